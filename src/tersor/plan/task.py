"""What the search is asked, what it may call, and what it answers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tersor.core.errors import ConfigError
from tersor.core.levels import Inside
from tersor.core.records import BaselineRow, BuildChoice, Candidate, Level, Plan, PriceTable, Term
from tersor.plan.problem import Problem, native_levels

Assignment = Mapping[str, Level]
Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The budgets of a target, in the search's own units; at least one is set.

    Args:
        max_ms: Latency of one call, in the session of the baseline's median.
        max_bytes: Bytes of the artifact.
        max_loss: Quality loss in the units of ``evaluate``: points, or 1 - agreement.
        max_peak: Bytes of extra memory that one call takes at its peak; judged among the plans
            that are built, as no price knows it.
    """

    max_ms: float | None = None
    max_bytes: float | None = None
    max_loss: float | None = None
    max_peak: float | None = None

    def __post_init__(self) -> None:
        if self.max_ms is None and self.max_bytes is None and self.max_loss is None:
            raise ConfigError(
                "the plan has no budget that it can act on: found none of max_ms, max_bytes and "
                "max_loss; give a speed, a size or a quality in the target"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """Everything the search reads.

    Args:
        candidates: Site -> its candidates; pinned sites are left out.
        tables: One price table for each build choice in the race; at least one.
        tensors: Site -> the tensor that it reads.
        fixed_bytes: Bytes of everything that is no site, pinned sites included.
        size_terms: Bytes that depend on the levels of several sites; see ``Problem``.
        inside: Branch -> sites that go with it.
        limits: The target's budgets.
        baseline: The best uncompressed build.
        pinned: Pinned site -> why.
        max_evaluations: Plans whose quality is looked at by real forwards, besides the baseline's
            own; on however few samples.
        max_seconds: That the looks of the search around the plan may take; the last one may end
            later.
        max_rounds: Rounds of measuring, correcting and solving again.
        seed: Chooses among swap moves where there are too many.
        target, model: Copied into the plans.
    """

    candidates: Mapping[str, Sequence[Candidate]]
    tables: tuple[PriceTable, ...]
    tensors: Mapping[str, str]
    fixed_bytes: int
    limits: Limits
    baseline: BaselineRow
    pinned: Mapping[str, str] = field(default_factory=dict)
    max_evaluations: int = 100
    max_seconds: float = 240.0
    max_rounds: int = 3
    seed: int = 0
    target: Mapping[str, float] = field(default_factory=dict)
    model: str = ""
    size_terms: tuple[Term, ...] = ()
    inside: Inside = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.tables:
            raise ConfigError("found no price table, wanted at least one; run the price stage")
        if self.baseline.choice is None:
            raise ConfigError(
                f"baseline {self.baseline.name}: found the eager model, wanted a build; the best "
                "uncompressed build is what speeds are compared with"
            )
        if self.max_evaluations < 0 or self.max_rounds < 1:
            raise ConfigError(
                f"found max_evaluations={self.max_evaluations}, max_rounds={self.max_rounds}; "
                "wanted at least 0 and 1"
            )

    @property
    def baseline_choice(self) -> BuildChoice:
        """How the best uncompressed build is made."""
        choice = self.baseline.choice
        assert choice is not None  # checked at birth
        return choice

    @property
    def baseline_ms(self) -> float:
        """Median latency of the best uncompressed build."""
        return self.baseline.timing.median_ms

    def baseline_assignment(self) -> dict[str, Level]:
        """Every site as the best uncompressed build has it."""
        precision, counts = self.baseline_choice.precision, self.tables[0].native
        return native_levels(self.candidates, precision, counts)

    def problem(self, table: PriceTable) -> Problem:
        """The allocation problem on one table, with the size budget and no other."""
        return Problem(
            candidates=self.candidates,
            table=table,
            tensors=self.tensors,
            fixed_bytes=self.fixed_bytes,
            size_terms=self.size_terms,
            inside=self.inside,
            max_bytes=self.limits.max_bytes,
        )


def _no_noise(one: Assignment, other: Assignment) -> float:
    """Losses that are exact."""
    del one, other
    return 0.0


def _no_clock() -> float:
    """Looks that take no time."""
    return 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Tools:
    """What the search calls.

    Args:
        evaluate: Quality loss of an assignment on the search part, by real forwards; lower is
            better. Called once for each distinct assignment.
        measure: Builds plans and measures them interleaved with the baseline; milliseconds,
            normalised so that the baseline would show ``baseline_ms``.
        correct: A table moved by one measured plan: (table, assignment, tensors, measured_ms).
        changes: How much an assignment changes the outputs on the first share (0..1] of the search
            samples, one number a sample [n], lower is better, finer than the loss. None: the loss
            itself leads the search.
        noise: Standard error of the difference of two evaluated losses.
        clock: Seconds that looks have taken since the search began. Counted so that a search which
            goes on after an interruption reads the same.
        peak: Bytes of extra memory of a plan's build at the peak of one call; None where the
            system does not tell.
        least_ms: What a measured plan takes at the least: the lower 95 % bound beside the baseline,
            normalised as ``measure`` is. None: its median.
        beside: How many times the latency of a plan is that of another one, both measured in one
            interleaved run, and the lower 95 % bound of that. None: each as it was measured at its own
            moment.
    """

    evaluate: Callable[[Assignment], float]
    measure: Callable[[Sequence[Plan]], Sequence[float]]
    correct: Callable[[PriceTable, Assignment, Mapping[str, str], float], PriceTable]
    changes: Callable[[Assignment, float], Array] | None = None
    noise: Callable[[Assignment, Assignment], float] = _no_noise
    clock: Callable[[], float] = _no_clock
    peak: Callable[[Plan], int | None] | None = None
    least_ms: Callable[[Plan], float] | None = None
    beside: Callable[[Plan, Plan], tuple[float, float]] | None = None


@dataclass(frozen=True, slots=True, order=True)
class Draft:
    """One level for each site, on one of the task's tables."""

    table: int
    levels: tuple[tuple[str, Level], ...]  # by site name

    @property
    def assignment(self) -> dict[str, Level]:
        """Site -> level."""
        return dict(self.levels)


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """One real evaluation: the sum of the candidates' errors against the loss that it caused."""

    assignment: Assignment
    error: float
    loss: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What the search answers.

    Attributes:
        plan: The plan to build.
        finalists: One to three plans, the chosen one first, then by latency.
        evaluations: Every real evaluation, in order.
        binding: The constraint by name: latency, size, drop, memory, or "" where nothing binds.
        reason: Why this plan, in words.
        target_met_on_search: Every budget holds by the numbers at hand.
        is_baseline: The best uncompressed build is the answer.
        prediction_off: How far the plan's predicted latency is from the measured one, as a share
            of it; None where nothing was measured.
    """

    plan: Plan
    finalists: tuple[Plan, ...]
    evaluations: tuple[Evaluation, ...]
    binding: str
    reason: str
    target_met_on_search: bool
    is_baseline: bool = False
    prediction_off: float | None = None
