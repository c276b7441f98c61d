"""Which sizes get a build of their own, where one size varies and shorter inputs can be padded.

A build for one size is faster than one for all, and costs the padding of what is smaller. What a
call costs is a curve through measured points; the best buckets under it are found exactly, by
dynamic programming over the sizes in the data.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from scipy.optimize import nnls

from tersor.core.errors import ConfigError
from tersor.core.records import Bucket

Cost = Callable[[int], float]  # milliseconds of a call at a size; grows with it
GAIN = 0.01  # two builds that are closer are equal (docs/measuring.md): one more must save that


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """Milliseconds of a call: a + b * size + c * size**2, none negative, so that it grows."""

    a: float
    b: float
    c: float

    def __call__(self, size: int) -> float:
        """Milliseconds at a size."""
        return self.a + self.b * size + self.c * size * size


def fit_curve(points: Mapping[int, float]) -> Curve:
    """Least relative squares through (size, milliseconds).

    Raises:
        ConfigError: Fewer than two sizes, or a time that is not positive.
    """
    if len(points) < 2 or not all(ms > 0 and math.isfinite(ms) for ms in points.values()):
        raise ConfigError(f"found the times {dict(points)}, wanted two sizes or more, all above 0")
    sizes = np.asarray(list(points), dtype=np.float64)
    times = np.asarray(list(points.values()), dtype=np.float64)
    top = float(sizes.max())
    columns = np.stack([np.ones_like(sizes), sizes / top, (sizes / top) ** 2], axis=1)
    (a, b, c), _ = nnls(columns / times[:, None], np.ones_like(times))
    return Curve(a=float(a), b=float(b) / top, c=float(c) / top**2)


@dataclass(frozen=True, slots=True)
class Buckets:
    """Sizes that are built, growing, and what a call then costs on average."""

    sizes: tuple[int, ...]
    mean_ms: float


def best_buckets(counts: Mapping[int, int], single: Cost, opened: Cost, most: int) -> Buckets:
    """The cheapest of all sets of at most ``most`` buckets.

    A call goes to the smallest bucket that holds it, or to the open build where that is cheaper.
    Both costs grow with the size, so that the calls of one bucket are neighbours and an optimal
    bucket is a size of the data. Exact, in O(sizes**2 * most).

    Args:
        counts: Size -> how often it occurs.
        single: Cost of a call of a build for that size.
        opened: Cost of a call of the open build at that size.
        most: Buckets at most.
    """
    return min(_best_by_count(counts, single, opened, most), key=lambda b: b.mean_ms)


def worthwhile(counts: Mapping[int, int], single: Cost, opened: Cost, most: int) -> Buckets:
    """The best buckets of the smallest number from which no larger one saves ``GAIN`` a bucket."""
    ways = _best_by_count(counts, single, opened, most)
    chosen = 0
    for more in range(1, len(ways)):
        if ways[more].mean_ms < ways[chosen].mean_ms * (1 - GAIN) ** (more - chosen):
            chosen = more
    return ways[chosen]


def as_buckets(symbol: str, sizes: Sequence[int], costs: tuple[Cost, Cost],
               limits: tuple[int, int, int]) -> tuple[Bucket, ...]:  # fmt: skip
    """Records of buckets, with the smallest size that goes to each: the open build takes the rest.

    Args:
        symbol: The size that varies.
        sizes: What is built, growing.
        costs: Of a call of a build for that size, and of the open build.
        limits: (smallest, largest, step) of what the model takes.
    """
    single, opened = costs
    low, _, step = limits
    found = []
    for size in sizes:
        ms = single(size)
        least = next(n for n in range(low, size + 1, step) if n == size or opened(n) > ms)
        found.append(Bucket(sizes={symbol: size}, least={symbol: least}))
        low = size + step
    return tuple(found)


def _best_by_count(
    counts: Mapping[int, int], single: Cost, opened: Cost, most: int
) -> list[Buckets]:
    """The best buckets for every number of them, from 0 to ``most``; sizes that repeat are fewer."""
    sizes = sorted(counts)
    before = [0, *accumulate(counts[s] for s in sizes)]  # samples below each size
    alone = [counts[s] * opened(s) for s in sizes]
    built = [single(s) for s in sizes]
    # best[k][i]: cost of the first i sizes with at most k buckets, and the buckets' positions.
    rows: list[list[tuple[float, tuple[int, ...]]]] = []
    for k in range(most + 1):
        row: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
        for i, own in enumerate(alone):
            cost, chosen = row[i]
            ways = [(cost + own, chosen)]
            if k:
                for j in range(i + 1):
                    cost, chosen = rows[k - 1][j]
                    ways.append((cost + built[i] * (before[i + 1] - before[j]), (*chosen, i)))
            row.append(min(ways, key=lambda way: (way[0], len(way[1]))))
        rows.append(row)
    total = max(1, before[-1])
    ends = [row[-1] for row in rows]
    return [Buckets(tuple(sizes[i] for i in chosen), cost / total) for cost, chosen in ends]
