"""The output's gradient moment against Jacobians by the definition."""

import pytest
import torch
from torch import Tensor, nn
from torch.func import jacrev, vmap

from tersor.graph.contracts import Graph
from tersor.observe.output_moments import MOST_CLASSES, output_moments
from tests.unit.capturing import graph_of, random, trained

# Float32 gradients of a small network, squared and summed.
SINGLE = 1e-4


class Net(nn.Module):
    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(2, 4, 3, groups=2), nn.Linear(4, classes)

    def hidden(self, x: Tensor) -> Tensor:
        return self.conv(x)

    def rest(self, y: Tensor) -> Tensor:
        return self.head(torch.tanh(y).mean((2, 3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(self.hidden(x))


def graph(net: nn.Module) -> Graph:
    return graph_of(net, random(2, 2, 5, 5))


def wanted(net: Net, x: Tensor) -> Tensor:
    """Mean over samples of sum over positions of J^T F J, by group of outputs [2, 2, 2]."""
    total = torch.zeros(2, 2, 2, dtype=torch.float64)
    y = net.hidden(x).detach()
    for one, p in zip(y, net.rest(y).softmax(1).detach().double(), strict=True):
        jacobian = jacrev(lambda v: net.rest(v.unsqueeze(0))[0])(one).double()  # [k, 4, h, w]
        metric = (torch.diag(p) - torch.outer(p, p)) / 2
        for group in range(2):
            own = jacobian[:, 2 * group : 2 * group + 2].flatten(2)
            total[group] += torch.einsum("kat,kl,lbt->ab", own, metric, own)
    return total / len(x)


def test_of_logits_it_is_the_expectation_over_classes() -> None:
    net, x = trained(Net()), random(6, 2, 5, 5, seed=3)
    found = output_moments(graph(net), [(x[:4],), (x[4:],)], "logits", seed=0)
    assert [tuple(v.shape) for v in found.values()] == [(2, 2, 2), (1, 5, 5)]
    torch.testing.assert_close(found["conv2d"], wanted(net, x), rtol=SINGLE, atol=1e-8)
    p = net(x).softmax(1).detach().double()
    metric = (torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)).mean(0) / 2
    torch.testing.assert_close(found["linear"][0], metric, rtol=SINGLE, atol=1e-8)
    again = output_moments(graph(net), [(x[:4],), (x[4:],)], "logits", seed=1)
    assert all(torch.equal(found[n], again[n]) for n in found)  # nothing is drawn


@pytest.mark.parametrize("kind", ["logits", "values"])
def test_random_vectors_come_close(kind: str) -> None:
    classes = MOST_CLASSES + 4
    net, x = trained(Net(classes)), random(400, 2, 5, 5, seed=3)
    found = output_moments(graph(net), [(x,)], kind, seed=0)["linear"][0]  # type: ignore[arg-type]
    if kind == "logits":
        p = net(x).softmax(1).detach().double()
        metric = (torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)).mean(0) / 2
    else:
        spread = net(x).detach().double().var(0).mean()
        metric = torch.eye(classes, dtype=torch.float64) / (classes * spread)
    # 3,200 draws: the root of 2 / 3200 is 2.5 % of a diagonal entry, four deviations.
    assert float((found - metric).abs().max()) < 0.1 * float(metric.max())


class Positions(nn.Module):
    """Logits of every token, which do not depend on the others."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(3, 4), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.first(x)))


def test_positions_of_a_sample_do_not_add_up() -> None:
    net, x = trained(Positions()), random(60, 6, 3, seed=2)
    found = output_moments(graph_of(net, x[:2]), [(x,)], "logits", seed=0)["linear"]
    hidden = net.first(x).detach().reshape(-1, 4)
    rest = lambda y: net.head(torch.tanh(y))  # noqa: E731
    p = rest(hidden).softmax(1).detach().double()
    metric = (torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)) / (2 * 6)
    jacobian = vmap(jacrev(rest))(hidden).double()
    each = torch.einsum("tka,tkl,tlb->tab", jacobian, metric, jacobian).sum(0) / 60
    torch.testing.assert_close(found[0], each, rtol=SINGLE, atol=1e-7)
