"""From a target to one measured plan.

Solve, measure the best few, correct the tables by what was measured, solve again, until the
prediction of the best plan holds; then search around it with real evaluations, and measure what that
finds. Where prediction and measurement do not come together, the choice says so. The best
uncompressed build takes part: a plan that does not beat it is not returned where speed is asked.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from tersor.core.records import Plan
from tersor.plan.improve import improve
from tersor.plan.ledger import Ledger
from tersor.plan.lighter import lighter
from tersor.plan.problem import Binding, Constraint, Objective
from tersor.plan.proposals import FINALISTS, Proposal, plain, propose
from tersor.plan.task import Choice, Draft, Evaluation, Limits, Task, Tools
from tersor.plan.words import binding_words

# A prediction that is this close needs no further round: the error of a table in context.
AGREEMENT = 0.03
# Medians of interleaved rounds repeat to 0.2-2 % (FINDINGS 1): closer ones are equal.
MEASURED_NOISE = 0.01
SAME_SPEED = 0.02  # what the same plan in fewer bytes may surely take longer, measured side by side
OBJECTIVES: tuple[Objective, ...] = ("latency", "size")  # whose optimum may take little memory


def choose(task: Task, tools: Tools, known: Sequence[Evaluation] = ()) -> Choice:
    """Choose a plan for a target, by prices, real evaluations and measurements.

    With a quality budget: the fastest plan whose evaluated loss holds (and fits the size), with what takes no
    time in as few bytes as the quality allows.
    With a speed only: the least loss within the time. With a size only: the least loss within
    the bytes, no slower than the baseline unless the size needs it. A budget that can't be met
    gives the best point found and the constraint by name.

    Everything is reproducible given the arguments and what the tools answer. ``known``: losses
    that an earlier search evaluated; they cost nothing.
    """
    ledger = Ledger(task, tools, known)
    if baseline_is_enough(task) and ledger.baseline_holds_peak():
        return _return_baseline(ledger, [], "the best uncompressed build meets the target", None)
    proposal = _measure_rounds(ledger)
    best = _pick(ledger, proposal.drafts)
    better = improve(ledger, best)[-(FINALISTS - 1) :]
    if better:
        ledger.measure(better)
        proposal = replace(proposal, drafts=(*better[::-1], *proposal.drafts))
        best = _pick(ledger, proposal.drafts)
    best = _lighter(ledger, _in_memory(ledger, _agreed(ledger, best)))
    binding = _binding(ledger, best, proposal.binding)
    off = ledger.disagreement(best)
    reason = _baseline_wins(ledger, best)
    if reason:
        return _return_baseline(ledger, _finalists(ledger, best, proposal), reason, binding, best)
    words = binding_words(ledger, best, binding)
    plans = [ledger.plan(d, words if d == best else "") for d in _finalists(ledger, best, proposal)]
    return Choice(
        plan=plans[0],
        finalists=tuple(plans),
        evaluations=tuple(ledger.evaluations),
        binding=binding or "",
        reason=_reason(ledger, best) + _disagreement_words(ledger, best),
        target_met_on_search=meets(ledger.task.limits, plans[0], ledger.loss(best))
        and _peak_holds(ledger, best),
        is_baseline=ledger.is_baseline(best),
        prediction_off=off,
    )


def baseline_is_enough(task: Task) -> bool:
    """Whether the best uncompressed build meets a target that asks for no more than that."""
    limits, baseline = task.limits, task.baseline
    if limits.max_loss is not None:  # asks for the fastest plan, whatever the baseline does
        return False
    fast = limits.max_ms is None or task.baseline_ms <= limits.max_ms
    return fast and (limits.max_bytes is None or baseline.size_bytes <= limits.max_bytes)


def _measure_rounds(ledger: Ledger) -> Proposal:
    proposal, more = propose(ledger), plain(ledger)
    for _ in range(ledger.task.max_rounds):
        fresh = ledger.measure([*proposal.drafts, *more])
        again = propose(ledger)
        if again.drafts[0] in ledger.measured and (
            not fresh or ledger.disagreement(again.drafts[0]) <= AGREEMENT
        ):
            return again
        proposal = again
    # The last tables may ask for a plan that there is no round left to measure.
    known = sorted(ledger.measured, key=lambda d: (ledger.measured[d], d))
    return replace(proposal, drafts=tuple(known[:FINALISTS]))


def _agreed(ledger: Ledger, best: Draft) -> Draft:
    """The best once the tables, corrected by what the search has measured, were solved again.

    As often as there are rounds, while its prediction is off and there is something to measure.
    """
    for _ in range(ledger.task.max_rounds):
        if ledger.disagreement(best) <= AGREEMENT or not ledger.measure(propose(ledger).drafts[:1]):
            break
        best = _pick(ledger, ())
    return best


def _lighter(ledger: Ledger, best: Draft) -> Draft:
    """The same plan in fewer bytes, unless it is surely slower or takes more memory.

    Fewer bytes are certain, and a few hundredths of a latency are what two builds of one plan differ by.
    """
    found = lighter(ledger, best)
    if found == best:
        return best
    is_as_fast = ledger.measure_beside(best, found) <= 1 + SAME_SPEED
    caps = (ledger.task.baseline_ms, ledger.task.limits.max_ms or math.inf)
    holds = all(ledger.measured[found] < c for c in caps if ledger.measured[best] < c)
    return found if is_as_fast and holds and _peak_holds(ledger, found) else best


def _in_memory(ledger: Ledger, best: Draft) -> Draft:
    """The best once the fastest and the smallest plans were built, where it takes too much memory.

    No price knows memory, but less work and smaller weights mostly need less of it.
    """
    if _peak_holds(ledger, best):
        return best
    fastest, smallest = (ledger.solve(o, may_be_slower=True)[:1] for o in OBJECTIVES)
    ledger.measure([*fastest, *smallest])
    return _pick(ledger, ())


def _pick(ledger: Ledger, drafts: tuple[Draft, ...]) -> Draft:
    """The best of all measured drafts for the target; of those that hold the memory, if any do."""
    limits = ledger.task.limits
    known = list(dict.fromkeys([*(d for d in drafts if d in ledger.measured), *ledger.measured]))
    known = [d for d in known if _peak_holds(ledger, d)] or [min(known, key=_peak_of(ledger))]
    if limits.max_loss is not None:
        holding = [d for d in known if ledger.loss(d) <= limits.max_loss]
        return _fastest(ledger, holding) if holding else min(known, key=ledger.loss)
    if limits.max_ms is None:
        return _mildest(ledger, _not_slower(ledger, known) or _built(ledger, known) or known)
    # A plan just inside the target fails as often as not when it is measured again.
    for cap in (limits.max_ms * (1 - MEASURED_NOISE), limits.max_ms):
        in_time = [d for d in known if ledger.measured[d] <= cap]
        if in_time:
            return _mildest(ledger, in_time)
    return _fastest(ledger, known)


def _not_slower(ledger: Ledger, drafts: list[Draft]) -> list[Draft]:
    """Those that are not surely slower than the baseline: where nobody asks for speed a tie is enough."""
    cap = ledger.task.baseline_ms * (1 + MEASURED_NOISE)
    return [d for d in drafts if ledger.least_ms(d) <= cap]


def _built(ledger: Ledger, drafts: list[Draft]) -> list[Draft]:
    return [d for d in drafts if math.isfinite(ledger.measured[d])]


def _mildest(ledger: Ledger, drafts: list[Draft]) -> Draft:
    """The least loss; among those that it can't be told from, the least change of the outputs."""
    best = min(drafts, key=lambda d: (ledger.loss(d), ledger.measured[d], d))
    if not ledger.has_changes:
        return best
    equal = [d for d in drafts if not ledger.is_worse(d, best)]
    return min(equal, key=lambda d: (ledger.changes(d, 1.0).mean(), ledger.measured[d], d))


