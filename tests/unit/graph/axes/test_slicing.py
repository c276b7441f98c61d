"""Cutting: what stays, what is refused, and what an analysis of the cut graph finds."""

import operator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx

from tersor.core.errors import ShapeError
from tersor.graph.axes import analyse_axes, keep_units, mac_share
from tersor.graph.axes.gate import check
from tersor.graph.axes.macs import node_macs
from tersor.graph.contracts import Graph
from tersor.graph.edit import attribute
from tests.unit.graph.axes.micro import Net


def layers(seed: int = 0) -> Graph:
    """Two widths, one of them in two parts."""
    n = Net(seed)
    a = n("tanh", n.lin("a", n.x(), 6))
    left, right = n("chunk", n.lin("c", a, 10), 2, 1)
    return n.close(n.lin("b", n("mul.Tensor", left, n("sigmoid", right)), 3))


def heads() -> Graph:
    n = Net()
    y = n("view", n.lin("a", n.x(), 12), [-1, 3, 4])
    y = n("reshape", n("tanh", n("permute", y, [0, 2, 1])), [-1, 12])
    return n.close(n.lin("b", y, 3))


def tensor(graph: Graph, name: str) -> torch.Tensor:
    return attribute(graph.module, name)


def test_the_units_that_stay_are_those_of_the_tensors():
    graph = layers()
    small = keep_units(graph, analyse_axes(graph), {"a": [1, 4], "c": [0, 3, 4]})
    assert torch.equal(tensor(small, "a.weight"), tensor(graph, "a.weight")[[1, 4]])
    assert torch.equal(tensor(small, "a.bias"), tensor(graph, "a.bias")[[1, 4]])
    rows = tensor(graph, "c.weight")[[0, 3, 4, 5, 8, 9]]
    assert torch.equal(tensor(small, "c.weight"), rows[:, [1, 4]])
    assert torch.equal(tensor(small, "b.weight"), tensor(graph, "b.weight")[:, [0, 3, 4]])
    assert tensor(small, "b.bias") is not None


def test_the_graph_that_is_cut_is_only_read():
    graph = layers()
    axes = analyse_axes(graph)
    before = {n: t.clone() for n, t in graph.module.named_buffers()}
    code, x = graph.module.code, graph.example
    wanted = graph.run(x)
    keep_units(graph, axes, {"a": [0], "c": [2]})
    assert graph.module.code == code
    assert all(torch.equal(t, before[n]) for n, t in graph.module.named_buffers())
    assert torch.equal(graph.run(x)[0], wanted[0])


def test_nodes_keep_their_names_and_learn_their_sizes():
    graph = layers()
    small = keep_units(graph, analyse_axes(graph), {"a": [0, 5], "c": [1, 2]})
    nodes = {n.name: n for n in small.module.graph.nodes}
    assert list(nodes) == [n.name for n in graph.module.graph.nodes]
    sizes = {name: list(n.meta["val"].shape) for name, n in nodes.items() if "tanh" in name}
    assert sizes == {"tanh_default": [8, 2]}
    assert str(nodes["chunk_default"].target) == "aten.split_with_sizes.default"
    assert nodes["chunk_default"].args[1] == [2, 2]


def test_a_width_that_is_not_named_stays_whole():
    graph = layers()
    small = keep_units(graph, analyse_axes(graph), {"a": [2]})
    assert tensor(small, "c.weight").shape == (10, 1)
    chunk = next(n for n in small.module.graph.nodes if n.name == "chunk_default")
    assert str(chunk.target) == "aten.chunk.default"


@pytest.mark.parametrize(
    ("units", "found"),
    [
        ([], "0 kept units up to -1"),
        ([0, 6], "2 kept units up to 6"),
        ([-1], "1 kept units up to -1"),
    ],
)
def test_units_that_are_not_there_are_refused(units: list[int], found: str):
    graph = layers()
    with pytest.raises(ShapeError) as caught:
        keep_units(graph, analyse_axes(graph), {"a": units})
    assert str(caught.value) == (f"width a: found {found}, wanted 1 to 6 indices below 6")


def test_a_cut_graph_has_the_same_widths_with_the_units_that_are_left():
    for graph, keep in (
        (layers(), {"a": [0, 2, 3], "c": [1, 4]}),
        (heads(), {"a": [0, 2], "a#2": [1, 3]}),
    ):
        small = keep_units(graph, analyse_axes(graph), keep)
        again = analyse_axes(small)
        assert {w.name: w.units for w in again.widths} == {k: len(v) for k, v in keep.items()}


@settings(max_examples=10, deadline=None)
@given(st.sets(st.integers(0, 5), min_size=2), st.sets(st.integers(0, 4), min_size=2), st.data())
def test_cutting_twice_is_cutting_once(first: set[int], second: set[int], data: st.DataObject):
    graph = layers()
    keep = {"a": sorted(first), "c": sorted(second)}
    once = {k: data.draw(st.sets(st.sampled_from(v), min_size=1)) for k, v in keep.items()}
    wanted = keep_units(graph, analyse_axes(graph), {k: sorted(v) for k, v in once.items()})
    half = keep_units(graph, analyse_axes(graph), keep)
    axes = analyse_axes(half)
    places = {k: [keep[k].index(u) for u in sorted(v)] for k, v in once.items()}
    found = keep_units(half, axes, places)
    for name, value in wanted.module.named_buffers():
        assert torch.equal(tensor(found, name), value)
    assert torch.equal(found.run(graph.example)[0], wanted.run(graph.example)[0])


