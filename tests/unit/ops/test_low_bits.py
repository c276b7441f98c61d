"""The group that spends its bits best, by the definition; rounding with and without statistics."""

import math

import pytest
import torch
from torch import Tensor

from tersor.core.errors import ConfigError
from tersor.ops.group_grids import GroupGrid, dequantize, fit_steps, nearest_codes
from tersor.ops.low_bits import DRAFT, best_group, rounded_low
from tersor.ops.refit import layer_loss

GROUPS = (0, 64, 32, 16)


def weight_of(seed: int, *, spread: float) -> Tensor:
    """Normal weights whose blocks of 16 inputs differ in size."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randn(1, 8, 8, generator=generator, dtype=torch.float64).mul(spread).exp()
    noise = torch.randn(1, 8, 128, generator=generator, dtype=torch.float64)
    return noise * sizes.repeat_interleave(16, dim=2)


def moment(seed: int, n: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4 * n, n, generator=generator, dtype=torch.float64)
    x[:, 1:] += 0.7 * x[:, :-1]
    return (x.mT @ x).unsqueeze(0)


def cost(weight: Tensor, bits: int, group: int) -> float:
    """log2 of the root of the error, and the bits of a weight, rows of 128 with steps of 16."""
    grid = GroupGrid(bits=bits, group=group or None)
    steps = fit_steps(weight, grid)
    off = dequantize(nearest_codes(weight, steps, grid), steps, grid) - weight
    return math.log2(float(off.square().sum())) / 2 + bits + 16 / (group or 128)


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("spread", [0.0, 0.5, 2.0])
def test_the_best_of_the_groups(bits: int, spread: float) -> None:
    weight = weight_of(0, spread=spread)
    wanted = min(GROUPS, key=lambda group: cost(weight, bits, group))
    assert best_group(weight, None, bits, GROUPS) == wanted
    if bits == 4 and spread != 0.5:  # equal blocks need no steps of their own; very unequal ones do
        assert (0 < wanted <= 32) == (spread == 2.0)


def test_groups_that_hold_all_inputs_are_one_choice() -> None:
    weight = weight_of(0, spread=2.0)[:, :, :16]
    assert best_group(weight, None, 4, (0, 128, 16)) == 0
    assert best_group(torch.zeros(1, 4, 64), None, 4, (0, 32)) == 0
    with pytest.raises(ConfigError, match="groups: found none"):
        best_group(weight, None, 4, ())


def test_statistics_lower_the_error_of_the_output() -> None:
    weight, H = weight_of(1, spread=0.5), moment(2, 128)
    grid = GroupGrid(bits=3, group=32)

    def loss(metric: Tensor | None, keep: Tensor | None = None) -> float:
        codes, steps = rounded_low(weight, metric, grid, DRAFT, keep)
        return float(layer_loss(weight - dequantize(codes, steps, grid), H).sum())

    # Of a moving average the variance given the other inputs is 1 / (1 + 0.7^2) of all of it: that is
    # what feedback leaves, but for 4 n samples and the steps.
    assert loss(H) == pytest.approx(loss(None) / 1.49, rel=0.1)
    codes, steps = rounded_low(weight, H, grid)
    assert float(layer_loss(weight - dequantize(codes, steps, grid), H).sum()) <= loss(H)


@pytest.mark.parametrize("has_moment", [False, True])
def test_zeros_stay(has_moment: bool) -> None:
    weight = weight_of(3, spread=0.5)
    keep = torch.rand(weight.shape, generator=torch.Generator().manual_seed(4)) < 0.5
    grid = GroupGrid(bits=8)
    H = moment(5, 128) if has_moment else None
    codes, _ = rounded_low(weight * keep, H, grid, DRAFT, keep)
    assert not bool(codes[~keep].any())
    assert bool(codes[keep].any())
