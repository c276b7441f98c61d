"""What real evaluations teach about the sum of errors: which terms are off, and which pairs interact.

A Gaussian process over plans. Its mean is the sum of the candidates' errors, which is what the
program minimises; its covariance says how that sum may be wrong:

    k(a, b) = c^2 (S^2 s_a s_b + T^2 sum_i u_i^2 + P^2 sum_{i<j} u_i u_j),
    u_i = sqrt(e_i(a) e_i(b)) * R^|rank of a_i - rank of b_i|,   s_a = sum_i e_i(a)

The first term is one common factor, the second a factor for each (site, level) of which near levels
have similar ones, the third a product for each pair of sites: errors that point the same way add
more than their squares. What is left is noise in proportion to the loss. T, P and the noise are
those of the greatest likelihood on a small grid. Around a plan the posterior is a sum again, so that the
program can be solved with it.

Source: Rasmussen and Williams 2006, algorithm 2.1 and section 5.4.
"""

import itertools
from dataclasses import dataclass, replace

import numpy as np
from scipy.linalg import cho_solve, solve_triangular

from tersor.core.records import Candidate
from tersor.plan.ranks import Array, Grid, Ranks

# Relative sizes of what may be off: of all errors together, of one (site, level), of a pair, of a
# single plan. The first is wide: losses may be in other units than errors.
COMMON = 0.5
TERMS = (0.1, 0.3, 1.0)
PAIRS = (0.0, 0.1, 0.3, 1.0)
NOISES = (0.01, 0.03, 0.1)
# How much of its correction the next level of a site shares.
NEAR = 0.7
SMALL, TINY = 0.1, 1e-12  # of the median loss, and where that is 0


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
        grid: Levels and their errors.
        x: Plans that were seen, at least one.
        y: Their losses [n].
        errors: Standard error of each loss [n], above 0 where it was estimated on few samples.
        sizes: Of the covariance's terms; None: the most likely ones.
    """

    def __init__(
        self, grid: Grid, x: Ranks, y: Array, errors: Array, sizes: Sizes | None = None
    ) -> None:
        self._grid, self._x = grid, x
        sums = self._sums(x)
        known = sums > 0
        ratios = y[known] / sums[known]
        factor = float(np.median(ratios)) if known.any() else 0.0
        self._factor = factor if factor > 0 else 1.0  # nothing was lost so far
        self._off = y - self._factor * sums
        # A loss of next to nothing is not known to a share of itself.
        floor = float(np.median(np.abs(y))) * SMALL
        self._spread = np.maximum(np.maximum(np.abs(y), self._factor * sums), floor or TINY)
        self._measured = errors
        self._known = self._parts(x, x)
        if sizes is None and len(y) >= ENOUGH:
            every = itertools.product(TERMS, PAIRS, NOISES)
            sizes = max((Sizes(*row) for row in every), key=self._likelihood)
        self.sizes = sizes or FIRST
        self._posterior = self._conditioned(self.sizes)

    def predict(self, x: Ranks) -> tuple[Array, Array]:
        """Mean and standard deviation of the losses of some plans, [n] each."""
        cross = self._kernel(x, self._x)
        mean = self._factor * self._sums(x) + cross @ self._posterior.weights
        half = solve_triangular(self._posterior.factor, cross.T, lower=True)
        # What no term explains is another plan's own: it does not average out.
        own = np.square(self.sizes.noise * np.maximum(mean, 0.0))
        variance = np.maximum(self._own_variance(x) - np.square(half).sum(0), 0.0) + own
        return mean, np.sqrt(variance)

    def around(
        self, row: Ranks, generator: np.random.Generator | None = None
    ) -> tuple[dict[str, tuple[Candidate, ...]], float]:
        """Candidates whose errors are what each level adds to a plan's loss, never below 0.

        Args:
            row: Where the loss is taken as a sum: what each site adds, with the others as here.
            generator: Draw them from what they may be; None: their means.

        Returns:
            The candidates, and what the plan loses beyond the sum of its own.
        """
        grid = self._grid
        points = [(i, rank) for i, found in enumerate(grid.levels) for rank in range(len(found))]
        x = np.repeat(row[None], len(points) + 1, axis=0)
        for place, (i, rank) in enumerate(points):
            x[place, i] = rank
        values = self._drawn(x, generator)  # the last is the plan itself
        found: dict[str, tuple[Candidate, ...]] = {}
        start, total = 0, 0.0
        for i, (site, levels) in enumerate(self._grid.problem.levels().items()):
            rows = list(levels.values())
            own = values[start : start + len(rows)]
            start += len(rows)
            added = np.maximum(own - own[0] + self._factor * grid.errors[i][0], 0.0)
            total += float(added[row[i]])
            found[site] = tuple(
                replace(c, error=float(e)) for c, e in zip(rows, added, strict=True)
            )
        return found, float(values[-1]) - total

    def _drawn(self, x: Ranks, generator: np.random.Generator | None) -> Array:
        cross = self._kernel(x, self._x)
        mean: Array = self._factor * self._sums(x) + cross @ self._posterior.weights
        if generator is None:
            return mean
        half = solve_triangular(self._posterior.factor, cross.T, lower=True)
        covariance = self._kernel(x, x) - half.T @ half
        values, vectors = np.linalg.eigh((covariance + covariance.T) / 2)
        root = vectors * np.sqrt(np.maximum(values, 0.0))
        drawn: Array = mean + root @ generator.standard_normal(len(values))
        return drawn

    def _own(self, x: Ranks) -> Array:
        """Errors [n, sites]."""
        columns = [errors[x[:, i]] for i, errors in enumerate(self._grid.errors)]
        return np.stack(columns, 1) if columns else np.zeros((len(x), 0))

    def _sums(self, x: Ranks) -> Array:
        sums: Array = self._own(x).sum(1)
        return sums

    def _own_variance(self, x: Ranks) -> Array:
        """The prior's variance of each plan [n]."""
        errors = self._own(x)
        common, term = np.square(errors.sum(1)), np.square(errors).sum(1)
        return self._weighed((common, term, (common - term) / 2), self.sizes)

    def _parts(self, a: Ranks, b: Ranks) -> tuple[Array, Array, Array]:
        """What each of the three terms of the covariance is, before its size."""
        ea, eb = self._own(a), self._own(b)
        first, second = np.zeros((len(a), len(b))), np.zeros((len(a), len(b)))
        for i, errors in enumerate(self._grid.errors):
            ranks = np.arange(len(errors))
            by_rank = np.sqrt(np.outer(errors, errors)) * NEAR ** np.abs(ranks[:, None] - ranks)
            u = by_rank[a[:, i]][:, b[:, i]]
            first += u
            second += u * u
        return np.outer(ea.sum(1), eb.sum(1)), second, (first * first - second) / 2

    def _kernel(self, a: Ranks, b: Ranks) -> Array:
        return self._weighed(self._parts(a, b), self.sizes)

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
        weights: Array = cho_solve((factor, True), self._off)
        return _Posterior(weights, factor)
