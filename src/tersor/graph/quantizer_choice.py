"""Which quantiser a tensor gets: one for all its readers, by the error of their outputs.

Symmetric, one step a tensor (unsigned where the range is one-sided, shifted where it nearly is), with
a smoothing scale per channel where that helps. What convolutions read takes the range of least squared
error, or that of another rule (largest value, percentile, entropy) where one is surely better.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tersor.graph.contracts import Quantizer, Readers, SiteStatistics
from tersor.ops.float8 import RELATIVE_VARIANCE
from tersor.ops.grids import fake_quantize
from tersor.ops.moments import Moments
from tersor.ops.ranges import PERCENTILES, activation_steps
from tersor.ops.smoothing import smoothing_scale

SIGNED, UNSIGNED = (-128, 127), (0, 255)
# A tensor such as GELU's, whose negative part is short, wastes half of a signed grid.
SHIFT_SHARE = 0.25
# Ranges to choose from, as fractions of the largest value.
RANGE_FRACTIONS = (1.0, 0.8, 0.64, 0.5, 0.4, 0.3)
SURE = 2.0  # standard errors by which another range has to be better
_COST_ROWS = 384  # of the sample, to compare grids
# Error feedback leaves about half of the error of rounding to nearest (ALGORITHMS 9).
FEEDBACK_GAIN = 0.5


def choose_quantizer(
    statistics: SiteStatistics, alphas: Sequence[float | None], weight_limit: int
) -> tuple[Quantizer, float | None]:
    """The quantiser of a tensor, the same for all its readers, and its smoothing exponent.

    It depends on the tensor and on its readers as a whole, so every reader finds the same one.

    Args:
        statistics: Of any reader.
        alphas: Exponents to choose from; None: no smoothing.
        weight_limit: Largest absolute code of the readers' weights.
    """
    readers = statistics.readers
    if readers is None:
        return on_grid(statistics, range_steps(statistics)["mse"]), None
    # The transform asks again with other statistics, of the same readers.
    seen = (statistics.low, statistics.high, float(statistics.channels.double().sum()))
    if readers.weight is None:
        key: tuple[Any, ...] = ("range", *seen)
        if key not in readers.decided:  # by the first reader, for all
            readers.decided[key] = range_steps(statistics)[best_range(range_errors(statistics))]
        return on_grid(statistics, readers.decided[key]), None
    key = ("quantizer", tuple(alphas), weight_limit, *seen)
    if key not in readers.decided:
        readers.decided[key] = _least_cost(statistics, readers, alphas, weight_limit)
    found: tuple[Quantizer, float | None] = readers.decided[key]
    return found


def _least_cost(
    statistics: SiteStatistics,
    readers: Readers,
    alphas: Sequence[float | None],
    weight_limit: int,
) -> tuple[Quantizer, float | None]:
    """The grid and the smoothing exponent of the least expected error."""
    assert readers.weight is not None
    best: tuple[float, Quantizer, float | None] | None = None
    sample = statistics.channels.float()
    amax = torch.quantile(sample.abs(), 0.999, dim=0).clamp_min(1e-6)
    rows = sample[:: max(1, len(sample) // _COST_ROWS)]
    # |W e|^2 = e (W^T W) e: the smaller of the two products.
    is_tall = readers.weight.shape[0] > readers.weight.shape[1]
    gram = readers.weight.mT @ readers.weight if is_tall else None
    for alpha in alphas:
        scale = None if alpha is None else smoothing_scale(amax, readers.amax, alpha).float()
        values = rows if scale is None else rows / scale
        weight = readers.weight if scale is None else readers.weight * scale
        form = gram if gram is None or scale is None else gram * torch.outer(scale, scale)
        expected = _Expected(values, weight, form, weight_limit)
        for quantizer in _grids(statistics, sample, scale):
            cost = expected.cost(quantizer)
            if best is None or cost < best[0]:
                best = (cost, quantizer, alpha)
    assert best is not None
    return best[1], best[2]


def range_steps(statistics: SiteStatistics) -> dict[str, float]:
    """Steps of a tensor to choose from, by the rule that its range follows (``ops.ranges``)."""
    return activation_steps(
        statistics.counts, statistics.edges, signed=statistics.low < 0, percentiles=PERCENTILES
    )


def on_grid(statistics: SiteStatistics, step: float) -> Quantizer:
    """The tensor's grid with a step: unsigned where nothing is negative."""
    low, high = SIGNED if statistics.low < 0 else UNSIGNED
    return Quantizer(step=step, low=low, high=high, channel_dim=statistics.channel_dim)


