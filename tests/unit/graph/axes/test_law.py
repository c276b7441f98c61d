"""Cutting units out computes what zeroing them does, on small networks of every kind."""

import copy
import functools

import pytest
import torch

from tersor.capture.module import capture
from tersor.capture.samples import Samples, flatten_item
from tersor.core.errors import ParityError, ShapeError
from tersor.graph.axes import Axes, analyse_axes, keep_units, mac_share
from tersor.graph.axes.gate import TOLERANCE, check, check_random, random_share, require
from tersor.graph.axes.rulebook import RULES, Call, Shape
from tersor.graph.contracts import Graph
from tests.unit.graph.axes.nets import NETS


def captured(name: str) -> tuple[Graph, Axes]:
    """A graph of its own each time; exported once."""
    graph = copy.deepcopy(exported(name))
    return graph, analyse_axes(graph)


@functools.cache
def exported(name: str) -> Graph:
    make, example = NETS[name]
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(3)
        model, inputs = make().eval(), example()
    call, tensors = flatten_item(inputs, "example")
    return capture(model, Samples(call, tensors)).graph


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("share", [0.3, 0.8])
def test_cut_equals_mask(name: str, share: float):
    graph, axes = captured(name)
    report = check_random(graph, axes, share=share, seed=1, each=True)
    assert report.passed
    assert report.batch != len(graph.example[0])
    assert not report.silent
    assert not axes.unknown


# Width -> (kind, units, exactness): what an expert would prune by hand.
WANTED = {
    "residual": {"stem": ("channels", 8, "exact"), "a": ("channels", 6, "exact")},
    "dense": {"stem": ("channels", 6, "exact"), "a": ("channels", 4, "exact"), "b": ("channels", 5, "exact")},
    "squeeze-excite": {"stem": ("channels", 8, "exact"), "down": ("channels", 4, "exact")},
    "transposed": {"down": ("channels", 6, "exact"), "wide": ("channels", 8, "exact"), "up": ("channels", 5, "exact")},
    "fused attention": {
        "qkv:heads": ("heads", 3, "exact"),
        "up": ("neurons", 20, "exact"),
    },
    "grouped queries": {
        "q:heads": ("heads", 2, "exact"),  # a key with its two queries
        "q:head_dim": ("head_dim", 3, "exact"),  # rotary pairs
        "v:head_dim": ("head_dim", 6, "exact"),
        "gate": ("neurons", 20, "exact"),
        "embed": ("stream", 16, "exact"),
    },
    "flattened": {"conv": ("channels", 6, "exact"), "left": ("neurons", 5, "exact")},
    "table": {"up": ("neurons", 14, "exact"), "down": ("stream", 10, "approximate")},
}  # fmt: skip


@pytest.mark.parametrize("name", WANTED)
def test_finds_the_widths_that_are_there(name: str):
    _, axes = captured(name)
    found = {w.name: (w.kind, w.units, w.exactness) for w in axes.widths}
    assert {k: found.get(k) for k in WANTED[name]} == WANTED[name]


def test_grouped_convolutions_lose_the_same_channel_of_every_group():
    graph, axes = captured("grouped")
    assert {w.name: w.units for w in axes.widths} == {"stem": 3, "grouped": 2}
    small = keep_units(graph, axes, {"stem": [0, 2], "grouped": [1]})
    shapes = {n: tuple(t.shape) for n, t in small.module.named_buffers()}
    assert shapes["grouped.weight"] == (4, 2, 3, 3)
    assert shapes["stem.weight"] == (8, 3, 1, 1)


def test_vocabularies_and_outputs_are_pinned_with_their_reason():
    reasons = {}
    for name in ("table", "cosine attention"):
        _, axes = captured(name)
        reasons |= {(p.tensor, p.dim): (p.op, p.reason) for p in axes.pinned}
    text = "entries of a table that indices choose"
    assert reasons["embed.weight", 0] == ("aten.embedding", text)
    assert reasons["out.weight", 0] == ("output", "an output of the model")


def test_a_cut_graph_keeps_names_and_shows_the_smaller_widths():
    graph, axes = captured("residual")
    small = keep_units(graph, axes, {"stem": [1, 3, 4], "a": [0, 5]})
    names = [n.name for n in graph.module.graph.nodes]
    assert [n.name for n in small.module.graph.nodes if n.name in names] == names
    assert {w.name: w.units for w in analyse_axes(small).widths} == {"stem": 3, "a": 2}
    assert mac_share(graph, axes) == 1.0


@pytest.mark.parametrize("units", [[], [0, 99]])
def test_a_width_keeps_at_least_one_unit_that_it_has(units: list[int]):
    graph, axes = captured("residual")
    with pytest.raises(ShapeError, match=r"width a: .* wanted"):
        keep_units(graph, axes, {"a": units})


def test_the_gate_catches_a_wrong_rule(monkeypatch: pytest.MonkeyPatch):
    """Labels that go along in the wrong order still fit in shape: only the values differ."""
    right = RULES["relu"]

    def reversed_rows(call: Call) -> Shape:
        found = list(right(call))
        dim = found[1]
        found[1] = type(dim)(dim.rows[::-1], dim.zero)
        return found

    monkeypatch.setitem(RULES, "relu", reversed_rows)
    graph, axes = captured("dense")
    gone = random_share(axes, 0.3, 0)
    report = check(graph, axes, gone)
    assert not report.difference <= TOLERANCE
    with pytest.raises(ParityError, match="a rule is wrong for this model"):
        require(graph, axes, gone)


def test_the_gate_knows_when_it_shows_nothing():
    graph, axes = captured("residual")
    graph.module.get_buffer("b.weight").zero_()
    report = check(graph, axes, {"a": [0, 1]}, each=True)
    assert report.silent == ("a",)
    assert not report.passed


def test_an_op_without_a_rule_freezes_what_it_meets_and_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delitem(RULES, "gelu")
    _, axes = captured("residual")
    assert axes.unknown == {"aten.gelu": 1}
    assert {w.name for w in axes.widths} == {"stem"}
    assert ("a.weight", 0, "aten.gelu") in {(p.tensor, p.dim, p.op) for p in axes.pinned}
    assert check_random(axes.graph, axes).passed
