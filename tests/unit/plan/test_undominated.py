"""Packed levels that another stored one beats: no plan is lost without them."""

from collections.abc import Sequence
from itertools import product

from hypothesis import given
from hypothesis import strategies as st

from tersor.core.formats import PACKED, Level
from tersor.core.rank_levels import RankLevel
from tersor.core.records import Candidate
from tersor.plan.problem import undominated

LEVELS: tuple[Level, ...] = (
    "f32",
    "int8",
    "int8_weight",
    "int4_weight",
    "lut4_weight",
    RankLevel.of("f32", 8),
)


def candidate(level: Level, size: int, error: float) -> Candidate:
    return Candidate(site="a", level=level, method="m", size_bytes=size, error=error)


def test_a_packed_level_that_is_larger_and_worse_is_left_out() -> None:
    rows = [
        candidate("f32", 100, 0.0),
        candidate("int8_weight", 25, 0.1),
        candidate("lut8_weight", 26, 0.2),  # larger and worse than int8_weight
        candidate("int4_weight", 13, 0.3),
        candidate("sparse70_weight", 13, 0.4),  # as large, and worse
        candidate("int3_weight", 10, 0.5),
    ]
    left = [c.level for c in undominated(rows)]
    assert left == ["f32", "int8_weight", "int4_weight", "int3_weight"]


def test_equals_and_what_takes_another_time_stay() -> None:
    rows = [
        candidate("f32", 100, 0.0),
        candidate("int8_weight", 25, 0.5),  # never left out: its time is every backend's own
        candidate("int8", 25, 0.9),
        candidate(RankLevel.of("f32", 8), 50, 0.9),
        candidate("lut4_weight", 13, 0.1),
        candidate("int4_weight", 13, 0.1),
    ]
    assert undominated(rows) == tuple(rows)


@given(
    st.lists(
        st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), min_size=6, max_size=6),
        min_size=1,
        max_size=3,
    ),
    st.integers(3, 27),
)
def test_the_least_error_within_a_budget_is_the_same(
    sizes: list[list[tuple[int, int]]], budget: int
) -> None:
    sites = [[candidate(v, n, e) for v, (n, e) in zip(LEVELS, row, strict=True)] for row in sizes]

    def least(rows: Sequence[Sequence[Candidate]]) -> float:
        """By trying every plan."""
        held = [p for p in product(*rows) if sum(c.size_bytes for c in p) <= budget]
        return min((sum(c.error for c in p) for p in held), default=-1.0)

    thin = [undominated(row) for row in sites]
    assert least(thin) == least(sites)
    for row, own in zip(sites, thin, strict=True):
        assert all(c in own or c.level in PACKED for c in row)
