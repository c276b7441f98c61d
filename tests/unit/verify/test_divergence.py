"""The first value that differs, and the op that makes it differ."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tersor.core.errors import ConfigError
from tersor.graph import meta
from tersor.graph.contracts import Graph
from tersor.graph.edit import copy_graph, rebuild, run_all
from tersor.graph.ending import ending_at
from tersor.verify.divergence import STEPS, compare_graphs, first_above, squared_error
from tests.unit.capturing import graph_of, random, trained


def net() -> nn.Module:
    return trained(
        nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 3))
    )


def changed(graph: Graph, target: str, change: Callable[[Tensor], Tensor]) -> Graph:
    """The graph with another tensor behind a name."""
    fresh, tensors = copy_graph(graph.module)
    tensors[target] = change(tensors[target])
    module = rebuild(fresh, tensors)
    return Graph(module, graph.signature, graph.example)


def test_equal_graphs_differ_nowhere() -> None:
    graph = graph_of(net(), random(4, 6))
    points = compare_graphs(graph, graph, [random(4, 6, seed=3)])
    assert [p.node for p in points] == ["linear", "relu", "linear_1", "gelu", "linear_2"]
    assert all(p.error == 0 and p.own == 0 for p in points)


def test_what_a_changed_layer_does_is_its_own_and_goes_on() -> None:
    graph = graph_of(net(), random(4, 6))
    other = changed(graph, "2.weight", lambda w: w * 1.1)
    points = {p.node: p for p in compare_graphs(graph, other, [random(4, 6, seed=3)])}
    assert points["linear"].error == points["relu"].error == 0
    assert points["linear_1"].own == pytest.approx(points["linear_1"].error)
    assert points["linear_1"].own > 1e-4
    assert points["gelu"].error > 0
    assert points["gelu"].own == points["linear_2"].own == 0


def test_errors_are_over_the_mean_square() -> None:
    graph = graph_of(net(), random(4, 6))
    other = changed(graph, "4.weight", lambda w: w + 0.1)
    x = random(5, 6, seed=2)
    values, others = run_all(graph.module, [x]), run_all(other.module, [x])
    found = {p.node: p for p in compare_graphs(graph, other, [x])}["linear_2"].error
    off = (others["linear_2"] - values["linear_2"]).double().square().mean()
    assert found == pytest.approx(float(off / values["linear_2"].double().square().mean()))


def test_values_that_are_no_numbers_are_infinitely_far() -> None:
    assert squared_error(torch.tensor([1.0, math.nan]), torch.ones(2)) == math.inf
    graph = graph_of(net(), random(4, 6))
    other = changed(graph, "2.weight", lambda w: w * math.nan)
    points = {p.node: p for p in compare_graphs(graph, other, [random(4, 6)])}
    assert points["linear_1"].own == points["linear_2"].error == math.inf
    assert points["linear_2"].own == 0


def test_values_of_other_shapes_are_not_compared() -> None:
    class Wide(nn.Module):
        def __init__(self, n: int) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, n), nn.Linear(n, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.relu(self.a(x)))

    one, other = (graph_of(trained(Wide(n)), random(4, 6)) for n in (8, 5))
    assert [p.node for p in compare_graphs(one, other, [random(4, 6)])] == ["linear_1"]


@pytest.mark.parametrize("first", [0, 1, 6, 12, 99, None])
def test_bisection_finds_the_first_error(first: int | None) -> None:
    names = [f"n{i}" for i in range(100)]
    limit = 1e-3
    found, asked = first_above(
        names, lambda n: 1.0 if first is not None and int(n[1:]) >= first else 0.0, limit
    )
    assert found == (None if first is None else f"n{first}")
    assert len(asked) <= STEPS + math.ceil(math.log2(len(names) / STEPS))
    assert len({name for name, _ in asked}) == len(asked)


def test_an_error_that_later_ops_hide_is_found() -> None:
    names = [f"n{i}" for i in range(200)]
    found, _ = first_above(names, lambda n: float(60 <= int(n[1:]) < 90), 1e-3)
    assert found == "n60"


@pytest.mark.parametrize("first", [0, 1, 60, 61, 117, 199])
def test_what_cannot_be_told_is_no_proof(first: int) -> None:
    names = [f"n{i}" for i in range(200)]
    known = {n for i, n in enumerate(names) if i % 3 == 0 or i == first}
    found, asked = first_above(
        names, lambda n: float(int(n[1:]) >= first) if n in known else None, 1e-3
    )
    assert found == f"n{first}"
    assert {name for name, _ in asked} <= known
    assert first_above(names, lambda _: None, 1e-3) == (None, ())


def test_bisection_takes_no_number_for_an_error() -> None:
    found, _ = first_above(["a", "b"], lambda _: math.nan, 1e-3)
    assert found == "a"
    assert first_above([], lambda _: 1.0, 1e-3) == (None, ())


@pytest.mark.parametrize("name", ["linear", "relu", "gelu", "linear_2"])
def test_a_graph_that_ends_early_gives_that_value(name: str) -> None:
    graph = graph_of(net(), random(4, 6))
    part = ending_at(graph, name)
    x = random(3, 6, seed=5)
    (found,) = part.run([x])
    assert torch.equal(found, run_all(graph.module, [x])[name])
    assert [spec.name for spec in part.signature.outputs] == [name]
    assert part.signature.inputs == graph.signature.inputs
    assert len(part.module.graph.nodes) <= len(graph.module.graph.nodes)


def test_a_graph_ends_at_no_unknown_node() -> None:
    graph = graph_of(net(), random(4, 6))
    meta.ensure(graph)
    with pytest.raises(ConfigError, match="nowhere"):
        ending_at(graph, "nowhere")