def test_a_product_loses_its_rows_and_its_columns():
    graph = heads()
    axes = analyse_axes(graph)
    small = keep_units(graph, axes, {"a": [0, 2], "a#2": [1, 3]})
    kept = [4 * h + d for h in (0, 2) for d in (1, 3)]
    assert torch.equal(tensor(small, "a.weight"), tensor(graph, "a.weight")[kept])
    turned = [3 * d + h for d in (1, 3) for h in (0, 2)]
    assert torch.equal(tensor(small, "b.weight"), tensor(graph, "b.weight")[:, turned])
    assert check(graph, axes, {"a": [1], "a#2": [0, 2]}).passed


def test_rows_and_columns_of_a_square_view_are_two_widths():
    n = Net()
    y = n("permute", n("view", n.lin("a", n.x(), 9), [-1, 3, 3]), [0, 2, 1])
    graph = n.close(n.lin("b", n("reshape", y, [-1, 9]), 3))
    axes = analyse_axes(graph)
    assert {w.name: w.units for w in axes.widths} == {"a": 3, "a#2": 3}
    assert check(graph, axes, {"a": [0, 1]}, each=True).passed


def test_a_width_of_which_one_unit_is_left_stays_a_dimension():
    n = Net()
    y = n("squeeze", n("unsqueeze", n.lin("a", n.x(), 6), 1))
    graph = n.close(n.lin("b", y, 3))
    small = keep_units(graph, analyse_axes(graph), {"a": [3]})
    assert small.run(graph.example)[0].shape == (8, 3)


def test_a_single_element_that_may_be_repeated_stays():
    """A gate of one channel, cut from a layer, is spread over all others."""
    n = Net()
    gate, rest = n("split_with_sizes", n.lin("a", n.x(), 6), [1, 5], 1)
    graph = n.close(n.lin("b", n("mul.Tensor", n("sigmoid", gate), rest), 3))
    axes = analyse_axes(graph)
    assert [w.units for w in axes.widths] == [5]
    assert check(graph, axes, {"a": [0, 3]}, each=True).passed


def test_macs_are_those_of_the_sizes_and_fall_with_the_widths():
    graph = layers()
    axes = analyse_axes(graph)
    small = keep_units(graph, axes, {"a": [0, 1, 2], "c": [0]})
    totals = [sum(node_macs(g, n) for n in g.module.graph.nodes) for g in (graph, small)]
    assert totals == [8 * (4 * 6 + 6 * 10 + 5 * 3), 8 * (4 * 3 + 3 * 2 + 1 * 3)]
    assert mac_share(graph, axes) == 1.0


def test_macs_of_every_kind_of_product():
    n = Net()
    x = n.x(3, 5, 5)
    c = n.conv("c", n.conv("a", x, 6, 3), 6, 3, groups=3)
    t = n("conv_transpose2d.input", c, n.param("t", 6, 4, 2, 2), None, [2, 2])
    tokens = n("flatten.using_ints", t, 2)
    turned = n("transpose.int", tokens, 1, 2)
    y = n("scaled_dot_product_attention", turned, turned, turned, scale=0.5)
    graph = n.close(n("matmul", tokens, y))
    analyse_axes(graph)
    found = [node_macs(graph, node) for node in graph.module.graph.nodes]
    assert [m for m in found if m] == [
        8 * 25 * 6 * 3 * 9,
        8 * 25 * 6 * 2 * 9,
        8 * 25 * 6 * 4 * 4,
        8 * 2 * 100 * 100 * 4,
        8 * 4 * 4 * 100,
    ]


def test_macs_of_a_recurrent_layer():
    """Four gates read the input and the state at every step; biases multiply nothing."""
    n = Net()
    x = n("unsqueeze", n.x(), 1)
    state = n("zeros", [1, 1, 6])
    weights = [n.param("i", 24, 4), n.param("h", 24, 6), n.param("b", 24), n.param("c", 24)]
    options = (True, 1, 0.0, False, False, False)
    y, *_ = n("lstm.input", x, [state, state], weights, *options)
    graph = n.close(y)
    analyse_axes(graph)
    assert sum(node_macs(graph, node) for node in graph.module.graph.nodes) == 8 * 24 * (4 + 6)


def test_sizes_of_nodes_that_know_none_are_computed_without_data():
    graph = layers()
    assert all("val" not in n.meta for n in graph.module.graph.nodes)
    analyse_axes(graph)
    known = {n.name: n.meta["val"] for n in graph.module.graph.nodes if n.op == "call_function"}
    assert list(known["linear_default_1"].shape) == [8, 10]
    assert all(
        isinstance(v, torch._subclasses.FakeTensor)
        for n, v in known.items()
        if isinstance(v, torch.Tensor)
    )
    items: list[fx.Node] = [n for n in graph.module.graph.nodes if n.target is operator.getitem]
    assert [list(n.meta["val"].shape) for n in items] == [[8, 5], [8, 5]]
