"""A trace's bars are as long as the ops, and follow each other."""

import json
from itertools import pairwise

import pytest

from tersor.analyse.roofline import ProfileRow
from tersor.report.trace import chrome_trace


def row(node: str, ms: float) -> ProfileRow:
    return ProfileRow(
        node=node, layer=f"layer of {node}", kind="linear", format="f32", ms=ms, share=0.5
    )


def test_bars_follow_each_other() -> None:
    trace = json.loads(json.dumps(chrome_trace("net", [row("a", 0.5), row("b", 1.25)], 0.2)))
    bars = [e for e in trace["traceEvents"] if e["ph"] == "X"]
    assert [bar["name"] for bar in bars] == ["layer of a", "layer of b", "outside of all ops"]
    assert [bar["dur"] for bar in bars] == pytest.approx([500, 1250, 200])
    for before, after in pairwise(bars):
        assert after["ts"] == pytest.approx(before["ts"] + before["dur"])
    assert bars[0]["args"]["node"] == "a"
