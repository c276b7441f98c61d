"""What the caller allows is checked at once; records go to JSON and back."""

import json

import pytest

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
    ],
)
def test_wrong_values_are_named(wrong: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Recover(**wrong)  # type: ignore[arg-type]


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
