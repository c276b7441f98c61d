"""Assumed moments against their definitions, and that rounding in them pays on inputs like that."""

import math

import pytest
import torch
from torch import Tensor

from tersor.ops.assumed import function_moments, norm_moments, plain_moments
from tersor.ops.group_grids import GroupGrid, dequantize
from tersor.ops.low_bits import DRAFT, rounded_low
from tersor.ops.moments import centred, second_moment

# The trapezoid rule at a kink between two points 0.004 apart: their distance squared.
QUADRATURE = 2e-5


def double(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_nothing_known_is_the_identity() -> None:
    metric, mean = centred(plain_moments(3, 4))
    assert torch.equal(metric, torch.eye(4, dtype=torch.float64).expand(3, -1, -1))
    assert torch.equal(mean, torch.zeros(3, 4, dtype=torch.float64))


def test_a_norm_has_its_own_deviations_and_means() -> None:
    scale, shift = torch.tensor([0.5, -2.0, 0.0]), torch.tensor([1.0, 0.0, -3.0])
    metric, mean = centred(norm_moments(scale, shift))
    assert torch.equal(mean[0], shift.double())
    assert torch.equal(metric[0], torch.diag(torch.tensor([0.25, 4.0, 0.0], dtype=torch.float64)))
    without = centred(norm_moments(scale, None))
    assert torch.equal(without[0], metric)
    assert not bool(without[1].any())


def test_a_rectifier_has_the_moments_of_half_a_normal_distribution() -> None:
    moments = function_moments(torch.relu, 2, 3)
    mean, square = 1 / math.sqrt(2 * math.pi), 0.5
    wanted = torch.full((3, 3), mean**2, dtype=torch.float64)
    wanted.fill_diagonal_(square)
    torch.testing.assert_close(second_moment(moments)[0], wanted, rtol=0, atol=QUADRATURE)
    assert not bool(moments.x.any())  # how large values are is not known: the bias must not move
    torch.testing.assert_close(centred(moments)[0], second_moment(moments))


@pytest.mark.parametrize("function", [torch.zeros_like, lambda z: z / 0])
def test_a_function_without_variance_tells_nothing(function: object) -> None:
    moments = function_moments(function, 1, 2)  # type: ignore[arg-type]
    assert torch.equal(moments.xx[0], torch.eye(2, dtype=torch.float64))


@pytest.mark.parametrize("bits", [2, 3])
def test_rounding_for_a_common_mean_errs_less_where_there_is_one(bits: int) -> None:
    """On rectified normal inputs, which the rounding has not seen."""
    weight, grid = double(1, 200, 96, seed=1), GroupGrid(bits=bits)
    inputs = torch.relu(double(4000, 96, seed=2))
    errors = []
    for metric in (None, centred(function_moments(torch.relu, 1, 96))[0]):
        codes, steps = rounded_low(weight, metric, grid, DRAFT)
        off = weight - dequantize(codes, steps, grid)
        errors.append(float((inputs @ off[0].mT).square().mean()))
    # E[f]^2 / E[f^2] = 1 / pi of the error comes from the mean; at least half of that goes.
    assert errors[1] < (1 - 0.5 / math.pi) * errors[0]
