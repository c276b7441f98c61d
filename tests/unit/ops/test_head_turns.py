"""Turns of heads: invertible, harmless by themselves, and what is cut behind them is what was said."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tersor.ops.head_turns import score_turn, turned_consumer, value_turn
from tersor.ops.kept import kept_columns, refit_columns
from tersor.ops.obs import Consumer, removal_order
from tersor.ops.refit import layer_loss

SEEDS = st.integers(0, 2**32 - 1)
HEADS, SIZE, OUTPUTS = 3, 4, 5


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def reader(seed: int) -> tuple[Consumer, Tensor]:
    """A projection behind heads whose dimensions lie anywhere among its inputs."""
    order = torch.randperm(HEADS * SIZE, generator=torch.Generator().manual_seed(seed))
    columns = order.reshape(HEADS, SIZE)
    half = normal(seed + 1, HEADS * SIZE, HEADS * SIZE)
    moment = (half @ half.T / 12 + 0.05 * torch.eye(HEADS * SIZE)).unsqueeze(0)
    weight = normal(seed + 2, 1, OUTPUTS, HEADS * SIZE)
    return Consumer(weight=weight, second_moment=moment, columns=columns.T.unsqueeze(0)), columns


def lost(consumer: Consumer, kept: Tensor) -> float:
    """By definition: the best weight on the columns of the units that stay."""
    chosen = kept_columns(consumer.columns, consumer.weight.shape[2], kept)
    return float(refit_columns(consumer.weight, consumer.second_moment, chosen)[1].sum())


@given(SEEDS, st.integers(1, SIZE), st.sampled_from([1, 3]))
@settings(max_examples=15, deadline=None)
def test_what_goes_behind_a_turn_costs_what_it_says(seed: int, rank: int, sharing: int) -> None:
    consumer, columns = reader(seed)
    found = value_turn(consumer, columns, rank, sharing=sharing)
    assert found.first.shape == (HEADS // sharing, SIZE, SIZE)
    eye = torch.eye(SIZE, dtype=torch.float64).expand_as(found.second)
    torch.testing.assert_close(found.second @ found.second.mT, eye)
    torch.testing.assert_close(found.second, found.first.repeat_interleave(sharing, 0))
    turned = turned_consumer(consumer, columns, found.second)
    total = layer_loss(consumer.weight, consumer.second_moment)
    torch.testing.assert_close(layer_loss(turned.weight, turned.second_moment), total)
    share = lost(turned, torch.arange(rank)) / float(total.sum())
    assert abs(share - found.loss) <= 1e-9 + 1e-7 * share
    if rank == SIZE:
        assert found.loss <= 1e-12


@given(SEEDS)
@settings(max_examples=15, deadline=None)
def test_directions_lose_no_more_than_units(seed: int) -> None:
    """On these: units are directions too, and the alternating fit ends below the best greedy ones."""
    consumer, columns = reader(seed)
    order = removal_order([consumer])
    total = float(layer_loss(consumer.weight, consumer.second_moment).sum())
    losses = []
    for rank in range(1, SIZE):
        by_units = float(order.loss[SIZE - rank - 1]) / total
        losses.append(value_turn(consumer, columns, rank).loss)
        assert losses[-1] <= by_units * (1 + 1e-9)
    assert losses == sorted(losses, reverse=True)


def test_heads_of_few_outputs_are_turned_as_well() -> None:
    consumer, columns = reader(0)
    narrow = Consumer(
        weight=consumer.weight[:, :1],
        second_moment=consumer.second_moment,
        columns=consumer.columns,
    )
    found = value_turn(narrow, columns, 2)
    assert found.loss <= 1e-9  # one output reads one direction of each head
    zero = Consumer(
        weight=0 * consumer.weight, second_moment=consumer.second_moment, columns=consumer.columns
    )
    assert value_turn(zero, columns, 2).loss == 0
    assert bool(torch.isfinite(value_turn(zero, columns, 2).first).all())


@given(SEEDS, st.integers(0, SIZE))
@settings(max_examples=15, deadline=None)
def test_scores_are_whole_until_something_goes(seed: int, rank: int) -> None:
    q, k = normal(seed, 400, 2 * HEADS, SIZE), normal(seed + 1, 400, HEADS, SIZE) + 1
    k = k @ normal(seed + 2, SIZE, SIZE)
    queries = torch.einsum("thr,thd->hrd", q, q) / 400
    queries = queries.reshape(HEADS, 2, SIZE, SIZE).sum(1)
    centred = k - k.mean(0)
    keys = torch.einsum("thr,thd->hrd", centred, centred) / 400
    found = score_turn(queries, keys, rank, sharing=2)
    assert found.first.shape == (2 * HEADS, SIZE, SIZE)
    both = found.first.mT @ found.second.repeat_interleave(2, 0)
    torch.testing.assert_close(both, torch.eye(SIZE, dtype=torch.float64).expand_as(both))
    # By definition: all pairs of a query and a centred key, in the first dimensions alone.
    mapped_q = torch.einsum("hrd,thd->thr", found.first[:, :rank], q)
    mapped_k = torch.einsum("hrd,thd->thr", found.second[:, :rank], centred)
    mapped_k, whole_k = (y.repeat_interleave(2, 1) for y in (mapped_k, centred))
    off = torch.einsum("shr,thr->hst", mapped_q, mapped_k) - torch.einsum(
        "shd,thd->hst", q, whole_k
    )
    scale = torch.einsum("shd,thd->hst", q, whole_k).square().sum()
    assert abs(float(off.square().sum() / scale) - found.loss) <= 1e-5 + 1e-5 * found.loss
