"""Shapes computed again after a cut, where the batch is a symbol."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tersor.graph.axes import analyse_axes
from tersor.graph.axes.gate import check
from tersor.graph.axes.slicing import cut
from tersor.graph.meta import read_back, refresh, sizes
from tersor.graph.serial import graph_from_json, graph_tensors, graph_to_json
from tests.unit.capturing import graph_of, random, targets, trained

# Ops whose kernels in C++ want numbers where a traced graph has the batch's symbol.
OPS: dict[str, Callable[[Tensor], Tensor]] = {
    "pad": lambda x: functional.pad(x, (1, 0, 1, 0)),
    "addcmul": lambda x: torch.addcmul(x, x.tanh(), x.sigmoid()),
}


class Between(nn.Module):
    """A convolution, an op, a convolution."""

    def __init__(self, apply: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 4, 1)
        self.apply_to = apply

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.apply_to(self.a(x)))


@pytest.mark.parametrize("name", OPS)
def test_a_cut_graph_knows_its_shapes(name: str) -> None:
    graph = graph_of(trained(Between(OPS[name])), random(2, 3, 4, 4))
    assert any(name in target for target in targets(graph))
    axes = analyse_axes(graph)
    (width,) = axes.widths
    smaller = cut(graph, axes, axes.removed({width.name: [0, 3]}))
    places = [n for n in smaller.module.graph.nodes if name in str(n.target)]
    for node in places:
        batch, channels = node.meta["val"].shape[:2]
        assert isinstance(batch, torch.SymInt)
        assert channels == 4
    assert places
    assert check(graph, axes, {width.name: [0, 3]}).passed


def test_shapes_need_no_data() -> None:
    """Every node gets a shape from the inputs' alone, the same as tracing gave."""
    graph = graph_of(trained(Between(OPS["pad"])), random(2, 3, 4, 4))
    module = graph.module
    wanted = {n.name: n.meta["val"].shape for n in module.graph.nodes if n.op == "call_function"}
    for node in module.graph.nodes:
        if node.op == "call_function":
            del node.meta["val"]
    refresh(module)
    found = {n.name: n.meta["val"].shape for n in module.graph.nodes if n.op == "call_function"}
    assert {k: str(v) for k, v in found.items()} == {k: str(v) for k, v in wanted.items()}


def test_a_graph_that_was_written_knows_the_shapes_that_it_had() -> None:
    graph = graph_of(trained(Between(OPS["pad"])), random(2, 3, 4, 4))
    written = graph_from_json(graph_to_json(graph), graph_tensors(graph))
    found = read_back(written, graph)
    assert sizes(found) == {name: sizes(graph)[name] for name in sizes(found)}
    assert {n.name for n in graph.module.graph.nodes if n.op == "call_function"} <= set(
        sizes(found)
    )
    assert any(not size.isdigit() for size in sizes(found)["x"])  # the batch stays open
    assert found.example is graph.example
