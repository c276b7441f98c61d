"""From candidates and prices to one measured result: plan, transform, build, verify."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from tersor.analyse.calibration import embedding_statistics, tensor_readers
from tersor.analyse.sites import find_sites
from tersor.api.files import artifact_size
from tersor.api.latency import measure_calls
from tersor.api.quality import Quality, original_score, score
from tersor.api.session import Session, metric_of
from tersor.api.shrink import Changes, formats_on, narrowed
from tersor.api.stages import (
    Offers,
    build_for,
    calibration_batches,
    eager_call,
    stitched,
)
from tersor.build.build import Built
from tersor.core.errors import BackendError, ParityError
from tersor.core.jsonable import digest
from tersor.core.records import (
    BuildChoice,
    Candidate,
    Level,
    Plan,
    Prices,
    PriceTable,
    TensorSpec,
    Timing,
    Verdict,
)
from tersor.core.target import Target
from tersor.core.units import BYTES_PER_MB
from tersor.graph.apply import apply
from tersor.graph.changes import ChangeRecords, pack, unpack
from tersor.graph.contracts import Graph, SiteChange
from tersor.graph.edit import attribute
from tersor.graph.serial import graph_from_json, graph_tensors, graph_to_json
from tersor.plan.problem import native_levels
from tersor.plan.search import choose
from tersor.plan.task import Evaluation, Limits, Task, Tools
from tersor.price.table import correct_table
from tersor.propose.propose import NATIVE
from tersor.runtime.runner import Runner
from tersor.timing.protocol import Protocol, Ratio, ratio
from tersor.transform.sequential import transform
from tersor.verify.memory import peak_bytes
from tersor.verify.verify import Measured, agreement, verdict

_FINALISTS = Protocol(rounds=5, runs=9, max_seconds=20.0)
_FINAL = Protocol(rounds=9, runs=15, max_seconds=60.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChoiceRecord:
    """What the plan stage found, with the tables as measurements corrected them."""

    plan: Plan
    finalists: tuple[Plan, ...]
    evaluations: tuple[Evaluation, ...]
    binding: str
    reason: str
    is_baseline: bool
    tables: tuple[PriceTable, ...]
    met: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class _Measured:
    ms: float  # at the speed at which the baseline ran when it was priced


@dataclass(frozen=True, slots=True, kw_only=True)
class FinalRecord:
    """How the final graph was made."""

    changes: ChangeRecords
    is_sequential: bool
    loss: float


@dataclass(frozen=True, slots=True, kw_only=True)
class NarrowRecord:
    """A graph whose widths were cut and fitted; its tensors are the arrays."""

    graph: Mapping[str, Any]


@dataclass
class Final:
    """The compressed graph and its build."""

    graph: Graph
    changes: tuple[SiteChange, ...]
    built: Built
    notes: tuple[str, ...] = ()


@dataclass
class TestPart:
    """The test part, and how often it was used."""

    uses: int = 0
    wanted: list[tuple[Tensor, ...]] = field(default_factory=list)


def limits_for(target: Target, prices: Prices, quality: Quality, original_bytes: int) -> Limits:
    """The target's budgets in the plan's units."""
    times = [target.latency_ms]
    if target.speedup is not None:
        times.append(prices.baseline.timing.median_ms / target.speedup)
    sizes = [None if target.size_mb is None else target.size_mb * BYTES_PER_MB]
    if target.size_ratio is not None:
        sizes.append(original_bytes / target.size_ratio)
    max_ms = min((t for t in times if t is not None), default=None)
    max_bytes = min((s for s in sizes if s is not None), default=None)
    limit = quality.limit()
    if max_ms is None and max_bytes is None and limit is None:  # peak memory alone
        max_ms = prices.baseline.timing.median_ms
    return Limits(max_ms=max_ms, max_bytes=max_bytes, max_loss=limit)


def task_for(
    session: Session,
    offered: Offers,
    prices: Prices,
    tables: Sequence[PriceTable],
    quality: Quality,
) -> Task:
    """What the plan stage reads."""
    whole = artifact_size(session, session.graph, prices.baseline.choice)
    candidates = offered.by_site()
    covered = _native_bytes(candidates, prices)
    return Task(
        candidates=candidates,
        tables=tuple(tables),
        tensors=session.tensors,
        fixed_bytes=max(0, whole - covered),
        limits=limits_for(quality.target, prices, quality, session.original_bytes),
        baseline=prices.baseline,
        pinned={s.name: s.pinned for s in session.sites if s.pinned is not None},
        seed=session.settings.seed,
        target=quality.target.budgets(),
        model=session.model_hash,
        size_terms=prices.size_terms,
    )


def _native_bytes(candidates: Mapping[str, Sequence[Candidate]], prices: Prices) -> int:
    """Bytes of what the plan decides, when all of it is left alone."""
    assert prices.baseline.choice is not None
    native = native_levels(candidates, prices.baseline.choice.precision, {})
    sized = {name for term in prices.size_terms for name in term.sites}
    own = sum(
        c.size_bytes
        for site, rows in candidates.items()
        if site not in sized
        for c in rows
        if c.level == native[site]
    )
    return own + round(sum(term.at(native) for term in prices.size_terms))


def choose_plan(
    session: Session, offered: Offers, prices: Prices, quality: Quality
) -> ChoiceRecord:
    """Solve, evaluate, build and measure until the plan holds; found again in the store."""
    key = plan_key(session, prices, quality.target)
    kept = session.store.get(ChoiceRecord, "plan", key)
    if kept is not None:
        return kept
    session.progress.stage("plan")
    task = task_for(session, offered, prices, prices.tables, quality)
    tables = {t.choice.describe(): t for t in prices.tables}

    def correct(
        table: PriceTable,
        assignment: Mapping[str, Level],
        tensors: Mapping[str, str],
        measured_ms: float,
    ) -> PriceTable:
        corrected = correct_table(table, assignment, tensors, measured_ms)
        tables[table.choice.describe()] = corrected
        return corrected

    tools = Tools(
        evaluate=quality.of_assignment(offered),
        measure=_remembered(session, prices, _measurer(session, offered, prices)),
        correct=correct,
    )
    found = choose(task, tools)
    record = ChoiceRecord(
        plan=found.plan,
        finalists=found.finalists,
        evaluations=found.evaluations,
        binding=found.binding,
        reason=found.reason,
        is_baseline=found.is_baseline,
        tables=tuple(tables.values()),
        met=found.target_met_on_search,
    )
    session.store.put("plan", key, record)
    return record


def plan_key(session: Session, prices: Prices, target: Target) -> str:
    """The key of a plan: the model and data, the prices, the target, and the metric's code."""
    stamp = digest(prices) if prices.tables else ""
    return digest(session.key, stamp, target.budgets(), metric_stamp(session, "metric"))


