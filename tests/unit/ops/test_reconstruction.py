"""The loss of a block by its definition, and the sizes of steps."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tersor.core.errors import ConfigError
from tersor.ops.reconstruction import block_loss, spread, step_share, step_size

SEEDS = st.integers(0, 2**32 - 1)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(SEEDS, st.integers(2, 9), st.integers(1, 4), st.integers(1, 3))
@settings(max_examples=30, deadline=None)
def test_the_mean_has_a_loss_of_one(seed: int, n: int, channels: int, size: int) -> None:
    wanted = normal(seed, n, channels, size) + 3
    mean = wanted.mean(0, keepdim=True).expand_as(wanted)
    assert float(block_loss(mean, wanted, spread(wanted))) == pytest.approx(1.0, rel=1e-9)


def test_only_real_tokens_count() -> None:
    found, wanted = normal(0, 2, 3, 4), normal(1, 2, 3, 4)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    total, count = 0.0, 0
    for i in range(2):
        for t in range(3):
            for c in range(4):
                if mask[i, t]:
                    total += float(found[i, t, c] - wanted[i, t, c]) ** 2
                    count += 1
    assert float(block_loss(found, wanted, 2.0, mask)) == pytest.approx(
        total / count / 2, rel=1e-12
    )
    pooled = block_loss(found[:, 0], wanted[:, 0], 2.0, mask)  # [2, 4]: no tokens to leave out
    assert float(pooled) == pytest.approx(
        float((found[:, 0] - wanted[:, 0]).square().mean()) / 2, rel=1e-12
    )


def test_constants_and_single_samples_have_a_spread() -> None:
    assert 0 < spread(torch.full((4, 2), 5.0)) < 1e-20
    assert spread(torch.full((1, 2), 3.0)) == 9.0


@given(st.floats(0, 2))
def test_shares_rise_then_fall_to_nothing(progress: float) -> None:
    share = step_share(progress)
    assert 0 <= share <= 1
    if progress >= 1:
        assert share == pytest.approx(0, abs=1e-15)
    elif progress >= 0.05:
        assert share == pytest.approx(0.5 * (1 + math.cos(math.pi * progress)))
        assert step_share(min(1.0, progress + 0.05)) < share


def test_steps_are_relative_to_the_tensor() -> None:
    tensor = torch.tensor([3.0, -4.0])
    assert step_size(tensor, 0.1) == pytest.approx(0.1 * math.sqrt(12.5))
    assert step_size(torch.zeros(3), 0.1) == 0.0
    with pytest.raises(ConfigError, match=r"found -0\.1"):
        step_share(-0.1)