def _peak_holds(ledger: Ledger, draft: Draft) -> bool:
    """Whether a build takes no more memory than allowed, as far as the system tells."""
    limit = ledger.task.limits.max_peak
    if limit is None or not math.isfinite(ledger.measured[draft]):
        return limit is None
    peak = ledger.peak(draft)
    return peak is None or peak <= limit


def _peak_of(ledger: Ledger) -> Callable[[Draft], tuple[float, float]]:
    """What orders drafts by memory; a build that failed comes last."""

    def order(draft: Draft) -> tuple[float, float]:
        ms = ledger.measured[draft]
        return (float(ledger.peak(draft) or 0) if math.isfinite(ms) else math.inf, ms)

    return order


def _fastest(ledger: Ledger, drafts: list[Draft]) -> Draft:
    """The least measured latency; among equal ones the least loss."""
    best = min(ledger.measured[d] for d in drafts)
    equal = [d for d in drafts if ledger.measured[d] <= best * (1 + MEASURED_NOISE)]
    return min(equal, key=lambda d: (ledger.loss(d), ledger.measured[d], d))


def _finalists(ledger: Ledger, best: Draft, proposal: Proposal) -> list[Draft]:
    """The best, and what comes next; under a quality budget what holds it, whoever proposed it."""
    limit = ledger.task.limits.max_loss
    others = [d for d in dict.fromkeys(proposal.drafts) if d in ledger.measured and d != best]
    if limit is not None:
        known = [d for d in ledger.measured if d != best and not ledger.is_baseline(d)]
        known = [d for d in known if ledger.is_evaluated(d) and ledger.loss(d) <= limit]
        others = [d for d in known if _peak_holds(ledger, d)] or others
    others.sort(key=lambda d: (ledger.measured[d], d))
    return [best, *others[: FINALISTS - 1]]


