"""How fast int8 is, whatever it costs: ``python -m benchmarks.cpu_speed [--case ...] [--threads N]``.

Builds of one model in one interleaved run, on OpenVINO: uncompressed in the device's best precision,
all layers in int8, additions as well, and NNCF's two presets from the same float model. Weights are
random where a case has no trained ones: latency does not depend on them.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace

from benchmarks import record
from benchmarks.prices import CASES, SEED, format_levels, opened, simple
from tersor.api.shrink import sketched
from tersor.backends.openvino import executable_from_model, to_openvino_model
from tersor.build.build import shapes_of
from tersor.cli.demo.peers import PRESETS, nncf_models
from tersor.core.records import ADD_PREFIX, BuildChoice, Level, Timing
from tersor.timing.protocol import Protocol, Ratio, measure, ratio

NAME = "cpu_speed"
PROTOCOL = Protocol(rounds=11, runs=21, max_seconds=60.0)
SAMPLES = 8  # that NNCF calibrates on: ranges decide no latency
TRANSFORMERS = ("vit_s", "minilm")


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
    model = to_openvino_model(session.graph, shapes, base)
    flat = session.flat("calibration", SAMPLES)
    arrays = [
        {spec.name: t[i : i + 1].numpy() for spec, t in zip(signature.inputs, flat, strict=True)}
        for i in range(len(flat[0]))
    ]
    peers = nncf_models(model, arrays, PRESETS, transformer=name in TRANSFORMERS)
    for preset, peer in peers.items():
        calls[f"NNCF {preset}"] = session.caller(executable_from_model(peer, base), 1)
    timings = measure(calls, PROTOCOL)
    fastest = min((timings[f"NNCF {p}"] for p in peers), key=lambda t: t.median_ms)
    return [
        Row(
            model=name,
            build=build,
            choice=choices[build].describe(),
            latency=timing,
            versus_peer=ratio(fastest, timing) if build.startswith("layers") else None,
        )
        for build, timing in timings.items()
    ]


def main() -> None:
    """Read the options and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", nargs="*", choices=sorted(CASES), default=list(CASES))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dry", action="store_true", help="write no results")
    options = parser.parse_args()
    for name in options.case:
        rows = run(name, options.threads)
        for row in rows:
            timing, versus = row.latency, row.versus_peer
            against = f", {versus.value:.2f}x NNCF" if versus else ""
            print(
                f"{name} {row.build} ({row.choice}): {timing.median_ms:.3f} ms "
                f"[{timing.low_ms:.3f}, {timing.high_ms:.3f}]{against}",
                flush=True,
            )
        if not options.dry:
            record.append(NAME, rows, seed=SEED, settings=vars(options))


if __name__ == "__main__":
    main()
