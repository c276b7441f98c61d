"""Ranges of an activation tensor, four ways, from its histogram.

Which is best depends on what reads the tensor, so that all are offered and measured error chooses:
the largest value (no clipping), a percentile of the magnitudes, the least squared error, and the
least relative entropy between the values and their rounded form.

Magnitudes are |x| on a signed grid and max(x, 0) on an unsigned one. Within a bin of the histogram
values are taken to be spread evenly.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Float64, Shaped
from torch import Tensor

from tersor.core.errors import ConfigError
from tersor.ops.grids import (
    N_RANGE_FRACTIONS,
    SMALLEST_RANGE_FRACTION,
    activation_codes,
    check_histogram,
    range_step,
)

PERCENTILES = (99.9, 99.99, 99.999)
# As the published method, which looks at 128 levels of 2048 bins.
ENTROPY_BINS = 2048


def activation_steps(
    counts: Shaped[Tensor, " bins"],
    edges: Float[Tensor, " edges"],
    *,
    signed: bool,
    bits: int = 8,
    percentiles: Sequence[float] = PERCENTILES,
) -> dict[str, float]:
    """Steps to choose from, by the name of their rule.

    Args:
        counts: Values in each bin, >= 0; read only.
        edges: Ascending bounds of the bins, one more than bins; read only.
        signed: Codes -2^(bits-1)..2^(bits-1)-1; otherwise 0..2^bits-1.
        bits: Width of a code, 2..8.
        percentiles: In %, each above 0 and at most 100.

    Returns:
        ``max``, ``percentile 99.9`` and so on, ``mse`` and ``entropy``: the step whose largest code
        stands for that bound, > 0; all 1.0 if there is nothing but zeros.

    Raises:
        ConfigError: ``bits`` or a percentile out of range.
        NumericalError: No histogram.
    """
    counts, edges = counts.to(torch.float64), edges.to(torch.float64)
    check_histogram(counts, edges)
    _, high = activation_codes(bits, signed=signed)
    bounds = {"max": largest_magnitude(counts, edges, signed=signed)}
    for percentile in percentiles:
        bound = percentile_magnitude(counts, edges, percentile, signed=signed)
        bounds[f"percentile {percentile:g}"] = bound
    bounds["entropy"] = entropy_magnitude(counts, edges, signed=signed, bits=bits)
    steps = {name: bound / high if bound > 0 else 1.0 for name, bound in bounds.items()}
    return steps | {"mse": range_step(counts, edges, signed=signed, bits=bits)}


def largest_magnitude(
    counts: Float64[Tensor, " bins"], edges: Float64[Tensor, " edges"], *, signed: bool
) -> float:
    """Bound of all magnitudes; 0 where there are none."""
    used = counts > 0
    ends = torch.cat([edges[1:][used], -edges[:-1][used]] if signed else [edges[1:][used]])
    return max(0.0, float(ends.max())) if ends.numel() else 0.0


def percentile_magnitude(
    counts: Float64[Tensor, " bins"],
    edges: Float64[Tensor, " edges"],
    percentile: float,
    *,
    signed: bool,
) -> float:
    """The bound below which that share of all values lies.

    Raises:
        ConfigError: ``percentile`` not above 0 and at most 100.
    """
    if not 0 < percentile <= 100:
        raise ConfigError(f"percentile must be above 0 and at most 100, got {percentile}")
    top = largest_magnitude(counts, edges, signed=signed)
    wanted = float(counts.sum()) * percentile / 100
    low, high = 0.0, top
    # Bisection: 60 halvings reach the last bit, whatever the bins are.
    for _ in range(60):
        middle = (low + high) / 2
        below = float(_mass_below(counts, edges, torch.tensor([middle]).double(), signed=signed)[0])
        low, high = (low, middle) if below >= wanted else (middle, high)
    return min(high, top)


def entropy_magnitude(
    counts: Float64[Tensor, " bins"], edges: Float64[Tensor, " edges"], *, signed: bool, bits: int
) -> float:
    """The bound that loses least information, of ``N_RANGE_FRACTIONS`` fractions of the largest.

    The values clipped to a bound, as a distribution over fine bins, against what is left of it after
    merging the bins of each code and spreading them evenly over those that were used.

    Returns:
        The bound with the least Kullback-Leibler divergence; 0 where all values are zero.

    Source: Migacz 2017, 8-bit Inference with TensorRT, GTC: entropy calibration.
    """
    top = largest_magnitude(counts, edges, signed=signed)
    if top <= 0:
        return 0.0
    grid = torch.linspace(0, top, ENTROPY_BINS + 1, dtype=torch.float64)
    fine = _mass_below(counts, edges, grid, signed=signed).diff().clamp_min(0)
    levels = 1 << (bits - 1 if signed else bits)
    best, least = top, torch.inf
    for fraction in torch.linspace(1, SMALLEST_RANGE_FRACTION, N_RANGE_FRACTIONS).tolist():
        n = max(levels, round(fraction * ENTROPY_BINS))
        divergence = _divergence(fine, n, levels)
        if divergence < least:
            best, least = top * n / ENTROPY_BINS, divergence
    return best


def _divergence(fine: Float64[Tensor, " bins"], n: int, levels: int) -> float:
    """Relative entropy of the first n bins, all beyond in the last, to their rounded form."""
    clipped = fine[:n].clone()
    clipped[-1] += fine[n:].sum()
    used = fine[:n] > 0
    level = torch.arange(n) * levels // n
    mass = torch.zeros(levels, dtype=fine.dtype).index_add_(0, level, fine[:n])
    members = torch.zeros(levels, dtype=fine.dtype).index_add_(0, level, used.to(fine.dtype))
    rounded = torch.where(used, (mass / members.clamp_min(1))[level], 0.0)
    if not bool(used.any()):
        return torch.inf
    p, q = clipped / clipped.sum(), rounded / rounded.sum()
    if bool(((p > 0) & (q <= 0)).any()):  # the last bin holds nothing but what was clipped
        return torch.inf
    both = p > 0
    return float((p[both] * (p[both] / q[both]).log()).sum())


def _mass_below(
    counts: Float64[Tensor, " bins"],
    edges: Float64[Tensor, " edges"],
    bounds: Float64[Tensor, " k"],
    *,
    signed: bool,
) -> Float64[Tensor, " k"]:
    """How many values have a magnitude of at most each bound."""
    below = _cumulative(counts, edges, bounds)
    if not signed:
        return below
    # A point mass at the bound itself counts as inside, hence what lies strictly below -bound.
    return below - _cumulative(counts, edges, -bounds)


def _cumulative(
    counts: Float64[Tensor, " bins"], edges: Float64[Tensor, " edges"], x: Float64[Tensor, " k"]
) -> Float64[Tensor, " k"]:
    """How many values lie below x, evenly spread within bins."""
    total = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    if not counts.numel():
        return torch.zeros_like(x)
    place = torch.searchsorted(edges, x, right=True).sub_(1).clamp_(0, len(counts) - 1)
    left, width = edges[place], edges[place + 1] - edges[place]
    share = torch.where(width > 0, (x - left) / width, (x >= left).to(x.dtype)).clamp(0, 1)
    return total[place] + share * counts[place]
