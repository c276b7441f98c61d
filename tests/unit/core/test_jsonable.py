import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tersor.core.errors import ConfigError
from tersor.core.jsonable import digest, dumps, from_json, read_record, to_json
from tersor.core.records import (
    BuildChoice,
    Plan,
    Signature,
    Structure,
    TensorSpec,
    Timing,
)


@dataclass(frozen=True, kw_only=True)
class Inner:
    x: float
    tag: Literal["a", "b"] = "a"


@dataclass(frozen=True, kw_only=True)
class Outer:
    name: str
    n: int
    flag: bool = False
    maybe: int | None = None
    pair: tuple[int, str] = (0, "")
    many: tuple[Inner, ...] = ()
    table: Mapping[str, Inner] = field(default_factory=dict)
    either: str | int | bool = ""
    free: Any = None


inners = st.builds(Inner, x=st.floats(allow_nan=False), tag=st.sampled_from(["a", "b"]))
outers = st.builds(
    Outer,
    name=st.text(),
    n=st.integers(),
    flag=st.booleans(),
    maybe=st.none() | st.integers(),
    pair=st.tuples(st.integers(), st.text()),
    many=st.lists(inners, max_size=3).map(tuple),
    table=st.dictionaries(st.text(max_size=5), inners, max_size=3),
    either=st.text() | st.integers() | st.booleans(),
    free=st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(), lambda s: st.lists(s, max_size=3)
    ),
)


@given(outers)
def test_round_trip(record: Any):
    text = dumps(record)
    again = from_json(Outer, json.loads(text))
    assert again == record
    assert type(again.either) is type(record.either)
    assert dumps(again) == text


def nested(shape: Any) -> Structure:
    if shape is None:
        return Structure(kind="tensor")
    kind, children = shape
    return Structure(kind=kind, children=tuple(nested(child) for child in children))


SHAPES = st.recursive(
    st.none(),
    lambda s: st.tuples(st.sampled_from(["tuple", "list"]), st.lists(s, max_size=3)),
    max_leaves=6,
)


@given(SHAPES)
def test_real_nested_records_round_trip(shape: Any):
    structure = nested(shape)
    signature = Signature(
        inputs=(TensorSpec(name="x", dtype="float32", shape=(None, 3)),),
        outputs=(),
        args=structure,
        kwargs=Structure(kind="dict"),
        result=Structure(kind="constant", value=2.5),
        parameter_names=("x",),
    )
    assert from_json(Signature, json.loads(dumps(signature))) == signature


def test_a_plan_round_trips_through_a_file(tmp_path: Path):
    plan = Plan(
        assignment={"fc": "int8"},
        choice=BuildChoice(backend="openvino", options={"hint": "latency", "streams": 1}),
        predicted_ms=1.5,
        predicted_bytes=10,
        predicted_error=0.25,
        settings={"fc": {"alpha": 0.5}},
    )
    path = tmp_path / "plan.json"
    plan.save(str(path))
    assert read_record(Plan, path) == plan


@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_infinite_floats_travel_as_text(value: Any):
    text = dumps(Inner(x=value))
    assert "Infinity" not in text
    assert from_json(Inner, json.loads(text)).x == value


def test_nan_travels_as_text():
    assert math.isnan(from_json(Inner, json.loads(dumps(Inner(x=math.nan)))).x)


def test_an_integer_is_read_as_a_float_where_one_is_wanted():
    x = from_json(Inner, {"x": 1}).x
    assert type(x) is float
    assert x == 1.0


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"x": 1.0, "z": 1}, r"Inner: unknown keys \['z'\]; known are \['tag', 'x'\]"),
        ({}, r"Inner: keys \['x'\] are missing"),
        ([], "Inner: found list, wanted an object"),
        ({"x": "1"}, "Inner.x: found '1', wanted float"),
        ({"x": True}, "Inner.x: found True, wanted float"),
        ({"x": 1.0, "tag": "c"}, r"Inner.tag: found 'c', wanted one of \['a', 'b'\]"),
    ],
)
def test_a_bad_record_says_where(data: Any, message: str):
    with pytest.raises(ConfigError, match=message):
        from_json(Inner, data)


GOOD = {"name": "n", "n": 1}


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"n": True}, "Outer.n: found True, wanted int"),
        ({"n": 1.5}, "Outer.n: found 1.5, wanted int"),
        ({"flag": 1}, "Outer.flag: found 1, wanted bool"),
        ({"maybe": "x"}, "Outer.maybe: found 'x', wanted int"),
        ({"pair": [1]}, "Outer.pair: found 1 items, wanted 2"),
        ({"pair": "ab"}, "Outer.pair: found str, wanted a list"),
        ({"many": [{"x": 1}, {"x": None}]}, r"Outer.many\[1\].x: found None"),
        ({"table": {"k": {}}}, r"Outer.table\[k\]: keys \['x'\] are missing"),
        ({"table": []}, "Outer.table: found list, wanted an object"),
        ({"either": 1.5}, "Outer.either: found 1.5"),
    ],
)
def test_a_bad_value_says_where(extra: Any, message: str):
    with pytest.raises(ConfigError, match=message):
        from_json(Outer, GOOD | extra)


def test_what_is_no_json_value_is_refused():
    with pytest.raises(ConfigError, match="set is no JSON value"):
        to_json({"a": {1, 2}})


def test_an_unreadable_file_says_why(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"No such file.*wanted a JSON file with a Timing"):
        read_record(Timing, tmp_path / "absent.json")
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    with pytest.raises(ConfigError, match=r"broken\.json.*wanted a JSON file with a Timing"):
        read_record(Timing, broken)


@pytest.mark.parametrize("value", [{"assignment": {}}, None, b"plan.json", 3])
def test_what_is_no_path_says_what_is_taken(value: Any):
    kind = type(value).__name__
    with pytest.raises(ConfigError, match=rf"plan: found {kind}, wanted a Plan or the path of a"):
        read_record(Plan, value)


def test_digests_depend_on_content_not_on_key_order():
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    assert digest({"a": 1}) != digest({"a": 2})
    assert digest("a", "b") != digest("ab")
    # Golden: keys of caches on disk; changing it loses every cache.
    assert digest({"a": 1}) == "f9d86028c6e0d64e225186f96acb69338b2c59764df79162107f5c4bb34d1310"
