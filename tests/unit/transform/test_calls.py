"""Weights of several calls: one order in which all of them run first, one fit for all."""

import pytest
import torch
from torch import Tensor, nn

from tersor.analyse.widths import width_of, width_sites
from tersor.capture.module import capture
from tersor.capture.samples import Samples, flatten_item
from tersor.graph.axes import analyse_axes, keep_units
from tersor.graph.contracts import Graph
from tersor.graph.edit import stored_uses
from tersor.graph.geometry import output_error
from tersor.graph.operators import weighted_ops
from tersor.transform.calls import shared_calls
from tersor.transform.narrow import narrow


class Twins(nn.Module):
    """One branch for two inputs, and a last layer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 16), nn.Linear(16, 12, bias=False)
        self.last = nn.Linear(24, 3)

    def branch(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(self.first(x).relu()).relu()
        return y

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        y: Tensor = self.last(torch.cat([self.branch(a), self.branch(b)], 1))
        return y


class Again(nn.Module):
    """A layer that runs on its own result."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.last = nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.inner(self.inner(x).relu()).relu())
        return y


def _graph(model: nn.Module, *inputs: Tensor) -> Graph:
    call, tensors = flatten_item(tuple(t[:2] for t in inputs), "example")
    return capture(model.eval(), Samples(call, tensors)).graph


def _noise(rows: int, seed: int) -> Tensor:
    return torch.randn(rows, 6, generator=torch.Generator().manual_seed(seed))


def _calls(graph: Graph) -> tuple[list[str], set[tuple[str, ...]]]:
    ops = {op.node.name: op for op in weighted_ops(graph.module)}
    uses = stored_uses(graph.module)
    order, found = shared_calls(ops, uses, list(graph.module.graph.nodes))
    return [node.name for node in order], set(found.values())


def test_all_calls_come_before_what_follows_them() -> None:
    graph = _graph(Twins(), _noise(2, 0), _noise(2, 1))
    order, groups = _calls(graph)
    assert len(groups) == 2
    assert sorted(order) == sorted(n.name for n in graph.module.graph.nodes)
    nodes = {n.name: n for n in graph.module.graph.nodes}
    for calls in groups:
        last = max(order.index(name) for name in calls)
        assert order.index(calls[-1]) == last
        assert all(order.index(u.name) > last for name in calls for u in nodes[name].users)
    for node in nodes.values():
        assert all(order.index(s.name) < order.index(node.name) for s in node.all_input_nodes)


def test_calls_that_depend_on_each_other_are_left_alone() -> None:
    graph = _graph(Again(), _noise(2, 0))
    order, groups = _calls(graph)
    assert not groups
    assert order == [n.name for n in graph.module.graph.nodes]


def test_a_cut_of_shared_layers_is_fitted_on_all_calls() -> None:
    torch.manual_seed(0)
    model, inputs = Twins(), (_noise(128, 2), _noise(128, 3) * 2 + 1)
    graph = _graph(model, *inputs)
    axes = analyse_axes(graph)
    keep = {
        width_of(axes, site).name: list(range(site.units * 3 // 4)) for site in width_sites(axes)
    }
    wanted = graph.run(inputs)
    fitted = narrow(graph, axes, keep, [inputs])
    second = {name for name in fitted.losses if "linear" in name}
    assert len(second) == 3  # both calls of the second layer, and the last one
    unfitted = keep_units(graph, axes, keep)
    errors = [
        output_error(g.run(inputs), wanted, "values").mean() for g in (fitted.graph, unfitted)
    ]
    assert errors[0] < errors[1] / 2
    held_out = (_noise(64, 4), _noise(64, 5) * 2 + 1)
    wanted = graph.run(held_out)
    errors = [
        output_error(g.run(held_out), wanted, "values").mean() for g in (fitted.graph, unfitted)
    ]
    assert errors[0] < errors[1]


def test_each_call_has_its_say_in_a_fit() -> None:
    """Inputs in other directions: a fit on the rows of one call alone is of no use to the other."""
    torch.manual_seed(0)
    flat = torch.ones(6)
    flat[3:] = 0.02
    model, inputs = Twins(), (_noise(128, 2) * flat, _noise(128, 3) * flat.flip(0))
    graph = _graph(model, *inputs)
    axes = analyse_axes(graph)
    keep = {width_of(axes, site).name: list(range(site.units // 2)) for site in width_sites(axes)}
    wanted = graph.run(inputs)
    fitted = narrow(graph, axes, keep, [inputs])
    rounds = []
    for silent in (0, 1):  # one of the two calls says nothing
        given = tuple(t * (i != silent) for i, t in enumerate(inputs))
        alone = narrow(graph, axes, keep, [given])
        rounds.append(float(output_error(alone.graph.run(inputs), wanted, "values").mean()))
    both = float(output_error(fitted.graph.run(inputs), wanted, "values").mean())
    assert both < 0.5 * min(rounds)


class Shared(nn.Module):
    """Calls of one weight that are no twins: its bias serves another layer, or another op reads the weight."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.inner, self.other = nn.Linear(6, 6), nn.Linear(6, 6)
        if how == "bias":
            self.other.bias = self.inner.bias

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        y = self.inner(a).relu() + self.inner(b).relu()
        if self.how == "bias":
            return y + self.other(a)
        if self.how == "weight":
            return y + (y[:, :1, None] * self.inner.weight).sum(2)
        if self.how == "two biases":
            return y + nn.functional.linear(b, self.inner.weight, self.other.bias).relu()
        return y


@pytest.mark.parametrize(
    ("how", "groups"), [("twins", 1), ("bias", 0), ("weight", 0), ("two biases", 0)]
)
def test_what_else_reads_a_weight_or_its_bias(how: str, groups: int) -> None:
    graph = _graph(Shared(how), _noise(2, 0), _noise(2, 1))
    order, found = _calls(graph)
    assert len(found) == groups
    if not groups:
        assert order == [n.name for n in graph.module.graph.nodes]
