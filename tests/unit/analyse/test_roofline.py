"""Rows of a profile: times add up to the call, floors come from the ceilings."""

import pytest

from tersor.analyse.roofline import Ceilings, Nodes, floor_ms, profile_rows, raised
from tersor.core.records import OUTSIDE
from tersor.graph.facts import NodeFacts

FACTS = {
    "conv": NodeFacts(
        kind="conv", macs=10**9, weight_elements=1000, in_elements=1000, out_elements=1000
    ),
    "add": NodeFacts(kind="elementwise", in_elements=10**6, out_elements=10**6),
    "softmax": NodeFacts(kind="norm", in_elements=10, out_elements=10),
    "fused": NodeFacts(kind="activation", in_elements=10, out_elements=10),
}
NODES = Nodes(facts=FACTS, formats={"conv": "int8"}, layers={"conv": "stem"}, precision="f32")
TIMES = {"softmax": 0.1, "conv": 5.0, "add": 2.0, "Reorder": 0.4, OUTSIDE: 0.5}
CEILINGS = Ceilings(macs_per_s={"f32": 1e11, "int8": 4e11}, bytes_per_s=8e9)


def test_times_add_up_to_the_call() -> None:
    rows = profile_rows(TIMES, 16.0, NODES, None)
    assert [row.node for row in rows] == ["conv", "add", "softmax", "Reorder"]
    assert sum(row.ms for row in rows) == pytest.approx(15.0)
    assert sum(row.share for row in rows) == pytest.approx(1.0)
    assert [row.kind for row in rows] == ["conv", "elementwise", "norm", "glue"]
    assert all(row.bound == "" and row.of_ceiling is None for row in rows)
    assert rows[0].layer == "stem"
    assert rows[1].layer == "add"


def test_bounds_are_by_the_longer_floor() -> None:
    rows = {row.node: row for row in profile_rows(TIMES, 8.0, NODES, CEILINGS)}
    assert rows["conv"].bound == "compute"
    assert rows["conv"].of_ceiling == pytest.approx(2.5 / 5.0)  # 1e9 at 4e11 a second: 2.5 ms
    assert rows["add"].bound == "memory"
    assert rows["add"].of_ceiling == pytest.approx(1.0 / 2.0)  # 8 MB at 8 GB a second: 1 ms
    assert rows["softmax"].bound == "overhead"
    assert rows["Reorder"].bound == ""
    assert floor_ms(tuple(rows.values())) == pytest.approx(3.5, rel=1e-3)


def test_bytes_follow_the_format() -> None:
    rows = {row.node: row for row in profile_rows(TIMES, 8.0, NODES, None)}
    assert rows["conv"].bytes == 1000 + 1000 + 4 * 1000
    assert rows["add"].bytes == 8 * 10**6


def test_no_op_is_above_the_raised_ceiling() -> None:
    slow = Ceilings(macs_per_s={"f32": 1e9, "int8": 1e9}, bytes_per_s=None)
    rows = profile_rows(TIMES, 8.0, NODES, slow)
    again = profile_rows(TIMES, 8.0, NODES, raised(slow, rows))
    assert rows[0].of_ceiling == pytest.approx(200.0)
    assert again[0].of_ceiling == pytest.approx(1.0)
    assert raised(CEILINGS, rows).macs_per_s == CEILINGS.macs_per_s


def test_an_empty_profile_has_no_rows() -> None:
    assert profile_rows({}, 1.0, NODES, CEILINGS) == ()
    assert floor_ms(()) == 0
