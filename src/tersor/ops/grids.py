"""Symmetric integer grids: how to round, and which step to round with.

A code q stands for q * step. Weights use one step an output and codes within +-limit; activations
one step a tensor, [-128, 127] or, where nothing is negative, [0, 255]. Steps are chosen by squared
error over a few fractions of the largest value: clipping a rare extreme buys precision for the rest.

Axes: g groups, m outputs and n inputs of a group.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Float64, Int8, Shaped
from torch import Tensor

from tersor.core.errors import ConfigError, NumericalError

WEIGHT_FRACTIONS = (1.0, 0.95, 0.9, 0.85, 0.8)
# Outliers that are a share p of all values are best clipped at p / (p + 1 / (12 * 127^2)) of their size,
# where clipping and rounding error balance: 0.15 belongs to one value in a million, about the rarest
# that a calibration histogram can tell. Forty fractions are 2 % of the largest value apart.
N_RANGE_FRACTIONS = 40
SMALLEST_RANGE_FRACTION = 0.15
INT8_LIMIT = 127
SIGNED_CODES = (-128, 127)
UNSIGNED_CODES = (0, 255)


def fake_quantize(
    x: Float[Tensor, "*shape"], step: Float[Tensor, "..."] | float, low: int, high: int
) -> Float[Tensor, "*shape"]:
    """Round to the nearest point of a grid: clamp(round(x / step), low, high) * step.

    Args:
        x: Values; read only.
        step: Distance of neighbouring points, > 0; broadcasts against ``x``.
        low: Smallest code.
        high: Largest code, >= ``low``.

    Returns:
        Values on the grid, in the type of ``x``; ties go to the even code. The error is at most
        half a step within [low, high] * step.

    Raises:
        ConfigError: ``low`` exceeds ``high``.

    Source: Jacob et al. 2018, arXiv:1712.05877, eq. 1, zero point 0.
    """
    if low > high:
        raise ConfigError(f"codes {low}..{high} are an empty grid; give low <= high")
    return ((x / step).round().clamp(low, high) * step).to(x.dtype)


def weight_steps(
    weight: Float[Tensor, "g m n"],
    limit: int,
    H_diag: Float[Tensor, "g n"] | None = None,
    fractions: Sequence[float] = WEIGHT_FRACTIONS,
) -> Float64[Tensor, "g m"]:
    """Step of every output, the best of a few fractions of max|w| / limit.

    Args:
        weight: Weight; read only.
        limit: Largest code, 1..127.
        H_diag: Mean square of every input, the weight of its column's error; None: all alike.
        fractions: What part of the largest weight the largest code stands for; the first wins a tie.

    Returns:
        Steps > 0 that minimise sum_j H_jj (w_j - q_j)^2 of each row; an all-zero row gets step 1.

    Raises:
        ConfigError: ``limit`` outside 1..127, or no fractions.
        NumericalError: The weight is not finite.
    """
    check_limit(limit)
    if not fractions:
        raise ConfigError("weight steps: no fractions to choose from; give at least (1.0,)")
    check_finite(weight, "weight")
    W = weight.to(torch.float64)
    importance = 1.0 if H_diag is None else H_diag.to(torch.float64).unsqueeze(1)
    largest = W.abs().amax(2) / limit
    largest = torch.where(largest > 0, largest, 1.0)
    best = largest * fractions[0]
    least = torch.full_like(best, torch.inf)
    for fraction in fractions:
        step = largest * fraction
        rounded = fake_quantize(W, step.unsqueeze(2), -limit, limit)
        error = ((W - rounded).square() * importance).sum(2)
        best = torch.where(error < least, step, best)
        least = torch.minimum(error, least)
    return torch.where(weight.count_nonzero(2) > 0, best, 1.0)


def round_nearest(
    weight: Float[Tensor, "g m n"], step: Float[Tensor, "g m"], limit: int
) -> Int8[Tensor, "g m n"]:
    """Codes of the nearest grid points, clamp(round(w / step), -limit, limit).

    Args:
        weight: Weight; read only.
        step: Step of every output, > 0.
        limit: Largest code, 1..127.

    Raises:
        ConfigError: ``limit`` outside 1..127.
        NumericalError: The weight is not finite, or a step is not positive.
    """
    check_limit(limit)
    check_finite(weight, "weight")
    check_steps(step)
    scaled = weight.to(torch.float64) / step.to(torch.float64).unsqueeze(2)
    return scaled.round().clamp(-limit, limit).to(torch.int8)


def range_step(
    counts: Shaped[Tensor, " bins"],
    edges: Float[Tensor, " edges"],
    *,
    signed: bool,
    bits: int = 8,
) -> float:
    """Step of an activation tensor with the least expected squared error over its histogram.

    Args:
        counts: Values in each bin, >= 0, of any number type; read only.
        edges: Ascending bounds of the bins, one more than bins; read only.
        signed: Grid [-128, 127]; otherwise [0, 255], on which negative values become 0.
        bits: Width of a code, 2..8; the grids above are those of 8 bits.

    Returns:
        The best of ``N_RANGE_FRACTIONS`` fractions of max|x| / 127 (signed) or max x / 255, where
        all of a bin stands at its centre; 1.0 if there is nothing but zeros (or negative values on
        the unsigned grid).

    Raises:
        ConfigError: ``bits`` outside 2..8.
        NumericalError: Counts or edges are negative or not finite, not ascending or do not fit.
    """
    counts, edges = counts.to(torch.float64), edges.to(torch.float64)
    check_histogram(counts, edges)
    low, high = activation_codes(bits, signed=signed)
    used = counts > 0
    left, right, mass = edges[:-1][used], edges[1:][used], counts[used]
    largest = torch.cat([right, -left if signed else right]).clamp(min=0)
    top = float(largest.max()) if largest.numel() else 0.0
    if top <= 0:
        return 1.0
    fractions = torch.linspace(
        1, SMALLEST_RANGE_FRACTION, N_RANGE_FRACTIONS, dtype=torch.float64, device=edges.device
    )
    steps = (fractions * (top / high)).unsqueeze(1)
    centres = ((left + right) / 2).expand(N_RANGE_FRACTIONS, -1)
    error = (centres - fake_quantize(centres, steps, low, high)).square() @ mass
    return float(steps[error.argmin(), 0])


def activation_codes(bits: int, *, signed: bool) -> tuple[int, int]:
    """Smallest and largest code of an activation of this width.

    Raises:
        ConfigError: ``bits`` outside 2..8.
    """
    if not 2 <= bits <= 8:
        raise ConfigError(f"bits must be 2..8, got {bits}")
    half = 1 << (bits - 1)
    return (-half, half - 1) if signed else (0, 2 * half - 1)


def check_limit(limit: int) -> None:
    """Raise ConfigError unless codes within +-limit fit into int8."""
    if not 1 <= limit <= INT8_LIMIT:
        raise ConfigError(f"limit must be 1..{INT8_LIMIT} (127 for int8, 7 for int4), got {limit}")


def check_steps(step: Float[Tensor, "g m"]) -> None:
    """Raise NumericalError unless all steps are positive and finite."""
    good = (step > 0) & step.isfinite()
    if not bool(good.all()):
        group, row = (int(i) for i in (~good).nonzero()[0])
        raise NumericalError(
            f"step {tuple(step.shape)}: output {row} of group {group} has step {float(step[group, row])}, "
            "wanted a positive number; an all-zero row takes step 1"
        )


def check_finite(weight: Float[Tensor, "g m n"], name: str) -> None:
    """Raise NumericalError unless all of a weight is finite."""
    if bool(weight.sum().isfinite()):  # no sum with NaN or infinity is
        return
    finite = weight.isfinite()
    if not bool(finite.all()):
        group, row, column = (int(i) for i in (~finite).nonzero()[0])
        raise NumericalError(
            f"{name} {tuple(weight.shape)}: found {float(weight[group, row, column])} at group {group}, output {row}, "
            f"input {column}, wanted finite values; mend the checkpoint or leave this layer as it is"
        )


def check_histogram(counts: Float64[Tensor, " bins"], edges: Float64[Tensor, " edges"]) -> None:
    """Raise NumericalError unless these are a histogram."""
    fits = edges.numel() == counts.numel() + 1
    sound = bool(counts.isfinite().all() & edges.isfinite().all() & (counts >= 0).all())
    if not (fits and sound and bool((edges.diff() >= 0).all())):
        raise NumericalError(
            f"histogram of {counts.numel()} counts and {edges.numel()} edges: wanted finite counts >= 0 and one more "
            "edge than counts, finite and ascending; drop samples that are not finite before counting"
        )
