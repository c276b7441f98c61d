"""Which quantiser a tensor gets: one for all its readers, by the error of their outputs.

Symmetric, one step a tensor (unsigned where the range is one-sided, shifted where it nearly is), with
a smoothing scale per channel where that helps. What convolutions read takes the range of least squared
error, or that of another rule (largest value, percentile, entropy) where one is surely better.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
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
_CLIPPED = 0.999  # share of values that a clipped range takes in
_FLOORS = (0.5, 1.0)  # of channels' largest magnitudes, in units of the middle channel's
_EXACT = 24  # grids whose errors are computed as the readers see them
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
    """The grid and the smoothing exponent of the least expected error.

    All are ranked as if errors of channels were independent; of the best few it is computed what readers make of them.
    """
    assert readers.weight is not None
    sample = statistics.channels.float()
    rows = sample[:: max(1, len(sample) // _COST_ROWS)]
    expected = _Expected(rows, readers.weight, weight_limit)
    ranked: list[tuple[float, int, _Smoothed, Quantizer]] = []
    for smoothed in _smoothed(sample, readers.amax, alphas):
        own = expected.of_weights(smoothed)
        for quantizer in _grids(statistics, sample, smoothed.scale):
            cost = expected.rough(smoothed, quantizer, own)
            ranked.append((cost, len(ranked), smoothed, quantizer))
    nearest = sorted(ranked, key=lambda r: r[:2])[:_EXACT]
    costs = [expected.cost(smoothed, quantizer) for _, _, smoothed, quantizer in nearest]
    _, _, smoothed, quantizer = nearest[min(range(len(costs)), key=costs.__getitem__)]
    return quantizer, smoothed.alpha


def _smoothed(
    sample: Tensor, weight_amax: Tensor, alphas: Sequence[float | None]
) -> Iterator["_Smoothed"]:
    """All factors to choose from."""
    magnitudes: list[Tensor] = []
    for alpha in alphas:
        if alpha is None:
            yield _Smoothed(None, None)
            continue
        magnitudes = magnitudes or list(_largest(sample))
        for amax in magnitudes:
            yield _Smoothed(alpha, smoothing_scale(amax, weight_amax, alpha).float())


def _largest(sample: Tensor) -> Iterator[Tensor]:
    """What may stand for the largest magnitude of each channel [n].

    A quantile where a few values are worth clipping; or the largest, that of quiet channels raised to a share of the
    middle channel's. The short side of a function such as GELU is as long in a quiet channel as in a loud one: divided by
    little it would take most of a grid that is shifted for it.
    """
    sizes = sample.abs()
    yield _quantile(sizes, _CLIPPED).clamp_min(1e-6)
    largest = sizes.amax(0).clamp_min(1e-6)
    middle = float(largest.median())
    for share in _FLOORS:
        yield largest.clamp_min(share * middle)


def _quantile(values: Tensor, share: float) -> Tensor:
    """A high quantile of each column [n], between two values as ``torch.quantile`` takes it, which sorts all of them."""
    place = share * (len(values) - 1)
    below = math.floor(place)
    top = values.topk(len(values) - below, dim=0).values
    return torch.lerp(top[-1], top[max(0, len(top) - 2)], place - below)


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


@dataclass(frozen=True, slots=True, eq=False)
class _Smoothed:
    """A smoothing exponent, and the factors of channels that come of it."""

    alpha: float | None
    scale: Tensor | None

    def values(self, rows: Tensor) -> Tensor:
        return rows if self.scale is None else rows / self.scale

    def weight(self, weight: Tensor) -> Tensor:
        return weight if self.scale is None else weight * self.scale


class _Expected:
    """Expected error of the readers' outputs: activations' rounding plus the weights' own.

    Each row counts relative to its own output (plus the middle one: the mean is that of the few rows
    with massive activations, which would own the choice).

    Args:
        rows: Of the tensor [t, n].
        weight: All rows of all readers [m, n].
        limit: Largest absolute code of the weights.
    """

    def __init__(self, rows: Tensor, weight: Tensor, limit: int) -> None:
        self.rows, self.readers, self.limit = rows, weight, limit
        # |W e|^2 = e (W^T W) e: the smaller of the two products.
        self.gram = weight.mT @ weight if weight.shape[0] > weight.shape[1] else None
        self.columns = weight.square().sum(0)
        energy = self._outputs(rows, None)
        heard = energy[energy > 0]  # rows of nothing but zeros say nothing of what is usual
        self.scale = energy + (heard.median() if len(heard) else 0.0) + 1e-30

    def of_weights(self, smoothed: _Smoothed) -> Tensor:
        """What rounding the weights adds [t]."""
        steps = smoothed.weight(self.readers).abs().amax(1) / self.limit
        energy = smoothed.values(self.rows).square().sum(1)
        return energy * (steps.square().sum() / 12 * FEEDBACK_GAIN)

    def rough(self, smoothed: _Smoothed, quantizer: Quantizer, own: Tensor) -> float:
        """With the tensor on a grid, and errors of channels that have nothing to do with each other."""
        columns = self.columns if smoothed.scale is None else self.columns * smoothed.scale.square()
        error = self._error(smoothed, quantizer).square() @ columns
        return float(((error + own) / self.scale).mean())

    def cost(self, smoothed: _Smoothed, quantizer: Quantizer) -> float:
        """With the tensor on a grid."""
        error = self._outputs(self._error(smoothed, quantizer), smoothed.scale)
        return float(((error + self.of_weights(smoothed)) / self.scale).mean())

    def _error(self, smoothed: _Smoothed, quantizer: Quantizer) -> Tensor:
        shifted = smoothed.values(self.rows) + quantizer.shift
        return fake_quantize(shifted, quantizer.step, quantizer.low, quantizer.high) - shifted

    def _outputs(self, rows: Tensor, scale: Tensor | None) -> Tensor:
        """Squared norms of the outputs [t], of rows that channels were divided by ``scale`` in."""
        whole = rows if scale is None else rows * scale
        if self.gram is None:
            return (whole @ self.readers.mT).square().sum(1)
        return (whole @ self.gram).mul_(whole).sum(1).clamp_min(0.0)


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
