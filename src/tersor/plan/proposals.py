"""Which plans are worth measuring, for each kind of target; the best first.

A quality budget asks for the fastest plan whose real loss holds: a search over the error budget
with real evaluations as the oracle. A speed alone asks for the least error within the time, a
size alone for the least error within the bytes.
"""

import math
from dataclasses import dataclass

from tersor.core.rank_levels import EIGHT_BITS
from tersor.plan.ledger import Ledger, draft_of
from tersor.plan.problem import Constraint
from tersor.plan.solve import TOLERANCE
from tersor.plan.sweep import SMALLEST_SHARE
from tersor.plan.task import Draft

FINALISTS = 3
# Predictions are off by 2-5 % (FINDINGS 1): ask for that much more than the target.
SPEED_MARGIN = 0.05
WIDE_MARGIN = 0.10
# Error budgets closer than this do not differ in loss by what an evaluation can tell.
RESOLUTION = 1.03
MAX_STEPS = 24
BRACKET_LOOKS = 16  # of the real evaluations


@dataclass(frozen=True, slots=True)
class Proposal:
    """Drafts to measure, best first, and the constraint that stopped them."""

    drafts: tuple[Draft, ...]
    binding: Constraint | None


def propose(ledger: Ledger) -> Proposal:
    """The finalists for the task's target, on the tables as corrected so far."""
    limits = ledger.task.limits
    check_size(ledger)
    if limits.max_loss is not None:
        proposal = _fastest_that_holds(ledger, limits.max_loss)
    elif limits.max_ms is not None:
        proposal = _mildest_in_time(ledger, limits.max_ms)
    else:
        proposal = _mildest_in_size(ledger)
    return Proposal(proposal.drafts, ledger.unreachable or proposal.binding)


def plain(ledger: Ledger) -> tuple[Draft, ...]:
    """All of int8 that there is and nothing else: what other tools return, as a plan to beat.

    Prices are off by more between mixtures of formats than for it, so that it is measured whatever they say.
    None where no speed is asked for, nothing is int8, or its size or its loss does not hold.
    """
    limits = ledger.task.limits
    if limits.max_loss is None and limits.max_ms is None:
        return ()
    drafts = []
    for table in range(len(ledger.tables)):
        problem = ledger.problem(table)
        chosen = {
            s: next(v for v in EIGHT_BITS if v in row)
            for s, row in problem.levels().items()
            if not {*EIGHT_BITS}.isdisjoint(row)
        }
        if chosen:
            levels = {**problem.native_assignment(), **chosen}
            drafts.append(draft_of(table, problem.settled(levels)))
    if not drafts:
        return ()
    best = min(drafts, key=lambda d: (ledger.totals(d), d))
    if limits.max_bytes is not None and ledger.totals(best).size_bytes > limits.max_bytes:
        return ()
    if not ledger.is_evaluated(best) and ledger.evaluations_left <= 0:
        return ()
    if limits.max_loss is not None and ledger.loss(best) > limits.max_loss:
        return ()
    return (best,)


def check_size(ledger: Ledger) -> None:
    """Give up the size budget, and note it, where not even the smallest plan holds it."""
    if ledger.task.limits.max_bytes is None or ledger.unreachable is not None:
        return
    if not ledger.solve("size", may_be_slower=True):
        ledger.unreachable = "size"


