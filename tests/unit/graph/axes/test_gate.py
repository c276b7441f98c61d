"""The law can fail: wrong rules, wrong rewrites, masks without effect, outputs that are no numbers."""

import numpy as np
import pytest
import torch
from torch import Tensor

from tersor.core.errors import ParityError
from tersor.graph.axes import Axes, analyse_axes
from tersor.graph.axes.gate import (
    EFFECT,
    TOLERANCE,
    check,
    check_random,
    other_batch,
    random_share,
    randomised,
    require,
)
from tersor.graph.axes.labels import Dim
from tersor.graph.axes.rulebook import REWRITES, RULES, Call, Edit, Shape
from tersor.graph.contracts import Graph
from tersor.graph.edit import attribute
from tests.unit.graph.axes.micro import Net

GONE = {"a": [0, 3]}


def between(op: str, *args: object) -> Graph:
    n = Net()
    return n.close(n.lin("b", n(op, n.lin("a", n.x(5, 4), 6), *args), 3))


def analysed(op: str, *args: object) -> tuple[Graph, Axes]:
    graph = between(op, *args)
    return graph, analyse_axes(graph)


def reversed_units(call: Call) -> Shape:
    x = call.dims("self")
    return [*x[:-1], Dim(x[-1].rows[::-1], x[-1].zero)]


def always_zero(call: Call) -> Shape:
    return [Dim(d.rows, zero=True) for d in call.dims("self")]


def test_units_in_the_wrong_order_are_caught(monkeypatch: pytest.MonkeyPatch):
    graph, axes = analysed("tanh")
    assert check(graph, axes, GONE).passed
    monkeypatch.setitem(RULES, "tanh", reversed_units)
    axes = analyse_axes(graph)
    assert axes["a"].units == 6
    assert check(graph, axes, GONE).difference > EFFECT * TOLERANCE
    with pytest.raises(ParityError, match=r"cutting 2 units of a differs from zeroing them by .*"):
        require(graph, axes, GONE)


