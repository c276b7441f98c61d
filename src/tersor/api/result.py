"""What ``compress`` returns: the plan, the model, the verdict, and ways to ask for more."""

import datetime as dt
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from torch import nn

from tersor._version import __version__
from tersor.api.choosing import (
    ChoiceRecord,
    budget_bytes,
    choose_plan,
    metric_stamp,
    plan_key,
    task_for,
)
from tersor.api.files import Facts, artifact_size, final_bytes, is_brief
from tersor.api.final import (
    Final,
    Made,
    as_baseline,
    built_final,
    kept_choice,
    make_final,
    packaged,
)
from tersor.api.judging import Decision, TestPart, judge, race, runner_for
from tersor.api.keeping import MadeRecord, pack_made, unpack_made
from tersor.api.mixing import settle
from tersor.api.proposing import Offers
from tersor.api.quality import Quality
from tersor.api.recovering import recovery_key
from tersor.api.session import Session
from tersor.api.settling import Settling, final_key, standing
from tersor.api.undoing import measure_undone
from tersor.capture.detector import Attached
from tersor.core.errors import BackendError, ConfigError, ParityError
from tersor.core.jsonable import digest, dumps, from_json, to_json
from tersor.core.machine import describe_machine
from tersor.core.records import ParetoPoint, Plan, Prices, Verdict
from tersor.core.store import write_atomic
from tersor.core.target import Target, as_target
from tersor.core.units import BYTES_PER_MB
from tersor.graph.modules import GraphModule
from tersor.observe.ranks import Parcel
from tersor.plan.resolve import curve, front
from tersor.plan.resolve import resolve as resolve_plan
from tersor.plan.task import Evaluation
from tersor.report.brief import brief
from tersor.report.explain import costliest
from tersor.report.explain import explain as explain_site
from tersor.report.form import report_json
from tersor.report.record import Report, Undone
from tersor.runtime.runner import Runner
from tersor.verify.verify import BUSY, is_slower

_CURVE_POINTS = 12
_PACKAGES = ("torch", "openvino", "onnxruntime", "numpy", "scipy", "safetensors")


@dataclass(frozen=True, kw_only=True)
class Run:
    """What all results of one ``compress`` share."""

    session: Session
    offered: Offers
    prices: Prices
    test: TestPart


@dataclass(frozen=True, slots=True, kw_only=True)
class ResultRecord:
    """A result that was verified, for other ranks; its tensors are the graph's and the changes'."""

    choice: ChoiceRecord
    plan: Plan
    is_baseline: bool
    reason: str
    verdict: Verdict
    pareto: tuple[ParetoPoint, ...]
    made: MadeRecord
    test_uses: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Curve:
    points: tuple[ParetoPoint, ...]


def _converted(searched: "_Searched", own: Quality, wanted: Quality) -> tuple[Evaluation, ...]:
    """Evaluations in another target's units; none where that asks for another quantity."""
    (quantity, whole), (other, whole_other) = own.unit, wanted.unit
    if quantity != other:
        return ()
    factor = whole_other / whole
    return tuple(replace(e, loss=e.loss * factor) for e in searched.evaluations)


@dataclass(frozen=True, slots=True, kw_only=True)
class _StandIn:
    """The plan that stands in for one whose build failed."""

    plan: Plan
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Searched:
    """What a search evaluated, in the units of its own target."""

    target: Target
    evaluations: tuple[Evaluation, ...]


