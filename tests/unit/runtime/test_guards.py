import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tersor.artifact import Range
from tersor.core.errors import ConfigError, GuardError
from tersor.runtime.guards import Guards, guard_arrays

CLAMP, REJECT = Guards(policy="clamp"), Guards()


def one(array: Any, allowed: Any, guards: Any) -> Any:
    ranges = {} if allowed is None else {"x": allowed}
    arrays, changed = guard_arrays({"x": np.asarray(array)}, ranges, guards, "input")
    return arrays["x"], changed


@pytest.mark.parametrize(
    ("low", "high", "factor", "wanted"),
    [
        (-1.0, 3.0, 1.0, (-1.0, 3.0)),
        (-1.0, 3.0, 2.0, (-3.0, 5.0)),
        (0.0, 1.0, 3.0, (-1.0, 2.0)),
        (1.0, 1.0, 2.0, (0.0, 2.0)),
        (-4.0, -4.0, 1.5, (-6.0, -2.0)),
        (0.0, 0.0, 2.0, (0.0, 0.0)),
    ],
)
def test_the_factor_widens_the_range_around_its_middle(
    low: Any, high: Any, factor: Any, wanted: Any
):
    guards = Guards(range_factor=factor)
    allowed = Range(low=low, high=high)
    for edge in wanted:
        assert one([edge], allowed, guards)[1] == 0
    for beyond in (np.nextafter(wanted[0], -np.inf), np.nextafter(wanted[1], np.inf)):
        with pytest.raises(GuardError):
            one([beyond], allowed, guards)


FLOATS = hnp.arrays(np.float32, st.integers(0, 8), elements=st.floats(width=32))


@given(FLOATS, st.floats(-100, 100, width=32), st.floats(0, 100, width=32))
def test_clamping_is_idempotent_and_rejecting_agrees_with_it(array: Any, low: Any, width: Any):
    allowed = Range(low=low, high=low + width)
    clamped, changed = one(array, allowed, CLAMP)
    assert clamped.dtype == array.dtype
    assert clamped.shape == array.shape
    assert np.isfinite(clamped).all()
    same = clamped == array
    assert changed == (~same).sum()
    again, left = one(clamped, allowed, REJECT)
    assert left == 0
    np.testing.assert_array_equal(again, clamped)
    if changed:
        with pytest.raises(GuardError, match="input 'x'"):
            one(array, allowed, REJECT)


@given(FLOATS)
def test_without_a_range_only_what_is_not_finite_changes(array: Any):
    clamped, changed = one(array, None, CLAMP)
    finite = np.isfinite(array)
    assert changed == (~finite).sum()
    np.testing.assert_array_equal(clamped[finite], array[finite])
    assert np.isfinite(clamped).all()


def test_what_replaces_what():
    found, changed = one([np.nan, np.inf, -np.inf, 7.0, 1.0], Range(low=0.0, high=4.0), CLAMP)
    assert found.tolist() == [2.0, 6.0, -2.0, 6.0, 1.0]
    assert changed == 4
    found, _ = one(np.float16([np.nan, np.inf]), None, CLAMP)
    assert found.tolist() == [0.0, 65504.0]


@pytest.mark.parametrize("dtype", ["int64", "int32", "uint8"])
def test_integers_keep_to_the_declared_range(dtype: Any):
    allowed = Range(low=0.0, high=9.0)
    array = np.array([0, 9, 10, 200], dtype=dtype)
    with pytest.raises(GuardError, match=r"2 of 4 values .* found 200, wanted 0 to 9"):
        one(array, allowed, REJECT)
    found, changed = one(array, allowed, CLAMP)
    assert found.tolist() == [0, 9, 9, 9]
    assert found.dtype == array.dtype
    assert changed == 2


def test_large_integers_are_compared_exactly():
    allowed = Range(low=0.0, high=2.0**40)
    found, changed = one(np.array([2**40, 2**40 + 1]), allowed, CLAMP)
    assert found.tolist() == [2**40, 2**40]
    assert changed == 1


def test_checks_can_be_switched_off():
    off = Guards(check_finite=False, range_factor=None)
    array = np.float32([np.nan, np.inf, 1e9])
    found, changed = one(array, Range(low=0.0, high=1.0), off)
    assert found is not None
    np.testing.assert_array_equal(found, array)
    assert changed == 0
    # Ranges alone: -inf masks pass, large values do not.
    masks = Guards(check_finite=False)
    assert one([-np.inf, 0.5], Range(low=0.0, high=1.0), masks)[1] == 0
    with pytest.raises(GuardError):
        one([-np.inf, 5.0], Range(low=0.0, high=1.0), masks)


def test_bools_have_no_range():
    assert one([True, False], Range(low=0.0, high=0.0), REJECT)[1] == 0


def test_nothing_is_copied_that_passes():
    array = np.zeros(3)
    assert one(array, Range(low=-1.0, high=1.0), CLAMP)[0] is array


@pytest.mark.parametrize(
    ("array", "allowed", "message"),
    [
        ([1.0, np.nan], None, r"input 'x': found 1 NaN and 0 infinite of 2 values, wanted finite"),
        ([np.inf], Range(low=0.0, high=1.0), "found 0 NaN and 1 infinite of 1"),
        (
            [0.0, 7.0, -9.0],
            Range(low=-1.0, high=1.0),
            (
                "input 'x': 2 of 3 values lie outside of .*: found -9, wanted -2 to 2; check the "
                "preprocessing, raise range_factor"
            ),
        ),
        (
            [-1, 3],
            Range(low=0.0, high=5.0),
            "found -1, wanted 0 to 5; check the preprocessing, or use",
        ),
    ],
)
def test_the_message_says_what_and_how_much(array: Any, allowed: Any, message: str):
    with pytest.raises(GuardError, match=message):
        one(array, allowed, REJECT)


@pytest.mark.parametrize("factor", [0.5, -1.0, math.nan, math.inf])
def test_a_bad_factor_is_refused(factor: Any):
    with pytest.raises(ConfigError, match=f"range_factor: found {factor}, wanted at least 1"):
        Guards(range_factor=factor)


def test_policies_that_do_not_exist_are_refused():
    with pytest.raises(ConfigError, match="'fallback' is not available in this version; use 'rej"):
        Guards(policy="fallback")
    with pytest.raises(
        ConfigError, match=r"policy: found 'ignore', wanted one of \['reject', 'cla"
    ):
        Guards(policy="ignore")
