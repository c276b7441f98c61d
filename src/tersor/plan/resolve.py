"""Another target, and the whole curve, from tables and evaluations at hand: nothing is built.

What is returned is predicted: times by the tables, losses by the curve through the evaluations
that the search has made.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from tersor.core.records import ParetoPoint, Plan, PriceTable
from tersor.plan.ledger import Ledger, draft_of
from tersor.plan.proposals import Proposal, check_size, propose
from tersor.plan.search import baseline_is_enough, meets
from tersor.plan.solve import TOLERANCE
from tersor.plan.sweep import error_budget, expected_loss, non_dominated, pareto
from tersor.plan.task import Assignment, Choice, Draft, Evaluation, Task, Tools
from tersor.plan.words import MEGABYTE, binding_words


def resolve(task: Task, evaluations: Sequence[Evaluation]) -> Choice:
    """The plan for another target, predicted; takes seconds.

    Args:
        task: With the new limits, and the tables as corrected by the search.
        evaluations: What the search evaluated: how predicted errors become losses.

    Returns:
        A choice of one finalist without measurements. ``target_met_on_search`` is a prediction.
    """
    ledger = Ledger(replace(task, max_evaluations=0), _no_tools(), evaluations)
    if baseline_is_enough(task):
        return _predicted_baseline(ledger, "the best uncompressed build meets the target")
    proposal = _propose(ledger)
    best = proposal.drafts[0]
    totals = ledger.totals(best)
    fits = task.limits.max_bytes is None or task.baseline.size_bytes <= task.limits.max_bytes
    if totals.ms >= task.baseline_ms and (fits or task.limits.max_ms is not None):
        return _predicted_baseline(
            ledger,
            f"nothing is predicted faster than the best uncompressed build: {totals.ms:.3g} ms "
            f"against {task.baseline_ms:.3g} ms ({task.baseline.name})",
            proposal.binding or "",
            binding_words(ledger, best, proposal.binding),
        )
    words = binding_words(ledger, best, proposal.binding)
    plan = ledger.plan(best, words)
    loss = ledger.loss(best)
    return Choice(
        plan=plan,
        finalists=(plan,),
        evaluations=tuple(evaluations),
        binding=proposal.binding or "",
        reason=f"predicted: {totals.ms:.3g} ms, loss {loss:.4g}; nothing was built",
        target_met_on_search=meets(task.limits, plan, loss),
        is_baseline=ledger.is_baseline(best),
    )


def curve(
    task: Task,
    evaluations: Sequence[Evaluation],
    n_points: int,
    measured: Sequence[Plan] = (),
) -> tuple[ParetoPoint, ...]:
    """Plans that trade latency, size and loss, over all tables, fastest first.

    The task's limits are ignored. Points with a measured plan's choice and levels carry its
    measurements and say so.
    """
    pairs = [(e.error, e.loss) for e in evaluations]
    ledger = Ledger(replace(task, max_evaluations=0), _no_tools(), evaluations)
    ledger.unreachable = "size"  # no budget holds
    drafts: dict[Draft, None] = {}
    for i in range(len(ledger.tables)):
        for solution in pareto(ledger.problem(i), n_points):
            drafts[draft_of(i, solution.assignment)] = None
    totals = {d: ledger.totals(d) for d in drafts}
    kept = set(non_dominated(list(totals.values())))
    by_totals = {t: d for d, t in reversed(totals.items()) if t in kept}
    known = {(p.choice.describe(), draft_of(0, p.assignment).levels): p for p in measured}
    points = []
    for total in sorted(by_totals):
        plan = ledger.plan(by_totals[total])
        found = known.get((plan.choice.describe(), by_totals[total].levels))
        if found is not None and not math.isfinite(found.measured_ms or 0.0):
            continue  # it could not be built
        points.append(_point(found or plan, expected_loss(pairs, total.error)))
    return front(points)


def front(points: Iterable[ParetoPoint]) -> tuple[ParetoPoint, ...]:
    """Those that no other one equals or beats in latency, size, drop and predicted error, fastest first.

    Measurements in the place of predictions change their order, and so does what an error is expected to lose.
    """
    ordered = sorted(points, key=lambda p: (p.latency_ms, p.size_mb, p.drop, p.error))
    kept: list[ParetoPoint] = []
    for point in ordered:
        told = point.size_mb, point.drop, point.error
        if not any(k.size_mb <= told[0] and k.drop <= told[1] and k.error <= told[2] for k in kept):
            kept.append(point)
    return tuple(kept)


def _point(plan: Plan, loss: float) -> ParetoPoint:
    is_measured = plan.measured_ms is not None
    return ParetoPoint(
        latency_ms=plan.predicted_ms if plan.measured_ms is None else plan.measured_ms,
        size_mb=plan.predicted_bytes / MEGABYTE,
        drop=loss if plan.measured_error is None else plan.measured_error,
        error=plan.predicted_error,
        measured=is_measured,
        plan=plan,
    )


def _propose(ledger: Ledger) -> Proposal:
    """As in the search, but the error budget comes from the curve through the evaluations."""
    limit = ledger.task.limits.max_loss
    if limit is None:
        return propose(ledger)
    check_size(ledger)
    budget = error_budget([(e.error, e.loss) for e in ledger.evaluations], limit)
    fastest = ledger.solve("latency", may_be_slower=True)
    if ledger.totals(fastest[0]).error <= budget * (1 + TOLERANCE):
        return Proposal((fastest[0],), ledger.unreachable)
    within = ledger.solve("latency", max_error=budget * (1 + TOLERANCE), may_be_slower=True)
    within = within or ledger.solve("error", may_be_slower=True)
    return Proposal(tuple(within), ledger.unreachable or "drop")


def _predicted_baseline(ledger: Ledger, reason: str, binding: str = "", words: str = "") -> Choice:
    plan = ledger.baseline_plan(words)
    loss = plan.measured_error
    if loss is None:
        pairs = [(e.error, e.loss) for e in ledger.evaluations]
        loss = expected_loss(pairs, plan.predicted_error)
    return Choice(
        plan=plan,
        finalists=(plan,),
        evaluations=tuple(ledger.evaluations),
        binding=binding,
        reason=reason,
        target_met_on_search=meets(ledger.task.limits, plan, loss),
        is_baseline=True,
    )


def _no_tools() -> Tools:
    """For a ledger that only predicts."""

    def evaluate(assignment: Assignment) -> float:
        raise AssertionError(f"resolve evaluates nothing, yet was asked for {assignment}")

    def measure(plans: Sequence[Plan]) -> Sequence[float]:
        raise AssertionError(f"resolve measures nothing, yet was asked for {len(plans)} plans")

    def correct(
        table: PriceTable, assignment: Assignment, tensors: Mapping[str, str], ms: float
    ) -> PriceTable:
        raise AssertionError(
            f"resolve corrects no table, yet was asked for {table.choice.describe()}, "
            f"{len(assignment)} sites, {len(tensors)} tensors, {ms} ms"
        )

    return Tools(evaluate=evaluate, measure=measure, correct=correct)
