"""Real models at three targets against the peers: ``python -m benchmarks.cpu_table [--case ...]``.

For each model: eager, the best uncompressed build, NNCF's two presets, ONNX Runtime's int8,
Torch-Pruning in front of NNCF (the most that keeps each target on the search part), and ours at
three targets, all in one interleaved measurement with the same threads and samples, judged on a
test part that no build has seen. The first target is what the best NNCF preset keeps.

Each row says what its time is made of (the build's own counters by kind of work), so that the
distance to a goal has names.
"""

import argparse
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from rich.console import Console
from torch import nn

from benchmarks import record
from benchmarks.cpu_peers import onnx_models, runner_of, thinner_models
from benchmarks.cpu_peers import rows as rows_of
from benchmarks.first_light import PIPE_WIDTH, make_case
from tersor.backends.openvino import executable_from_model, to_openvino_model
from tersor.build.build import shapes_of
from tersor.capture.module import capture
from tersor.cli.demo.compare import (
    CAREFUL,
    QUICK,
    Settings,
    Subject,
    agreement,
    compress,
    eager,
    float_model,
    judge,
    make_peers,
    make_subjects,
    run,
    target_for,
)
from tersor.cli.demo.models import CASES, Case
from tersor.cli.demo.peers import MOST_SAMPLES, PRESETS, nncf_models
from tersor.cli.demo.table import Row, comparison_table
from tersor.cli.progress import make_progress
from tersor.core.progress import Progress
from tersor.core.records import OUTSIDE
from tersor.core.target import Target
from tersor.graph.contracts import Graph
from tersor.timing.protocol import Ratio, measure, ratio

