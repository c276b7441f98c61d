"""Search around a plan by real evaluations, led by what they have taught so far.

Each round the surrogate is fitted to all looks; the program is solved with its errors and with
errors drawn from what it leaves open; those plans and the neighbours of the best one, of one and two
moves, are ranked by the gain that they may bring. A few are looked at on few samples, the better
ones on more, the best on all: a plan that is not kept has cost little, and none is kept that all
samples say is worse. Differences are paired, sample by sample; below their standard error plans are
equal and the older one stays.

It ends with the budget of looks, where no plan is left that should gain anything, or after several
rounds without a gain.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, runtime_checkable

import numpy as np

from tersor.core.records import Level
from tersor.plan.moves import moved
from tersor.plan.problem import Problem
from tersor.plan.solve import optimise
from tersor.plan.surrogate import Array, Sizes, Surrogate

Assignment = Mapping[str, Level]
Key = tuple[tuple[str, Level], ...]

# Shares of the samples of each stage of a round, and how many plans take part in it.
SHARES = (0.25, 0.5, 1.0)
TAKEN = (6, 3, 2)
# Programs a round with errors drawn from the surrogate, beside the one with its means.
DRAWS = 3
# Rounds without a gain after which the search ends.
PATIENCE = 4
# A gain below this share is not worth a look.
LEAST_GAIN = 5e-4
# Plans of a round that are compared again after each choice.
LISTED = 200
# Steps from neighbour to neighbour, by what the surrogate says.
CLIMB = 3


@runtime_checkable
class Judge(Protocol):
    """Who looks at plans."""

    def look(self, plan: Assignment, share: float) -> Array:
        """Losses of the plan on the first share of the samples [n]; one number where there are none."""

    def accepts(self, plan: Assignment) -> bool:
        """Whether a plan that all samples call better may be the next one."""

    @property
    def looks_left(self) -> int:
        """How many more plans may be looked at."""

    @property
    def max_loss(self) -> float:
        """What the mean loss of a plan may be, where the objective is the latency; else infinite."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Aim:
    """What is better: the problem's objective, ``error`` within a latency or bytes, or ``latency``.

    Attributes:
        problem: The objective and its budgets; that on the error is the judge's.
        seed: Of what is drawn.
    """

    problem: Problem
    seed: int = 0


