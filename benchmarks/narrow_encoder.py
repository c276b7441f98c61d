"""Narrow transformers with their layers fused (``blocks="fused"``) against op by op and torch.compile, on one card.

    python -m benchmarks.narrow_encoder --out encoder.jsonl [--models vit,minilm] [--batch 64]

The ViT and MiniLM of ``gpu_compress`` with random weights: speed only. "hand": the same module by ``torch.compile`` in
16 bits, its call recorded as a CUDA graph; "ops" and "fused": this project's uncompressed builds, recorded. All of one
line were measured in turn in one run, by device events, inputs on the device. "int8" and "fp8": fused, in float16, the linears
in 8 bits that such builds offer them for (MiniLM's feed-forward layers; ranges of the batch itself); "int8 ops": the same, op by
op. ``nodes_us`` are microseconds of fused builds by the graph's nodes; ``error`` is the largest difference to float32 over the
largest output.
"""

import argparse
import copy
import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from benchmarks.gpu_builds import in_eight_bits
from benchmarks.gpu_compress import LENGTH, WORDS, MiniLM, Vit
from benchmarks.narrow_block import Recorded
from tersor.backends.inductor import InductorBackend
from tersor.backends.inductor.host import facts
from tersor.build.build import shapes_of
from tersor.capture.module import capture
from tersor.capture.samples import Samples, flatten_item
from tersor.core.records import BuildChoice
from tersor.graph.contracts import Graph
from tersor.graph.operators import weighted_ops
from tersor.timing.device import call_of
from tersor.timing.protocol import Protocol, measure, noise, ratio

PROTOCOL = Protocol(rounds=9, runs=15, max_seconds=15.0)
HALVES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
LEVELS: tuple[Literal["int8", "fp8"], ...] = ("int8", "fp8")
SHOWN = 16  # nodes of a row


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
    nodes: dict[str, Mapping[str, float]] = {}
    for label, (version, half, blocks) in {**plain(graph), **coded(graph, batch)}.items():
        start = time.perf_counter()
        build = InductorBackend("cuda").build(
            version, shapes_of(graph.signature, batch), choice_of(half, blocks, batch)
        )
        seconds[label] = round(time.perf_counter() - start, 1)
        found = torch.as_tensor(next(iter(build.run(arrays).values())))
        errors[label] = float((found - wanted).abs().max() / wanted.abs().max())
        calls[label] = call_of(build, arrays)
        if blocks == "fused" and half == "float16":
            nodes[label] = build.profile()
    for half, dtype in HALVES.items():
        calls[f"hand {half}"] = by_hand(model, inputs, dtype)
    times = measure(calls, PROTOCOL)
    best = {
        way: min((n for n in times if n.startswith(way)), key=lambda n: times[n].median_ms)
        for way in ("hand", "ops", "fused")
    }
    gains = {way: ratio(times[best[way]], times[best["fused"]]) for way in ("hand", "ops")}
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
        "nodes_us": {label: dict(slowest(found)) for label, found in nodes.items()},
        "card": facts("cuda"),
    }


def choice_of(half: str, blocks: str, batch: int) -> BuildChoice:
    """Compiled and recorded."""
    options = {"mode": "compile", "graph": True, "half": half, "blocks": blocks}
    return BuildChoice(
        backend="inductor", device="cuda", precision="bf16", batch=batch, options=options
    )


def plain(graph: Graph) -> dict[str, tuple[Graph, str, str]]:
    """Graph, type and blocks of the uncompressed builds."""
    return {f"{b} {half}": (graph, half, b) for half in HALVES for b in ("ops", "fused")}


def coded(graph: Graph, batch: int) -> dict[str, tuple[Graph, str, str]]:
    """Those with 8-bit layers; none where fused builds offer none."""
    left = InductorBackend("cuda").joined(graph, choice_of("float16", "fused", batch))
    linears = {op.node.name for op in weighted_ops(graph.module) if op.kind == "linear"}
    found: dict[str, tuple[Graph, str, str]] = {}
    for level in LEVELS if linears - left else ():
        eight = in_eight_bits(graph, level, left)
        found |= {level: (eight, "float16", "fused"), f"{level} ops": (eight, "float16", "ops")}
    return found


def slowest(nodes: Mapping[str, float]) -> Iterator[tuple[str, float]]:
    """Nodes and their microseconds, the slowest first."""
    for name, ms in sorted(nodes.items(), key=lambda item: -item[1])[:SHOWN]:
        yield name, round(1e3 * ms, 1)


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
