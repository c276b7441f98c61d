"""Which kept counts a width offers: whole tiles of the device, spread evenly."""

from collections.abc import Callable, Sequence
from math import gcd

import numpy as np

from tersor.core.errors import ConfigError
from tersor.core.records import Precision
from tersor.price.laws import TILES

DEFAULT_TILES: dict[Precision | str, int] = {"f32": 8, "bf16": 16, "int8": 16}
FEW = 4  # a width with fewer counts on whole tiles is cut finer
# A staircase is believed where it leaves less of the squared error of a straight line than this.
STAIRS = 0.5


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


def discover_tile(time_of: Callable[[int], float], default: int, *, last: int = 192) -> int:
    """The tile that the times of one op show as its size grows.

    Args:
        time_of: Milliseconds of the op with a number of channels: builds and measures it.
        default: What holds where no staircase shows (``DEFAULT_TILES``).
        last: The largest size; sizes go up to it by half of the least tile.

    Returns:
        The tile whose staircase explains the times best, if that is much better than a straight
        line.
    """
    step = TILES[0] // 2
    sizes = np.arange(TILES[-1], last + 1, step)
    times = np.array([time_of(int(n)) for n in sizes])
    straight = _misfit(sizes, times)
    misfits = {tile: _misfit(-(-sizes // tile) * tile, times) for tile in TILES}
    best = min(misfits, key=lambda tile: misfits[tile])
    return best if misfits[best] < STAIRS * straight else default


def _misfit(sizes: Sequence[int] | np.ndarray, times: np.ndarray) -> float:
    """Squared error of the best line through times over sizes."""
    columns = np.stack([np.ones(len(times)), np.asarray(sizes, dtype=np.float64)], axis=1)
    line, *_ = np.linalg.lstsq(columns, times, rcond=None)
    return float(np.sum(np.square(columns @ line - times)))
