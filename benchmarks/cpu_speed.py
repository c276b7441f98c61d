"""How fast int8 is, whatever it costs: ``python -m benchmarks.cpu_speed [--case ...] [--threads N]``.

Builds of one model in one interleaved run: eager, then on OpenVINO uncompressed in the device's best
precision, all layers in int8, additions as well, NNCF's two presets from the same float model and
Torch-Pruning at half the MACs in front of the faster one; ONNX Runtime's int8. Weights are random
where a case has no trained ones: latency does not depend on them.

``--cold``: how long ``tersor.compress`` takes from an empty cache, and another target after it.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

import tersor
from benchmarks import record
from benchmarks.cpu_peers import onnx_models, rows, thinner_models
from benchmarks.prices import CASES, SEED, format_levels, opened, simple
from tersor.api.session import Session
from tersor.api.shrink import sketched
from tersor.backends.openvino import executable_from_model, to_openvino_model
from tersor.build.build import shapes_of
from tersor.capture.module import capture
from tersor.capture.samples import Samples, flatten_item
from tersor.cli.demo.models import Inputs
from tersor.cli.demo.peers import PRESETS, nncf_models
from tersor.core.records import ADD_PREFIX, BuildChoice, Level, Timing
from tersor.timing.protocol import Protocol, Ratio, measure, ratio

NAME = "cpu_speed"
PROTOCOL = Protocol(rounds=11, runs=21, max_seconds=60.0)
SAMPLES = 8  # that NNCF calibrates on: ranges decide no latency
TRANSFORMERS = ("vit_s", "minilm")
HALF = 0.5  # of the MACs
EAGER = "eager"
AGREEMENT = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One build.

    Attributes:
        versus_peer: Of our builds: against the faster preset of NNCF.
    """

    model: str
    build: str
    choice: str
    latency: Timing
    versus_peer: Ratio | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ColdRow:
    """From an empty cache to a verdict, and to another plan."""

    model: str
    compress_seconds: float
    resolve_seconds: float
    status: str
    predicted_ms: float
    describe: str


def run(name: str, threads: int) -> list[Row]:
    """All builds of one model."""
    session = opened(name, "openvino")
    info, signature = session.infos[0], session.graph.signature
    shapes = shapes_of(signature, 1)
    base = BuildChoice(
        backend=info.name, precision=info.precisions[-1], threads=threads, options={}
    )
    backend = session.backends[info.name]
    calls: dict[str, Callable[[], object]] = {}
    choices = dict.fromkeys(("uncompressed", *(f"NNCF {p}" for p in PRESETS)), base)
    calls["uncompressed"] = session.caller(backend.build(session.graph, shapes, base), 1)
    for options in info.choices:
        choice = replace(base, options=dict(options))
        levels = format_levels(session, choice)
        int8 = info.format("int8")
        made = simple(session, levels, int8.weight_limit if int8 else 0)
        layers: dict[str, Level] = {s: "int8" for s in levels if not s.startswith(ADD_PREFIX)}
        both: dict[str, Level] = dict.fromkeys(levels, "int8")
        ways = {"layers": layers, **({"layers and additions": both} if both != layers else {})}
        for what, assignment in ways.items():
            build = backend.build(sketched(session, made.changes(assignment)), shapes, choice)
            label = f"{what}, {' '.join(map(str, options.values()))}"
            calls[label], choices[label] = session.caller(build, 1), choice
    calls |= peers(session, name, base)
    timings = measure(calls, PROTOCOL)
    fastest = min((timings[f"NNCF {p}"] for p in PRESETS), key=lambda t: t.median_ms)
    return [
        Row(
            model=name,
            build=build,
            choice=choices[build].describe() if build in choices else "",
            latency=timing,
            versus_peer=ratio(fastest, timing) if build.startswith("layers") else None,
        )
        for build, timing in timings.items()
    ]


