import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tersor.core.errors import ConfigError
from tersor.price.grid import DEFAULT_TILES, discover_tile, kept_counts


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


@pytest.mark.parametrize("tile", [8, 16, 32, 64])
@pytest.mark.parametrize("seed", range(3))
def test_the_tile_of_a_staircase_is_found(tile: int, seed: int) -> None:
    rng = np.random.default_rng(seed)

    def time_of(n: int) -> float:
        return (0.01 + 0.002 * -(-n // tile) * tile) * float(np.exp(0.005 * rng.normal()))

    assert discover_tile(time_of, default=1) == tile


@pytest.mark.parametrize("seed", range(5))
def test_without_a_staircase_the_default_holds(seed: int) -> None:
    rng = np.random.default_rng(seed)
    noisy = lambda n: (0.01 + 0.002 * n) * float(np.exp(0.2 * rng.normal()))  # noqa: E731
    assert discover_tile(noisy, default=1) == 1
    assert discover_tile(noisy, default=DEFAULT_TILES["int8"]) == 16
    assert discover_tile(lambda n: 0.01 + 0.002 * n, default=DEFAULT_TILES["f32"]) == 8
