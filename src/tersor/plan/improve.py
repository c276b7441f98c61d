"""The search around a measured plan, with the ledger's evaluations.

With a quality budget: faster plans whose real loss holds. Without one: plans that change the outputs
less, within the time and the size, and do not lose more. Where the outputs' change is told apart from
the loss it leads the search, as it is finer than a metric; the loss has the last word.
"""

import math
from dataclasses import dataclass, field, replace

from tersor.plan.explore import Aim, Explorer
from tersor.plan.ledger import Ledger, draft_of
from tersor.plan.problem import Problem
from tersor.plan.proposals import SPEED_MARGIN, reference_ms
from tersor.plan.sweep import error_budget
from tersor.plan.task import Array, Assignment, Draft

# Evaluated plans whose change is looked at, to know which change loses how much.
ANCHORS = 4


def improve(ledger: Ledger, incumbent: Draft) -> list[Draft]:
    """Plans that are better than the incumbent by real evaluations, best last.

    Better: with a quality budget, predicted faster while the real loss holds; without one, outputs
    that change less by more than the difference's standard error, while the loss is no worse by
    more than its own, within the time and the size.
    """
    limits = ledger.task.limits
    if ledger.unreachable and limits.max_ms is None and limits.max_loss is None:
        return []  # the smallest plan is the answer, and every milder one is larger
    if ledger.evaluations_left <= 0 or ledger.is_out_of_time():
        ledger.ended = "no look was left for it"
        return []
    judge = _Judge(ledger, incumbent)
    aim = Aim(problem=_problem(ledger, incumbent), seed=ledger.task.seed)
    explorer = Explorer(aim, judge, incumbent.assignment)
    found = explorer.run()
    ledger.ended = explorer.reason
    if ledger.is_out_of_time():
        ledger.ended = f"its {ledger.task.max_seconds:.0f} s were used up"
    return [draft_of(incumbent.table, plan) for plan in found]


def _problem(ledger: Ledger, incumbent: Draft) -> Problem:
    problem, limits = ledger.problem(incumbent.table), ledger.task.limits
    if limits.max_loss is not None:
        return replace(problem, objective="latency", max_ms=None, max_error=None)
    here = ledger.totals(incumbent)
    if limits.max_ms is not None:
        cap = max(limits.max_ms * (1 - SPEED_MARGIN), here.ms)
    else:
        cap = max(here.ms, reference_ms(ledger))
    return replace(problem, objective="error", max_ms=cap, max_error=None)


@dataclass
class _Judge:
    """Looks and evaluations of the ledger, for plans on one table."""

    ledger: Ledger
    best: Draft
    pairs: list[tuple[float, float]] = field(default_factory=list)  # change, loss

    def __post_init__(self) -> None:
        limit = self.ledger.task.limits.max_loss
        if limit is None or not self.ledger.has_changes:
            return
        known = [(e.assignment, e.loss) for e in self.ledger.evaluations]
        for plan, _ in sorted(known, key=lambda row: abs(row[1] - limit))[:ANCHORS]:
            self._pair(self._draft(plan))

    def _draft(self, plan: Assignment) -> Draft:
        return draft_of(self.best.table, plan)

    def _pair(self, draft: Draft) -> None:
        change = float(self.ledger.changes(draft, 1.0).mean())
        self.pairs.append((change, self.ledger.loss(draft)))

    def look(self, plan: Assignment, share: float) -> Array:
        """Changes on a share of the samples, or the loss itself."""
        return self.ledger.changes(self._draft(plan), share)

    def accepts(self, plan: Assignment) -> bool:
        """Whether the loss agrees."""
        draft, limit = self._draft(plan), self.ledger.task.limits.max_loss
        if limit is None:
            accepted = not self.ledger.is_worse(draft, self.best)
        else:
            accepted = self.ledger.loss(draft) <= limit
            if self.ledger.has_changes:
                self._pair(draft)
        if accepted:
            self.best = draft
        return accepted

    @property
    def looks_left(self) -> int:
        """Of the task's; none where its seconds are used up."""
        return 0 if self.ledger.is_out_of_time() else self.ledger.evaluations_left

    @property
    def max_loss(self) -> float:
        """The change, or loss, at which the quality budget should be used up."""
        limit = self.ledger.task.limits.max_loss
        if limit is None:
            return math.inf
        return error_budget(self.pairs, limit) if self.ledger.has_changes else limit
