"""Ranges by their definitions, on histograms of known samples."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tersor.core.errors import ConfigError, NumericalError
from tersor.ops.grids import range_step
from tersor.ops.ranges import (
    ENTROPY_BINS,
    activation_steps,
    entropy_magnitude,
    largest_magnitude,
    percentile_magnitude,
)


def histogram(values: Tensor, bins: int = 400) -> tuple[Tensor, Tensor]:
    low, high = float(values.min()), float(values.max())
    edges = torch.linspace(low, high, bins + 1, dtype=torch.float64)
    return torch.histogram(values.double(), edges).hist, edges


def sample(seed: int, n: int = 5000) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(st.integers(0, 2**32 - 1), st.sampled_from([50.0, 90.0, 99.9, 100.0]), st.booleans())
@settings(max_examples=20, deadline=None)
def test_percentile_is_that_of_the_sample(seed: int, percentile: float, signed: bool) -> None:
    values = sample(seed) + 0.3
    counts, edges = histogram(values)
    bound = percentile_magnitude(counts, edges, percentile, signed=signed)
    magnitudes = values.abs() if signed else values
    share = float((magnitudes <= bound).double().mean())
    width = float(edges[1] - edges[0])
    near = float(((magnitudes - bound).abs() <= width).double().mean())
    assert abs(share - percentile / 100) <= near + 1e-9
    assert bound <= largest_magnitude(counts, edges, signed=signed)


def divergence_by_hand(fine: list[float], n: int, levels: int) -> float:
    reference = fine[:n]
    reference[-1] += sum(fine[n:])
    rounded = [0.0] * n
    for level in range(levels):
        members = [i for i in range(n) if i * levels // n == level and fine[i] > 0]
        for i in members:
            rounded[i] = sum(fine[j] for j in members) / len(members)
    p, q = sum(reference), sum(rounded)
    total = 0.0
    for a, b in zip(reference, rounded, strict=True):
        if a > 0:
            if b <= 0:
                return math.inf
            total += a / p * math.log((a / p) / (b / q))
    return total


@pytest.mark.parametrize("bits", [3, 8])
def test_entropy_bound_is_the_least_divergence(bits: int) -> None:
    values = sample(1, 3000).abs()
    values[0] = 12.0
    edges = torch.linspace(0, 12, ENTROPY_BINS + 1, dtype=torch.float64)
    counts = torch.histogram(values, edges).hist
    got = entropy_magnitude(counts, edges, signed=True, bits=bits)
    best: tuple[float, float] | None = None
    for fraction in torch.linspace(1, 0.15, 40).tolist():
        n = max(1 << (bits - 1), round(fraction * ENTROPY_BINS))
        divergence = divergence_by_hand(counts.tolist(), n, 1 << (bits - 1))
        if best is None or divergence < best[0]:
            best = divergence, 12.0 * n / ENTROPY_BINS
    assert best is not None
    assert got == pytest.approx(best[1])
    if bits == 3:
        assert got < 12.0  # with few levels one outlier is worth clipping


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_steps_of_all_rules(signed: bool, bits: int) -> None:
    values = sample(2) if signed else sample(2).abs()
    counts, edges = histogram(values)
    steps = activation_steps(counts, edges, signed=signed, bits=bits)
    assert list(steps) == [
        "max",
        "percentile 99.9",
        "percentile 99.99",
        "percentile 99.999",
        "entropy",
        "mse",
    ]
    high = (1 << (bits - 1)) - 1 if signed else (1 << bits) - 1
    assert steps["max"] * high == pytest.approx(float(values.abs().max()))
    assert steps["percentile 99.9"] < steps["percentile 99.99"] <= steps["max"]
    assert steps["mse"] == range_step(counts, edges, signed=signed, bits=bits) <= steps["max"]
    low = -high - 1 if signed else 0

    def error(step: float) -> float:
        return float((values - (values / step).round().clamp(low, high) * step).square().mean())

    assert error(steps["mse"]) <= 1.02 * min(error(step) for step in steps.values())


def test_degenerate_histograms() -> None:
    edges = torch.tensor([-1.0, 0.0, 1.0, 2.0])
    assert set(activation_steps(torch.zeros(3), edges, signed=True).values()) == {1.0}
    negative = activation_steps(torch.tensor([5.0, 0, 0]), edges, signed=False)
    assert set(negative.values()) == {1.0}
    constant = activation_steps(torch.tensor([7.0]), torch.tensor([3.0, 3.0]), signed=False)
    assert constant["max"] * 255 == pytest.approx(3.0)
    assert constant["percentile 99.9"] * 255 == pytest.approx(3.0)


def test_wrong_arguments_are_refused() -> None:
    counts, edges = histogram(sample(0))
    with pytest.raises(ConfigError, match=r"percentile must be above 0 and at most 100, got 0"):
        activation_steps(counts, edges, signed=True, percentiles=(0.0,))
    with pytest.raises(ConfigError, match=r"bits must be 2\.\.8, got 1"):
        activation_steps(counts, edges, signed=True, bits=1)
    with pytest.raises(NumericalError, match=r"histogram of 400 counts and 400 edges"):
        activation_steps(counts, edges[1:], signed=True)
