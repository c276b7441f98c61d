from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tersor.core.errors import ConfigError
from tersor.price.grid import _staircase, discover_tile, kept_counts, tile_for


@pytest.mark.parametrize(
    ("units", "unit_size", "tile", "wanted"),
    [
        (1536, 1, 64, (1536, 1344, 1152, 960, 768, 576, 384, 192)),
        (100, 1, 16, (100, 96, 80, 64, 48, 32, 16)),
        (12, 32, 64, (12, 10, 8, 6, 4, 2)),
        (6, 64, 32, (6, 5, 4, 3, 2, 1)),
        (16, 1, 16, (16, 12, 8, 4)),
        (5, 1, 64, (5, 4, 3, 2, 1)),
        (1, 1, 16, (1,)),
    ],
)
def test_counts(units: int, unit_size: int, tile: int, wanted: tuple[int, ...]) -> None:
    assert kept_counts(units, unit_size, tile) == wanted


@given(st.integers(1, 5000), st.integers(1, 128), st.sampled_from([8, 16, 32, 64]))
def test_counts_are_few_valid_and_span_the_width(units: int, unit_size: int, tile: int) -> None:
    counts = kept_counts(units, unit_size, tile)
    assert counts[0] == units
    assert list(counts) == sorted(set(counts), reverse=True)
    assert counts[-1] >= 1
    assert len(counts) <= 9  # eight of the grid, and a full count that is none of it
    step = tile // np.gcd(tile, unit_size)
    if units >= 4 * step:
        assert all(c * unit_size % tile == 0 for c in counts[1:])
        assert counts[-1] <= max(units / 8 + step / 2, step)


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"found units=0, unit_size=1, tile=8, n=8"):
        kept_counts(0, 1, 8)


SIZES = range(36, 137, 4)
SWEEPS = 4


def swept(
    time_of: Callable[[int], float], seed: int, each: float, build: float = 0.0
) -> list[list[float]]:
    """Sweeps with noise of each time, and of each size that all sweeps share."""
    rng = np.random.default_rng(seed)
    shared = np.exp(build * rng.standard_normal(len(SIZES)))
    rows = np.exp(each * rng.standard_normal((SWEEPS, len(SIZES)))) * shared
    speed = np.exp(0.1 * rng.standard_normal((SWEEPS, 1)))  # of the machine at the time
    return (rows * speed * [time_of(n) for n in SIZES]).tolist()


def stairs(tile: int) -> Callable[[int], float]:
    return lambda n: 0.01 + 0.002 * -(-n // tile) * tile


@pytest.mark.parametrize("tile", [8, 16, 32, 64])
@pytest.mark.parametrize("seed", range(3))
def test_the_tile_of_a_staircase_is_found(tile: int, seed: int) -> None:
    found = discover_tile(SIZES, swept(stairs(tile), seed, 0.01), default=1)
    assert (found.tile, found.is_believed) == (tile, True)
    assert discover_tile(found.sizes, found.sweeps_ms, default=1) == found  # from what is kept


@pytest.mark.parametrize("tile", [16, 32])
def test_sizes_that_are_no_whole_tiles_may_cost_more_than_padding(tile: int) -> None:
    """Figures of AMX: 64 31, 68 61, 96 76, 100 133, 128 110, 129 182 us."""

    def time_of(n: int) -> float:
        return stairs(tile)(n) * (1.0 if n % tile == 0 else 1.5)

    assert discover_tile(SIZES, swept(time_of, 0, 0.01), default=1).tile == tile


@pytest.mark.parametrize("tile", [8, 16, 32])
def test_sizes_that_something_hit_hide_no_staircase(tile: int) -> None:
    sweeps = np.array(swept(stairs(tile), 0, 0.005))
    sweeps[:, 10] *= 6  # measured: one size of 26, in all sweeps
    sweeps[1:3, 17] *= 4
    assert discover_tile(SIZES, sweeps.tolist(), default=1).tile == tile


@pytest.mark.parametrize(
    "time_of",
    [
        lambda n: 0.01 + 0.002 * n,
        lambda n: 0.01 + 0.001 * n + 2e-5 * n * n,  # caches that no longer hold it
        lambda _n: 0.1,
    ],
    ids=["line", "curve", "constant"],
)
@pytest.mark.parametrize("noise", [(0.01, 0.0), (0.2, 0.0), (0.02, 0.05)])
def test_without_a_staircase_the_default_holds(
    time_of: Callable[[int], float], noise: tuple[float, float]
) -> None:
    """Also where builds of some sizes are slower in all sweeps, by chance."""
    for seed in range(20):
        found = discover_tile(SIZES, swept(time_of, seed, *noise), default=16)
        assert (found.tile, found.is_believed) == (16, False), seed


def test_a_weak_staircase_that_hangs_on_one_sweep_is_not_believed() -> None:
    """Noise of a third of a step: what all sweeps show, some three of them do not."""
    refused = 0
    for seed in range(40):
        sweeps = np.array(swept(stairs(32), seed, 0.08))
        scaled = sweeps / np.median(sweeps, axis=1, keepdims=True)
        sizes = np.asarray(SIZES, dtype=np.float64)
        groups = [scaled, *(np.delete(scaled, i, axis=0) for i in range(SWEEPS))]
        shown = [_staircase(sizes, np.median(rows, axis=0)) for rows in groups]
        found = discover_tile(SIZES, sweeps.tolist(), default=1)
        assert found.is_believed == (None not in shown and len(set(shown)) == 1)
        refused += shown[0] is not None and not found.is_believed
    assert refused >= 5


@pytest.mark.parametrize(
    ("sizes", "sweeps"),
    [
        (range(8), [[1.0] * 8] * 2),
        (range(7), [[1.0] * 7] * 4),
        (range(8), [[1.0] * 7] * 4),
        (range(8), [[1.0] * 7 + [0.0]] * 4),
        (range(8), [[1.0] * 7 + [float("nan")]] * 4),
    ],
)
def test_too_little_to_tell_is_refused(sizes: range, sweeps: list[list[float]]) -> None:
    with pytest.raises(ConfigError, match="wanted at least 3 sweeps over at least 8 sizes"):
        discover_tile(sizes, sweeps, default=8)


@pytest.mark.parametrize(
    ("units", "unit_size", "natives", "others", "wanted"),
    [
        (512, 1, (8,), (32,), 32),  # 16 counts: int8's tiles cost no choice
        (128, 1, (8,), (32,), 8),  # 4 counts would be left, of the 8 on offer
        (128, 1, (8,), (16,), 16),
        (512, 1, (8, 16), (64, 16), 64),
        (256, 1, (8, 16), (64, 16), 16),  # 4 of 64, 16 of 16
        (64, 1, (8, 16), (64, 16), 8),
        (12, 64, (8,), (64,), 64),  # heads of 64: every count is whole tiles
        (100, 1, (16,), (), 16),
    ],
)
def test_the_tile_of_a_width_is_good_for_all_formats_where_it_costs_no_choice(
    units: int, unit_size: int, natives: tuple[int, ...], others: tuple[int, ...], wanted: int
) -> None:
    assert tile_for(units, unit_size, natives, others) == wanted