def metric_stamp(session: Session, name: str) -> str:
    """What tells one metric from another: its code, its unit, and its value on the original."""
    metric = metric_of(getattr(session.settings, name))
    if metric is None:
        return ""
    code = getattr(metric.function, "__code__", None)
    text = "" if code is None else f"{code.co_code!r}{code.co_consts!r}{code.co_names!r}"
    known = getattr(metric.function, "__qualname__", repr(type(metric.function)))
    return digest(known, text, metric.points, original_score(session, name))


def _measurer(
    session: Session, offered: Offers, prices: Prices
) -> Callable[[Sequence[Plan]], list[float]]:
    base = prices.baseline.choice
    assert base is not None
    reference: list[Callable[[], object]] = []

    def measure_plans(plans: Sequence[Plan]) -> list[float]:
        if not reference:
            built = build_for(session, session.graph, base)
            reference.append(session.caller(built.executable, base.batch))
        calls: dict[str, Callable[[], object]] = {"reference": reference[0]}
        for i, plan in enumerate(plans):
            try:
                graph = stitched(session, offered, plan.assignment)
                built = build_for(session, graph, plan.choice)
            except (BackendError, ParityError) as error:
                session.progress.note(f"a plan was dropped: {error}")
                continue
            calls[str(i)] = session.caller(built.executable, plan.choice.batch)
        timings = measure_calls(session, calls, _FINALISTS)
        drift = timings["reference"].median_ms / prices.baseline.timing.median_ms
        found = [timings[str(i)].median_ms / drift if str(i) in timings else float("inf")
                 for i in range(len(plans))]  # fmt: skip
        for plan, ms in zip(plans, found, strict=True):
            session.progress.note(
                f"plan predicted {plan.predicted_ms:.2f} ms, measured {ms:.2f} ms"
            )
        return found

    return measure_plans