def _binding(ledger: Ledger, best: Draft, proposed: Constraint | None) -> Binding | None:
    """What stops the plan; where nothing does and the speed is missed, the latency itself.

    The memory, where the plan does not hold it or one that does not would have been chosen.
    """
    max_ms = ledger.task.limits.max_ms
    if not _peak_holds(ledger, best) or _is_held_back(ledger, best):
        return "memory"
    if proposed is None and max_ms is not None and ledger.measured[best] > max_ms:
        return "latency"
    return proposed


def _is_held_back(ledger: Ledger, best: Draft) -> bool:
    """Whether a measured plan beats the best one in latency and loss, and takes too much memory."""
    if ledger.task.limits.max_peak is None:
        return False
    ms, loss = ledger.measured[best] * (1 - MEASURED_NOISE), ledger.loss(best)
    return any(
        ledger.measured[d] <= ms and ledger.loss(d) <= loss and not _peak_holds(ledger, d)
        for d in ledger.measured
        if d != best
    )


def _disagreement_words(ledger: Ledger, best: Draft) -> str:
    """What to say where the tables and the machine do not come together; else nothing."""
    off = ledger.disagreement(best)
    if off <= AGREEMENT or not math.isfinite(ledger.measured[best]):
        return ""
    predicted = ledger.totals(best).ms
    return (
        f"; its prediction did not come within {AGREEMENT:.0%} of that: {predicted:.3g} ms, "
        f"{off:.1%} off after {len(ledger.measured)} measured plan(s) and "
        f"{ledger.tables[best.table].corrections} correction(s) of its table, so that plans which "
        "were not measured may be faster or slower than predicted"
    )


def _baseline_wins(ledger: Ledger, best: Draft) -> str:
    """Why the best uncompressed build is the answer; "" where it is not."""
    task, limits = ledger.task, ledger.task.limits
    ms = ledger.measured[best]
    if ms < task.baseline_ms * (1 - MEASURED_NOISE):
        return ""
    too_large = limits.max_bytes is not None and task.baseline.size_bytes > limits.max_bytes
    if limits.max_ms is None and too_large:
        return ""  # only a compressed plan is small enough
    if limits.max_loss is not None and ledger.baseline_loss() > limits.max_loss:
        return ""  # only another plan is accurate enough
    if not ledger.baseline_holds_peak():
        return ""  # only another plan may take little enough memory
    if not math.isfinite(ms):
        tried = len(ledger.measured)
        return f"none of the {tried} plan(s) tried could be built; the notes of the run say why"
    return (
        f"nothing that was measured is faster than the best uncompressed build: "
        f"{ms:.3g} ms against {task.baseline_ms:.3g} ms ({task.baseline.name}), "
        f"{len(ledger.measured)} plan(s) tried"
    )


def _return_baseline(
    ledger: Ledger,
    drafts: list[Draft],
    reason: str,
    binding: Binding | None,
    best: Draft | None = None,
) -> Choice:
    loss = ledger.baseline_loss()
    words = "" if best is None else binding_words(ledger, best, binding)
    plan = ledger.baseline_plan(words)
    others = [ledger.plan(d) for d in drafts[: FINALISTS - 1]]
    return Choice(
        plan=plan,
        finalists=(plan, *others),
        evaluations=tuple(ledger.evaluations),
        binding=binding or "",
        reason=reason,
        target_met_on_search=meets(ledger.task.limits, plan, loss) and ledger.baseline_holds_peak(),
        is_baseline=True,
    )


def meets(limits: Limits, plan: Plan, loss: float) -> bool:
    """Whether a plan holds every budget, by measurements where there are any."""
    ms = plan.predicted_ms if plan.measured_ms is None else plan.measured_ms
    found = (ms, plan.predicted_bytes, loss)
    wanted = (limits.max_ms, limits.max_bytes, limits.max_loss)
    return all(w is None or f <= w for f, w in zip(found, wanted, strict=True))


def _reason(ledger: Ledger, best: Draft) -> str:
    task, n_measured = ledger.task, len(ledger.measured)
    ms = ledger.measured[best]
    speed = f"{ms:.3g} ms, {task.baseline_ms / ms:.2f}x the best uncompressed build"
    if not math.isfinite(ms):
        speed = "could not be built"
    what = {
        True: "the fastest measured plan whose loss holds",
        False: "the least loss within the budgets",
    }[task.limits.max_loss is not None]
    return (
        f"{what}: {speed}, loss {ledger.loss(best):.4g}; {n_measured} plan(s) measured, "
        f"{len(ledger.evaluations)} evaluated, {ledger.n_looked} looked at"
        + (f"; the search ended as {ledger.ended}" if ledger.ended else "")
    )
