"""Neurons that are left are fitted together with what reads them."""

import pytest
import torch
from torch import Tensor, nn

from tersor.graph.axes import analyse_axes
from tersor.graph.edit import parameters_by_name
from tersor.transform.narrow import narrow
from tersor.transform.pairs import find_pairs, fit_pairs
from tests.unit.capturing import graph_of, random, trained


class Net(nn.Module):
    """A pair, one whose units are seen twice, one without a bias, and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 2)
        self.up, self.down = nn.Linear(18, 24), nn.Linear(24, 6)
        self.twice, self.after = nn.Linear(6, 6), nn.Linear(6, 6)
        self.bare, self.head = nn.Linear(6, 8, bias=False), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).relu().flatten(1)
        x = self.down(nn.functional.gelu(self.up(x)))
        y = self.twice(x).relu()
        return self.head(self.bare(self.after(y) + y).relu())


X = random(400, 1, 4, 4, seed=2)
KEEP = {"up": list(range(0, 24, 3))}


def test_only_pairs_that_nothing_else_sees() -> None:
    graph = graph_of(trained(Net()), X[:4])
    assert [str(p.first.weight.target) for p in find_pairs(graph)] == ["up.weight"]


@pytest.fixture(scope="module")
def fitted() -> tuple[float, float, dict[str, Tensor], dict[str, Tensor]]:
    graph = graph_of(trained(Net()), X[:4])
    axes, batches = analyse_axes(graph), [(X[:150],), (X[150:300],)]
    small = narrow(graph, axes, KEEP, batches).graph
    found = fit_pairs(graph, small, axes, KEEP, batches, iterations=40)
    (wanted,) = graph.run([X[300:]])
    errors = [float((g.run([X[300:]])[0] - wanted).square().mean()) for g in (small, found)]
    return (*errors, parameters_by_name(small.module), parameters_by_name(found.module))  # type: ignore[return-value]


def test_a_pair_beats_its_parts(fitted: tuple[float, float, object, object]) -> None:
    assert fitted[1] < 0.7 * fitted[0]


def test_all_else_stays(fitted: tuple[float, float, dict[str, Tensor], dict[str, Tensor]]) -> None:
    _, _, before, after = fitted
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    assert changed == {"up.weight", "up.bias", "down.weight", "down.bias"}
    assert after["up.weight"].shape == (8, 18)


def test_without_a_cut_nothing_is_fitted() -> None:
    graph = graph_of(trained(Net()), X[:4])
    found = fit_pairs(graph, graph, analyse_axes(graph), {}, [(X[:50],)])
    before, after = parameters_by_name(graph.module), parameters_by_name(found.module)
    assert all(torch.equal(before[n], after[n]) for n in before)
