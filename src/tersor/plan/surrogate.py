"""What real evaluations teach about the sum of errors: which terms are off, and which pairs interact.

A Gaussian process over plans. Its mean is the sum of the candidates' errors, which is what the
program minimises; its covariance says how that sum may be wrong:

    k(a, b) = c^2 (S^2 s_a s_b + T^2 sum_i u_i^2 + P^2 sum_{i<j} u_i u_j),
    u_i = sqrt(e_i(a) e_i(b)) * R^|rank of a_i - rank of b_i|,   s_a = sum_i e_i(a)

The first term is one common factor, the second a factor for each (site, level) of which near levels
have similar ones, the third a product for each pair of sites: errors that point the same way add
more than their squares. What is left is noise in proportion to the loss. The four sizes are those
of the greatest likelihood on a small grid. Around a plan the posterior is a sum again, so that the
program can be solved with it.

Source: Rasmussen and Williams 2006, algorithm 2.1 and section 5.4.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tersor.core.records import Candidate, Level

Assignment = Mapping[str, Level]
Array = np.ndarray[Any, np.dtype[np.float64]]
Ranks = np.ndarray[Any, np.dtype[np.int64]]

# Relative sizes of what may be off: of all errors together, of one (site, level), of a pair, of a
# single plan. The first is wide: losses may be in other units than errors.
COMMON = 0.5
TERMS = (0.1, 0.3, 1.0)
PAIRS = (0.0, 0.1, 0.3, 1.0)
NOISES = (0.01, 0.03, 0.1)
# How much of its correction the next level of a site shares.
NEAR = 0.7


@dataclass(frozen=True, slots=True)
class Sizes:
    """Relative sizes of what may be off: of a (site, level), of a pair, of a single plan."""

    term: float
    pair: float
    noise: float


# Before enough plans were seen to tell: the likelihood of few is greatest where nothing is off.
ENOUGH = 8
FIRST = Sizes(term=0.3, pair=0.3, noise=0.03)


@dataclass(frozen=True, slots=True)
class _Posterior:
    weights: Array  # [n]
    factor: Array  # Cholesky of the covariance of what was seen, [n, n]


class Surrogate:
    """The loss of any plan, as far as some evaluated plans tell.

    Args:
        levels: Site -> level -> candidate, the errors' source; the native level first.
        seen: Evaluated plans and their losses; at least one.
        errors: Standard error of each loss, where it was estimated on few samples.
        sizes: Of the covariance's terms; None: the most likely ones.
    """

    def __init__(
        self,
        levels: Mapping[str, Mapping[Level, Candidate]],
        seen: Sequence[tuple[Assignment, float]],
        errors: Sequence[float] | None = None,
        sizes: "Sizes | None" = None,
    ) -> None:
        self._sites = sorted(levels)
        self._ranks = {s: {v: i for i, v in enumerate(levels[s])} for s in self._sites}
        self._errors = [
            np.array([max(0.0, c.error) for c in levels[s].values()]) for s in self._sites
        ]
        self._levels = levels
        self._x = self._encoded([assignment for assignment, _ in seen])
        y = np.array([loss for _, loss in seen], dtype=np.float64)
        sums = self._sums(self._x)
        known = sums > 0
        ratios = y[known] / sums[known]
        self._factor = max(float(np.median(ratios)), 0.0) if known.any() else 0.0
        if self._factor <= 0:  # nothing was lost so far, or nothing is known
            self._factor = 1.0
        self._off = y - self._factor * sums
        # A loss of next to nothing is not known to a share of itself.
        floor = float(np.median(np.abs(y))) * 0.1
        self._spread = np.maximum(np.maximum(np.abs(y), self._factor * sums), floor or 1e-12)
        self._measured = np.zeros(len(y)) if errors is None else np.array(errors, dtype=np.float64)
        self._known = self._parts(self._x, self._x)
        if sizes is None and len(y) >= ENOUGH:
            grid = itertools.product(TERMS, PAIRS, NOISES)
            sizes = max((Sizes(*row) for row in grid), key=self._likelihood)
        self._sizes = sizes or FIRST
        self._posterior = self._conditioned(self._sizes)

    @property
    def sizes(self) -> Sizes:
        """Of the covariance's terms."""
        return self._sizes

    def predict(self, plans: Sequence[Assignment]) -> tuple[Array, Array]:
        """Mean and standard deviation of the losses of some plans, [n] each."""
        x = self._encoded(plans)
        cross = self._kernel(x, self._x, self._sizes)
        mean = self._factor * self._sums(x) + cross @ self._posterior.weights
        half = np.linalg.solve(self._posterior.factor, cross.T)
        prior = self._own_variance(x)
        # What no term explains is another plan's own: it does not average out.
        own = np.square(self._sizes.noise * np.maximum(mean, 0.0))
        variance = np.maximum(prior - np.square(half).sum(0), 0.0) + own
        return mean, np.sqrt(variance)

    def around(
        self, plan: Assignment, generator: np.random.Generator | None = None
    ) -> tuple[dict[str, tuple[Candidate, ...]], float]:
        """Candidates whose errors are what each level adds to a plan's loss, never below 0.

        Args:
            plan: Where the loss is taken as a sum: what each site adds, with the others as here.
            generator: Draw them from what they may be; None: their means.

        Returns:
            The candidates, and what the plan loses beyond the sum of its own.
        """
        points: list[Assignment] = []
        for site in self._sites:
            points += [{**plan, site: level} for level in self._levels[site]]
        values = self._drawn(points, generator)
        found: dict[str, tuple[Candidate, ...]] = {}
        place, total, whole = 0, 0.0, 0.0
        for site in self._sites:
            rows = list(self._levels[site].values())
            own = values[place : place + len(rows)]
            place += len(rows)
            here = self._ranks[site][plan[site]]
            added = np.maximum(own - own[0] + self._factor * max(0.0, rows[0].error), 0.0)
            total += float(added[here])
            whole = float(own[here])
            found[site] = tuple(
                replace(c, error=float(e)) for c, e in zip(rows, added, strict=True)
            )
        return found, whole - total

    def _drawn(self, plans: Sequence[Assignment], generator: np.random.Generator | None) -> Array:
        x = self._encoded(plans)
        cross = self._kernel(x, self._x, self._sizes)
        mean = self._factor * self._sums(x) + cross @ self._posterior.weights
        if generator is None:
            return mean
        half = np.linalg.solve(self._posterior.factor, cross.T)
        covariance = self._kernel(x, x, self._sizes) - half.T @ half
        values, vectors = np.linalg.eigh((covariance + covariance.T) / 2)
        root = vectors * np.sqrt(np.maximum(values, 0.0))
        drawn: Array = mean + root @ generator.standard_normal(len(values))
        return drawn

    def _encoded(self, plans: Sequence[Assignment]) -> Ranks:
        """Ranks of the levels, [n, sites]."""
        rows = [[self._ranks[s][p[s]] for s in self._sites] for p in plans]
        return np.array(rows, dtype=np.int64).reshape(len(plans), len(self._sites))

    def _own(self, x: Ranks) -> Array:
        """Errors [n, sites]."""
        columns = [self._errors[i][x[:, i]] for i in range(len(self._sites))]
        return np.stack(columns, 1) if columns else np.zeros((len(x), 0))

    def _sums(self, x: Ranks) -> Array:
        sums: Array = self._own(x).sum(1)
        return sums

    def _own_variance(self, x: Ranks) -> Array:
        """The prior's variance of each plan [n]."""
        errors = self._own(x)
        common, term = np.square(errors.sum(1)), np.square(errors).sum(1)
        return self._weighed((common, term, (common - term) / 2), self._sizes)

    def _parts(self, a: Ranks, b: Ranks) -> tuple[Array, Array, Array]:
        """What each of the three terms of the covariance is, before its size."""
        ea, eb = self._own(a), self._own(b)
        first, second = np.zeros((len(a), len(b))), np.zeros((len(a), len(b)))
        for i in range(len(self._sites)):
            gap = np.abs(a[:, i, None] - b[None, :, i])
            u = np.sqrt(np.outer(ea[:, i], eb[:, i])) * NEAR**gap
            first += u
            second += u * u
        return np.outer(ea.sum(1), eb.sum(1)), second, (first * first - second) / 2

    def _kernel(self, a: Ranks, b: Ranks, sizes: Sizes) -> Array:
        return self._weighed(self._parts(a, b), sizes)

    def _weighed(self, parts: tuple[Array, Array, Array], sizes: Sizes) -> Array:
        common, term, pair = parts
        total: Array = COMMON**2 * common + sizes.term**2 * term + sizes.pair**2 * pair
        return self._factor**2 * total

    def _likelihood(self, sizes: Sizes) -> float:
        found = self._conditioned(sizes)
        fit = float(self._off @ found.weights)
        return -0.5 * fit - float(np.log(np.diag(found.factor)).sum())

    def _conditioned(self, sizes: Sizes) -> _Posterior:
        noise = np.square(sizes.noise * self._spread) + np.square(self._measured)
        covariance = self._weighed(self._known, sizes) + np.diag(noise)
        factor: Array = np.linalg.cholesky(covariance).astype(np.float64)
        weights = np.linalg.solve(factor.T, np.linalg.solve(factor, self._off))
        return _Posterior(weights, factor)
