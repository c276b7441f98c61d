"""One case against its peers: as given, the best uncompressed build, NNCF twice, ours.

The peers come from the same float model, the same calibration samples, threads and shapes. They are
made first, because what they keep of the original is the least that ours must keep. At the end all
builds are measured in one interleaved run and judged on the test part by running them.
"""

from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from tersor.backends.openvino import (
    OpenVINOBackend,
    executable_from_model,
    to_openvino_model,
)
from tersor.build.build import shapes_of
from tersor.capture.module import capture
from tersor.capture.samples import Samples, collect
from tersor.cli.demo.models import Case, Inputs, Predict, minilm
from tersor.cli.demo.peers import MOST_SAMPLES, PRESETS, nncf_models
from tersor.cli.demo.table import Kind, Row, comparison_table
from tersor.cli.progress import make_progress
from tersor.core.data import Split
from tersor.core.errors import BackendError
from tersor.core.machine import usable_cores
from tersor.core.progress import Progress
from tersor.core.records import BuildChoice, Timing
from tersor.core.target import Target
from tersor.graph.contracts import Executable, Graph
from tersor.graph.geometry import sample_agreement
from tersor.runtime.runner import Runner
from tersor.timing.protocol import Protocol, measure, ratio

QUICK_SENTENCES: Mapping[Split, int] = {"calibration": 64, "search": 32, "test": 100}
CAREFUL = Protocol(rounds=9, runs=15, max_seconds=60.0)
QUICK = Protocol(rounds=5, runs=9, max_seconds=15.0)
EAGER_BATCH = 32  # samples at a time where the original is run for its outputs
FEWEST = 0.05  # quantile of the per-sample agreement that is reported


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How to compare."""

    seed: int = 0
    cache_dir: str | Path | None = None
    protocol: Protocol = CAREFUL


@dataclass(frozen=True, slots=True, kw_only=True)
class FloatModel:
    """The captured model and its ``openvino.Model``, which the peers start from."""

    graph: Graph
    model: Any
    calibration: Samples
    choice: BuildChoice  # before the best uncompressed build is known

    def predictor(self, executable: Executable) -> Runner:
        """A build as a callable with the model's calling convention."""
        return Runner(executable, self.graph.signature, self.choice.batch)

    def arrays(self, samples: Samples) -> list[dict[str, Any]]:
        """Inputs by name, one item a call; an incomplete last batch is left out."""
        specs, batch = self.graph.signature.inputs, self.choice.batch
        return [
            {s.name: t.contiguous().numpy() for s, t in zip(specs, flat, strict=True)}
            for flat in samples.batches(batch)
            if len(flat[0]) == batch
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """One build that is measured."""

    name: str
    kind: Kind
    build: str
    call: Callable[[], object]
    predict: Predict
    size_bytes: int
    missed: bool = False
    note: str = ""


def run_demo(
    *, seed: int, cache_dir: str | Path | None, quick: bool, console: Console
) -> tuple[Row, ...]:
    """Compress MiniLM-L6 for this processor, compare it with NNCF and print the table."""
    case = minilm(QUICK_SENTENCES if quick else None, seed)
    settings = Settings(seed=seed, cache_dir=cache_dir, protocol=QUICK if quick else CAREFUL)
    with closing(make_progress(console)) as progress:
        rows = compare(case, settings, progress)
    console.print(comparison_table(case.description, rows))
    return rows


def compare(case: Case, settings: Settings, progress: Progress) -> tuple[Row, ...]:
    """All builds of one case, in the order of the table.

    Raises:
        BackendError: OpenVINO is not available.
        MissingDependencyError: NNCF is not installed.
    """
    progress.stage("float model of the peers")
    source = float_model(case, settings.seed)
    peers = make_peers(case, source, progress)
    first = target_for(case, source, peers, progress)
    targets = {"ours": first, **{f"ours, {t.describe()}": t for t in case.further}}
    results = {name: compress(case, t, settings, progress) for name, t in targets.items()}
    subjects = make_subjects(case, source, peers, results)
    progress.stage("measure all builds side by side")
    timings = measure({s.name: s.call for s in subjects}, settings.protocol)
    return judge(case, subjects, timings, progress)


def float_model(case: Case, seed: int) -> FloatModel:
    """Capture the case and convert it, at its batch.

    Raises:
        BackendError: OpenVINO is not available.
    """
    info = OpenVINOBackend().describe()
    if not info.available:
        raise BackendError(f"openvino: {info.reason}; {info.remedy}")
    calibration = collect(case.data(), seed)["calibration"]
    graph = capture(case.model, calibration).graph
    choice = BuildChoice(
        backend=info.name,
        precision="bf16" if "bf16" in info.precisions else "f32",
        threads=usable_cores(),
        batch=case.batch,
    )
    model = to_openvino_model(graph, shapes_of(graph.signature, case.batch), choice)
    return FloatModel(graph=graph, model=model, calibration=calibration, choice=choice)


def make_peers(case: Case, source: FloatModel, progress: Progress) -> dict[str, Any]:
    """Name of the peer -> ``openvino.Model``."""
    arrays = source.arrays(source.calibration)[:MOST_SAMPLES]
    progress.stage("NNCF int8", len(PRESETS))
    models = {}
    for preset in PRESETS:
        made = nncf_models(source.model, arrays, (preset,), transformer=case.transformer)
        models[f"NNCF int8 {preset}"] = made[preset]
        progress.advance()
    return models


def target_for(
    case: Case, source: FloatModel, peers: Mapping[str, Any], progress: Progress
) -> Target:
    """The case's own budget, or to agree on the search part at least as well as every peer."""
    if case.drop_points is not None:
        return Target(drop_points=case.drop_points)
    progress.stage("peers on the search part", len(peers))
    wanted = run(eager(case.model), case.search)
    best = case.min_agreement
    for name, model in peers.items():
        predict = source.predictor(executable_from_model(model, source.choice))
        found = agreement(case, run(predict, case.search), wanted)
        progress.note(f"{name}: agreement {float(found.mean()):.5f} on the search part")
        best = max(best, float(found.mean()))
        progress.advance()
    return Target(min_agreement=best)


def compress(case: Case, target: Target, settings: Settings, progress: Progress) -> Any:
    """Our result for a case."""
    from tersor import api

    progress.note(f"target: {target.describe()}")
    return api.compress(
        case.model,
        case.data(),
        target=target,
        metric=case.metric,
        test_metric=case.test_metric,
        backend="openvino",  # where the peers run
        batch=case.batch,
        cache_dir=settings.cache_dir,
        seed=settings.seed,
        progress=progress,
    )


def make_subjects(
    case: Case, source: FloatModel, peers: Mapping[str, Any], results: Mapping[str, Any]
) -> list[Subject]:
    """Every build, with the threads and precision of the best uncompressed one."""
    first = next(iter(results.values()))
    choice = first.record.prices.baseline.choice
    inputs = {name: _first(t, case.batch) for name, t in _named(source, case.search).items()}
    arrays = {name: tensor.numpy() for name, tensor in inputs.items()}

    def built(name: str, kind: Kind, model: Any) -> Subject:
        executable = executable_from_model(model, choice)
        sections = executable.serialize()
        return Subject(
            name=name,
            kind=kind,
            build=replace(choice, options={}).describe(),  # the options are about our int8
            call=lambda: executable.run(arrays),
            predict=source.predictor(executable),
            size_bytes=len(sections["model.xml"]) + len(sections["model.bin"]),
        )

    return [
        _as_given(case, first.verdict.original_bytes),
        built("best uncompressed", "uncompressed", source.model),
        *(built(name, "peer", model) for name, model in peers.items()),
        *(_ours(name, result, arrays) for name, result in results.items()),
    ]


def _ours(name: str, result: Any, arrays: dict[str, Any]) -> Subject:
    verdict = result.verdict  # first: it may give the baseline back in place of the plan
    model: Runner = result.model
    note = verdict.reason or f"verdict: {verdict.status}"
    cut = [s for s in result.record.sites if s.kind == "width"]
    narrower = sum(result.plan.assignment.get(s.name, s.units) != s.units for s in cut)
    return Subject(
        name=name,
        kind="ours",
        build=result.plan.choice.describe(),
        call=lambda: model.executable.run(arrays),
        predict=model,
        size_bytes=verdict.size_bytes,
        missed=verdict.returned_baseline,
        note=f"{note}, {narrower} of {len(cut)} widths cut" if cut else note,
    )


def judge(
    case: Case, subjects: list[Subject], timings: Mapping[str, Timing], progress: Progress
) -> tuple[Row, ...]:
    """Run every build on the test part and put its figures beside its latency."""
    progress.stage("judge on the test part", len(subjects))
    base = next(timings[s.name] for s in subjects if s.kind == "uncompressed")
    peers = [timings[s.name] for s in subjects if s.kind == "peer"]
    fastest = min(peers, key=lambda timing: timing.median_ms, default=None)
    wanted: Tensor | None = None
    rows = []
    for subject in subjects:
        found = run(subject.predict, case.test)
        wanted = found if wanted is None else wanted  # the model as given is the first
        each = agreement(case, found, wanted)
        latency = timings[subject.name]
        versus = ratio(fastest, latency) if fastest and subject.kind == "ours" else None
        rows.append(
            Row(
                case=case.name,
                name=subject.name,
                kind=subject.kind,
                build=subject.build,
                batch=case.batch,
                latency=latency,
                speedup=ratio(base, latency),
                versus_peer=versus,
                size_bytes=subject.size_bytes,
                output=case.output,
                test_samples=case.n_samples("test"),
                agreement=float(each.mean()),
                agreement_p5=None if case.output == "logits" else float(each.quantile(FEWEST)),
                score=case.test_metric(subject.predict) if case.test_metric else None,
                missed=subject.missed,
                note=subject.note,
            )
        )
        progress.advance()
    return tuple(rows)


def agreement(case: Case, found: Tensor, wanted: Tensor) -> Tensor:
    """Agreement of each sample in the geometry of the case's output."""
    return sample_agreement([found], [wanted], case.output)


def run(predict: Predict, inputs: Inputs) -> Tensor:
    """Outputs for all samples of a part."""
    return predict(**inputs) if isinstance(inputs, dict) else predict(*inputs)


def eager(model: nn.Module) -> Predict:
    """The model as given, a few samples at a time and without gradients."""

    def predict(*args: Tensor, **kwargs: Tensor) -> Tensor:
        count = len((*args, *kwargs.values())[0])
        outputs = []
        with torch.no_grad():
            for start in range(0, count, EAGER_BATCH):
                rows = slice(start, start + EAGER_BATCH)
                some = {name: tensor[rows] for name, tensor in kwargs.items()}
                outputs.append(model(*(tensor[rows] for tensor in args), **some))
        return torch.cat(outputs)

    return predict


def _as_given(case: Case, size_bytes: int) -> Subject:
    inputs = case.search
    few: Inputs = (
        {name: _first(tensor, case.batch) for name, tensor in inputs.items()}
        if isinstance(inputs, dict)
        else tuple(_first(tensor, case.batch) for tensor in inputs)
    )
    predict = eager(case.model)
    return Subject(
        name="as given",
        kind="eager",
        build=f"PyTorch eager, {torch.get_num_threads()} thread(s)",
        call=lambda: run(predict, few),
        predict=predict,
        size_bytes=size_bytes,
    )


def _named(source: FloatModel, inputs: Inputs) -> dict[str, Tensor]:
    """Inputs by the graph's own names."""
    if isinstance(inputs, dict):
        return dict(inputs)
    specs = source.graph.signature.inputs
    return {spec.name: tensor for spec, tensor in zip(specs, inputs, strict=True)}


def _first(tensor: Tensor, count: int) -> Tensor:
    return tensor[:count].contiguous()
