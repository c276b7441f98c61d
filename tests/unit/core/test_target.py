import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tersor.core import target
from tersor.core.errors import ConfigError, TargetError
from tersor.core.jsonable import from_json, to_json
from tersor.core.target import Target, as_target

ONE_OF_EACH = {
    "speedup": 2.0,
    "size_mb": 10.0,
    "peak_mb": 64.0,
    "drop_points": 0.5,
    "min_agreement": 0.99,
}


@pytest.mark.parametrize(
    ("text", "budgets"),
    [
        ("2x", {"speedup": 2.0}),
        ("2x, 0.5 pt", {"speedup": 2.0, "drop_points": 0.5}),
        ("5 ms; 10 MB", {"latency_ms": 5.0, "size_mb": 10.0}),
        ("4x smaller", {"size_ratio": 4.0}),
        ("size_ratio=4x", {"size_ratio": 4.0}),
        ("size_ratio=4", {"size_ratio": 4.0}),
        ("peak_mb=1 GB", {"peak_mb": 1000.0}),
        ("min_agreement=0.99, 2x", {"min_agreement": 0.99, "speedup": 2.0}),
        ("latency_ms=500us", {"latency_ms": 0.5}),
        ("drop_points=0", {"drop_points": 0.0}),
    ],
)
def test_parses_text(text: str, budgets: Any):
    assert Target.parse(text).budgets() == pytest.approx(budgets)


@pytest.mark.parametrize(("name", "value"), [*ONE_OF_EACH.items(), ("latency_ms", 5.0)])
def test_takes_numbers_and_texts(name: str, value: Any):
    assert Target(**{name: value}).budgets() == {name: value}
    assert Target.from_mapping({name: str(value)}).budgets() == {name: value}
    assert Target.from_mapping({name: value}).budgets() == {name: value}


BUDGETS = st.fixed_dictionaries(
    {},
    optional={
        "speedup": st.floats(1, 1e6),
        "size_mb": st.floats(1e-6, 1e6),
        "peak_mb": st.floats(1e-6, 1e6),
        "drop_points": st.floats(0, 100),
        "min_agreement": st.floats(0, 1),
    },
).filter(bool)


@given(BUDGETS)
def test_describe_is_what_parse_reads(budgets: Any):
    target = Target(**budgets)
    again = Target.parse(target.describe())
    # describe() writes six digits.
    assert again.budgets() == pytest.approx(target.budgets(), rel=1e-5)
    assert from_json(Target, to_json(target)) == target


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "the target is empty; give at least one of speedup, latency_ms"),
        ({"speedup": 0.5}, "speedup=0.5 contradicts the promise.*at least 1"),
        ({"size_ratio": 0.99}, "size_ratio=0.99 contradicts"),
        ({"latency_ms": 0}, "latency_ms=0: wanted more than 0"),
        ({"size_mb": -1}, "size_mb=-1: wanted more than 0"),
        ({"peak_mb": 0}, "peak_mb=0: wanted more than 0"),
        ({"drop_points": -0.1}, "drop_points=-0.1: wanted 0 to 100"),
        ({"drop_points": 101}, "wanted 0 to 100 points"),
        ({"min_agreement": 1.01}, "min_agreement=1.01: wanted a fraction from 0 to 1"),
        ({"min_agreement": -1}, "wanted a fraction"),
        ({"speedup": math.inf}, "speedup=inf: wanted a finite number"),
        ({"speedup": math.nan}, "speedup=nan: wanted a finite number"),
        ({"size_mb": "5 ms"}, "size_mb='5 ms': found a ms, wanted mb"),
        ({"min_agreement": "1 pt"}, "found a points, wanted a plain number"),
        ({"speedup": 2, "latency_ms": 5}, "contradicts itself: speedup=2 and latency_ms=5"),
        ({"size_mb": 2, "size_ratio": 5}, "contradicts itself: size_mb=2 and size_ratio=5"),
    ],
)
def test_refuses(values: Any, message: str):
    with pytest.raises(TargetError, match=message):
        Target.from_mapping(values)


@pytest.mark.parametrize("value", [True, [2.0]])
def test_refuses_what_is_no_number(value: Any):
    with pytest.raises(TargetError, match="wanted a number or a text such as '2x'"):
        Target.from_mapping({"speedup": value})


def test_unknown_keys_are_named_with_the_known_ones():
    with pytest.raises(TargetError, match=r"unknown keys \['speed'\]; known are \['speedup'"):
        Target.from_mapping({"speed": 2})
    with pytest.raises(TargetError, match=r"unknown keys \['speed'\]"):
        Target.parse("speed=2")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the target is empty"),
        ("2", "'2': a bare number could be anything"),
        ("2x, 3x", "speedup is given as '2x' and as '3x'"),
        ("2x, speedup=3", "speedup is given as '2x' and as '3'"),
        ("2x, 5 ms", "both bound one quantity"),
        ("quick", "no number found"),
        ("speedup=quick", "no number found"),
    ],
)
def test_parse_refuses(text: str, message: str):
    with pytest.raises(TargetError, match=message):
        Target.parse(text)


def test_a_target_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Target(speedup=2.0).speedup = 3.0  # type: ignore[misc]


def test_a_target_is_taken_in_three_forms():
    wanted = Target(speedup=2, drop_points=0.5)
    assert as_target(wanted) is wanted
    assert as_target("2x, 0.5 pt") == as_target({"speedup": 2, "drop_points": "0.5 pt"}) == wanted
    with pytest.raises(ConfigError, match=r"found float, wanted tersor\.Target"):
        as_target(2.0)


@pytest.mark.parametrize("number", [np.float32(2), np.float64(2), np.int64(2), np.uint8(2)])
def test_numbers_of_numpy_are_numbers(number: Any) -> None:
    found = target._checked("speedup", number)
    assert type(found) is float
    assert found == 2.0


@pytest.mark.parametrize("other", [np.bool_(True), True, np.array(2.0), [2.0], 2j])
def test_what_is_no_number_is_refused(other: Any) -> None:
    with pytest.raises(TargetError, match="wanted a number or a text"):
        target._checked("speedup", other)
