"""Buckets by dynamic programming: as good as the best of all sets, and what each size then costs."""

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tersor.core.errors import ConfigError
from tersor.price.buckets import (
    GAIN,
    Buckets,
    Cost,
    Curve,
    as_buckets,
    best_buckets,
    fit_curve,
    worthwhile,
)

# Sums of a few dozen float64 terms in another order.
ROUNDING = 1e-12
COUNTS = st.dictionaries(st.integers(1, 40), st.integers(1, 9), min_size=1, max_size=8)
PART = st.floats(0, 3)
CURVES = st.builds(Curve, a=PART, b=PART, c=st.floats(0, 0.1))


def mean_ms(counts: dict[int, int], built: tuple[int, ...], single: Cost, opened: Cost) -> float:
    """By the definition: every call takes the cheapest build that holds it."""
    spent = sum(
        count * min([opened(n), *(single(b) for b in built if b >= n)])
        for n, count in counts.items()
    )
    return spent / sum(counts.values())


def of_all_sets(counts: dict[int, int], single: Cost, opened: Cost, most: int) -> float:
    sets = (c for k in range(most + 1) for c in combinations(sorted(counts), k))
    return min(mean_ms(counts, built, single, opened) for built in sets)


@given(COUNTS, CURVES, CURVES, st.integers(0, 4))
def test_no_other_set_is_cheaper(
    counts: dict[int, int], single: Curve, opened: Curve, most: int
) -> None:
    found = best_buckets(counts, single, opened, most)
    assert len(found.sizes) <= most
    assert list(found.sizes) == sorted(set(found.sizes) & set(counts))
    wanted = of_all_sets(counts, single, opened, most)
    assert found.mean_ms == pytest.approx(wanted, rel=ROUNDING, abs=ROUNDING)
    assert mean_ms(counts, found.sizes, single, opened) == pytest.approx(
        wanted, rel=ROUNDING, abs=ROUNDING
    )


@given(COUNTS, CURVES, CURVES, st.integers(1, 4), st.integers(1, 3))
def test_records_send_every_size_to_its_cheapest_build(
    counts: dict[int, int], single: Curve, opened: Curve, most: int, step: int
) -> None:
    counts = {n * step: c for n, c in counts.items()}
    sizes = best_buckets(counts, single, opened, most).sizes
    found = as_buckets("n", sizes, (single, opened), (step, 1000, step))
    assert tuple(b.sizes["n"] for b in found) == sizes
    assert all(b.least["n"] % step == 0 for b in found)
    for n in range(step, 41 * step, step):
        takers = [b for b in found if b.takes({"n": n})]
        assert len(takers) <= 1
        ms = single(takers[0].sizes["n"]) if takers else opened(n)
        cheapest = min([opened(n), *(single(b) for b in sizes if b >= n)])
        if n in counts:
            assert ms == pytest.approx(cheapest, rel=ROUNDING, abs=ROUNDING)


FASTER = Curve(a=1.0, b=0.1, c=0.0)
OPEN = Curve(a=2.0, b=0.1, c=0.0)


def test_the_case_by_hand() -> None:
    """Padding 9 to 10 costs 0.1 ms and saves 1; padding 10 to 30 costs 2 and saves 1."""
    assert best_buckets({9: 1, 10: 1, 30: 1}, FASTER, OPEN, 2) == Buckets((10, 30), 8 / 3)
    one = best_buckets({9: 1, 10: 1, 30: 1}, FASTER, OPEN, 1)
    assert one.sizes == (10,)
    (bucket,) = as_buckets("n", (10,), (FASTER, OPEN), (1, 99, 1))
    assert (bucket.least, bucket.sizes) == ({"n": 1}, {"n": 10})
    (bucket,) = as_buckets("n", (30,), (FASTER, OPEN), (1, 99, 1))
    assert bucket.least == {"n": 21}  # at 20 the open build takes as long


def test_a_bucket_more_must_save_something() -> None:
    counts = dict.fromkeys(range(10, 20), 1)
    flat = Curve(a=10.0, b=0.0, c=0.0)
    assert worthwhile(counts, flat, Curve(a=12.0, b=0.0, c=0.0), 6).sizes == (19,)
    assert worthwhile(counts, flat, Curve(a=10.0 * (1 + GAIN / 2), b=0.0, c=0.0), 6).sizes == ()
    assert worthwhile(counts, OPEN, FASTER, 6).sizes == ()
    # 1.0 saved by the first of two equal halves, then by the second: both count.
    assert worthwhile({10: 1, 40: 1}, FASTER, OPEN, 6).sizes == (10, 40)


def test_curves_go_through_their_points_and_never_fall() -> None:
    wanted = Curve(a=2.0, b=0.3, c=0.01)
    found = fit_curve({n: wanted(n) for n in (8, 16, 40, 64)})
    assert [found(n) for n in (5, 30, 100)] == pytest.approx([wanted(n) for n in (5, 30, 100)])
    falling = fit_curve({10: 3.0, 20: 2.0})
    assert falling(10) == falling(20) == pytest.approx(2.3, abs=0.2)


@pytest.mark.parametrize("points", [{8: 1.0}, {8: 1.0, 9: 0.0}, {8: 1.0, 9: float("inf")}])
def test_times_that_say_nothing(points: dict[int, float]) -> None:
    with pytest.raises(ConfigError, match="wanted two sizes or more, all above 0"):
        fit_curve(points)
