"""Narrow transformers with their layers fused (``blocks="fused"``) against op by op and torch.compile, on one card.

    python -m benchmarks.narrow_encoder --out encoder.jsonl [--models vit,minilm] [--batch 64]

The ViT and MiniLM of ``gpu_compress`` with random weights: speed only. "hand": the same module by ``torch.compile`` in
16 bits, its call recorded as a CUDA graph; "ops" and "fused": this project's uncompressed builds, recorded. All of one
line were measured in turn in one run, by device events, inputs on the device. ``nodes_us`` are microseconds of the
fused build by the graph's nodes; ``error`` is the largest difference to float32 over the largest output.
"""

import argparse
import copy
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu_compress import LENGTH, WORDS, MiniLM, Vit
from benchmarks.narrow_block import Recorded
from tersor.backends.inductor import InductorBackend
from tersor.backends.inductor.host import facts
from tersor.build.build import shapes_of
from tersor.capture.module import capture
from tersor.capture.samples import Samples, flatten_item
from tersor.core.records import BuildChoice
from tersor.timing.device import call_of
from tersor.timing.protocol import Protocol, measure, noise, ratio

PROTOCOL = Protocol(rounds=9, runs=15, max_seconds=15.0)
HALVES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
SHOWN = 12  # nodes of a row


def inputs_of(name: str, batch: int) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model and its inputs; sentences of 8 to 128 words."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    if name == "vit":
        return Vit().eval(), {"x": torch.randn(batch, 1, 28, 28, generator=generator)}
    lengths = torch.randint(8, LENGTH + 1, (batch, 1), generator=generator)
    words = torch.randint(0, WORDS, (batch, LENGTH), generator=generator)
    mask = (torch.arange(LENGTH)[None] < lengths).long()
    return MiniLM().eval(), {"input_ids": words, "attention_mask": mask}


def row(name: str, batch: int) -> dict[str, Any]:
    """All contenders of one model."""
    model, inputs = inputs_of(name, batch)
    item: Any = inputs["x"] if len(inputs) == 1 else inputs
    call, flat = flatten_item(item, "the inputs")
    graph = capture(model, Samples(call, flat)).graph
    names = [spec.name for spec in graph.signature.inputs]
    arrays = {n: t.numpy() for n, t in zip(names, flat, strict=True)}
    with torch.no_grad():
        wanted = model(*inputs.values())
    calls: dict[str, Callable[[], object]] = {}
    seconds, errors = {}, {}
    nodes: Mapping[str, float] = {}
    for half, dtype in HALVES.items():
        for blocks in ("ops", "fused"):
            start = time.perf_counter()
            options = {"mode": "compile", "graph": True, "half": half, "blocks": blocks}
            choice = BuildChoice(
                backend="inductor", device="cuda", precision="bf16", batch=batch, options=options
            )
            build = InductorBackend("cuda").build(graph, shapes_of(graph.signature, batch), choice)
            label = f"{blocks} {half}"
            seconds[label] = round(time.perf_counter() - start, 1)
            found = torch.as_tensor(next(iter(build.run(arrays).values())))
            errors[label] = float((found - wanted).abs().max() / wanted.abs().max())
            calls[label] = call_of(build, arrays)
            if blocks == "fused" and half == "float16":
                nodes = build.profile()
        calls[f"hand {half}"] = by_hand(model, inputs, dtype)
    times = measure(calls, PROTOCOL)
    best = {
        way: min((n for n in times if n.startswith(way)), key=lambda n: times[n].median_ms)
        for way in ("hand", "ops", "fused")
    }
    gains = {way: ratio(times[best[way]], times[best["fused"]]) for way in ("hand", "ops")}
    ordered = sorted(nodes.items(), key=lambda item: -item[1])[:SHOWN]
    return {
        "model": name,
        "batch": batch,
        "ms": {n: [round(t.median_ms, 4), round(noise(t), 4)] for n, t in times.items()},
        "best": best,
        "fused_over": {
            w: [round(v, 3) for v in (g.value, g.low, g.high)] for w, g in gains.items()
        },
        "error": errors,
        "build_s": seconds,
        "nodes_us": {n: round(1e3 * ms, 1) for n, ms in ordered},
        "card": facts("cuda"),
    }


def by_hand(model: nn.Module, inputs: Mapping[str, Tensor], dtype: torch.dtype) -> Any:
    """torch.compile, recorded; inputs lie on the card."""
    own = copy.deepcopy(model).to("cuda", dtype)
    on_card = [t.to("cuda", dtype) if t.is_floating_point() else t.cuda() for t in inputs.values()]
    compiled = torch.compile(own)
    with torch.no_grad():
        return Recorded(lambda: compiled(*on_card), 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", default="vit,minilm")
    parser.add_argument("--batch", type=int, default=64)
    chosen = parser.parse_args()
    for name in chosen.models.split(","):
        found = row(name, chosen.batch)
        with chosen.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(found) + "\n")
        print(found["model"], found["ms"], found["fused_over"], flush=True)


if __name__ == "__main__":
    main()
