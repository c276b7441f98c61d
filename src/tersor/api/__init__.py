"""The public functions: they compose the stages, nothing else.

The only place beside ``train`` that turns names into methods and backends.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tersor.core import registry
from tersor.core.errors import ConfigError, MissingDependencyError
from tersor.core.jsonable import from_json
from tersor.core.records import BaselineRow, Check, Level, Plan
from tersor.core.target import Target, as_target

if TYPE_CHECKING:
    from tersor.analyse.doctor import Doctor
    from tersor.analyse.inspection import Inspection
    from tersor.analyse.roofline import Profile
    from tersor.api.comparing import Comparison
    from tersor.api.result import Result
    from tersor.core.ranks import Ranks
    from tersor.core.recovery import Recover
    from tersor.report.record import Report
    from tersor.runtime.guards import Guards
    from tersor.runtime.runner import Runner

__all__ = [
    "apply_plan",
    "bench",
    "compare",
    "compress",
    "doctor",
    "export",
    "inspect",
    "load",
    "profile",
    "read_report",
    "verify",
]


def compress(  # noqa: PLR0913 - the options of DESIGN.md, all by keyword
    model: Any,
    data: Any,
    *,
    target: Target | str | Mapping[str, Any],
    metric: Any = None,
    test_metric: Any = None,
    device: str = "cpu",
    backend: str = "auto",
    batch: int = 1,
    methods: str | Sequence[str] = "all",
    recover: "Recover | None" = None,
    keep: Sequence[str] = (),
    cache_dir: str | Path | None = None,
    seed: int = 0,
    progress: Any = True,
    ranks: "Ranks | None" = None,
) -> "Result":
    """Compress a model for this machine under a target.

    Args:
        model: An ``nn.Module``, an ``ExportedProgram`` or the path of a ``.pt2``; never changed.
        data: Iterable of inputs (a tensor, a tuple of positional or a dict of keyword arguments a
            batch), or ``tersor.Data``. Split 60/20/20 into calibration, search and test parts.
        target: ``tersor.Target``, or a text such as "2x, 0.5 pt".
        metric: Takes ``predict`` (called like the model), returns a number, higher is better.
            None: agreement with the original.
        test_metric: The same on data that nothing else saw; called once for the original and once
            for the result.
        device: Where the model will run: "cpu", or "cuda" (or "cuda:1") for the first (second) card.
        backend: "auto" or a backend's name.
        batch: Samples in one call, for which latency is measured.
        methods: "all" or names.
        recover: ``tersor.Recover(seconds=60)`` trains what is left towards the original's outputs,
            without labels, before and after formats are rounded. None: no gradient steps.
        keep: Patterns of layers to leave alone.
        cache_dir: Where finished stages are kept; None: ~/.cache/tersor.
        seed: Of every split, sample and draw.
        progress: True prints stages, False is silent, or a ``core.progress.Progress``.
        ranks: ``tersor.Ranks(timeout_s=...)``, for calls on every rank of a process group.

    Returns:
        A Result whose verdict was measured. A target that can't be met gives the best point found
        and the constraint that binds; a result that is slower than the best uncompressed build is
        not returned, that build is.

    Raises:
        TersorError: A subclass for each cause that the caller can act on.
    """
    _require_torch("compress")
    from tersor.api.proposing import propose
    from tersor.api.session import Settings, open_session
    from tersor.api.sharing import check_metric, found_result
    from tersor.observe.ranks import joined

    wanted = as_target(target)
    settings = Settings(
        device=device,
        backend=backend,
        batch=batch,
        methods=methods,
        recover=recover,
        keep=keep,
        cache_dir=cache_dir,
        seed=seed,
        progress=progress,
        metric=metric,
        test_metric=test_metric,
        for_size=wanted.size_mb is not None or wanted.size_ratio is not None,
    )
    with joined(ranks) as group:
        session = open_session(model, data, settings, group)
        group.agree({"target": wanted.describe(), "metric": str(metric is not None)}, "open")
        if metric is not None:
            check_metric(session)
        return found_result(session, propose(session), wanted)


def apply_plan(  # noqa: PLR0913 - the options of compress that a plan leaves open
    model: Any,
    data: Any,
    plan: Plan | str | Path,
    *,
    metric: Any = None,
    test_metric: Any = None,
    recover: "Recover | None" = None,
    cache_dir: str | Path | None = None,
    progress: Any = True,
    ranks: "Ranks | None" = None,
) -> "Result":
    """Carry out a plan, edited or not, on a model and data: transform, build and verify.

    Recovery is no part of a plan: ``recover`` is as for ``compress``, and so is ``ranks``.

    Raises:
        ConfigError: A plan that names a layer or a level that the model does not have.
    """
    _require_torch("apply_plan")
    from tersor.api.proposing import propose
    from tersor.api.session import Settings, open_session
    from tersor.api.sharing import given_result
    from tersor.core.formats import PACKED
    from tersor.core.jsonable import digest, read_record
    from tersor.observe.ranks import joined

    found = plan if isinstance(plan, Plan) else read_record(Plan, plan)
    settings = Settings(
        methods=_methods_of(found),
        device=found.choice.device,
        backend=found.choice.backend,
        batch=found.choice.batch,
        cache_dir=cache_dir,
        seed=found.seed,
        progress=progress,
        metric=metric,
        test_metric=test_metric,
        recover=recover,
        for_size=bool({"size_mb", "size_ratio"} & {*found.target})  # as when it was made
        or any(level in PACKED for level in found.assignment.values()),
        made_by=found.methods,
    )
    with joined(ranks) as group:
        session = open_session(model, data, settings, group)
        group.agree({"plan": digest(found)}, "open")
        offered = propose(session, found.assignment)
        _check_plan(found, offered.levels())
        return given_result(session, offered, found)


def _methods_of(plan: Plan) -> list[str]:
    """The methods that a plan can come from: formats always, others where it has their sites or levels."""
    from tersor.core.formats import PACKED
    from tersor.core.rank_levels import rank_of
    from tersor.core.records import ACTIVATION_PREFIX, WIDTH_PREFIX
    from tersor.graph.contracts import kinds_of
    from tersor.graph.residuals import BRANCH_PREFIX

    kinds = {WIDTH_PREFIX: "width", BRANCH_PREFIX: "branch", ACTIVATION_PREFIX: "activation"}
    wanted = {
        k for prefix, k in kinds.items() if any(s.startswith(prefix) for s in plan.assignment)
    }
    wanted.add("format")
    levels = plan.assignment.values()
    absent = {  # what a method says of itself -> whether the plan has nothing of the kind
        "for_size": not any(level in PACKED for level in levels),
        "gives_ranks": not any(rank_of(level) for level in levels),
    }
    classes = {n: registry.resolve(registry.METHODS, n) for n in registry.names(registry.METHODS)}
    named = {*plan.methods.values()} if _says_methods(plan) else {*classes}
    return [
        name
        for name, cls in classes.items()
        if wanted & {*kinds_of(cls)}
        and not any(getattr(cls, mark, False) and gone for mark, gone in absent.items())
        and (name in named or kinds_of(cls) != ("format",) or not getattr(cls, "by_name", False))
    ]


def _says_methods(plan: Plan) -> bool:
    """Whether it names the method of every layer that it changes: an edited one may not."""
    return all(
        isinstance(level, int) or level in ("f32", "bf16") or site in plan.methods
        for site, level in plan.assignment.items()
    )


def _check_plan(plan: Plan, levels: Mapping[str, Sequence[Level]]) -> None:
    for site, level in plan.assignment.items():
        if site not in levels:
            raise ConfigError(f"plan: layer {site!r} is not in the model, or is kept")
        if level not in levels[site]:
            raise ConfigError(
                f"plan: layer {site!r} has no level {level!r}, only {', '.join(map(str, levels[site]))}"
                + _asked(plan.methods.get(site))
            )


def _asked(method: str | None) -> str:
    """The way out where a plan names the method of a layer, which then alone is asked."""
    return (
        ""
        if method is None
        else f" by {method}; take the layer out of the plan's methods, to ask all"
    )


def load(path: str | Path, *, device: str = "cpu", guards: "Guards | None" = None) -> "Runner":
    """Load an artifact; the runner is called like the original model. Needs no torch.

    Raises:
        ArtifactError: The file is no artifact, is damaged or was edited.
        BackendError: No build in it runs here.
    """
    from tersor.runtime.load import load_runner

    return load_runner(path, device, guards, resolve_backend=lambda name: _backend(name, device))


def _backend(name: str, device: str = "cpu") -> Any:
    return registry.backend(name, device)


def inspect(
    model: Any, example: Any, *, keep: Sequence[str] = (), time: bool = False
) -> "Inspection":
    """Show what may be chosen in a model: sites, widths, what is pinned and why, as a tree.

    Args:
        model: An ``nn.Module``, an ``ExportedProgram`` or the path of a ``.pt2``; never changed.
        example: One batch of inputs.
        keep: Patterns of layers to leave alone.
        time: Profile a pass through the graph, too, for each branch's share of the time.

    Raises:
        TersorError: As ``compress`` for a model that can't be captured.
    """
    _require_torch("inspect")
    from tersor.analyse.inspection import Inspection
    from tersor.analyse.profiling import profile_nodes
    from tersor.analyse.sites import find_sites, unsupported
    from tersor.analyse.tree import grow, pinned_infos, sample_macs, width_infos
    from tersor.capture.detector import split_input
    from tersor.capture.module import capture
    from tersor.capture.programs import open_model
    from tersor.capture.samples import Samples, flatten_item
    from tersor.graph.axes import analyse_axes, mac_share

    opened, item = split_input(open_model(model), example)
    call, tensors = flatten_item(item, "example")
    graph = capture(opened, Samples(call, tensors)).graph
    sites = find_sites(graph, tuple(keep))
    axes = analyse_axes(graph)
    macs = sample_macs(graph)
    times_ms = profile_nodes(graph) if time else None
    return Inspection(
        signature=graph.signature,
        sites=sites,
        unsupported=unsupported(graph),
        macs=sum(s.macs for s in sites),
        size_bytes=graph.parameter_bytes(),
        nodes=len(graph.module.graph.nodes),
        widths=width_infos(graph, axes, macs, tuple(keep)),
        pinned=pinned_infos(axes),
        unknown=dict(axes.unknown),
        mac_share=mac_share(graph, axes),
        seconds=axes.seconds,
        tree=grow(graph, axes, sites, macs, times_ms),
        pass_ms=None if times_ms is None else sum(times_ms.values()),
    )


def doctor() -> "Doctor":
    """What works here, what is missing, and how to mend it."""
    from tersor.analyse.doctor import diagnose
    from tersor.core.machine import describe_machine

    infos = [_backend(name).describe() for name in registry.names(registry.BACKENDS)]
    return diagnose(infos, describe_machine())


def bench(
    model: Any,
    data: Any,
    *,
    device: str = "cpu",
    backend: str = "auto",
    batch: int = 1,
    cache_dir: str | Path | None = None,
) -> tuple[BaselineRow, ...]:
    """Time the model as given and every uncompressed build, interleaved; fastest build first."""
    _require_torch("bench")
    import tempfile

    from tersor.api.session import Settings, open_session
    from tersor.api.stages import baselines

    with tempfile.TemporaryDirectory() as folder:  # a bench measures now, whatever is kept
        settings = Settings(
            device=device,
            backend=backend,
            batch=batch,
            cache_dir=cache_dir or folder,
            progress=False,
            methods=(),  # nothing is changed here
        )
        rows, _ = baselines(open_session(model, data, settings))
    return rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Verified:
    """What ``verify`` found."""

    path: str
    checks: tuple[Check, ...]


def verify(
    path: str | Path, *, model: Any = None, inputs: Mapping[str, Any] | None = None
) -> Verified:
    """Check every hash of an artifact, then its build against its graph and the original.

    Args:
        path: The artifact.
        model: The original, to compare with as well.
        inputs: Arrays by input name; None: drawn within the calibrated ranges.

    Raises:
        ArtifactError: An entry is damaged or was edited.
    """
    from tersor.artifact.file import read_artifact, verify_artifact

    verify_artifact(path)
    checks = [Check(name="hashes", wanted=0.0, found=0.0, status="pass", note="every entry")]
    try:
        _require_torch("verify")
    except MissingDependencyError as error:
        note = f"the graph was not run: {error}"
        checks.append(Check(name="graph", wanted=0.0, found=0.0, status="unknown", note=note))
        return Verified(path=str(path), checks=tuple(checks))
    from tersor.api.verifying import compare_build

    checks += compare_build(read_artifact(path), load(path), model, inputs)
    return Verified(path=str(path), checks=tuple(checks))


def compare(
    one: Any, other: Any = None, *, inputs: Any = None, limit: float = 1e-2
) -> "Comparison":
    """Find the first value at which two models, or a file's builds and its graph, differ.

    Both graphs run in torch, and every value that has the same name and shape in both is compared:
    with the error that has come together up to it, and with that of its own op alone. Each build in
    a file is compared with its graph; where it differs, the first such value is found by bisection.

    Args:
        one: The path of an artifact, or a model as for ``compress``: what is right.
        other: What is compared with it; None: only the builds in ``one``.
        inputs: One batch of inputs, or arrays by input name; None: drawn within the ranges that an
            artifact was calibrated with.
        limit: Mean squared difference over mean square above which two values differ, in (0, 1).

    Raises:
        ConfigError: Two models with different inputs, or no inputs and no artifact.
        ArtifactError: A file is no artifact, is damaged or was edited.
    """
    _require_torch("compare")
    from tersor.api.comparing import compare_models

    return compare_models(one, other, inputs, limit)


def profile(
    source: Any,
    data: Any = None,
    *,
    device: str = "cpu",
    backend: str = "auto",
    batch: int = 1,
    ceilings: bool = True,
) -> "Profile":
    """Where a build spends its time, op by op, beside what the device can do at most.

    Args:
        source: The path of an artifact, or a model as for ``compress``: then of its best uncompressed
            build.
        data: As for ``compress``; of an artifact one batch of inputs or arrays by name, or None for
            some drawn within the calibrated ranges.
        device: Where it runs.
        backend: Of a model: "auto" or a backend's name.
        batch: Of a model: samples in one call.
        ceilings: Measure the device's rates in the build's formats, with its threads, through its
            backend; takes some seconds.

    Raises:
        ArtifactError: A file is no artifact, is damaged or was edited.
        BackendError: No build in it runs here.
        ConfigError: A model without data.
    """
    _require_torch("profile")
    from tersor.api.profiling import profile_model

    return profile_model(
        source, data, device=device, backend=backend, batch=batch, ceilings=ceilings
    )


def export(path: str | Path, out: str | Path) -> None:
    """Write an artifact's model for another runtime: .xml, .onnx or .pt2; the file is checked."""
    _require_torch("export")
    from tersor.api.exporting import export_graph
    from tersor.api.files import open_graph
    from tersor.api.verifying import drawn_inputs
    from tersor.artifact.file import read_artifact

    artifact = read_artifact(path)
    graph = open_graph(artifact)
    choice = next(iter(artifact.manifest.choices.values()))
    export_graph(graph, choice, Path(out), drawn_inputs(artifact))


def read_report(path: str | Path) -> "Report":
    """The report that an artifact carries.

    Raises:
        ArtifactError: The artifact carries none.
    """
    from tersor.artifact.file import read_artifact
    from tersor.core.errors import ArtifactError
    from tersor.report.record import Report

    artifact = read_artifact(path)
    found = artifact.manifest.metadata.get("report")
    if found is None:
        raise ArtifactError(f"{path}: carries no report; it was not saved by a Result")
    report = from_json(Report, found, f"{path}, report")
    return replace(report, verdict=artifact.manifest.verdict or report.verdict)


def _require_torch(what: str) -> None:
    from importlib.util import find_spec

    missing = [name for name in ("torch", "scipy") if find_spec(name) is None]
    if missing:
        raise MissingDependencyError(
            f"{what} needs {' and '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} "
            "not installed; pip install 'tersor[compress]'"
        )
