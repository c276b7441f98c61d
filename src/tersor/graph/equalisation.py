"""Channels of what a convolution reads, evened out where that costs no op.

One step serves a whole tensor, so that a channel of small values is rounded coarsely. Dividing large
channels and multiplying small ones moves the spread into the reader's weight, whose rows have steps of
their own, and into the op before, where the factors go exactly (``graph.folding``). Only a tensor that
one op alone reads can be evened out: whatever else reads it would see the factors.

Source: Nagel et al. 2019, arXiv:1906.04721, section 4.1; Xiao et al. 2022, arXiv:2211.10438, eq. 4.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tersor.graph.contracts import Quantizer, SiteStatistics
from tersor.graph.quantizer import column_scale
from tersor.graph.quantizer_choice import (
    FEEDBACK_GAIN,
    channel_scale,
    choose_quantizer,
    on_grid,
)
from tersor.ops.grids import fake_quantize, range_step

_BINS = 2048
_QUANTILE = 0.999  # of the magnitudes of a channel: single values must not decide
_LEAST = 1e-6


def is_equalisable(statistics: SiteStatistics) -> bool:
    """Whether a convolution alone reads its tensor, and the op before can take factors of channels."""
    readers = statistics.readers
    return statistics.window is not None and readers is not None and readers.is_foldable


def equalised_quantizer(statistics: SiteStatistics, alpha: float) -> Quantizer:
    """The quantiser of an ``is_equalisable`` site's tensor with its channels evened out.

    Args:
        statistics: Of the site.
        alpha: 0 evens out the columns of the weight, 1 the channels of the tensor.
    """
    assert statistics.readers is not None
    sample = statistics.channels.float()
    amax = torch.quantile(sample.abs(), _QUANTILE, dim=0).clamp_min(_LEAST)
    scale = channel_scale(amax, statistics.readers, alpha)
    evened = sample / scale
    edge = max(float(evened.abs().max()), _LEAST)
    counts = torch.histc(evened, _BINS, -edge, edge)
    edges = torch.linspace(-edge, edge, _BINS + 1, dtype=torch.float64)
    step = range_step(counts, edges, signed=statistics.low < 0)
    return replace(on_grid(statistics, step), inverse_scale=1.0 / scale)


def equalising_exponent(
    statistics: SiteStatistics, alphas: Sequence[float], weight_limit: int
) -> float | None:
    """The exponent with the least expected error of the layer's outputs, if that is less than without.

    Args:
        statistics: Of a site.
        alphas: Exponents to choose from.
        weight_limit: Largest absolute code of the weight.
    """
    if not is_equalisable(statistics):
        return None
    plain, _ = choose_quantizer(statistics, (None,), weight_limit)
    costs: dict[float | None, float] = {None: _expected_error(statistics, plain, weight_limit)}
    for alpha in alphas:
        quantizer = equalised_quantizer(statistics, alpha)
        assert quantizer.inverse_scale is not None
        if bool((quantizer.inverse_scale != 1).any()):  # else it is the plain one
            costs[alpha] = _expected_error(statistics, quantizer, weight_limit)
    return min(costs, key=costs.__getitem__)


def _expected_error(statistics: SiteStatistics, quantizer: Quantizer, weight_limit: int) -> float:
    """Mean squared error of the outputs: the rounding of the sampled rows, and that of the weight."""
    columns = column_scale(statistics.weight, quantizer)  # [g, 1, n]
    rows, weight = statistics.rows().compressed.double(), statistics.weight
    if columns is not None:
        rows, weight = rows / columns.squeeze(1), weight * columns
    error = fake_quantize(rows, quantizer.step, quantizer.low, quantizer.high) - rows
    outputs: Tensor = torch.einsum("tgn,gmn->tgm", error, weight)
    # The bias takes up the mean of what clipping loses.
    found = (outputs - outputs.mean(0)).square().sum((1, 2)).mean()
    steps = (weight.abs().amax(2) / weight_limit).square().sum(1)  # [g]
    own = (rows.square().sum(2).mean(0) * steps).sum() / 12 * FEEDBACK_GAIN
    return float(found + own)
