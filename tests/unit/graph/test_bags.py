"""Bags of embeddings, written as ops that every backend has."""

import pytest
import torch
from torch import Tensor, nn

from tersor.analyse.sites import find_sites
from tests.unit.capturing import graph_of, scale_error, targets, trained

ROUNDING = 1e-6  # float32 sums of 5 terms


class Bags(nn.Module):
    def __init__(self, mode: str, padding: int | None = None) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(9, 4, mode=mode, padding_idx=padding)

    def forward(self, x: Tensor, factors: Tensor | None = None) -> Tensor:
        y: Tensor = self.bag(x, per_sample_weights=factors)
        return y


def _indices() -> Tensor:
    x = torch.randint(0, 9, (6, 5), generator=torch.Generator().manual_seed(0))
    x[1] = 2  # a bag of nothing, where 2 is the padding
    x[2, :3] = 2
    return x


@pytest.mark.parametrize("padding", [None, 2])
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_bags_are_embeddings(mode: str, padding: int | None) -> None:
    model = trained(Bags(mode, padding))
    graph = graph_of(model, _indices())
    assert "aten.embedding_bag.padding_idx" not in targets(graph)
    assert [(s.name, s.op_kind, s.pinned) for s in find_sites(graph)] == [
        ("bag", "embedding", None)
    ]
    for n in (1, 6):
        (found,) = graph.module(_indices()[:n])
        assert scale_error(found, model(_indices()[:n]).detach()) < ROUNDING


@pytest.mark.parametrize("padding", [None, 2])
def test_entries_with_factors(padding: int | None) -> None:
    model, factors = trained(Bags("sum", padding)), torch.linspace(-1, 1, 30).reshape(6, 5)
    graph = graph_of(model, _indices(), factors)
    (found,) = graph.module(_indices(), factors)
    assert scale_error(found, model(_indices(), factors).detach()) < ROUNDING


def test_bags_that_are_no_rows_stay() -> None:
    class Every(nn.Module):
        """Each second entry begins a bag, whatever the rows are."""

        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(9, 4))

        def forward(self, x: Tensor) -> Tensor:
            offsets = torch.arange(0, x.numel(), 2)
            y = nn.functional.embedding_bag(x.reshape(-1), self.table, offsets, mode="sum")
            return y.reshape(x.shape[0], -1)

    x = torch.randint(0, 9, (6, 4), generator=torch.Generator().manual_seed(0))
    graph = graph_of(Every(), x)
    assert "aten.embedding_bag.padding_idx" in targets(graph)
