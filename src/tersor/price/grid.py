"""Which kept counts a width offers: whole tiles of the device, spread evenly."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd, lcm
from typing import Any

import numpy as np

from tersor.core.errors import ConfigError
from tersor.core.records import Precision
from tersor.price.laws import TILES

DEFAULT_TILES: dict[Precision | str, int] = {"f32": 8, "bf16": 16, "int8": 16}
FEW = 4  # a width with fewer counts on whole tiles is cut finer
# A staircase is believed where it leaves less of the error of a smooth curve than this.
STAIRS = 0.6
_TRUSTED = 0.85  # of the sizes: the others may be what something hit
_ROUNDS = 20  # of weighted least squares
_LEAST = 1e-4  # of the median time: errors below count alike
FEWEST_SIZES, FEWEST_SWEEPS = 8, 3

Matrix = np.ndarray[Any, np.dtype[np.float64]]


def kept_counts(units: int, unit_size: int, tile: int, n: int = 8) -> tuple[int, ...]:
    """Counts that a width may keep, the full one first, then down.

    Args:
        units: The full count.
        unit_size: Elements of a unit: 1 of a channel, the head dimension of a head.
        tile: Elements in a tile of the device.
        n: Counts to offer at most; about evenly spread from full / n to full.

    Returns:
        Multiples of the least count that fills whole tiles (or of a half, a quarter ... of it,
        where a small width has fewer than four), and the full count.

    Raises:
        ConfigError: An argument below 1.
    """
    if min(units, unit_size, tile, n) < 1:
        raise ConfigError(
            f"found units={units}, unit_size={unit_size}, tile={tile}, n={n}; wanted each >= 1"
        )
    step = tile // gcd(tile, unit_size)
    while step > 1 and units // step < FEW:
        step = (step + 1) // 2
    multiples = range(step, units + 1, step)
    if len(multiples) <= n:
        found = {units, *multiples}
    else:
        found = {units, *(max(1, round(units * i / n / step)) * step for i in range(1, n))}
    return tuple(sorted((c for c in found if c <= units), reverse=True))


def tile_for(
    units: int, unit_size: int, natives: Sequence[int], others: Sequence[int] = (), n: int = 8
) -> int:
    """The tile whose multiples a width offers, where devices and formats differ in theirs.

    A kept count is one for all formats of the ops that it meets. One that fills whole tiles in every
    format costs nothing to leave out others for, as long as there are as many as are offered anyway;
    on a narrow width it would cost choices, so that there the native tile counts.

    Args:
        units: The full count.
        unit_size: Elements of a unit.
        natives: Tiles of the native precision, one a backend; at least one.
        others: Tiles of the other formats.
        n: Counts that are offered at most.

    Returns:
        The least common multiple of all tiles, or of the native ones, if it leaves ``n`` counts;
        else the least native tile.
    """
    for tile in (lcm(*natives, *others), lcm(*natives)):
        if units // (tile // gcd(tile, unit_size)) >= n:
            return tile
    return min(natives)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """What a sweep over sizes showed.

    Attributes:
        tile: Elements in a tile.
        is_believed: A staircase showed; else the tile is the default.
        sizes: What was measured.
        sweeps_ms: Times at these sizes, a row for each time that all were compiled and measured.
    """

    tile: int
    is_believed: bool
    sizes: tuple[int, ...]
    sweeps_ms: tuple[tuple[float, ...], ...]


def discover_tile(sizes: Sequence[int], sweeps_ms: Sequence[Sequence[float]], default: int) -> Tile:
    """The tile that the times of one op show as its size grows.

    A staircase is believed where it leaves much less of the error than a smooth curve does, with all
    sweeps and whichever one of them is left out, and it is the same one each time: noise of one
    build or one moment makes no tile.

    Args:
        sizes: Channels, at least eight sizes.
        sweeps_ms: Times at these sizes, a row a sweep; each from builds of its own.
        default: What holds where no staircase shows (``DEFAULT_TILES``).

    Returns:
        The same for the same times.

    Raises:
        ConfigError: Fewer sizes or than three sweeps, another number of times, or a time not above 0.
    """
    times = np.asarray(sweeps_ms, dtype=np.float64)
    is_whole = times.shape == (len(sweeps_ms), len(sizes)) and bool((times > 0).all())
    if len(sizes) < FEWEST_SIZES or len(sweeps_ms) < FEWEST_SWEEPS or not is_whole:
        raise ConfigError(
            f"found times of shape {times.shape} for {len(sizes)} sizes, wanted at least "
            f"{FEWEST_SWEEPS} sweeps over at least {FEWEST_SIZES} sizes, all times above 0"
        )
    # What a whole sweep is off by is no step.
    times = times / np.median(times, axis=1, keepdims=True)
    without = [np.delete(times, i, axis=0) for i in range(len(times))]
    found = {
        _staircase(np.asarray(sizes, dtype=np.float64), np.median(rows, axis=0))
        for rows in (times, *without)
    }
    tile = found.pop() if len(found) == 1 else None
    return Tile(
        tile=default if tile is None else tile,
        is_believed=tile is not None,
        sizes=tuple(int(n) for n in sizes),
        sweeps_ms=tuple(tuple(float(ms) for ms in row) for row in sweeps_ms),
    )


def _staircase(sizes: Matrix, times: Matrix) -> int | None:
    """The tile whose staircase explains times best; None where a curve does about as well."""
    smooth = _misfit(_curve(sizes), times)
    misfits = {t: _misfit(_stairs(sizes, t), times) for t in TILES}
    best = min(misfits, key=lambda t: misfits[t])
    return best if misfits[best] < STAIRS * smooth else None


def _curve(sizes: Matrix) -> Matrix:
    return np.stack([np.ones(len(sizes)), sizes, np.square(sizes)], axis=1)


def _stairs(sizes: Matrix, tile: int) -> Matrix:
    """The curve over sizes that are padded to whole tiles, and a step where they had to be."""
    padded = np.ceil(sizes / tile) * tile
    return np.column_stack([_curve(padded), padded != sizes])


def _misfit(columns: Matrix, times: Matrix) -> float:
    """Mean absolute error of the best fit without the largest errors, for the freedom it had.

    A size that something hit decides nothing: least absolute deviations, by least squares with
    weights.
    """
    scaled = columns / np.abs(columns).max(axis=0)
    weights = np.ones(len(times))
    off: Matrix = times
    for _ in range(_ROUNDS):
        fit, *_ = np.linalg.lstsq(scaled * weights[:, None], times * weights, rcond=None)
        off = np.abs(scaled @ fit - times)
        weights = 1 / np.sqrt(np.maximum(off, _LEAST))
    trusted = np.sort(off)[: math.ceil(_TRUSTED * len(off))]
    return float(np.sum(trusted)) / (len(trusted) - int(columns.shape[1]))