def _remembered(
    session: Session, prices: Prices, measure_new: Callable[[Sequence[Plan]], list[float]]
) -> Callable[[Sequence[Plan]], list[float]]:
    """Each plan is measured once beside one set of prices: one store, one choice.

    Also after an interruption in the middle of the search.
    """
    stamp = digest(session.key, prices)

    def measure_plans(plans: Sequence[Plan]) -> list[float]:
        keys = [digest(stamp, p.choice, sorted(p.assignment.items())) for p in plans]
        found = {k: r.ms for k in keys if (r := session.store.get(_Measured, "measured", k))}
        new = {k: plan for k, plan in zip(keys, plans, strict=True) if k not in found}
        times = measure_new(list(new.values())) if new else []
        for key, ms in zip(new, times, strict=True):
            found[key] = ms
            if math.isfinite(ms):  # what could not be built is tried again
                session.store.put("measured", key, _Measured(ms=ms))
        return [found[key] for key in keys]

    return measure_plans


def chosen_candidates(offered: Offers, plan: Plan) -> dict[str, Candidate]:
    """The plan's candidates that edit the graph, with settings that the user may have edited."""
    by_level = {(c.site, c.level): c for c in offered.candidates}
    found = {}
    for site, level in plan.assignment.items():
        if level in NATIVE or isinstance(level, int):
            continue
        candidate = by_level[site, level]
        settings = plan.settings.get(site)
        found[site] = replace(candidate, detail=dict(settings)) if settings else candidate
    return found


def make_final(
    session: Session, offered: Offers, plan: Plan, quality: Quality, key: str
) -> tuple[Graph, tuple[SiteChange, ...], str]:
    """The sequential transform; where the stitched changes lose less, those."""
    changed = offered.chosen(plan.assignment)
    chosen = chosen_candidates(offered, plan)
    base = _narrowed(session, changed, key) if changed.widths else session.graph
    if not chosen:
        note = f"widths fitted, loss on the search part {quality.loss(base):.4g}"
        return base, changed.widths, note if changed.widths else ""
    kept = session.store.get(FinalRecord, "transform", key)
    if kept is not None:
        arrays = session.store.arrays("transform", key)
        changes = tuple(unpack(kept.changes, arrays, session.site_by_name))
    else:
        kept, changes = _transform(session, changed, base, quality, chosen)
        records, arrays = pack(changes)
        session.store.put("transform", key, replace(kept, changes=records), arrays)
    graph = apply(base, changes)
    way = "front to back" if kept.is_sequential else "stitched"
    note = f"weights {way}, loss on the search part {kept.loss:.4g}"
    return graph, (*changed.widths, *changes), note


def _narrowed(session: Session, changed: Changes, key: str) -> Graph:
    """The graph of the plan's widths, found again in the store."""
    kept = session.store.get(NarrowRecord, "narrow", key)
    if kept is not None:
        arrays = session.store.arrays("narrow", key)
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        return replace(graph_from_json(kept.graph, tensors), example=session.graph.example)
    graph = narrowed(session, changed)
    arrays = {name: t.contiguous().numpy() for name, t in graph_tensors(graph).items()}
    session.store.put("narrow", key, NarrowRecord(graph=graph_to_json(graph)), arrays)
    return graph


def _transform(
    session: Session,
    changed: Changes,
    base: Graph,
    quality: Quality,
    chosen: Mapping[str, Candidate],
) -> tuple[FinalRecord, tuple[SiteChange, ...]]:
    """Formats on the graph of the plan's widths: front to back, and from what is at hand."""
    session.progress.stage("transform", len(chosen))
    sites = find_sites(base)
    done = transform(
        base,
        sites,
        chosen,
        session.methods,
        calibration_batches(session),
        readers=tensor_readers(base, sites),
        embedding=lambda site: embedding_statistics(attribute(base.module, site.weight)),
        seed=session.settings.seed,
        advance=session.progress.advance,
    )
    at_hand = tuple(formats_on(session, changed, base))
    ways = [(done.graph, tuple(done.changes), True), (apply(base, at_hand), at_hand, False)]
    limit = quality.limit()
    losses = [quality.loss(graph) for graph, _, _ in ways]
    errors = [quality.error(graph) for graph, _, _ in ways]
    session.progress.note(
        "on the search part, front to back / stitched: "
        f"loss {losses[0]:.4g} / {losses[1]:.4g}, error {errors[0]:.3g} / {errors[1]:.3g}"
    )
    # Within the limit first; among those the smaller error, which is finer than the loss.
    best = min((0, 1), key=lambda i: (limit is not None and losses[i] > limit, errors[i]))
    record = FinalRecord(
        changes=ChangeRecords(changes=()), is_sequential=ways[best][2], loss=losses[best]
    )
    return record, ways[best][1]


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What is judged, and why it is what it is."""

    plan: Plan
    binding: str
    is_baseline: bool
    reason: str


def runner_for(session: Session, built: Built) -> Runner:
    """A build with the original's calling convention."""
    return Runner(built.executable, session.graph.signature, built.choice.batch)