@dataclass
class Explorer:
    """One search; ``best`` moves, and ``found`` keeps every plan that was the best, in order."""

    aim: Aim
    judge: Judge
    best: Assignment
    seen: dict[Key, "_Seen"] = field(default_factory=dict)
    found: list[Assignment] = field(default_factory=list)
    rounds: int = 0
    reason: str = ""

    def run(self) -> list[Assignment]:
        """The plans that were better than all before, the best last; empty where none was."""
        self._look(self.best, 1.0)
        idle = 0
        while True:
            if self.judge.looks_left <= 0:
                self.reason = "the looks are used up"
                return self.found
            pool = self._ranked()
            if not pool:
                self.reason = "no plan is left that should gain anything"
                return self.found
            idle = 0 if self._race(pool) else idle + 1
            self.rounds += 1
            if idle >= PATIENCE:
                self.reason = f"nothing was gained in {PATIENCE} rounds"
                return self.found

    # What to look at

    def _ranked(self) -> list[Assignment]:
        """Unseen plans that should gain, the most promising first, each told of those before."""
        pool = self._pool()
        wanted = min(TAKEN[0], self.judge.looks_left)
        chosen: list[Assignment] = []
        observed = self._observed()
        first = surrogate = self._surrogate(observed)
        if pool:
            order = np.argsort(-self._gains(pool, first), kind="stable")[:LISTED]
            pool = [pool[int(i)] for i in order]
        while pool and len(chosen) < wanted:
            if chosen:  # as if they were what is expected of them
                means, _ = first.predict(chosen)
                told = [_Point(p, float(m), 0.0) for p, m in zip(chosen, means, strict=True)]
                surrogate = self._surrogate([*observed, *told], first.sizes)
            gains = self._gains(pool, surrogate)
            place = int(np.argmax(gains))
            if gains[place] <= LEAST_GAIN * self._scale():
                break
            chosen.append(pool.pop(place))
        return chosen

    def _pool(self) -> list[Assignment]:
        problem, surrogate = self.aim.problem, self._surrogate(self._observed())
        rng = np.random.default_rng([self.aim.seed, self.rounds])
        found: dict[Key, Assignment] = {}
        for generator in (None, *[rng] * DRAWS):
            errors, elsewhere = surrogate.around(self.best, generator)
            budget = None if math.isinf(self.judge.max_loss) else self.judge.max_loss - elsewhere
            solution = optimise(replace(problem, candidates=errors, max_error=budget))
            if solution.is_feasible:
                found[key_of(solution.assignment)] = solution.assignment
        for start in [self.best, *list(found.values())]:
            for plan in self._climb(start, surrogate, rng):
                found.setdefault(key_of(plan), plan)
        return [plan for key, plan in found.items() if key not in self.seen and self._fits(plan)]

    def _climb(
        self, start: Assignment, surrogate: Surrogate, generator: np.random.Generator
    ) -> list[Assignment]:
        """The neighbours of a plan, of the most promising of them, and so on."""
        found: list[Assignment] = []
        here = start
        for _ in range(CLIMB):
            near = [p for p in moved(self.aim.problem, here, generator) if self._fits(p)]
            if not near:
                break
            found += near
            gains = self._gains(near, surrogate)
            place = int(np.argmax(gains))
            if gains[place] <= self._gains([here], surrogate)[0] and here is not start:
                break
            here = near[place]
        return found

    def _fits(self, plan: Assignment) -> bool:
        problem = self.aim.problem
        totals, here = problem.totals(plan), problem.totals(self.best)
        if problem.max_bytes is not None and totals.size_bytes > problem.max_bytes:
            return False
        if problem.objective == "latency":
            return totals.ms < here.ms * (1 - LEAST_GAIN)
        return problem.max_ms is None or totals.ms <= problem.max_ms * (1 + 1e-9)

    def _gains(self, pool: Sequence[Assignment], surrogate: Surrogate) -> Array:
        """Expected gain in what the aim minimises."""
        means, deviations = surrogate.predict(pool)
        deviations = np.maximum(deviations, 1e-12)
        if self.aim.problem.objective == "error":
            z = (self._mean(self.best) - means) / deviations
            gain: Array = deviations * (z * _normal(z) + _density(z))
            return gain
        here = self.aim.problem.totals(self.best).ms
        saved = np.array([here - self.aim.problem.totals(p).ms for p in pool])
        held: Array = saved * _normal((self.judge.max_loss - means) / deviations)
        return held

    def _scale(self) -> float:
        if self.aim.problem.objective == "latency":
            return self.aim.problem.totals(self.best).ms
        return abs(self._mean(self.best))

    # Looking

    def _race(self, pool: Sequence[Assignment]) -> bool:
        """Whether one of the plans is the new best."""
        left = list(pool)
        for share, taken in zip(SHARES, TAKEN, strict=True):
            left = left[:taken]
            for plan in left:
                self._look(plan, share)
            left = sorted((p for p in left if self._is_open(p)), key=self._order)
        for plan in left:
            if self._is_better(plan) and self.judge.accepts(plan):
                self.best = plan
                self.found.append(plan)
                return True
        return False

    def _look(self, plan: Assignment, share: float) -> None:
        losses = np.atleast_1d(np.asarray(self.judge.look(plan, share), dtype=np.float64))
        key = key_of(plan)
        old = self.seen.get(key)
        if old is None or len(losses) > len(old.losses) or share > old.share:
            self.seen[key] = _Seen(plan, losses, share)

    def _order(self, plan: Assignment) -> float:
        if self.aim.problem.objective == "latency":
            return self.aim.problem.totals(plan).ms
        return self._mean(plan)

    def _is_open(self, plan: Assignment) -> bool:
        """Whether more samples may still show a plan to be good."""
        if self.aim.problem.objective == "latency":
            mean, error = self._estimate(plan)
            return mean - error <= self.judge.max_loss
        gain, error = self._difference(plan)
        return gain + error > 0

    def _is_better(self, plan: Assignment) -> bool:
        if self.aim.problem.objective == "latency":
            return self._mean(plan) <= self.judge.max_loss
        gain, error = self._difference(plan)
        return gain > error

    def _difference(self, plan: Assignment) -> tuple[float, float]:
        """How much less a plan loses than the best, on the samples that both saw, +- its error."""
        mine, its = self.seen[key_of(plan)].losses, self.seen[key_of(self.best)].losses
        n = min(len(mine), len(its))
        off = its[:n] - mine[:n]
        error = float(off.std(ddof=1)) / math.sqrt(n) if n > 1 else 0.0
        return float(off.mean()), error

    def _estimate(self, plan: Assignment) -> tuple[float, float]:
        """The loss on all samples, and its standard error where it saw only some.

        From the best plan's own loss, times the ratio of both on the samples that both saw.
        """
        seen, best = self.seen[key_of(plan)], self.seen[key_of(self.best)]
        if seen.share >= 1:
            return float(seen.losses.mean()), 0.0
        n = min(len(seen.losses), len(best.losses))
        gain, error = self._difference(plan)
        whole, part = float(best.losses.mean()), float(best.losses[:n].mean())
        factor = whole / part if part > 0 else 1.0
        return (part - gain) * factor, error * factor

    def _mean(self, plan: Assignment) -> float:
        return self._estimate(plan)[0]

    def _observed(self) -> list["_Point"]:
        return [_Point(s.plan, *self._estimate(s.plan)) for s in self.seen.values()]

    def _surrogate(self, points: Sequence["_Point"], sizes: Sizes | None = None) -> Surrogate:
        return Surrogate(
            self.aim.problem.levels(),
            [(p.plan, p.loss) for p in points],
            [p.error for p in points],
            sizes,
        )


@dataclass(frozen=True, slots=True)
class _Seen:
    plan: Assignment
    losses: Array
    share: float


@dataclass(frozen=True, slots=True)
class _Point:
    plan: Assignment
    loss: float
    error: float


def key_of(plan: Assignment) -> Key:
    """What tells one plan from another."""
    return tuple(sorted(plan.items()))


def _normal(z: Array) -> Array:
    values: Array = np.array([0.5 * (1 + math.erf(x / math.sqrt(2))) for x in z])
    return values


def _density(z: Array) -> Array:
    density: Array = np.exp(-0.5 * np.square(z)) / math.sqrt(2 * math.pi)
    return density
