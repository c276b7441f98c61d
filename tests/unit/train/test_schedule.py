"""Counts of dead units over a run."""

import json
import re
from inspect import unwrap

import pytest
from hypothesis import given as drawn
from hypothesis import strategies as st

from tersor.core.errors import ConfigError
from tersor.train.schedule import Schedule


def test_nothing_dies_before_the_begin_and_all_have_at_the_end() -> None:
    schedule = Schedule(total_steps=1000)
    assert (schedule.first, schedule.last) == (50, 400)
    assert schedule.dead(50, 64, 16) == 0
    assert schedule.dead(400, 64, 16) == 48
    assert schedule.dead(225, 64, 16) == round(48 * 0.875)  # halfway: 1 - 1/8


@drawn(st.integers(200, 5000), st.integers(2, 128), st.data())
def test_counts_grow(total: int, units: int, data: st.DataObject) -> None:
    keep = data.draw(st.integers(1, units))
    schedule = Schedule(total_steps=total, every=5)
    counts = [schedule.dead(step, units, keep) for step in range(0, total, 7)]
    assert counts == sorted(counts)
    assert 0 <= counts[0] <= counts[-1] == units - keep


def test_the_last_step_is_a_look_whatever_the_spacing() -> None:
    schedule = Schedule(total_steps=1013, every=20)
    assert schedule.is_look(schedule.last)
    assert schedule.is_look(40)
    assert not schedule.is_look(41)


@pytest.mark.parametrize("steps", [0, -3, True])
def test_steps_are_a_number_of_at_least_one(steps: object) -> None:
    with pytest.raises(ConfigError, match="total_steps"):
        Schedule(total_steps=steps)  # type: ignore[arg-type]


def test_a_run_too_short_says_how_long_it_must_be() -> None:
    with pytest.raises(ConfigError, match="too small: 1 looks") as error:
        Schedule(total_steps=100)
    words = str(error.value)
    assert "train for 286 steps" in words
    assert Schedule(total_steps=286).last
    assert "every=" in words


@pytest.mark.parametrize(
    ("steps", "given", "words"),
    [
        (8, {"every": 1}, "2 looks .*; train for 15 steps, or give a wider window: .*end=1.0, every=2"),
        (2, {"every": 1}, "0 looks .*; train for 15 steps$"),
        (300, {"begin": 0.1, "end": 0.2}, "begin=0.1, end=0.2, every=7"),
    ],
)  # fmt: skip
def test_the_way_out_of_a_run_too_short_is_one(
    steps: int, given: dict[str, float], words: str
) -> None:
    with pytest.raises(ConfigError, match=words) as error:
        Schedule(total_steps=steps, **given)  # type: ignore[arg-type]
    longer = re.search(r"train for (\d+) steps", str(error.value))
    assert longer is not None
    Schedule(total_steps=int(longer[1]), **given)  # type: ignore[arg-type]
    other = re.search(r"Schedule\((.*)\)$", str(error.value))
    assert (other is None) == (steps < 4)
    if other is not None:
        Schedule(**{n: json.loads(v) for n, v in (p.split("=") for p in other[1].split(", "))})


@pytest.mark.parametrize("given", [{"begin": "x"}, {"end": None}, {"hard": True}, {"begin": [0]}])
def test_a_share_is_a_number(given: dict[str, object]) -> None:
    ((name, value),) = given.items()
    with pytest.raises(ConfigError, match=re.escape(f"found {name}={value!r}, wanted a share")):
        # Without the annotations' own check, which only tests have.
        unwrap(Schedule.__init__)(object.__new__(Schedule), total_steps=4000, **given)


@pytest.mark.parametrize(("begin", "end"), [(0.5, 0.4), (-0.1, 0.4), (0.1, 1.2), (0.3, 0.3)])
def test_the_begin_is_before_the_end(begin: float, end: float) -> None:
    with pytest.raises(ConfigError, match="0 <= begin < end <= 1"):
        Schedule(total_steps=1000, begin=begin, end=end)