class Result:
    """One compressed model.

    ``plan`` and ``pareto`` are at hand; ``model``, ``module`` and ``verdict`` are made on first
    use where the result comes from ``resolve``.
    """

    def __init__(
        self, run: Run, target: Target, choice: ChoiceRecord, searched: "_Searched | None" = None
    ) -> None:
        self._run = run
        self._searched = searched  # by whom it was resolved; None: by itself
        self.target = target
        self._choice = choice
        self._reason = choice.reason
        self._plan = choice.plan
        self._is_baseline = choice.is_baseline
        self._stands_in = False  # another plan's build failed
        self._undone: dict[str, Undone] = {}

    def parcel(self) -> Parcel[ResultRecord]:
        """This result, verified, for other ranks."""
        verdict = self.verdict  # may change the plan
        record, tensors = pack_made(self._run.session, self._made)
        found = ResultRecord(
            choice=self._choice,
            plan=self._plan,
            is_baseline=self._is_baseline,
            reason=self._reason,
            verdict=verdict,
            pareto=self.pareto,
            made=record,
            test_uses=self._run.test.uses,
        )
        return Parcel(found, tensors)

    @classmethod
    def of_parcel(cls, run: Run, target: Target, parcel: Parcel[ResultRecord]) -> "Result":
        """What another rank found; its build is made here, on first use."""
        record = parcel.record
        run.test.uses = record.test_uses
        result = cls(run, target, record.choice)
        result._plan, result._reason = record.plan, record.reason
        result._is_baseline = record.is_baseline
        made = unpack_made(run.session, record.made, parcel.tensors)
        result.__dict__ |= {"_made": made, "verdict": record.verdict, "pareto": record.pareto}
        return result

    @property
    def plan(self) -> Plan:
        """The plan that this result carries out."""
        return self._plan

    @property
    def is_materialised(self) -> bool:
        """Whether the model was built and measured; else all numbers are predicted."""
        return "_final" in self.__dict__

    @cached_property
    def _quality(self) -> Quality:
        return Quality(self._run.session, self.target)

    @property
    def _key(self) -> str:
        """Of everything after the plan: the plan's own content."""
        return final_key(self._run.session, self._run.prices, self.target, self._plan)

    @cached_property
    def _final(self) -> Final:
        session = self._run.session
        made, key = self._made, self._key
        try:
            final = built_final(session, made, self._plan.choice)
        except (BackendError, ParityError) as error:
            if self._is_baseline:
                raise
            final = self._next_build(str(error)) or self._baseline_build(str(error))
            key = self._key
        best = self._run.prices.baseline.choice
        assert best is not None
        final = packaged(session, final, best, key)
        self._plan = replace(self._plan, choice=final.built.choice)
        return final

    def _next_build(self, error: str) -> Final | None:
        """The build of the next plan that holds the target; None where none can be built."""
        run, quality, failed = self._run, self._quality, self._key
        session, limit = run.session, self._quality.limit()
        for plan in standing(session, run.prices, quality, replace(self._choice, plan=self._plan)):
            key = final_key(session, run.prices, self.target, plan)
            made = make_final(session, run.offered, plan, quality, key)
            if limit is not None and made.loss > limit:
                continue
            try:
                final = built_final(session, made, plan.choice)
            except (BackendError, ParityError) as again:
                session.progress.note(f"the next plan failed as well: {again}")
                continue
            reason = (
                f"the build of the plan that was chosen failed, the next one stands in: {error}"
            )
            session.store.put("instead", failed, _StandIn(plan=plan, reason=reason))
            session.progress.note(reason)
            self._stand_in(plan, reason)
            self.__dict__["_made"] = made
            return final
        return None

    def _baseline_build(self, error: str) -> Final:
        self._fall_back(f"the planned build failed: {error}")
        session = self._run.session
        return built_final(session, Made(session.graph), self._plan.choice)

    def _stand_in(self, plan: Plan, reason: str) -> None:
        self._plan, self._reason, self._stands_in = plan, reason, True

    @cached_property
    def _made(self) -> Made:
        """The final graph; where it loses more or is larger than was allowed, that of another plan."""
        run, choice = self._run, self._choice
        if not choice.tables or self._is_baseline:  # it was given
            return make_final(run.session, run.offered, self._plan, self._quality, self._key)
        settled = Settling(run.session, run.offered, run.prices, self._quality, choice)
        made = settle(settled)
        self._choice = choice = settled.choice
        self._plan, self._is_baseline, self._reason = choice.plan, choice.is_baseline, choice.reason
        other = run.session.store.get(_StandIn, "instead", self._key)
        if other is None or self._is_baseline:
            return made
        self._stand_in(other.plan, other.reason)
        return make_final(run.session, run.offered, other.plan, self._quality, self._key)

    def _fall_back(self, reason: str) -> None:
        run = self._run
        for made in ("_made", "_final", "_runner"):  # of the plan that is given up
            self.__dict__.pop(made, None)
        self._plan = as_baseline(run.session, run.prices, self.target, self._plan)
        self._is_baseline, self._stands_in = True, False
        self._reason = reason

    @cached_property
    def verdict(self) -> Verdict:
        """What was measured on the test part, against the target."""
        session = self._run.session
        after = recovery_key(session, self._key)
        key = digest(after, metric_stamp(session, "test_metric"))
        kept = session.store.get(Verdict, "verdict", key)
        if kept is not None:
            self._run.test.uses += 1
            _ = self._made  # may step back, as it did then
            if kept.returned_baseline and not self._is_baseline:
                self._fall_back(kept.reason)
            choice = kept_choice(session, self._key) or self._plan.choice
            self._plan = replace(self._plan, choice=choice)
            return kept
        found = self._verify()
        if found.noise <= BUSY:  # else the same command measures again
            session.store.put("verdict", key, found)
        return found

    def _needs_size(self) -> bool:
        """Whether only a compressed plan can meet the target's size."""
        target, base = self.target, self._run.prices.baseline
        too_large = (
            target.size_mb is not None and base.size_bytes > target.size_mb * BYTES_PER_MB
        ) or target.size_ratio is not None
        return too_large and target.speedup is None and target.latency_ms is None

    def _verify(self) -> Verdict:
        """Race first: what is slower than the baseline never sees the test part."""
        run, seed = self._run, self._run.session.settings.seed
        final = self._final  # may fall back, and then moves the plan and the reason
        times = race(run.session, run.prices, final)
        speed = times.speed(seed)
        if not self._is_baseline and is_slower(speed) and not self._needs_size():
            self._fall_back(
                f"the compressed build measured {speed.value:.2f}x the best uncompressed build; "
                "that build is returned instead"
            )
            final = self._final
            times = race(run.session, run.prices, final)
        decision = Decision(
            size_of=self._file_size,
            binding=self._plan.binding or self._choice.binding,
            is_baseline=self._is_baseline,
            reason=self._reason if self._is_baseline or self._stands_in else "",
        )
        return judge(run.session, self.target, final, run.test, times, decision)

    @property
    def model(self) -> Runner | Attached:
        """Callable like the original; runs the built executable.

        A ``Runner``, or a detector (``Attached``) whose core is one.
        """
        return self._runner

    @cached_property
    def _runner(self) -> Runner | Attached:
        runner = runner_for(self._run.session, self._final.built)
        runner.module = self.module  # type: ignore[attr-defined]
        detector = self._run.session.detector
        return runner if detector is None else detector.attach(runner)

    @property
    def module(self) -> nn.Module:
        """The compressed graph as an ``nn.Module`` with the original's calling convention."""
        return GraphModule(self._final.graph)

    @cached_property
    def pareto(self) -> tuple[ParetoPoint, ...]:
        """Plans that trade latency, size and loss; each says whether it was measured."""
        run = self._run
        if not self._choice.tables:  # a plan that was given, not found, has no prices
            return ()
        choice, store = self._choice, run.session.store
        quality, evaluations, finalists = self._quality, choice.evaluations, choice.finalists
        if (
            self._searched is not None and not evaluations
        ):  # of a quantity that this target does not ask for
            quality = Quality(run.session, self._searched.target)
            evaluations, finalists = self._searched.evaluations, ()
        # Dozens of programs to solve: minutes where widths and formats are many.
        base = plan_key(run.session, run.prices, quality.target)
        record = replace(choice, evaluations=evaluations, finalists=finalists)
        read = from_json(ChoiceRecord, to_json(record))  # 2 or 2.0: as the store gives it
        key = digest(base, read.tables, read.evaluations, read.finalists)
        kept = store.get(_Curve, "pareto", key)
        if kept is None:
            task = task_for(run.session, run.offered, run.prices, choice.tables, quality)
            kept = _Curve(points=curve(task, evaluations, _CURVE_POINTS, finalists))
            store.put("pareto", key, kept)
        # The program's errors add up beyond what can be lost, and its units are the target's.
        return front(replace(p, drop=quality.points(p.drop)) for p in kept.points)

    def resolve(self, target: Target | str | Mapping[str, Any]) -> "Result":
        """Another result from the same tables, in seconds; its numbers are predicted."""
        run, target = self._run, as_target(target)
        quality = Quality(run.session, target)
        task = task_for(run.session, run.offered, run.prices, self._choice.tables, quality)
        searched = self._searched or _Searched(
            target=self.target, evaluations=self._choice.evaluations
        )
        evaluations = _converted(searched, Quality(run.session, searched.target), quality)
        found = resolve_plan(task, evaluations)
        record = replace(
            self._choice,
            plan=found.plan,
            finalists=found.finalists,
            evaluations=evaluations,
            binding=found.binding,
            reason=found.reason,
            is_baseline=found.is_baseline,
            met=found.target_met_on_search,
        )
        return Result(run, target, record, searched)

    def explain(self, site: str) -> dict[str, Any]:
        """Price, error, alternatives, reason and what undoing would change, for one layer.

        For the ten costliest sites that the plan changed, the last is measured: two builds, once.
        """
        report = self.record
        if site in costliest(report) and site not in self._undone:
            level = next(report.native(s) for s in report.sites if s.name == site)
            run = self._run
            found = measure_undone(
                run.session, run.offered, self._quality, self._plan, (site, level)
            )
            if found is not None:
                self._undone[site] = found
                report = self.record
        return explain_site(report, site)

    @property
    def record(self) -> Report:
        """Everything that reports say, as one record."""
        return self._report(self.verdict)

    def _report(self, verdict: Verdict) -> Report:
        run = self._run
        return Report(
            version=__version__,
            machine=describe_machine(),
            plan=self._plan,
            verdict=verdict,
            prices=run.prices
            if not self._choice.tables
            else replace(run.prices, tables=self._choice.tables),
            sites=run.session.sites,
            candidates=run.offered.candidates,
            pareto=self.pareto,
            versions=_versions(),
            notes=tuple(filter(None, (self._reason, self._shapes_note()))),
            undone=tuple(self._undone.values()),
            recoveries=() if self._is_baseline else self._made.recoveries,
        )

    def _shapes_note(self) -> str:
        choice = self._plan.choice
        return "" if choice.shapes == "open" else f"built as {choice.describe()}; else open sizes"

    def report(self, path: str | Path) -> None:
        """Write the report as JSON; of several ranks, rank 0 writes.

        Raises:
            ConfigError: Another suffix than .json.
        """
        if Path(path).suffix != ".json":
            raise ConfigError(f"{path}: reports are written as .json in this version")
        if self._writes:
            write_atomic(path, dumps(report_json(self.record), indent=1).encode())

    def save(self, path: str | Path) -> None:
        """Write one artifact that ``tersor.load`` runs, whole or not at all.

        Of several ranks, rank 0 writes.
        """
        if not self._writes:
            return
        final, facts = self._final, self._facts(self.verdict)
        write_atomic(path, final_bytes(self._run.session, final.graph, final.built, facts))

    @property
    def _writes(self) -> bool:
        return self._run.session.ranks.is_first

    def _facts(self, verdict: Verdict) -> Facts:
        # The verdict says the file's size: nothing that is measured after it is in the file.
        report = replace(self._report(verdict), undone=())
        run, most = self._run, budget_bytes(self.target, self._run.session.original_bytes)
        in_brief = is_brief(run.offered, run.prices, run.session.sites, most)
        return Facts(
            created=dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
            plan=self._plan,
            verdict=verdict,
            report=brief(report) if in_brief else report,
        )

    def _file_size(self, verdict: Verdict) -> int:
        final = self._final
        return artifact_size(self._run.session, final.graph, final.built, self._facts(verdict))

    def export(self, path: str | Path) -> None:
        """Write the model for another runtime: .xml (OpenVINO), .onnx or .pt2.

        Of several ranks, rank 0 writes.

        Raises:
            ConfigError: Another suffix.
            ParityError: The file computes something else than the graph.
        """
        from tersor.api.exporting import export_graph

        if not self._writes:
            return

        flat = self._run.session.flat("calibration", 4)
        export_graph(self._final.graph, self._final.built.choice, Path(path), flat)


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def make_result(run: Run, target: Target) -> Result:
    """Choose, transform, build and verify."""
    quality = Quality(run.session, target)
    choice = choose_plan(run.session, run.offered, run.prices, quality)
    result = Result(run, target, choice)
    _ = result.verdict
    run.session.progress.close()
    return result