def _fastest_that_holds(ledger: Ledger, max_loss: float) -> Proposal:
    top = ledger.solve("latency", may_be_slower=True)
    holding = [d for d in top if ledger.loss(d) <= max_loss]
    if top[0] in holding:
        return Proposal(tuple(holding[:FINALISTS]), None)
    mildest = ledger.solve("error", may_be_slower=True)[0]
    low = ledger.totals(mildest).error * (1 + TOLERANCE)
    start = ledger.solve("latency", max_error=low, may_be_slower=True)[0]
    if ledger.loss(start) > max_loss:
        return Proposal((start,), "drop")
    holding += [start, *_search_budget(ledger, max_loss, start, top[0])]
    error = ledger.totals(min(holding, key=lambda d: (ledger.totals(d), d))).error
    # The same budget on every table: prices may be wrong in other directions on the others.
    same = ledger.solve("latency", max_error=error * (1 + TOLERANCE), may_be_slower=True)
    holding += [d for d in same if ledger.loss(d) <= max_loss]
    ranked = sorted(dict.fromkeys(holding), key=lambda d: (ledger.totals(d), d))
    return Proposal(tuple(ranked[:FINALISTS]), "drop")


def _search_budget(ledger: Ledger, max_loss: float, start: Draft, top: Draft) -> list[Draft]:
    """Plans that hold, found between a budget that does and the error of a plan that does not.

    Alternates a guess in proportion to the loss with halving the bracket on a log scale. Half of
    the evaluations, or more, stay for the finalists and the search around them.
    """
    low, high, high_loss = ledger.totals(start).error, ledger.totals(top).error, ledger.loss(top)
    low = max(low, high * SMALLEST_SHARE)
    holding, best = [], start
    reserve = max(ledger.task.max_evaluations // 2, ledger.task.max_evaluations - BRACKET_LOOKS)
    for step in range(MAX_STEPS):
        if high <= low * RESOLUTION:
            break
        budget = math.sqrt(low * high)
        guess = high * max_loss / high_loss
        if step % 2 == 0 and low * RESOLUTION < guess < high / RESOLUTION:
            budget = guess
        draft = ledger.solve("latency", max_error=budget, may_be_slower=True)[0]
        if draft == best:
            low = budget
            continue
        if ledger.evaluations_left <= reserve and not ledger.is_evaluated(draft):
            break
        loss = ledger.loss(draft)
        if loss <= max_loss:
            holding.append(draft)
            low, best = budget, draft
        else:
            high, high_loss = ledger.totals(draft).error, loss
    return holding


def _mildest_in_time(ledger: Ledger, max_ms: float) -> Proposal:
    drafts = ledger.solve("error", max_ms=max_ms * (1 - SPEED_MARGIN))
    if not drafts:
        fastest = ledger.solve("latency", may_be_slower=True)
        return Proposal(tuple(fastest[:FINALISTS]), "latency")
    drafts += ledger.solve("error", max_ms=max_ms * (1 - WIDE_MARGIN))[:1]
    return Proposal(tuple(dict.fromkeys(drafts))[:FINALISTS], "latency")


def _mildest_in_size(ledger: Ledger) -> Proposal:
    if ledger.unreachable == "size":
        return Proposal(tuple(ledger.solve("size", may_be_slower=True)[:FINALISTS]), "size")
    baseline_ms = reference_ms(ledger)
    drafts = ledger.solve("error", max_ms=baseline_ms, may_be_slower=True)
    drafts += ledger.solve("error", max_ms=ledger.task.baseline_ms * (1 - SPEED_MARGIN))[:1]
    if not drafts:  # the size needs it
        drafts = ledger.solve("error", may_be_slower=True)
    return Proposal(tuple(dict.fromkeys(drafts))[:FINALISTS], "size")


def reference_ms(ledger: Ledger) -> float:
    """What a plan that need not be fast may take by prediction: the baseline, as far as tables can tell.

    Where every table predicts its own uncompressed build slower than the baseline was measured, what is left
    alone would not be in time; and by less than a prediction is off, no plan is known to be slower. Else speed
    that nobody asked for would be bought by errors. What was measured decides afterwards.
    """
    natives = [ledger.native_ms(table) for table in range(len(ledger.tables))]
    known = [table.uncertainty for table in ledger.tables if table.uncertainty is not None]
    off = min((found.deviation for found in known), default=0.0)
    return max(ledger.task.baseline_ms, min(natives)) * (1 + max(off, TOLERANCE))
