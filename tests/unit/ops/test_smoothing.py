"""Smoothing scales: the formula, a mean of 1, and channels with nothing to move."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tersor.core.errors import ConfigError, NumericalError
from tersor.ops.smoothing import LARGEST_LOG2, smoothing_scale

EPS = torch.finfo(torch.float64).eps
ALPHAS = st.floats(0, 1)
MAGNITUDES = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=8)
# Logarithms of magnitudes within 1e+-3 are below 7; a dozen operations round each.
ROUNDING = 12 * 7 * 8 * EPS


def double(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@given(MAGNITUDES, st.integers(0, 2**32 - 1), ALPHAS)
@settings(max_examples=60)
def test_scale_is_the_formula_with_geometric_mean_one(
    a: list[float], seed: int, alpha: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    w = (torch.rand(len(a), generator=generator, dtype=torch.float64) + 0.01).tolist()
    raw = [x**alpha / y ** (1 - alpha) for x, y in zip(a, w, strict=True)]
    mean = math.prod(value ** (1 / len(raw)) for value in raw)
    scale = smoothing_scale(double(a), double(w), alpha)
    assert scale.tolist() == [pytest.approx(value / mean, rel=ROUNDING) for value in raw]
    assert float(scale.log().mean()) == pytest.approx(0, abs=ROUNDING)


@given(MAGNITUDES)
@settings(max_examples=40)
def test_alpha_one_evens_the_activations_and_zero_the_weights(values: list[float]) -> None:
    magnitudes, ones = double(values), torch.ones(len(values), dtype=torch.float64)
    for evened in (
        magnitudes / smoothing_scale(magnitudes, ones, 1.0),
        magnitudes * smoothing_scale(ones, magnitudes, 0.0),
    ):
        assert float(evened.max() / evened.min()) == pytest.approx(1, rel=ROUNDING)


def test_channels_with_nothing_to_move_get_one() -> None:
    a, w = double([0.0, 8.0, 2.0, 5.0]), double([1.0, 1.0, 1.0, 0.0])
    scale = smoothing_scale(a, w, 1.0)
    assert scale.tolist() == [1.0, pytest.approx(2.0), pytest.approx(0.5), 1.0]


def test_nothing_at_all_gets_one() -> None:
    zeros = torch.zeros(3)
    assert smoothing_scale(zeros, zeros, 0.5).tolist() == [1.0] * 3
    assert smoothing_scale(torch.ones(1), zeros[:1] + 7, 0.5).tolist() == [1.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_extremes_stay_normal_float32_numbers(dtype: torch.dtype, alpha: float) -> None:
    info = torch.finfo(dtype)
    a = torch.tensor([info.tiny, 1.0, info.max], dtype=dtype)
    scale = smoothing_scale(a, a.flip(0), alpha)
    assert scale.dtype == torch.float64
    assert bool((scale.log2().abs() <= 2 * LARGEST_LOG2).all())
    for value in (scale, 1 / scale, scale.square()):
        as_float32 = value.to(torch.float32)
        assert bool((as_float32 >= torch.finfo(torch.float32).tiny).all())
        assert bool(as_float32.isfinite().all())
    assert float(scale.log().mean()) == pytest.approx(0, abs=100 * ROUNDING)


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan")])
def test_alpha_outside_is_refused(alpha: float) -> None:
    with pytest.raises(ConfigError, match=r"alpha must be within 0\.\.1, got"):
        smoothing_scale(torch.ones(2), torch.ones(2), alpha)


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
def test_magnitude_that_is_none_is_refused(bad: float) -> None:
    values = torch.tensor([1.0, bad])
    with pytest.raises(
        NumericalError, match=r"activation_amax \(2 channels\): channel 1 is (-1|nan|inf)"
    ):
        smoothing_scale(values, torch.ones(2), 0.5)
    with pytest.raises(
        NumericalError, match=r"weight_amax \(2 channels\): channel 1.*drop samples"
    ):
        smoothing_scale(torch.ones(2), values, 0.5)
