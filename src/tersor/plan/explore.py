"""Search around a plan by real evaluations, led by what they have taught so far.

Each round the surrogate is fitted to all looks; the program is solved with its errors and with
errors drawn from what it leaves open; those plans and the neighbours of the best one, of one and two
moves, are ranked by the gain that they may bring. A few are looked at on few samples, the better
ones on more, the best on all: a plan that is not kept has cost little, and none is kept that all
samples say is worse. Differences are paired, sample by sample; below their standard error plans are
equal and the older one stays.

It ends with the budget of looks, where no plan is left that should gain anything, or after many
looks without a gain.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
from scipy.special import ndtr

from tersor.core.records import Level
from tersor.plan.moves import moved
from tersor.plan.problem import Problem
from tersor.plan.ranks import Array, Grid, Ranks
from tersor.plan.solve import optimise
from tersor.plan.surrogate import Sizes, Surrogate

Assignment = Mapping[str, Level]
# Shares of the samples of each stage of a round, and how many plans take part in it.
SHARES = (0.25, 0.5, 1.0)
TAKEN = (6, 3, 2)
# Programs a round with errors drawn from the surrogate, beside the one with its means.
DRAWS = 3
# Looks without a gain after which the search ends.
PATIENCE = 24
# An expected gain below this share is not worth a look; nor is a latency that measures as equal.
LEAST_GAIN = 1e-4
SMALLEST_GAIN = 5e-3
ROUNDING, TINY = 1e-9, 1e-30
USED, EXHAUSTED = "the looks are used up", "no plan is left that should gain anything"
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


@dataclass(frozen=True, slots=True)
class _Seen:
    row: Ranks  # [sites]
    losses: Array  # [n]
    share: float


class Explorer:
    """One search.

    Attributes:
        best: The best plan so far.
        found: Every plan that was the best after the first one, in order.
        rounds: How many were raced.
        reason: Why it ended.
    """

    def __init__(self, aim: Aim, judge: Judge, start: Assignment) -> None:
        self.aim, self.judge = aim, judge
        self.found: list[dict[str, Level]] = []
        self.rounds = 0
        self.reason = ""
        self._grid = Grid(aim.problem)
        self._best = self._grid.encode([start])[0]
        self._seen: dict[bytes, _Seen] = {}

    @property
    def best(self) -> dict[str, Level]:
        """Every site's level."""
        return self._grid.decode(self._best)

    def run(self) -> list[dict[str, Level]]:
        """The plans that were better than all before, the best last; empty where none was."""
        self._look(self._best, 1.0)
        idle = 0
        while not self.reason:
            rows = self._ranked() if self.judge.looks_left > 0 else []
            if not rows:
                used = self.judge.looks_left <= 0
                self.reason = USED if used else EXHAUSTED
                break
            idle = 0 if self._race(rows) else idle + len(rows)
            self.rounds += 1
            if idle >= PATIENCE:
                self.reason = f"nothing was gained in {idle} looks"
        return self.found

    # What to look at

    def _ranked(self) -> list[Ranks]:
        """Unseen plans that should gain, the most promising first, each told of those before."""
        rows, losses, errors = self._observed()
        first = surrogate = Surrogate(self._grid, rows, losses, errors)
        pool = self._pool(first)
        pool = pool[np.argsort(-self._gains(pool, first), kind="stable")[:LISTED]]
        chosen: list[Ranks] = []
        while len(pool) and len(chosen) < min(TAKEN[0], self.judge.looks_left):
            if chosen:  # as if they were what is expected of them
                told = np.stack(chosen)
                surrogate = self._told(first.sizes, told, first.predict(told)[0])
            gains = self._gains(pool, surrogate)
            place = int(np.argmax(gains))
            if gains[place] <= LEAST_GAIN * self._scale():
                break
            chosen.append(pool[place])
            pool = np.delete(pool, place, axis=0)
        return chosen

    def _told(self, sizes: Sizes, x: Ranks, y: Array) -> Surrogate:
        """The surrogate of what was observed and of some beliefs."""
        rows, losses, errors = self._observed()
        return Surrogate(
            self._grid,
            np.concatenate([rows, x]),
            np.concatenate([losses, y]),
            np.concatenate([errors, np.zeros(len(y))]),
            sizes,
        )

    def _pool(self, surrogate: Surrogate) -> Ranks:
        """Plans that hold the budgets: the program's, their neighbours, and so on."""
        rng = np.random.default_rng([self.aim.seed, self.rounds])
        starts = [self._best, *self._programs(surrogate, rng)]
        rows = [np.stack(starts)]
        for start in starts:
            rows += self._climb(start, surrogate, rng)
        pool: Ranks = np.unique(np.concatenate(rows), axis=0)
        unseen = np.array([row.tobytes() not in self._seen for row in pool])
        held: Ranks = pool[unseen & self._fits(pool)]
        return held

    def _programs(self, surrogate: Surrogate, generator: np.random.Generator) -> list[Ranks]:
        """Solutions with the surrogate's errors around the best plan: means, and some draws."""
        problem, found = self.aim.problem, []
        for drawn in (None, *[generator] * DRAWS):
            errors, elsewhere = surrogate.around(self._best, drawn)
            limit = self.judge.max_loss
            budget = None if math.isinf(limit) else limit - elsewhere
            solution = optimise(replace(problem, candidates=errors, max_error=budget))
            if solution.is_feasible:
                found.append(self._grid.encode([solution.assignment])[0])
        return found

    def _climb(
        self, start: Ranks, surrogate: Surrogate, generator: np.random.Generator
    ) -> list[Ranks]:
        """The neighbours of a plan, of the most promising of them, and so on."""
        found: list[Ranks] = []
        here, gain = start, -math.inf
        for _ in range(CLIMB):
            near = moved(self._grid, here, generator)
            near = near[self._fits(near)]
            if not len(near):
                break
            found.append(near)
            gains = self._gains(near, surrogate)
            place = int(np.argmax(gains))
            if gains[place] <= gain:
                break
            here, gain = near[place], float(gains[place])
        return found

    def _fits(self, x: Ranks) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Which plans hold the budgets; with the objective ``latency``, and are faster."""
        problem = self.aim.problem
        held: np.ndarray[Any, np.dtype[np.bool_]] = np.ones(len(x), dtype=bool)
        if problem.max_bytes is not None:
            held &= self._grid.size_bytes(x) <= problem.max_bytes
        if problem.objective == "latency":
            held &= self._grid.ms(x) < self._ms(self._best) * (1 - SMALLEST_GAIN)
        elif problem.max_ms is not None:
            held &= self._grid.ms(x) <= problem.max_ms * (1 + ROUNDING)
        return held

    def _ms(self, row: Ranks) -> float:
        return float(self._grid.ms(row[None])[0])

    def _gains(self, pool: Ranks, surrogate: Surrogate) -> Array:
        """Expected gain in what the aim minimises [n]."""
        if not len(pool):
            return np.zeros(0)
        means, deviations = surrogate.predict(pool)
        deviations = np.maximum(deviations, ROUNDING * np.abs(means) + TINY)
        if self.aim.problem.objective == "latency":
            saved = self._ms(self._best) - self._grid.ms(pool)
            held: Array = saved * ndtr((self.judge.max_loss - means) / deviations)
            return held
        z = (self._mean(self._best) - means) / deviations
        density = np.exp(-0.5 * np.square(z)) / math.sqrt(2 * math.pi)
        gain: Array = deviations * (z * ndtr(z) + density)
        return gain

    def _scale(self) -> float:
        if self.aim.problem.objective == "latency":
            return self._ms(self._best)
        return abs(self._mean(self._best))

    # Looking

    def _race(self, rows: Sequence[Ranks]) -> bool:
        """Whether one of the plans is the new best."""
        left = list(rows)
        for share, taken in zip(SHARES, TAKEN, strict=True):
            left = left[:taken]
            for row in left:
                self._look(row, share)
            left = sorted((row for row in left if self._is_open(row)), key=self._order)
        for row in left:
            plan = self._grid.decode(row)
            if self._is_better(row) and self.judge.accepts(plan):
                self._best = row
                self.found.append(plan)
                return True
        return False

    def _look(self, row: Ranks, share: float) -> None:
        losses = np.atleast_1d(self.judge.look(self._grid.decode(row), share)).astype(np.float64)
        old = self._seen.get(row.tobytes())
        if old is None or share > old.share:
            self._seen[row.tobytes()] = _Seen(row, losses, share)

    def _order(self, row: Ranks) -> float:
        if self.aim.problem.objective == "latency":
            return self._ms(row)
        return self._mean(row)

    def _is_open(self, row: Ranks) -> bool:
        """Whether more samples may still show a plan to be good."""
        if self.aim.problem.objective == "latency":
            mean, error = self._estimate(row)
            return mean - error <= self.judge.max_loss
        gain, error = self._difference(row)
        return gain + error > 0

    def _is_better(self, row: Ranks) -> bool:
        if self.aim.problem.objective == "latency":
            return self._mean(row) <= self.judge.max_loss
        gain, error = self._difference(row)
        return gain > error

    def _difference(self, row: Ranks) -> tuple[float, float]:
        """How much less a plan loses than the best, on the samples that both saw, +- its error."""
        mine = self._seen[row.tobytes()].losses
        its = self._seen[self._best.tobytes()].losses
        n = min(len(mine), len(its))
        off = its[:n] - mine[:n]
        error = float(off.std(ddof=1)) / math.sqrt(n) if n > 1 else 0.0
        return float(off.mean()), error

    def _estimate(self, row: Ranks) -> tuple[float, float]:
        """The loss on all samples, and its standard error where the plan saw only some.

        From the best plan's own loss, times the ratio of both on the samples that both saw.
        """
        seen, best = self._seen[row.tobytes()], self._seen[self._best.tobytes()]
        if seen.share >= 1:
            return float(seen.losses.mean()), 0.0
        n = min(len(seen.losses), len(best.losses))
        gain, error = self._difference(row)
        whole, part = float(best.losses.mean()), float(best.losses[:n].mean())
        factor = whole / part if part > 0 else 1.0
        return (part - gain) * factor, error * factor

    def _mean(self, row: Ranks) -> float:
        return self._estimate(row)[0]

    def _observed(self) -> tuple[Ranks, Array, Array]:
        """Plans that were seen, their losses and those losses' standard errors."""
        rows = np.stack([seen.row for seen in self._seen.values()])
        found = [self._estimate(row) for row in rows]
        losses, errors = np.array(found, dtype=np.float64).T
        return rows, losses, errors