def range_errors(statistics: SiteStatistics) -> dict[str, Tensor]:
    """Rule -> squared error of a layer's outputs with its input so rounded, one a row [t].

    Without the mean of each output, which the bias takes up: clipping errs to one side.
    """
    rows, weight = statistics.rows().compressed.float(), statistics.weight.float()
    low, high = SIGNED if statistics.low < 0 else UNSIGNED
    found = {}
    for rule, step in range_steps(statistics).items():
        outputs = torch.einsum("tgn,gmn->tgm", fake_quantize(rows, step, low, high) - rows, weight)
        found[rule] = (outputs - outputs.mean(0)).square().sum((1, 2)).double()
    return found


def best_range(errors: Mapping[str, Tensor]) -> str:
    """The rule of the least mean error, if it is surely less than that of the rule ``mse``.

    A few rows hold most of the clipping: taking the least mean as it is made a ResNet-20 worse.

    Args:
        errors: Rule -> errors [t] of the same rows; ``mse`` among them.
    """
    best, most = "mse", 0.0
    if len(errors["mse"]) < 2:
        return best
    for rule, own in errors.items():
        gain = errors["mse"] - own
        mean, deviation = float(gain.mean()), float(gain.std()) / len(gain) ** 0.5
        if mean > max(most, SURE * deviation):
            best, most = rule, mean
    return best


def _grids(statistics: SiteStatistics, sample: Tensor, scale: Tensor | None) -> Iterator[Quantizer]:
    """Grids for one smoothing scale: signed, unsigned or shifted, of several ranges."""
    inverse = None if scale is None else 1.0 / scale
    low, high = (float(v) for v in torch.aminmax(sample if inverse is None else sample * inverse))
    if inverse is None:
        low, high = min(low, statistics.low), max(high, statistics.high)
    shifts = [0.0]
    if low < 0 < high and -low <= SHIFT_SHARE * (high - low) and not statistics.is_padded:
        shifts.append(-low)
    for shift in shifts:
        unsigned = low >= 0 or shift > 0
        grid = UNSIGNED if unsigned else SIGNED
        widest = (high + shift) / UNSIGNED[1] if unsigned else max(-low, high) / SIGNED[1]
        for fraction in RANGE_FRACTIONS:
            yield Quantizer(
                step=max(widest * fraction, 1e-12),
                low=grid[0],
                high=grid[1],
                inverse_scale=inverse,
                channel_dim=statistics.channel_dim,
                shift=shift,
            )


class _Expected:
    """Expected error of the readers' outputs: activations' rounding plus the weights' own.

    Each row counts relative to its own output (plus the average one), or the few rows with
    massive activations would own the choice.

    Args:
        values: Rows of the tensor [t, n].
        weight: All rows of all readers [m, n].
        gram: Their W^T W [n, n], or None to multiply by the weight itself.
        limit: Largest absolute code of the weights.
    """

    def __init__(self, values: Tensor, weight: Tensor, gram: Tensor | None, limit: int) -> None:
        self.values, self.weight, self.gram = values, weight, gram
        energy = self._outputs(values)
        self.scale = energy + energy.mean() + 1e-30
        steps = weight.abs().amax(1) / limit
        self.weights = values.square().sum(1) * (steps.square().sum() / 12 * FEEDBACK_GAIN)

    def cost(self, quantizer: Quantizer) -> float:
        """With the tensor on a grid."""
        shifted = self.values + quantizer.shift
        error = fake_quantize(shifted, quantizer.step, quantizer.low, quantizer.high) - shifted
        return float(((self._outputs(error) + self.weights) / self.scale).mean())

    def _outputs(self, rows: Tensor) -> Tensor:
        """Squared norms of the outputs [t]."""
        if self.gram is None:
            return (rows @ self.weight.mT).square().sum(1)
        return (rows @ self.gram).mul_(rows).sum(1).clamp_min(0.0)


def expected_moments(statistics: SiteStatistics, quantizer: Quantizer) -> Moments:
    """Moments of the quantised input without a second pass: rounding noise adds step^2 / 12, of floats a share."""
    moments = statistics.moments()
    n = moments.xx.shape[-1]
    if quantizer.kind == "fp8":  # relative to each value
        own = moments.xx.diagonal(dim1=1, dim2=2) * RELATIVE_VARIANCE
        return replace(moments, xx=moments.xx + torch.diag_embed(own))
    noise = torch.eye(n, dtype=torch.float64) * (quantizer.step**2 / 12 * moments.count)
    if quantizer.inverse_scale is None:
        return replace(moments, xx=moments.xx + noise)
    window = n * moments.xx.shape[0] // quantizer.inverse_scale.numel()
    factor = quantizer.inverse_scale.double().reshape(moments.xx.shape[0], -1)
    factor = factor.repeat_interleave(window, dim=1)
    xx = moments.xx * factor.unsqueeze(1) * factor.unsqueeze(2)
    return replace(moments, xx=xx + noise, x=moments.x * factor)
