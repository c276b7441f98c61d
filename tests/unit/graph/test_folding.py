"""Factors of channels that vanish in the op before: the same bits, and what has to keep its own op."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tersor.core.packing import Packing
from tersor.core.records import Site
from tersor.graph.apply import apply
from tersor.graph.contracts import Graph, Quantizer, SiteChange
from tersor.ops.storing import pack_nearest
from tests.unit.capturing import graph_of, random, site_of, targets, trained

Between = Callable[[Tensor], Tensor]
POWERS = torch.tensor([0.25, 0.5, 1.0, 2.0, 4.0, 8.0])
COMMUTING: list[Between] = [
    torch.relu,
    lambda x: F.leaky_relu(x, 0.1),
    lambda x: F.max_pool2d(torch.relu(x), 2),
    lambda x: F.avg_pool2d(x, 2),
    lambda x: x,
]
OTHERS: list[Between] = [torch.tanh, F.gelu, F.relu6, lambda x: x + 1, lambda x: x.flip(1)]


class Chain(nn.Module):
    """Two convolutions with something between them, and two linear layers behind a norm."""

    def __init__(self, between: Between = torch.relu, *, twice: bool = False) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 4, 3)
        self.norm, self.reader = nn.LayerNorm(6), nn.Linear(6, 5)
        self.between, self.twice = between, twice

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.between(self.first(x))
        normed = self.norm(x.flatten(2)[:, :, :6])
        more = (y.mean(), normed.mean()) if self.twice else ()
        return self.second(y), self.reader(normed), *more


def chain(between: Between = torch.relu, **options: Any) -> Graph:
    return graph_of(trained(Chain(between, **options)), random(2, 3, 8, 8))


def rounded(site: Site, factor: Tensor, **fields: Any) -> SiteChange:
    """An int8 change whose quantiser multiplies channels by a factor."""
    generator = torch.Generator().manual_seed(5)
    dim = -1 if site.op_kind == "linear" else 1
    quantizer = Quantizer(step=0.03, low=-128, high=127, inverse_scale=factor, channel_dim=dim)
    codes = torch.randint(-127, 128, site.shape, generator=generator).to(torch.int8)
    return SiteChange(
        site=site, level="int8", codes=codes, scale=torch.full((site.shape[0],), 0.01),
        quantizer=quantizer, **fields,
    )  # fmt: skip


def scalings(graph: Graph) -> list[str]:
    return [n.name for n in graph.module.graph.nodes if n.name.endswith("_scaled")]


def unfolded(graph: Graph, changes: list[SiteChange], monkeypatch: pytest.MonkeyPatch) -> Graph:
    with monkeypatch.context() as patch:
        patch.setattr("tersor.graph.apply.fold_", lambda *_: None)
        return apply(graph, changes)


@pytest.mark.parametrize("between", COMMUTING)
@pytest.mark.parametrize("is_rounded", [False, True])
def test_powers_of_two_go_into_the_convolution_before_bit_for_bit(
    between: Between, monkeypatch: pytest.MonkeyPatch, *, is_rounded: bool
) -> None:
    graph = chain(between)
    changes = [rounded(site_of(graph, "second"), POWERS)]
    if is_rounded:  # then its steps take the factors, and its codes stay
        first = rounded(site_of(graph, "first"), POWERS[:3], bias=random(6, seed=2))
        changes.append(replace(first, quantizer=None))
    plain, found = unfolded(graph, changes, monkeypatch), apply(graph, changes)
    assert (len(scalings(plain)), scalings(found)) == (1, [])
    assert len(targets(found)) == len(targets(plain)) - 1
    x = random(5, 3, 8, 8, seed=9)
    for own, wanted in zip(found.run([x]), plain.run([x]), strict=True):
        assert torch.equal(own, wanted)


def test_they_go_into_a_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = chain()
    changes = [rounded(site_of(graph, "reader"), POWERS)]
    plain, found = unfolded(graph, changes, monkeypatch), apply(graph, changes)
    assert (len(scalings(plain)), scalings(found)) == (1, [])
    x = random(5, 3, 8, 8, seed=9)
    assert torch.equal(found.run([x])[1], plain.run([x])[1])


@pytest.mark.parametrize("between", OTHERS)
def test_ops_that_do_not_commute_keep_theirs(between: Between) -> None:
    graph = chain(between)
    assert scalings(apply(graph, [rounded(site_of(graph, "second"), POWERS)])) != []


def test_a_tensor_that_others_read_keeps_its_own() -> None:
    graph = chain(twice=True)
    changes = [rounded(site_of(graph, name), POWERS) for name in ("second", "reader")]
    assert len(scalings(apply(graph, changes))) == 2


def test_factors_that_would_round_keep_their_op() -> None:
    graph = chain()
    assert scalings(apply(graph, [rounded(site_of(graph, "second"), POWERS * 0.9)])) != []


def test_packed_bits_stay_what_they_are() -> None:
    graph = chain()
    site = site_of(graph, "first")
    weight = random(*site.shape).double().reshape(1, site.shape[0], -1)
    packed = pack_nearest(weight, Packing(kind="grid", shape=site.shape, bits=4, group=0))
    first = SiteChange(site=site, level="int4_weight", packed=packed)
    found = apply(graph, [first, rounded(site_of(graph, "second"), POWERS)])
    assert scalings(found) != []
    assert [p.data for p in found.packed.values()] == [packed.data]


class Tied(nn.Module):
    """One convolution's weight makes two tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(torch.relu(self.first(x)))))


def test_a_weight_that_another_op_has_as_well_stays() -> None:
    graph = graph_of(trained(Tied()), random(2, 6, 8, 8))
    assert scalings(apply(graph, [rounded(site_of(graph, "second"), POWERS)])) != []