NAME = "cpu_table"
FURTHER: Mapping[str, tuple[Target, ...]] = {
    "minilm": (Target(min_agreement=0.99), Target(min_agreement=0.97)),
    "efficientnet": (Target(min_agreement=0.95), Target(min_agreement=0.9)),
    "resnet20": (Target(drop_points=0.5), Target(drop_points=1.0)),
}
TOP_NODES = 12
KINDS = (  # of work, by a part of the ATen name; the first that fits
    ("linear and convolution", ("linear", "conv")),
    ("attention products", ("scaled_dot", "matmul", "bmm")),
    ("norms", ("norm",)),
    (
        "softmax and activations",
        ("softmax", "gelu", "relu", "sigmoid", "silu", "hardtanh", "clamp"),
    ),
    ("additions", ("add",)),
    ("embedding", ("embedding",)),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TableRow:
    """One build, and how it stands.

    Attributes:
        versus: Of ours: name of the peer -> its latency over ours.
        work_ms: Kind of work -> milliseconds a call, by the build's own counters.
        costliest_ms: The costliest single nodes.
        compress_seconds, resolve_seconds: Of ours: to make it, and to answer another target.
    """

    row: Row
    versus: Mapping[str, Ratio]
    work_ms: Mapping[str, float]
    costliest_ms: Mapping[str, float]
    compress_seconds: float | None = None
    resolve_seconds: float | None = None


def work_by_kind(profile: Mapping[str, float], graph: Graph) -> dict[str, float]:
    """Milliseconds by kind of work."""
    targets = {n.name: str(n.target) for n in graph.module.graph.nodes}
    found: dict[str, float] = {}
    for name, ms in profile.items():
        kind = "outside of all nodes" if name == OUTSIDE else f"glue: {name}"
        if name in targets:
            fits = (k for k, parts in KINDS if any(p in targets[name] for p in parts))
            kind = next(fits, "other")
        found[kind] = found.get(kind, 0.0) + ms
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def costliest(profile: Mapping[str, float]) -> dict[str, float]:
    """The costliest nodes."""
    return dict(sorted(profile.items(), key=lambda item: -item[1])[:TOP_NODES])


def allowed_loss(target: Target) -> float:
    """What a target allows to lose on the search part."""
    if target.drop_points is not None:
        return target.drop_points / 100
    return 1 - (target.min_agreement or 0.0)


class Table:
    """One case: peers, results and their measurement."""

    def __init__(self, case: Case, settings: Settings, progress: Progress) -> None:
        self.case, self.settings, self.progress = case, settings, progress
        progress.stage("float model of the peers")
        self.source = float_model(case, settings.seed)
        self.seconds: dict[str, tuple[float, float | None]] = {}
        self.profiles: dict[str, Mapping[str, float]] = {}

    def rows(self) -> list[TableRow]:
        """All builds of the case."""
        case, source, progress = self.case, self.source, self.progress
        peers = make_peers(case, source, progress)
        targets = [target_for(case, source, peers, progress), *FURTHER[case.name]]
        peers |= self._pruned(targets)
        results = {f"ours, {t.describe()}": self._compressed(t) for t in targets}
        subjects = make_subjects(case, source, peers, results)
        subjects[2 + len(peers) : 2 + len(peers)] = self._onnx(results)
        for subject in subjects:
            self._profile(subject, results, peers)
        progress.stage("measure all builds side by side")
        timings = measure({s.name: s.call for s in subjects}, self.settings.protocol)
        named = {s.name: s for s in subjects if s.kind == "peer"}
        rows = judge(case, subjects, timings, progress)
        return [
            TableRow(
                row=row,
                versus={n: ratio(timings[n], timings[row.name]) for n in named}
                if row.kind == "ours"
                else {},
                work_ms=work_by_kind(self.profiles.get(row.name, {}), source.graph),
                costliest_ms=costliest(self.profiles.get(row.name, {})),
                compress_seconds=self.seconds.get(row.name, (None, None))[0],
                resolve_seconds=self.seconds.get(row.name, (None, None))[1],
            )
            for row in rows
        ]

    def _compressed(self, target: Target) -> Any:
        case, name = self.case, f"ours, {target.describe()}"
        begun = time.perf_counter()
        result = compress(case, target, self.settings, self.progress)
        compressed = time.perf_counter()
        other = replace(target, speedup=1.5)
        result.resolve(other)
        self.seconds[name] = compressed - begun, time.perf_counter() - compressed
        return result

    def _pruned(self, targets: Sequence[Target]) -> dict[str, Any]:
        """Torch-Pruning in front of NNCF's faster preset; the most that keeps each target."""
        self.progress.stage("Torch-Pruning", len(targets))
        case = self.case
        wanted = run(eager(case.model), case.search)
        base = case.metric(eager(case.model)) if case.metric else 0.0
        ways = [
            thinner_models(
                case.model, case.calibration, transformer=case.transformer, together=together
            )
            for together in (True, False)
        ]
        models: dict[float, nn.Module] = {}
        losses: dict[float, float] = {}
        for share in ways[0]:
            by_way = [(self._loss(way[share], wanted, base), way[share]) for way in ways]
            losses[share], models[share] = min(by_way, key=lambda row: row[0])
        shares: list[float] = []
        for target in targets:
            good = [share for share, loss in losses.items() if loss <= allowed_loss(target)]
            shares += [min(good)] if good else []
            if not good:
                mildest = max(losses)
                self.progress.note(
                    f"Torch-Pruning: {mildest:.0%} of the MACs lose {losses[mildest]:.4f} already, "
                    f"more than {target.describe()} allows"
                )
            self.progress.advance()
        # It stays in the table, at its mildest, where it meets no target.
        return {
            f"Torch-Pruning {share:.0%} of MACs, NNCF int8": self._quantized(models[share])
            for share in dict.fromkeys(shares or [max(losses)])
        }

    def _loss(self, model: nn.Module, wanted: torch.Tensor, base: float) -> float:
        if self.case.metric is not None:
            return base - self.case.metric(eager(model))
        return 1 - float(agreement(self.case, run(eager(model), self.case.search), wanted).mean())

    def _quantized(self, model: nn.Module) -> Any:
        """By NNCF's faster preset, as the unpruned one is."""
        graph = capture(model, self.source.calibration).graph
        choice = self.source.choice
        thin = to_openvino_model(graph, shapes_of(graph.signature, self.case.batch), choice)
        arrays = self.source.arrays(self.source.calibration)[:MOST_SAMPLES]
        preset = PRESETS[-1]
        made = nncf_models(thin, arrays, (preset,), transformer=self.case.transformer)
        return made[preset]

    def _onnx(self, results: Mapping[str, Any]) -> list[Subject]:
        case, source = self.case, self.source
        self.progress.stage("ONNX Runtime int8")
        first = next(iter(results.values()))
        threads = first.record.prices.baseline.choice.threads
        samples = source.arrays(source.calibration)[:MOST_SAMPLES]
        few = source.arrays(source.calibration)[0]
        subjects = []
        made = onnx_models(
            case.model,
            rows_of(case.search, 0, case.batch),
            source.graph.signature,
            samples,
            threads,
            transformer=case.transformer,
        )
        for kind, session in made.items():
            subjects.append(
                Subject(
                    name=f"ONNX Runtime {kind}",
                    kind="peer",
                    build=f"onnxruntime, {threads} thread(s)",
                    call=partial(session.run, few),
                    predict=runner_of(session, source),
                    size_bytes=session.size_bytes,
                )
            )
        return subjects

    def _profile(
        self, subject: Subject, results: Mapping[str, Any], peers: Mapping[str, Any]
    ) -> None:
        """What its time is made of, where the build counts."""
        if subject.name in results:
            executable = results[subject.name].model.executable
        elif subject.name in peers or subject.kind == "uncompressed":
            choice = next(iter(results.values())).record.prices.baseline.choice
            model = peers.get(subject.name, self.source.model)
            executable = executable_from_model(model, choice)
        else:
            return
        subject.call()
        self.profiles[subject.name] = executable.profile()


def show(found: Sequence[TableRow], console: Console) -> None:
    """Beside the table: ours against each peer, and what the time is made of."""
    for each in found:
        if each.versus:
            against = ", ".join(f"{v.value:.2f}x {name}" for name, v in each.versus.items())
            console.print(f"{each.row.name}: {against}")
            console.print(
                f"  compress {each.compress_seconds:.0f} s, another target "
                f"{each.resolve_seconds:.1f} s"
            )
        if each.work_ms:
            parts = ", ".join(f"{kind} {ms:.3f}" for kind, ms in list(each.work_ms.items())[:8])
            console.print(f"  {each.row.name}, ms: {parts}")


def main() -> None:
    """Read the options and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", nargs="*", choices=sorted(CASES), default=list(CASES))
    parser.add_argument("--quick", action="store_true", help="fewer sentences and rounds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache-dir", help="where finished stages are kept; default: nowhere")
    parser.add_argument("--dry", action="store_true", help="write no results")
    options = parser.parse_args()
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console = Console(highlight=False, markup=False, width=PIPE_WIDTH)
    for name in options.case:
        case = replace(make_case(name, quick=options.quick, seed=options.seed), further=())
        with (
            tempfile.TemporaryDirectory() as fresh,
            closing(make_progress(console)) as progress,
        ):
            settings = Settings(
                seed=options.seed,
                cache_dir=options.cache_dir or fresh,
                protocol=QUICK if options.quick else CAREFUL,
            )
            found = Table(case, settings, progress).rows()
        console.print(comparison_table(case.description, [each.row for each in found]))
        show(found, console)
        if not options.dry:
            about = {
                "quick": options.quick,
                "protocol": settings.protocol,
                "warm": options.cache_dir is not None,  # then seconds are of what was left to do
            }
            record.append(NAME, found, seed=options.seed, settings=about)


if __name__ == "__main__":
    main()
