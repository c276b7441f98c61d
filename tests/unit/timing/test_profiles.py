"""Runs of a profile."""

from hypothesis import given
from hypothesis import strategies as st

from tersor.timing.profiles import FEWEST_WARM, block_runs, warm_runs


@given(st.floats(0.0, 1e4), st.floats(0.0, 1e4))
def test_longer_calls_never_get_more_runs(a: float, b: float) -> None:
    short, long = min(a, b), max(a, b)
    assert warm_runs(short) >= warm_runs(long) >= FEWEST_WARM
    assert block_runs(short) >= block_runs(long) >= 3


def test_by_the_time_they_take() -> None:
    assert [warm_runs(ms) for ms in (0.1, 20.0, 400.0)] == [9, 5, 2]
    assert [block_runs(ms) for ms in (0.1, 4.0, 400.0)] == [100, 10, 3]
