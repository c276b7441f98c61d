"""What the caller allows is checked at once; records go to JSON and back."""

import json
from inspect import unwrap
from typing import Any

import pytest

from tersor.core.data import Data
from tersor.core.errors import ConfigError
from tersor.core.jsonable import dumps, from_json
from tersor.core.recovery import PartRecovery, Recover, Recovery


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"seconds": 0}, "seconds=0"),
        ({"seconds": float("nan")}, "seconds=nan"),
        ({"steps": 0}, "steps=0"),
        ({"rate": 0.0}, "rate=0.0"),
        ({"batch": 0}, "batch=0"),
        ({"whole": 1.5}, "whole=1.5"),
        ({"minutes": "x"}, "found minutes='x', wanted a number"),
        ({"seconds": None}, "found seconds=None, wanted a number"),
        ({"rate": "a"}, "found rate='a', wanted a number"),
        ({"temperature": True}, "found temperature=True, wanted a number"),
        ({"whole": []}, r"found whole=\[\], wanted a number"),
        ({"data": 5}, "found data=5, wanted an iterable"),
        ({"data": "rows"}, "found data='rows', wanted an iterable"),
        ({"data": [], "loss": 3}, r"found loss=3, wanted a function loss\(outputs, item\)"),
    ],
)
def test_wrong_values_are_named(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        # Without the annotations' own check, which only tests have.
        unwrap(Recover.__init__)(object.__new__(Recover), **wrong)


class Rows:
    """A dataset that is read by position."""

    def __getitem__(self, position: int) -> int:
        if position > 1:
            raise IndexError
        return position


@pytest.mark.parametrize("data", [iter([1]), Data([1]), Rows(), [1]])
def test_data_is_all_that_gives_items(data: object) -> None:
    assert Recover(data=data, minutes=2).seconds == 120


def test_records_read_back_and_say_what_was_done() -> None:
    part = PartRecovery(part="block", name="relu", ops=("a", "b"), steps=3, before=0.5, after=0.25)
    record = Recovery(what="weights", parts=(part, part), seconds=2.0, held_out=8,
                      before=0.5, after=0.25, is_kept=True)  # fmt: skip
    assert from_json(Recovery, json.loads(dumps(record))) == record
    assert record.steps == 6
    assert "6 steps on 2 parts in 2 s" in record.describe()
    assert "0.5 -> 0.25" in record.describe()
    idle = Recovery(what="rounded", reason="nothing in it can be trained")
    assert "nothing was trained: nothing in it can be trained" in idle.describe()
