"""One pass over a graph against the definition in two passes over stored values."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tersor.capture.module import capture
from tersor.core.records import Signature
from tersor.graph.contracts import Graph
from tersor.observe import keeping
from tersor.observe.statistics import (
    CHANNEL_ROWS,
    MIN_ROWS,
    ROWS,
    Observed,
    enough_rows,
    node_by_name,
    observe,
    token_mask,
)
from tests.unit.capturing import graph_of, random, samples, trained

# Sums in float64 of the same float32 values, in another order.
SUMS = 1e-12


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=2)
        self.linear = nn.Linear(36, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.conv(x).tanh().flatten(1))


@pytest.fixture(scope="module")
def small() -> Graph:
    return graph_of(trained(Small()), random(4, 2, 6, 6))


def batches(sizes: Sequence[int], *shape: int) -> list[tuple[Tensor]]:
    return [(random(n, *shape, seed=i),) for i, n in enumerate(sizes)]


def test_moments_and_ranges_are_those_of_the_definition(small: Graph) -> None:
    flat = batches([5, 3, 1], 2, 6, 6)
    seen = observe(small, flat, 3, seed=0)
    assert list(seen) == ["conv2d", "linear"]
    x = torch.cat([t for (t,) in flat])
    patches = F.unfold(x, 3, padding=1, stride=2).double()  # [b, 18, 9], groups of 9
    rows = patches.reshape(9, 2, 9, 9).permute(0, 3, 1, 2).reshape(81, 2, 9)
    moments = seen["conv2d"].moments
    assert moments.count == 81
    assert torch.allclose(
        moments.xx, torch.einsum("tgn,tgm->gnm", rows, rows), rtol=SUMS, atol=SUMS
    )
    assert torch.allclose(moments.x, rows.sum(0), rtol=SUMS, atol=SUMS)
    assert (seen["conv2d"].low, seen["conv2d"].high) == (float(x.min()), float(x.max()))
    assert seen["conv2d"].counts.sum() == x.numel()
    wanted = torch.histogram(x.double(), bins=seen["conv2d"].edges).hist
    assert torch.equal(seen["conv2d"].counts, wanted)
    hidden = seen["linear"]
    assert hidden.moments.count == 9
    assert -1 <= hidden.low < hidden.high <= 1


def test_rows_belong_together(small: Graph) -> None:
    seen = observe(small, batches([5, 3, 1], 2, 6, 6), 3, seed=0)
    weight = small.module.conv.weight.double().reshape(2, 2, 9)
    bias = small.module.conv.bias.double().reshape(2, 2)
    rows = seen["conv2d"].rows
    assert rows.original.shape == (81, 2, 9)
    wanted = torch.einsum("tgn,gmn->tgm", rows.original.double(), weight) + bias
    assert torch.allclose(rows.output.double(), wanted, rtol=1e-5, atol=1e-5)
    assert rows.compressed is rows.original


def test_samples_are_bounded_and_spread_over_the_batches() -> None:
    graph = graph_of(trained(nn.Sequential(nn.Linear(2, 3), nn.Tanh())), random(4, 2))
    flat = [(torch.full((3000, 2), float(i)),) for i in range(4)]
    seen = observe(graph, flat, 4, seed=0)["linear"]
    assert enough_rows(2) == MIN_ROWS
    assert seen.moments.count == MIN_ROWS  # of 12,000: more change nothing
    assert len(seen.rows.original) == ROWS
    assert len(seen.channels) == CHANNEL_ROWS
    for sample, limit in ((seen.rows.original[:, 0], ROWS), (seen.channels, CHANNEL_ROWS)):
        assert torch.bincount(sample[:, 0].int()).tolist() == [limit // 4] * 4
    assert torch.equal(seen.moments.x[0, 0] / MIN_ROWS, torch.tensor(1.5, dtype=torch.float64))
    assert seen.counts.sum() == 24000  # ranges see everything


def equal(left: Observed, right: Observed) -> bool:
    pairs = [(left.channels, right.channels), (left.rows.original, right.rows.original)]
    pairs += [(left.moments.xx, right.moments.xx), (left.rows.output, right.rows.output)]
    return all(torch.equal(a, b) for a, b in pairs)


def test_the_seed_decides_the_samples(small: Graph) -> None:
    flat = batches([3000, 3000], 2, 6, 6)
    first, same, other = (observe(small, flat, 2, seed=s)["linear"] for s in (0, 0, 1))
    assert equal(first, same)
    assert not equal(first, other)
    calls: list[int] = []
    observe(small, batches([1, 1], 2, 6, 6), 2, seed=0, advance=lambda: calls.append(1))
    assert len(calls) == 2


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.a, self.pooled = nn.Embedding(9, 4), nn.Linear(4, 3), nn.Linear(3, 2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        y = self.a(self.embed(input_ids))
        weights = attention_mask.unsqueeze(-1).float()
        return self.pooled((y * weights).sum(1) / weights.sum(1))


IDS = torch.tensor([[1, 2, 3, 0], [4, 5, 0, 0], [6, 0, 0, 0]])
MASK = (IDS > 0).long()


def test_only_real_tokens_count() -> None:
    module = trained(Tokens())
    item = {"input_ids": IDS, "attention_mask": MASK}
    graph = capture(module, samples(item)).graph
    seen = observe(graph, [(IDS, MASK)], 1, seed=0)
    real = module.embed.weight.detach()[IDS[IDS > 0]]
    tokens, pooled = seen["linear"], seen["linear_1"]
    assert tokens.moments.count == 6
    assert torch.allclose(tokens.moments.x[0], real.double().sum(0), rtol=SUMS)
    assert (tokens.low, tokens.high) == (float(real.min()), float(real.max()))
    assert torch.equal(tokens.channels, real)
    assert tokens.rows.original.shape == (6, 1, 4)
    assert pooled.moments.count == 3
    assert "embedding" not in seen


@pytest.mark.parametrize(
    ("mask", "counts"),
    [
        (MASK, True),
        (MASK.bool(), True),
        (MASK.float(), False),
        (MASK * 2, False),
        (MASK * 0, False),
    ],
)
def test_what_is_an_attention_mask(mask: Tensor, counts: bool) -> None:
    graph = capture(trained(Tokens()), samples({"input_ids": IDS, "attention_mask": MASK})).graph
    found = token_mask(graph.signature, (IDS, mask))
    assert (found is not None) == counts
    assert found is None or torch.equal(found, MASK.bool())


def test_other_inputs_are_no_masks(small: Graph) -> None:
    assert isinstance(small.signature, Signature)
    assert token_mask(small.signature, (torch.ones(2, 2, dtype=torch.long),)) is None


def test_statistics_can_be_kept(small: Graph) -> None:
    seen = observe(small, batches([5, 3], 2, 6, 6), 2, seed=0)
    records, arrays = keeping.pack(seen, 1e-7)
    again = keeping.unpack(records, {k: v.copy() for k, v in arrays.items()})
    assert records.self_check == 1e-7
    for name, one in seen.items():
        assert equal(one, again[name])
        assert (one.low, one.high, one.moments.count) == (
            again[name].low,
            again[name].high,
            again[name].moments.count,
        )
        assert torch.equal(one.edges, again[name].edges)


def test_channel_amax_and_nodes(small: Graph) -> None:
    seen = observe(small, batches([50], 2, 6, 6), 1, seed=0)["conv2d"]
    assert torch.allclose(seen.channel_amax(), torch.quantile(seen.channels.abs(), 0.999, dim=0))
    assert node_by_name(small)["linear"].target is torch.ops.aten.linear.default
