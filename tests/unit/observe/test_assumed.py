"""Which op says what about a layer's input."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tersor.graph.contracts import Graph
from tersor.graph.operators import weighted_ops
from tersor.observe.assumed import assumed_moments
from tersor.ops.assumed import function_moments, norm_moments, plain_moments
from tersor.ops.moments import Moments
from tests.unit.capturing import graph_of, random, trained


class Net(nn.Module):
    """Layers behind the input, a norm, activations with pools between, and a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(6, 8), nn.LayerNorm(8)
        self.normed, self.reader = nn.Linear(8, 8), nn.Linear(8, 4, bias=False)
        self.grouped, self.head = nn.Conv1d(8, 8, 3, groups=2), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.normed(self.norm(self.first(x)))
        active = F.gelu(hidden, approximate="tanh")
        wide = torch.relu(self.grouped(active.transpose(1, 2)))
        return self.reader(active + hidden), self.head(F.max_pool1d(wide, 2).mean(2))


@pytest.fixture(scope="module")
def graph() -> Graph:
    return graph_of(trained(Net()), random(3, 6, 6))


def seen(graph: Graph, name: str) -> Moments:
    op = next(op for op in weighted_ops(graph.module) if name in str(op.weight.target))
    return assumed_moments(graph, op)


def same(found: Moments, wanted: Moments) -> bool:
    pairs = [(found.xx, wanted.xx), (found.x, wanted.x)]
    return all(torch.equal(a, b) for a, b in pairs) and found.count == wanted.count


def test_norms_and_activations_are_read_and_moves_are_looked_through(graph: Graph) -> None:
    state = dict(trained(Net()).named_parameters())
    norm = norm_moments(state["norm.weight"].detach(), state["norm.bias"].detach())
    assert same(seen(graph, "normed"), norm)
    tanh = function_moments(lambda z: F.gelu(z, approximate="tanh"), 2, 12)
    assert same(seen(graph, "grouped"), tanh)
    assert same(seen(graph, "head"), function_moments(torch.relu, 1, 8))


def test_of_inputs_and_sums_nothing_is_known(graph: Graph) -> None:
    assert same(seen(graph, "first"), plain_moments(1, 6))
    assert same(seen(graph, "reader"), plain_moments(1, 8))
