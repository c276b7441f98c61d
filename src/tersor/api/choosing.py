"""From candidates and prices to one plan: solve, evaluate, build and measure until it holds."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from tersor.api.files import artifact_size, carried_size
from tersor.api.latency import measure_calls
from tersor.api.looking import Looks
from tersor.api.proposing import Offers
from tersor.api.quality import Quality, original_score
from tersor.api.session import Session, metric_of
from tersor.api.stages import build_for, stitched
from tersor.core.errors import BackendError, ParityError
from tersor.core.jsonable import digest
from tersor.core.records import (
    Candidate,
    Level,
    Plan,
    Prices,
    PriceTable,
)
from tersor.core.target import Target
from tersor.core.units import BYTES_PER_MB
from tersor.plan.problem import native_levels, undominated
from tersor.plan.search import choose
from tersor.plan.task import Evaluation, Limits, Task, Tools
from tersor.price.table import correct_table
from tersor.timing.protocol import Protocol, ratio
from tersor.verify.memory import peak_bytes

# Names of a changed weight and its bias: in the headers of tensors, the graph, the plan, the layouts. 50
# bytes a layer were seen (ResNet-20 with 22 layers, 21 of them packed).
_NAME_BYTES = 64
_AGAIN = 0.25  # of the seconds of a search, for each that follows it with a part of the budget
_FINALISTS = Protocol(rounds=5, runs=9, max_seconds=20.0, one_speed=True)
_PAIR = Protocol(rounds=9, runs=11, max_seconds=20.0, one_speed=True)


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
class Scope:
    """Which plans a search may choose: what they leave of the target, as final weights turned out to need it.

    Attributes:
        share: Of the quality budget that evaluations may spend, 0..1.
        spare_bytes: Of the size that stay free; less than 0: what a file was smaller than predicted.
        methods: That may take part; (): all.
    """

    share: float = 1.0
    spare_bytes: int = 0
    methods: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Measured:
    ms: float  # at the speed at which the baseline ran when it was priced
    least_ms: float | None = None  # lower bound, 95 %, beside the baseline


@dataclass(frozen=True, slots=True, kw_only=True)
class _Beside:
    """The latency of a plan in that of another, of one interleaved run, and its lower 95 % bound."""

    times: float
    least: float


def limits_for(target: Target, prices: Prices, quality: Quality, original_bytes: int) -> Limits:
    """The target's budgets in the plan's units."""
    times = [target.latency_ms]
    if target.speedup is not None:
        times.append(prices.baseline.timing.median_ms / target.speedup)
    max_ms = min((t for t in times if t is not None), default=None)
    max_bytes = budget_bytes(target, original_bytes)
    limit = quality.limit()
    if max_ms is None and max_bytes is None and limit is None:  # peak memory alone
        max_ms = prices.baseline.timing.median_ms
    max_peak = None if target.peak_mb is None else target.peak_mb * BYTES_PER_MB
    return Limits(max_ms=max_ms, max_bytes=max_bytes, max_loss=limit, max_peak=max_peak)


def budget_bytes(target: Target, original_bytes: int) -> float | None:
    """Bytes that the target allows the file to take; None where it does not say."""
    sizes = [None if target.size_mb is None else target.size_mb * BYTES_PER_MB]
    if target.size_ratio is not None:
        sizes.append(original_bytes / target.size_ratio)
    return min((s for s in sizes if s is not None), default=None)


def task_for(
    session: Session,
    offered: Offers,
    prices: Prices,
    tables: Sequence[PriceTable],
    quality: Quality,
) -> Task:
    """What the plan stage reads."""
    assert prices.baseline.choice is not None
    built = build_for(session, session.graph, prices.baseline.choice)
    whole = artifact_size(session, session.graph, built)
    limits = limits_for(quality.target, prices, quality, session.original_bytes)
    whole += carried_size(offered, prices, session.sites, limits.max_bytes)
    whole += _NAME_BYTES * len(session.formats)
    refused = {(r.site, r.level) for r in prices.refused}
    candidates = {
        site: undominated([c for c in rows if (site, c.level) not in refused])
        for site, rows in offered.by_site().items()
    }
    covered = _native_bytes(candidates, prices)
    return Task(
        candidates=candidates,
        tables=tuple(tables),
        tensors=session.tensors,
        fixed_bytes=max(0, whole - covered),
        limits=limits,
        # Its row has the bytes of its tensors; what a target is about is the file, graph and report included.
        baseline=replace(prices.baseline, size_bytes=whole),
        pinned={s.name: s.pinned for s in session.sites if s.pinned is not None},
        seed=session.settings.seed,
        target=quality.target.budgets(),
        model=session.model_hash,
        size_terms=prices.size_terms,
        inside=session.inside,
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
    session: Session,
    offered: Offers,
    prices: Prices,
    quality: Quality,
    *,
    scope: Scope | None = None,
    known: Sequence[Evaluation] = (),
) -> ChoiceRecord:
    """Solve, evaluate, build and measure until the plan holds; found again in the store.

    ``known`` evaluations cost nothing.
    """
    scope = scope or Scope()
    key = digest(plan_key(session, prices, quality.target), scope.share)
    key = digest(key, scope.spare_bytes) if scope.spare_bytes else key
    key = digest(key, scope.methods) if scope.methods else key
    kept = session.store.get(ChoiceRecord, "plan", key)
    if kept is not None:
        return kept
    session.progress.stage("plan")
    if scope.methods:
        offered = offered.only(scope.methods)
    task = task_for(session, offered, prices, prices.tables, quality)
    if task.limits.max_bytes is not None:
        limits = replace(task.limits, max_bytes=task.limits.max_bytes - scope.spare_bytes)
        task = replace(task, limits=limits)
    if task.limits.max_loss is not None:
        limits = replace(task.limits, max_loss=task.limits.max_loss * scope.share)
        task = replace(task, limits=limits)
    if scope != Scope():  # a second search knows what the first one saw
        task = replace(task, max_seconds=task.max_seconds * _AGAIN)
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

    stamp = digest(quality.target.budgets(), metric_stamp(session, "metric"))
    looks = Looks(session, offered, quality, stamp)
    remembered = _Remembered(session, prices, _Meter(session, offered, prices))
    tools = Tools(
        evaluate=looks.evaluate,
        changes=looks.changes,
        noise=looks.noise,
        clock=looks.clock,
        peak=_peaks(session, offered),
        measure=remembered.measure,
        least_ms=remembered.least_ms,
        beside=remembered.beside,
        correct=correct,
    )
    found = choose(task, tools, known)
    session.prefixes.clear()  # up to a gigabyte, which nothing after a search reads
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


class _Meter:
    """Builds plans and measures them, beside the best uncompressed build or beside each other."""

    def __init__(self, session: Session, offered: Offers, prices: Prices) -> None:
        self._session, self._offered, self._prices = session, offered, prices
        self._reference: Callable[[], object] | None = None

    def plans(self, plans: Sequence[Plan]) -> list[_Measured]:
        """At the speed that the machine had when the best uncompressed build was chosen."""
        session, base = self._session, self._prices.baseline.choice
        assert base is not None
        if self._reference is None:
            built = build_for(session, session.graph, base)
            self._reference = session.caller(built.executable, base.batch)
        calls = {"reference": self._reference, **self._calls(plans)}
        timings = measure_calls(session, calls, _FINALISTS)
        usual = self._prices.baseline.timing.median_ms
        found = [_Measured(ms=math.inf)] * len(plans)
        for i in (int(name) for name in timings if name != "reference"):
            times = ratio(timings[str(i)], timings["reference"])
            found[i] = _Measured(ms=usual * times.value, least_ms=usual * times.low)
        for plan, ms in zip(plans, (m.ms for m in found), strict=True):
            if not math.isfinite(ms):  # said where it was dropped
                continue
            se = "" if plan.predicted_ms_se is None else f" +- {plan.predicted_ms_se:.2f}"
            session.progress.note(
                f"plan predicted {plan.predicted_ms:.2f}{se} ms, measured {ms:.2f} ms"
            )
        return found

    def pair(self, plan: Plan, other: Plan) -> _Beside | None:
        """One beside the other; None where one of them can't be built."""
        calls = self._calls([plan, other])
        if len(calls) < len((plan, other)):
            return None
        timings = measure_calls(self._session, calls, _PAIR)
        times = ratio(timings["0"], timings["1"])
        self._session.progress.note(
            f"the same plan in fewer bytes: {times.value:.3f} [{times.low:.3f}, {times.high:.3f}] "
            "times the latency"
        )
        return _Beside(times=times.value, least=times.low)

    def _calls(self, plans: Sequence[Plan]) -> dict[str, Callable[[], object]]:
        """A call of each plan's build by its place; what can't be built is dropped."""
        session, calls = self._session, {}
        for i, plan in enumerate(plans):
            try:
                graph = stitched(session, self._offered, plan.assignment)
                built = build_for(session, graph, plan.choice)
            except (BackendError, ParityError) as error:
                session.progress.note(f"a plan was dropped: {error}")
                continue
            calls[str(i)] = session.caller(built.executable, plan.choice.batch)
        return calls


