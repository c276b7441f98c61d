"""The best linear map, against numpy's least squares and plain sums."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tersor.core.errors import ShapeError
from tersor.ops.linear_map import linear_map
from tersor.ops.moments import moments_of

# A solve through the normal equations loses twice the digits of the condition number; rows are 20
# times the inputs here and Gaussian, so that it is below 10.
NORMAL = 1e-9


def rows(seed: int, count: int, groups: int, size: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, groups, size, generator=generator, dtype=torch.float64) + 3


@given(st.integers(0, 2**32 - 1), st.integers(1, 3), st.integers(1, 5), st.integers(1, 4))
def test_without_damping_it_is_least_squares_with_a_constant(
    seed: int, groups: int, inputs: int, outputs: int
) -> None:
    count = 20 * (inputs + 1)
    x, y = rows(seed, count, groups, inputs), rows(seed + 1, count, groups, outputs)
    found = linear_map(moments_of(x, residual=y), damping=0.0)
    left = spread = 0.0
    for g in range(groups):
        ones = np.concatenate([x[:, g].numpy(), np.ones((count, 1))], axis=1)
        wanted, *_ = np.linalg.lstsq(ones, y[:, g].numpy(), rcond=None)
        assert np.allclose(found.weight[g].numpy(), wanted[:-1].T, atol=NORMAL)
        assert np.allclose(found.bias[g].numpy(), wanted[-1], atol=10 * NORMAL)
        left += float(((y[:, g].numpy() - ones @ wanted) ** 2).sum())
        spread += float((y[:, g] - y[:, g].mean(0)).square().sum())
    assert found.loss == pytest.approx(left / spread, abs=NORMAL)
    assert found.damping == 0.0


def test_damping_is_relative_and_spares_the_mean() -> None:
    x, y = rows(0, 50, 1, 1), rows(1, 50, 1, 1)
    found = linear_map(moments_of(x, residual=y), damping=0.5)
    a, b = x[:, 0, 0] - x.mean(), y[:, 0, 0] - y.mean()
    slope = float((a * b).sum() / (1.5 * (a * a).sum()))
    assert float(found.weight) == pytest.approx(slope)
    assert float(found.bias) == pytest.approx(float(y.mean()) - slope * float(x.mean()))
    scaled = linear_map(moments_of(10 * x, residual=y), damping=0.5)
    assert float(scaled.weight) == pytest.approx(slope / 10)
    assert scaled.loss == pytest.approx(found.loss)


def test_the_loss_is_that_of_the_damped_map() -> None:
    x, y = rows(0, 60, 1, 3), rows(1, 60, 1, 2)
    found = linear_map(moments_of(x, residual=y), damping=0.7)
    error = y[:, 0] - x[:, 0] @ found.weight[0].T - found.bias[0]
    wanted = float(error.square().sum() / (y[:, 0] - y[:, 0].mean(0)).square().sum())
    assert found.loss == pytest.approx(wanted)


def test_constant_inputs_and_constant_outputs() -> None:
    x, y = rows(0, 40, 1, 3), rows(1, 40, 1, 2)
    same = linear_map(moments_of(torch.full_like(x, 2.0), residual=y))
    assert torch.equal(same.weight, torch.zeros(1, 2, 3, dtype=torch.float64))
    assert torch.allclose(same.bias, y.mean(0))
    assert same.loss == pytest.approx(1.0)
    flat = linear_map(moments_of(x, residual=torch.full_like(y, 2.0)))
    assert torch.allclose(flat.bias, torch.full((1, 2), 2.0, dtype=torch.float64))
    assert flat.loss == 0.0


def test_moments_of_inputs_alone_are_refused() -> None:
    with pytest.raises(ShapeError, match=r"moments hold inputs alone.*moments_of\(x, residual=y\)"):
        linear_map(moments_of(rows(0, 9, 1, 2)))