@dataclass(frozen=True, kw_only=True)
class Race:
    """Latencies of one interleaved run, and the extra memory of one call."""

    timings: Mapping[str, Timing]
    peak: int | None

    def speed(self, seed: int) -> Ratio:
        """Best uncompressed build over result."""
        return ratio(self.timings["baseline"], self.timings["result"], seed)


def race(session: Session, prices: Prices, final: Final) -> Race:
    """Measure result, best uncompressed build and the model as given, interleaved."""
    session.progress.stage("verify")
    base = prices.baseline.choice
    assert base is not None
    baseline = build_for(session, session.graph, base)
    peak = peak_bytes(session.caller(final.built.executable, final.built.choice.batch))
    timings = measure_calls(
        session,
        {
            "result": session.caller(final.built.executable, final.built.choice.batch),
            "baseline": session.caller(baseline.executable, base.batch),
            "original": eager_call(session),
        },
        _FINAL,
    )
    return Race(timings=timings, peak=peak)


def judge(
    session: Session,
    target: Target,
    final: Final,
    test: TestPart,
    measured: Race,
    decision: Decision,
) -> Verdict:
    """Run the result on the test part, once, and compare with the target."""
    test.uses += 1
    return verdict(
        target,
        _measured(session, final, test, measured.timings, measured.peak, decision.plan),
        binding=decision.binding,
        returned_baseline=decision.is_baseline,
        reason=decision.reason,
        notes=final.notes,
        seed=session.settings.seed,
    )


def _measured(
    session: Session,
    final: Final,
    test: TestPart,
    timings: Mapping[str, Timing],
    peak: int | None,
    plan: Plan,
) -> Measured:
    runner = runner_for(session, final.built)
    batches = list(session.parts["test"].batches(16))
    if not test.wanted:
        test.wanted = [session.graph.run(flat) for flat in batches]
    found = [_flat_outputs(session, runner, flat) for flat in batches]
    own = metric_of(session.settings.test_metric)
    metric = own or metric_of(session.settings.metric)
    name = "test_metric" if own else "metric"
    return Measured(
        result=timings["result"],
        baseline=timings["baseline"],
        original=timings["original"],
        size_bytes=artifact_size(session, final.graph, final.built.choice, plan, final.built),
        original_bytes=session.original_bytes,
        peak_bytes=peak,
        agreement=agreement(found, test.wanted, session.kind),
        kind=session.kind,
        metric_original=None if metric is None else original_score(session, name),
        metric_result=None if metric is None else score(metric, session.as_given(runner), name),
        points=0.01 if metric is None else metric.points,
        metric_is_held_out=own is not None,
        test_uses=test.uses,
        difference=final.built.difference,
    )


def _flat_outputs(session: Session, runner: Runner, flat: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    specs = session.graph.signature
    parts: list[dict[str, Any]] = []
    size = runner.built_batch
    count = flat[0].shape[0]
    for start in range(0, count, size):
        rows = torch.arange(start, start + size).clamp_max(count - 1)
        inputs = {s.name: t[rows].numpy() for s, t in zip(specs.inputs, flat, strict=True)}
        parts.append(runner.executable.run(inputs))
    return tuple(
        torch.cat([_sized(torch.from_numpy(p[s.name]), s, size) for p in parts])[:count]
        for s in specs.outputs
    )


def _sized(tensor: Tensor, spec: TensorSpec, batch: int) -> Tensor:
    if spec.dynamic:
        return tensor
    return tensor.reshape([batch if size is None else size for size in spec.shape])


def as_baseline(session: Session, prices: Prices, target: Target, plan: Plan) -> Plan:
    """The plan that leaves everything as it is, on the best uncompressed build."""
    base = prices.baseline
    assert base.choice is not None
    native: Level = base.choice.precision
    return replace(
        plan,
        assignment={
            s.name: native if s.kind == "format" else s.units
            for s in session.sites
            if s.pinned is None
        },
        choice=base.choice,
        settings={},
        predicted_ms=base.timing.median_ms,
        measured_ms=base.timing.median_ms,
        predicted_error=0.0,
        target=target.budgets(),
    )


def built_final(
    session: Session, graph: Graph, changes: tuple[SiteChange, ...], choice: BuildChoice, note: str
) -> Final:
    """The final graph's build."""
    session.progress.stage("build")
    built = build_for(session, graph, choice)
    return Final(graph, changes, built, (note,) if note else ())