@dataclass(frozen=True, slots=True, kw_only=True)
class _Peak:
    peak: int | None


def _peaks(session: Session, offered: Offers) -> Callable[[Plan], int | None]:
    """Extra memory of one call of a plan's build, kept in the store: one store, one choice."""

    def measure(plan: Plan) -> int | None:
        key = digest(session.key, "peak", plan.choice, sorted(plan.assignment.items()))
        kept = session.store.get(_Peak, "peak", key)
        if kept is None:
            graph = stitched(session, offered, plan.assignment)
            built = build_for(session, graph, plan.choice)
            call = session.caller(built.executable, plan.choice.batch)
            call()  # what the first call sets up stays
            kept = _Peak(peak=peak_bytes(call))
            session.store.put("peak", key, kept)
            if kept.peak is not None:
                session.progress.note(f"a plan takes {kept.peak / BYTES_PER_MB:.2f} MB at its peak")
        return kept.peak

    return measure


class _Remembered:
    """Each plan is measured once beside one set of prices: one store, one choice.

    Also after an interruption in the middle of the search.
    """

    def __init__(
        self,
        session: Session,
        prices: Prices,
        meter: _Meter,
    ) -> None:
        self._store, self._meter = session.store, meter
        self._stamp = digest(session.key, prices)
        self._found: dict[str, _Measured] = {}

    def measure(self, plans: Sequence[Plan]) -> list[float]:
        """See ``Tools.measure``."""
        keys = [self._key(p) for p in plans]
        for key in keys:
            kept = self._store.get(_Measured, "measured", key)
            if kept is not None:
                self._found[key] = kept
        new = {k: p for k, p in zip(keys, plans, strict=True) if k not in self._found}
        times = self._meter.plans(list(new.values())) if new else []
        for key, time in zip(new, times, strict=True):
            if math.isfinite(time.ms):  # what could not be built is tried again
                self._store.put("measured", key, time)
                self._found[key] = time
        return [self._found[key].ms if key in self._found else math.inf for key in keys]

    def beside(self, plan: Plan, other: Plan) -> tuple[float, float]:
        """See ``Tools.beside``: kept for the pair."""
        key = digest(self._key(plan), self._key(other))
        kept = self._store.get(_Beside, "beside", key)
        if kept is None:
            kept = self._meter.pair(plan, other)
            if kept is None:  # tried again next time
                return math.inf, math.inf
            self._store.put("beside", key, kept)
        return kept.times, kept.least

    def least_ms(self, plan: Plan) -> float:
        """See ``Tools.least_ms``."""
        found = self._found.get(self._key(plan))
        if found is None:
            return math.inf
        return found.ms if found.least_ms is None else found.least_ms

    def _key(self, plan: Plan) -> str:
        return digest(self._stamp, plan.choice, sorted(plan.assignment.items()))
