"""What only an exported graph has: symbolic batches, sizes that values decide, ops of others."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tersor.graph.axes import analyse_axes
from tersor.graph.axes.gate import check
from tersor.graph.axes.rulebook import RULES, op_name
from tests.unit.capturing import graph_of, random, targets, trained
from tests.unit.graph.axes.micro import Net


class Beside(nn.Module):
    """A layer, something made of another, and their sum."""

    def __init__(self, apply: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(4, 5), nn.Linear(5, 3)
        self.apply_to = apply

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(x).tanh()) + self.apply_to(self.a(x))


def squares(x: Tensor) -> Tensor:
    """Values as whole numbers, few enough to be chosen by."""
    return x.relu().long().clamp(max=7)


COUNTED: dict[str, Callable[[Tensor], Tensor]] = {
    "masked_select": lambda a: a.masked_select(a > 0).sum(),
    "nonzero": lambda a: (a > 0).nonzero().float().sum(),
    "where": lambda a: torch.where(a > 0)[1].float().sum(),
    "index": lambda a: a[a > 0].sum(),
    "_unique2": lambda a: torch.unique(squares(a)).sum(),
    "repeat_interleave": lambda a: torch.repeat_interleave(squares(a).flatten()).sum(),
    "bincount": lambda a: torch.bincount(squares(a).flatten(), minlength=8).float().std(),
}


@pytest.mark.parametrize("name", COUNTED)
def test_elements_that_values_choose_hold_what_they_are_chosen_of(name: str):
    graph = graph_of(trained(Beside(COUNTED[name])), random(4, 4))
    assert any(name in target for target in targets(graph))
    axes = analyse_axes(graph)
    assert {w.name: w.units for w in axes.widths} == {"b": 5}
    reasons = {(p.tensor, p.dim): p.reason for p in axes.pinned}
    assert reasons["a.weight", 0] == "elements that values choose"
    assert check(graph, axes, {"b": [1, 4]}, each=True).passed


def test_an_op_of_others_is_not_taken_for_ours_by_its_name():
    """A relu that looks at its neighbours."""
    with torch.library._scoped_library("tersor_test", "FRAGMENT") as library:
        library.define("relu(Tensor x) -> Tensor")
        library.impl("relu", lambda x: x.relu() - x.mean(-1, True), "CompositeExplicitAutograd")
        torch.library.register_fake("tersor_test::relu", torch.empty_like, lib=library)
        n = Net()
        a, c = n.lin("a", n.x(), 6), n.lin("c", n("tanh", n.lin("b", n.x(), 5)), 6)
        node = n.graph.call_function(torch.ops.tersor_test.relu.default, (a,))
        n.values[node] = n.values[a]
        axes = analyse_axes(n.close(n("add.Tensor", node, c)))
    assert op_name(node) == "tersor_test.relu"
    assert axes.unknown == {"tersor_test.relu": 1}
    assert {w.name for w in axes.widths} == {"b"}
    (pin,) = [p for p in axes.pinned if (p.tensor, p.dim) == ("a.weight", 0)]
    assert (pin.op, pin.reason) == ("tersor_test.relu", "there is no rule for this op")


def test_names_in_the_rules_are_those_of_nodes():
    for name in RULES:
        packet = getattr(torch.ops.aten, name, None) or getattr(torch.ops.aten, f"{name}_")
        node = torch.fx.Graph().call_function(getattr(packet, packet.overloads()[0]))
        assert op_name(node) == name


class Heads(nn.Module):
    """Sizes that are computed from the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        y = self.a(x).view(b, t, 3, 4).transpose(1, 2).reshape(b * 3, t, 4)
        y = (y @ y.transpose(1, 2)).softmax(-1) @ y
        return self.b(y.view(b, 3, t, 4).transpose(1, 2).reshape(b, t, 12))


def test_a_head_may_go_though_its_count_is_part_of_a_product_with_the_batch():
    graph = graph_of(trained(Heads()), random(4, 5, 4))
    axes = analyse_axes(graph)
    assert {w.name: w.units for w in axes.widths} == {"a": 3, "a#2": 4}
    report = check(graph, axes, {"a": [1], "a#2": [0, 2]}, each=True)
    assert report.passed
    assert not report.silent