def test_a_wrong_claim_that_something_is_zero_is_caught(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(RULES, "exp", always_zero)
    n = Net()
    graph = n.close(n("sum.dim_IntList", n("exp", n.lin("a", n.x(), 6)), [1]))
    axes = analyse_axes(graph)
    assert not check(graph, axes, GONE).passed


@pytest.mark.parametrize("op", ["mean.dim", "rms_norm"])
def test_a_rewrite_that_does_nothing_is_caught(op: str, monkeypatch: pytest.MonkeyPatch):
    n = Net()
    a = n("tanh", n.lin("a", n.x(5, 4), 6))
    y = n(op, a, [-1]) if op == "mean.dim" else n.lin("b", n(op, a, [6]), 3)
    graph = n.close(y)
    axes = analyse_axes(graph)
    assert check(graph, axes, GONE).passed

    def only_the_shape(edit: Edit) -> None:
        if "normalized_shape" in edit.args:
            edit.set(normalized_shape=[4])

    monkeypatch.setitem(REWRITES, op.partition(".")[0], only_the_shape)
    assert check(graph, axes, GONE).difference > EFFECT * TOLERANCE


def test_the_comparison_is_at_another_batch_in_another_order():
    graph, axes = analysed("tanh")
    (x,) = graph.example
    (found,) = other_batch(graph)
    assert found.shape[0] == x.shape[0] + 1
    assert {tuple(r.flatten().tolist()) for r in found} == {tuple(r.flatten().tolist()) for r in x}
    assert not torch.equal(found[: len(x)], x)
    assert check(graph, axes, GONE).batch == 9


def test_literals_of_the_batch_are_caught_there():
    """A view that writes the batch out works on the example alone."""
    graph, axes = analysed("view", [8, 5, 6])
    with pytest.raises(RuntimeError, match="invalid for input of size"):
        check(graph, axes, GONE)
    assert check(graph, axes, {}, inputs=graph.example).difference == 0


def test_other_inputs_may_be_given():
    graph, axes = analysed("tanh")
    report = check(graph, axes, GONE, inputs=[torch.ones(2, 5, 4)])
    assert report.batch == 2
    assert report.passed


def test_a_mask_without_effect_shows_nothing_and_says_so():
    n = Net()
    a, c = n.lin("a", n.x(), 6), n.lin("c", n.x(), 5)
    graph = n.close([n.lin("b", a, 3), n.lin("d", c, 3)])
    attribute(graph.module, "b.weight").zero_()
    axes = analyse_axes(graph)
    report = check(graph, axes, {"a": [1], "c": [2]}, each=True)
    assert report.silent == ("a",)
    assert report.passed  # the other one did move the output
    alone = check(graph, axes, {"a": [1]}, each=True)
    assert alone.silent == ("a",)
    assert not alone.passed
    assert require(graph, axes, {"a": [1]}).effect == 0  # a cut that changes nothing is a right cut


def test_a_wrong_rule_is_caught_where_the_plan_removes_dead_units(
    monkeypatch: pytest.MonkeyPatch,
):
    """Units 0 and 5 move nothing, so their cut agrees under any rule that swaps them."""
    monkeypatch.setitem(RULES, "tanh", reversed_units)
    graph, axes = analysed("tanh")
    attribute(graph.module, "b.weight")[:, [0, 5]] = 0
    dead = {"a": [0, 5]}
    report = check(graph, axes, dead, each=True)
    assert report.difference <= TOLERANCE
    assert report.silent == ("a",)
    with pytest.raises(ParityError, match=r"cutting 3 units of a differs"):
        require(graph, axes, dead)


def test_widths_that_nothing_depends_on_are_named():
    n = Net()
    a, c = n.lin("a", n.x(), 6), n.lin("c", n.x(), 5)
    graph = n.close([n.lin("b", a, 3), n.lin("d", c, 3)])
    attribute(graph.module, "b.weight").zero_()
    attribute(graph.module, "d.weight")[:, 2] = 0
    report = require(graph, analyse_axes(graph), {"a": [1], "c": [2]})
    assert report.silent == ("a",)  # others of c's units do move the output, and were checked


def test_values_that_are_no_numbers_never_agree():
    n = Net()
    graph = n.close(n.lin("b", n("log", n.lin("a", n.x(), 6)), 3))
    axes = analyse_axes(graph)
    assert not axes.widths
    report = check(graph, axes, {})
    assert not report.difference <= report.tolerance


def test_a_random_share_leaves_a_unit_and_takes_one():
    _, axes = analysed("tanh")
    for share, count in ((0.0, 1), (0.3, 2), (0.5, 3), (1.0, 5)):
        found = random_share(axes, share, 0)["a"]
        assert len(set(found)) == count
        assert found == sorted(found)
        assert set(found) <= set(range(6))
    assert random_share(axes, 0.5, 1) == random_share(axes, 0.5, 1)
    assert any(random_share(axes, 0.5, 1) != random_share(axes, 0.5, s) for s in range(2, 8))


def test_approximate_widths_are_left_out_unless_asked_for():
    graph, axes = analysed("layer_norm", [6])
    assert random_share(axes, 0.3, 0) == {}
    gone = random_share(axes, 0.3, 0, exact_only=False)
    assert len(gone["a"]) == 2
    assert check(graph, axes, gone).difference > TOLERANCE


def test_vectors_of_fresh_models_are_drawn_at_random_and_the_rest_stays():
    n = Net()
    y = n("mul.Tensor", n.lin("a", n.x(), 6), n.stored("ones", torch.ones(6)))
    graph = n.close(n.lin("b", y, 3))
    shaken = randomised(graph, 3)

    def value(g: Graph, name: str) -> Tensor:
        return attribute(g.module, name)

    assert value(shaken, "ones").unique().numel() == 6
    assert np.allclose(value(shaken, "ones"), 1.05, atol=0.1)
    assert torch.equal(value(shaken, "a.weight"), value(graph, "a.weight"))
    assert torch.equal(value(graph, "ones"), torch.ones(6))
    assert check_random(graph, analyse_axes(graph), each=True).passed
