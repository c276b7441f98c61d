"""Permutations keep more, never less, and all there is to keep where that can be tried."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tersor.core.errors import ConfigError, ShapeError
from tersor.ops.permutation import kept_score, permute_inputs
from tersor.ops.sparsity import NofM, best_mask

SEEDS = st.integers(0, 2**32 - 1)


def scores_of(seed: int, outputs: int, inputs: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(outputs, inputs, generator=generator, dtype=torch.float64).square()
    return values * torch.rand(inputs, generator=generator, dtype=torch.float64)


@given(SEEDS)
@settings(max_examples=10, deadline=None)
def test_one_pair_of_groups_is_split_best(seed: int) -> None:
    scores = scores_of(seed, 5, 8)
    order = permute_inputs(scores, NofM(), rounds=1)
    best = max(
        kept_score(scores, NofM(), torch.tensor([*first, *(set(range(8)) - set(first))]))
        for first in itertools.combinations(range(8), 4)
    )
    assert kept_score(scores, NofM(), order) == pytest.approx(best, rel=1e-12)


@given(SEEDS, st.sampled_from([NofM(), NofM(kept=1, of=4), NofM(kept=1, of=2), NofM(kept=2, of=3)]))
@settings(max_examples=20, deadline=None)
def test_never_keeps_less_and_more_rounds_keep_no_less(seed: int, pattern: NofM) -> None:
    scores, plain = scores_of(seed, 6, 24), torch.arange(24)
    kept = [kept_score(scores, pattern, plain)]
    for rounds in (0, 1, 4, 16):
        order = permute_inputs(scores, pattern, rounds=rounds, seed=1)
        assert torch.equal(order.sort().values, plain)
        kept.append(kept_score(scores, pattern, order))
    assert all(b >= a * (1 - 1e-12) for a, b in itertools.pairwise(kept))


def test_score_is_what_the_mask_keeps() -> None:
    scores = scores_of(3, 6, 16)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    mask = best_mask(scores[:, order].unsqueeze(0), NofM())
    wanted = float(scores[:, order][mask[0]].sum())
    assert kept_score(scores, NofM(), order) == pytest.approx(wanted, rel=1e-12)


def test_large_columns_are_brought_apart() -> None:
    scores = torch.zeros(3, 32)
    scores[:, :16] = 1.0  # in order half of it would go
    order = permute_inputs(scores, NofM())
    assert kept_score(scores, NofM(), order) == 48.0
    assert torch.equal(order, permute_inputs(scores, NofM()))


def test_nothing_to_choose() -> None:
    plain = torch.arange(4)
    assert torch.equal(permute_inputs(scores_of(0, 2, 4), NofM()), plain)
    assert torch.equal(permute_inputs(scores_of(0, 2, 4), NofM(kept=2, of=2)), plain)
    assert permute_inputs(torch.zeros(2, 8), NofM()).sort().values.tolist() == list(range(8))


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ShapeError, match=r"10 inputs do not split into groups of 4"):
        permute_inputs(torch.ones(2, 10), NofM())
    with pytest.raises(ConfigError, match=r"rounds must be >= 0, got -1"):
        permute_inputs(torch.ones(2, 8), NofM(), rounds=-1)
    with pytest.raises(ConfigError, match=r"groups of 16 inputs, wanted at most 8"):
        permute_inputs(torch.ones(2, 32), NofM(kept=8, of=16))
