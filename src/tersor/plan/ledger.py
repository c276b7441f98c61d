"""What a search has paid for: each real evaluation and each measurement once.

The one stateful part of the stage. Tables move with every measurement, so that totals of a draft
are always read from here.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from tersor.core.records import Candidate, Level, Plan, PriceTable
from tersor.plan.problem import Constraint, Objective, Problem, Totals
from tersor.plan.solve import TOLERANCE, optimise
from tersor.plan.sweep import expected_loss
from tersor.plan.task import Array, Assignment, Draft, Evaluation, Task, Tools

Key = tuple[tuple[str, Level], ...]


def draft_of(table: int, assignment: Assignment) -> Draft:
    """The draft of an assignment on a table."""
    return Draft(table, _key(assignment))


def _key(assignment: Assignment) -> Key:
    return tuple((site, assignment[site]) for site in sorted(assignment))


class Ledger:
    """Tables as corrected so far, evaluated losses and measured latencies."""

    def __init__(self, task: Task, tools: Tools, known: Sequence[Evaluation] = ()) -> None:
        self.task = task
        self.tables: list[PriceTable] = list(task.tables)
        self.evaluations: list[Evaluation] = list(known)
        self.measured: dict[Draft, float] = {}
        self.unreachable: Constraint | None = None  # a budget that had to be given up
        self.ended = ""  # why the search around the plan ended; "" where there was none
        self._tools = tools
        self._losses: dict[Key, float] = {_key(e.assignment): e.loss for e in known}
        self._free = set(self._losses)
        self._looked: set[Key] = set()  # every plan that was looked at, evaluated or not
        self._peaks: dict[Draft, int | None] = {}
        self._baseline_peak: int | None = None
        self._problems: dict[tuple[int, bool], Problem] = {}

    @property
    def n_looked(self) -> int:
        """Plans whose quality was looked at, on however few samples."""
        return len(self._looked)

    @property
    def evaluations_left(self) -> int:
        """How many more plans the task allows to look at."""
        return self.task.max_evaluations - len(self._looked - self._free)

    def problem(self, table: int) -> Problem:
        """The problem on one table as corrected so far."""
        key = (table, self.unreachable == "size")
        kept = self._problems.get(key)
        if kept is None or kept.table is not self.tables[table]:
            kept = self.task.problem(self.tables[table])
            kept = self._problems[key] = kept.without("size") if key[1] else kept
        return kept

    def native_ms(self, table: int) -> float:
        """Predicted latency of the uncompressed build on a table."""
        return self.tables[table].predict_ms({}, self.task.tensors)

    def solve(
        self,
        objective: Objective,
        *,
        max_ms: float | None = None,
        max_error: float | None = None,
        may_be_slower: bool = False,
    ) -> list[Draft]:
        """The best plan on each table that can hold the budgets, the best table first.

        Unless it may be, no plan is predicted slower than the uncompressed build on its table.
        """
        found = []
        for i in range(len(self.tables)):
            limit = max_ms
            if not may_be_slower:
                native = self.native_ms(i) * (1 + TOLERANCE)
                limit = native if max_ms is None else min(max_ms, native)
            problem = replace(
                self.problem(i), objective=objective, max_ms=limit, max_error=max_error
            )
            solution = optimise(problem)
            if solution.is_feasible:
                found.append(draft_of(i, solution.assignment))
        return sorted(found, key=lambda d: (self.totals(d).of(objective), self.totals(d), d.table))

    def totals(self, draft: Draft) -> Totals:
        """What a draft costs on its table as corrected so far."""
        return self.problem(draft.table).totals(draft.assignment)

    def is_evaluated(self, draft: Draft) -> bool:
        """Whether the real loss of a draft is known."""
        return draft.levels in self._losses

    def loss(self, draft: Draft) -> float:
        """The real quality loss of a draft; evaluated at most once.

        Where the evaluations are used up, the loss that its predicted error should cost.
        """
        if draft.levels in self._losses:
            return self._losses[draft.levels]
        error = self.totals(draft).error
        if self.evaluations_left <= 0 and draft.levels not in self._looked:
            return expected_loss([(e.error, e.loss) for e in self.evaluations], error)
        return self._evaluate(draft.assignment, draft.levels, error)

    def changes(self, draft: Draft, share: float) -> Array:
        """How a draft changes the outputs on a share of the samples; its loss where none tells."""
        if self._tools.changes is None:
            return np.array([self.loss(draft)])
        self._looked.add(draft.levels)
        return self._tools.changes(draft.assignment, share)

    def is_out_of_time(self) -> bool:
        """Whether looks have taken the seconds that the task allows."""
        return self._tools.clock() >= self.task.max_seconds

    @property
    def has_changes(self) -> bool:
        """Whether changes of the outputs are told apart from losses."""
        return self._tools.changes is not None

    def is_worse(self, draft: Draft, other: Draft) -> bool:
        """Whether the loss of a draft is above another's by more than their difference's error."""
        noise = self._tools.noise(draft.assignment, other.assignment)
        return self.loss(draft) > self.loss(other) + noise

    def peak(self, draft: Draft) -> int | None:
        """Extra memory of one call of the draft's build; measured at most once."""
        if draft not in self._peaks:
            measure = self._tools.peak
            self._peaks[draft] = None if measure is None else measure(self.plan(draft))
        return self._peaks[draft]

    def baseline_holds_peak(self) -> bool:
        """Whether the best uncompressed build takes no more memory than allowed; measured once.

        True where no memory is asked for, or the system does not tell.
        """
        limit, measure = self.task.limits.max_peak, self._tools.peak
        if limit is None or measure is None:
            return True
        if self._baseline_peak is None:
            self._baseline_peak = measure(self.baseline_plan()) or 0
        return self._baseline_peak <= limit

    def baseline_loss(self) -> float:
        """The real quality loss of the best uncompressed build; evaluated at most once."""
        assignment = self.task.baseline_assignment()
        known = self._losses.get(_key(assignment))
        if known is not None:
            return known
        self._free.add(_key(assignment))
        return self._evaluate(assignment, _key(assignment), self._baseline_error())

    def _baseline_error(self) -> float:
        native, rows = self.task.baseline_assignment(), self.task.candidates
        found = [
            min((c.error for c in rows[s] if c.level == v), default=0.0) for s, v in native.items()
        ]
        return sum(found, 0.0)

    def _evaluate(self, assignment: Assignment, levels: Key, error: float) -> float:
        loss = float(self._tools.evaluate(assignment))
        self._looked.add(levels)
        self._losses[levels] = loss
        self.evaluations.append(Evaluation(assignment=assignment, error=error, loss=loss))
        return loss

    def measure(self, drafts: Sequence[Draft]) -> bool:
        """Measure the drafts that were not yet, correct their tables; False if all were."""
        fresh = [d for d in dict.fromkeys(drafts) if d not in self.measured]
        if not fresh:
            return False
        times = self._tools.measure([self.plan(d) for d in fresh])
        for draft, ms in zip(fresh, times, strict=True):
            self.measured[draft] = float(ms)
            if not math.isfinite(ms):  # it could not be built: no word about the prices
                continue
            self.tables[draft.table] = self._tools.correct(
                self.tables[draft.table], draft.assignment, self.task.tensors, float(ms)
            )
        return True

    def measure_beside(self, draft: Draft, other: Draft) -> float:
        """How many times the latency of a measured draft another surely takes; infinite if that can't be built.

        The other counts as measured then, at the speed that the machine had for the first, also where it was
        measured before, at a moment of its own.
        """
        if self._tools.beside is None:
            self.measure([other])
            return self.measured[other] / self.measured[draft]
        times, least = self._tools.beside(self.plan(other), self.plan(draft))
        self.measured[other] = self.measured[draft] * times
        return least

    def ms(self, draft: Draft) -> float:
        """Measured latency of a draft, or the predicted one."""
        return self.measured.get(draft, self.totals(draft).ms)

    def least_ms(self, draft: Draft) -> float:
        """The lower bound of a measured draft's latency."""
        if self._tools.least_ms is None:
            return self.measured[draft]
        return min(self.measured[draft], self._tools.least_ms(self.plan(draft)))

    def disagreement(self, draft: Draft) -> float:
        """How far the prediction is from the measurement; infinite where there is none."""
        if draft not in self.measured:
            return float("inf")
        return abs(self.totals(draft).ms / self.measured[draft] - 1)

    def plan(self, draft: Draft, binding: str = "") -> Plan:
        """The record of a draft, with what is known about it."""
        totals = self.totals(draft)
        levels = self.problem(draft.table).levels()
        chosen: list[Candidate] = [levels[site][level] for site, level in draft.levels]
        return Plan(
            assignment=draft.assignment,
            choice=self.tables[draft.table].choice,
            predicted_ms=totals.ms,
            predicted_bytes=totals.size_bytes,
            predicted_error=totals.error,
            target=self.task.target,
            settings={c.site: c.detail for c in chosen if c.detail},
            methods={
                c.site: c.method
                for c in chosen
                if c.level != self.problem(draft.table).native_of(c.site)
            },
            binding=binding,
            seed=self.task.seed,
            model=self.task.model,
            measured_ms=self.measured.get(draft),
            measured_error=self._losses.get(draft.levels),
            predicted_ms_se=self.tables[draft.table].predict_se_ms(
                draft.assignment, self.task.tensors
            ),
        )

    def baseline_plan(self, binding: str = "") -> Plan:
        """The best uncompressed build as a plan."""
        task, assignment = self.task, self.task.baseline_assignment()
        return Plan(
            assignment=assignment,
            choice=task.baseline_choice,
            predicted_ms=task.baseline_ms,
            predicted_bytes=task.baseline.size_bytes,
            predicted_error=self._baseline_error(),
            target=task.target,
            binding=binding,
            seed=task.seed,
            model=task.model,
            measured_ms=task.baseline_ms,
            measured_error=self._losses.get(_key(assignment)),
        )

    def is_baseline(self, draft: Draft) -> bool:
        """Whether a draft is the best uncompressed build itself."""
        same = self.tables[draft.table].choice == self.task.baseline_choice
        return same and draft.assignment == self.problem(draft.table).native