def peers(session: Session, name: str, base: BuildChoice) -> dict[str, Callable[[], object]]:
    """Name -> one call of each peer, at one sample."""
    signature, transformer = session.graph.signature, name in TRANSFORMERS
    shapes = shapes_of(signature, 1)
    model = to_openvino_model(session.graph, shapes, base)
    flat = session.flat("calibration", SAMPLES)
    arrays = [
        {spec.name: t[i : i + 1].numpy() for spec, t in zip(signature.inputs, flat, strict=True)}
        for i in range(len(flat[0]))
    ]
    calls: dict[str, Callable[[], object]] = {}
    made = nncf_models(model, arrays, PRESETS, transformer=transformer)
    for preset, peer in made.items():
        calls[f"NNCF {preset}"] = session.caller(executable_from_model(peer, base), 1)
    torch.manual_seed(SEED)
    module, given = CASES[name]()
    inputs: Inputs = given if isinstance(given, dict) else (given,)
    few = rows(inputs, 0, 1)
    threads = base.threads
    sessions = onnx_models(module.eval(), few, signature, arrays, threads, transformer=transformer)
    for kind, onnx_session in sessions.items():
        calls[f"ONNX Runtime {kind}"] = partial(onnx_session.run, arrays[0])
    thin = thinner_models(module, inputs, (HALF,), transformer=transformer)[HALF]
    call, tensors = flatten_item(rows(inputs, 0, 2), "example")
    graph = capture(thin, Samples(call, tensors)).graph
    thin_model = to_openvino_model(graph, shapes_of(graph.signature, 1), base)
    faster = PRESETS[-1]
    pruned = nncf_models(thin_model, arrays, (faster,), transformer=transformer)[faster]
    calls[f"Torch-Pruning {HALF:.0%} of MACs, NNCF {faster}"] = session.caller(
        executable_from_model(pruned, base), 1
    )
    calls[EAGER] = partial(_eager, module, few, threads)
    return calls


def _eager(module: nn.Module, few: Any, threads: int) -> object:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.no_grad():
            return module(**few) if isinstance(few, dict) else module(*few)
    finally:
        torch.set_num_threads(before)


def cold(name: str) -> ColdRow:
    """Compress from an empty cache at two threads, with everything left at its default."""
    torch.manual_seed(SEED)
    module, inputs = CASES[name]()
    data = tersor.Data(list(inputs.split(1)), output="values")
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as fresh:
        result = tersor.compress(
            module.eval(),
            data,
            target=tersor.Target(speedup=1.5, min_agreement=AGREEMENT),
            backend="openvino",
            cache_dir=fresh,
            seed=SEED,
        )
        status = result.verdict.status
        made = time.perf_counter()
        again = result.resolve(tersor.Target(min_agreement=1 - 2 * (1 - AGREEMENT)))
        done = time.perf_counter()
    return ColdRow(
        model=name,
        compress_seconds=made - begun,
        resolve_seconds=done - made,
        status=status,
        predicted_ms=again.plan.predicted_ms,
        describe=str(again.plan.choice.describe()),
    )


def main() -> None:
    """Read the options and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", nargs="*", choices=sorted(CASES), default=list(CASES))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cold", action="store_true", help="the time that compress takes")
    parser.add_argument("--dry", action="store_true", help="write no results")
    options = parser.parse_args()
    for name in options.case:
        if options.cold:
            found = cold(name)
            print(found, flush=True)
            if not options.dry:
                record.append(f"{NAME}_cold", [found], seed=SEED, settings=vars(options))
            continue
        table = run(name, options.threads)
        for row in table:
            timing, versus = row.latency, row.versus_peer
            against = f", {versus.value:.2f}x NNCF" if versus else ""
            print(
                f"{name} {row.build} ({row.choice}): {timing.median_ms:.3f} ms "
                f"[{timing.low_ms:.3f}, {timing.high_ms:.3f}]{against}",
                flush=True,
            )
        if not options.dry:
            record.append(NAME, table, seed=SEED, settings=vars(options))


if __name__ == "__main__":
    main()
