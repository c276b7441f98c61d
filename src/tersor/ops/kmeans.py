"""Optimal codebooks of one number a weight: exact k-means on the line by dynamic programming.

Sorted values fall into k neighbouring intervals, each with its weighted mean as entry. With C(i, j)
the weighted squared deviation of values i .. j-1 from their mean, the least error of k entries is

    E_k(j) = min_i E_(k-1)(i) + C(i, j).

C meets the quadrangle inequality, so that the best i never falls as j grows: halving the range of j
(or dividing it into more parts) finds a whole row E_k in n log n steps, and all rows together hold the curve of errors over k.
Many tables (one a row or group of a weight) go through in step. The search runs in NumPy on the host.

Axes: t tables, n values of a table, k entries.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float64
from numpy.typing import NDArray
from torch import Tensor

from tersor.core.errors import ConfigError, NumericalError, ShapeError

# Distinct values times entries up to which a table is exact; beyond, neighbours are merged first.
# 2^21 are 131,072 values for 16 entries and 8,192 for 256: a few seconds a table.
EXACT_WORK = 2**21
# The same over all tables: 4,096 rows of 16 entries are searched with 256 values each, which takes
# some ten seconds on one core; 1,536 rows of 384 inputs are exact.
TOTAL_WORK = 2**24
# Values searched at once, over all tables: the row arrays of a search stay below 100 MB.
CHUNK_POINTS = 2**20
# Halving looks at the fewest values; where these are few, calls are most of the time, and dividing by
# eight takes a third of them.
FEW_POINTS, FEW_PARTS = 2**13, 8

_Floats = NDArray[np.float64]
_Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Codebooks:
    """Tables, their errors, and how far from the optimum they can be."""

    tables: Float64[Tensor, "t k"]  # ascending; a table of fewer distinct values repeats its last
    errors: Float64[Tensor, "t k"]  # weighted squared error of the best 1 .. k entries
    merged: Float64[Tensor, " t"]  # weighted squared deviation within merged values; 0: exact


def optimal_codebooks(
    values: Float[Tensor, "t n"],
    weights: Float[Tensor, "rows columns"] | None,
    entries: int,
    exact_work: int = EXACT_WORK,
) -> Codebooks:
    """The tables with the least weighted squared error, sum_i w_i min_c (v_i - c)^2.

    Args:
        values: Values of each table, n >= 1; read only.
        weights: How much the square of each value's error counts, >= 0; None: all alike. Where all of a
            table are zero they are taken as alike: its values still need entries. Read only.
        entries: k, 1 or more.
        exact_work: Where n * k is beyond it, or t * n * k beyond ``TOTAL_WORK``, each table's sorted values are
            merged into as many parts as keep within (at least 4 k).

    Returns:
        Tables, the errors of 1 .. k entries, which never rise, and what merging hid. Merged or not,
        errors include it and are reached by giving every merged part its nearest entry; the best
        possible error E* obeys sqrt(E*) >= sqrt(error - merged) - sqrt(merged), by the triangle inequality.

    Raises:
        ConfigError: ``entries`` below 1.
        ShapeError: No values.
        NumericalError: A value or weight is not finite, or a weight is negative.

    Source: Groenlund et al. 2017, arXiv:1701.07204, section 2; Wu 1991, doi:10.1016/0196-6774(91)90039-2.
    """
    if entries < 1:
        raise ConfigError(f"entries must be at least 1, got {entries}; 16 and 256 are usual")
    v, w = _checked(values, weights)
    limit = max(4 * entries, min(exact_work, TOTAL_WORK // len(v)) // entries)
    parts = [_points(*row, limit) for row in zip(v, w, strict=True)]
    size = max(len(x) for x, _, _ in parts)
    tables, errors = np.empty((len(parts), entries)), np.empty((len(parts), entries))
    step = max(1, CHUNK_POINTS // (size * max(1, entries // 16)))
    for start in range(0, len(parts), step):
        chunk = slice(start, start + step)
        tables[chunk], errors[chunk] = _solve([(x, m) for x, m, _ in parts[chunk]], entries)
    merged = np.array([hidden for _, _, hidden in parts])
    device = values.device
    return Codebooks(
        tables=torch.from_numpy(tables).to(device),
        errors=torch.from_numpy(errors + merged[:, None]).to(device),
        merged=torch.from_numpy(merged).to(device),
    )


def _checked(values: Tensor, weights: Tensor | None) -> tuple[_Floats, _Floats]:
    if values.shape[0] == 0 or values.shape[1] == 0:
        raise ShapeError(
            f"values {tuple(values.shape)} [table, value]: wanted at least one of each"
        )
    v: _Floats = values.detach().to("cpu", torch.float64).numpy()
    if weights is None:
        w = np.ones_like(v)
    else:
        if weights.shape != values.shape:
            raise ShapeError(
                f"weights {tuple(weights.shape)}, wanted {tuple(values.shape)} as the values have; "
                "give one weight a value"
            )
        w = weights.detach().to("cpu", torch.float64).numpy()
    if not (np.isfinite(v).all() and np.isfinite(w).all() and (w >= 0).all()):
        raise NumericalError(
            f"values {v.shape}: found NaN, infinity or a negative weight, wanted finite values and weights >= 0; "
            "mend the checkpoint or look for samples that are not finite"
        )
    return v, np.where(w.any(1, keepdims=True), w, 1.0)


def _points(v: _Floats, w: _Floats, limit: int) -> tuple[_Floats, _Floats, float]:
    """Distinct values that count, ascending, their weights, and the deviation that merging hid."""
    order = np.argsort(v[w > 0], kind="stable")
    v, w = v[w > 0][order], w[w > 0][order]
    starts = np.flatnonzero(np.concatenate([[True], np.diff(v) > 0]))
    x, mass = v[starts], np.add.reduceat(w, starts)
    if len(x) <= limit:
        return x, mass, 0.0
    # The best density of entries goes with the cube root of the density of values, here mass / gap
    # (Panter and Dite 1951, doi:10.1109/JRPROC.1951.230419); parts follow it, a fixed number an entry.
    gaps = np.diff(x, prepend=x[0])
    spread = np.cumsum(np.cbrt(mass * gaps**2))
    part = np.minimum((spread / spread[-1] * limit).astype(np.int64), limit - 1)
    starts = np.flatnonzero(np.concatenate([[True], np.diff(part) > 0]))
    total = np.add.reduceat(mass, starts)
    centre = np.add.reduceat(mass * x, starts) / total
    lengths = np.diff(np.append(starts, len(x)))
    hidden = float((mass * (x - np.repeat(centre, lengths)) ** 2).sum())
    return centre, total, hidden


def _solve(points: list[tuple[_Floats, _Floats]], entries: int) -> tuple[_Floats, _Floats]:
    """Tables and errors of some sets of points, padded to one length with points of no weight."""
    size = max(len(x) for x, _ in points)
    x, w = np.zeros((len(points), size)), np.zeros((len(points), size))
    for row, (values, mass) in enumerate(points):
        x[row, : len(values)], w[row, : len(values)] = values, mass
    # Squares are differences of sums: near zero mean they lose least.
    centre = (w * x).sum(1, keepdims=True) / w.sum(1, keepdims=True)
    y = (x - centre) * (w > 0)
    sums = np.stack([_prefix(w), _prefix(w * y), _prefix(w * y * y)])
    best = np.concatenate([np.full((len(points), 1), 0.0), _cost(sums, 0, slice(1, None))], 1)
    errors, cuts = [best[:, -1]], [np.zeros((len(points), size + 1), dtype=np.int32)]
    for _ in range(1, entries):
        best, cut = _next_row(best, sums)
        errors.append(best[:, -1])
        cuts.append(cut)
    tables = _entries(cuts, sums, np.array([len(values) for values, _ in points]))
    return tables + centre, np.minimum.accumulate(np.maximum(np.stack(errors, 1), 0), axis=1)


def _prefix(x: _Floats) -> _Floats:
    return np.concatenate([np.zeros((len(x), 1)), np.cumsum(x, axis=1)], axis=1)


def _cost(sums: _Floats, start: int, stop: slice) -> _Floats:
    mass, first, second = sums[:, :, stop] - sums[:, :, start, None]
    return np.asarray(second - first**2 / np.where(mass > 0, mass, 1.0))


def _next_row(before: _Floats, sums: _Floats) -> tuple[_Floats, NDArray[np.int32]]:
    """E_k(j) for all j from E_(k-1), with the place of the last cut; level by level of a division."""
    tables, columns = before.shape
    last = columns - 1
    best, cut = np.zeros_like(before), np.zeros(before.shape, dtype=np.int32)
    whole = np.zeros((tables, 1), dtype=np.int32), np.full((tables, 1), last, dtype=np.int32)
    _search_level(before, sums, (np.array([last]), *whole), (best, cut))
    parts = FEW_PARTS if before.size <= FEW_POINTS else 2
    stride = parts
    while stride <= last:
        stride *= parts
    while stride := stride // parts:
        targets = np.arange(stride, last, stride)
        targets = targets[targets % (parts * stride) > 0]
        if len(targets):
            below = targets - targets % (parts * stride)
            above = np.minimum(below + parts * stride, last)
            low, high = cut[:, below], cut[:, above]
            _search_level(before, sums, (targets, low, np.minimum(high, targets)), (best, cut))
    return best, cut


def _search_level(
    before: _Floats,
    sums: _Floats,
    ranges: tuple[_Ints, NDArray[np.integer], NDArray[np.integer]],
    result: tuple[_Floats, NDArray[np.int32]],
) -> None:
    """Best cut of each target within its range, for all tables at once; writes into the result."""
    targets, low, high = ranges
    tables, columns = before.shape
    lengths = (high - low + 1).astype(np.int64).ravel()
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    within = np.arange(lengths.sum()) - np.repeat(starts, lengths)
    table = np.repeat(np.arange(tables), len(targets))
    i = np.repeat(low.ravel() + table * columns, lengths) + within
    end = (table * columns) + np.tile(targets, tables)
    mass, first, second = (np.repeat(s.ravel()[end], lengths) - s.ravel()[i] for s in sums)
    value = before.ravel()[i] + second - first**2 / np.where(mass > 0, mass, 1.0)
    least = np.minimum.reduceat(value, starts)
    hits = np.flatnonzero(value == np.repeat(least, lengths))
    first_hit = hits[np.searchsorted(hits, starts)]
    best, cut = result
    best.ravel()[end] = least
    cut.ravel()[end] = i[first_hit] - table * columns


def _entries(cuts: list[NDArray[np.int32]], sums: _Floats, counts: _Ints) -> _Floats:
    """Means of the intervals, last one first; an empty interval repeats the entry above it."""
    tables = len(counts)
    row, end = np.arange(tables), counts.copy()
    found = np.full((tables, len(cuts)), np.nan)
    for k in range(len(cuts) - 1, -1, -1):
        start = cuts[k][row, end].astype(np.int64)
        mass, first, _ = sums[:, row, end] - sums[:, row, start]
        found[:, k] = np.where(mass > 0, first / np.where(mass > 0, mass, 1.0), np.nan)
        end = start
    return _filled(found)


def _filled(found: _Floats) -> _Floats:
    """Ascending, with the largest entry in place of the missing ones."""
    ordered = np.sort(found, axis=1)  # NaN goes last
    return np.asarray(np.where(np.isnan(ordered), np.nanmax(ordered, 1, keepdims=True), ordered))
