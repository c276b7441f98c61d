"""A linear layer on 8-bit floats: static step a tensor, one step an output, nearest values, mean of the error to the bias.

The error of a float is relative to itself, so that neither smoothing nor a search for the range gains much: the
largest values of the tensor and of every row of the weight become the grid's end.
"""

from collections.abc import Callable
from functools import reduce

from torch import Tensor

from tersor.core.errors import ConfigError
from tersor.core.records import Site
from tersor.graph.contracts import Quantizer, SiteChange, SiteStatistics
from tersor.graph.quantizer import rounded, scaled
from tersor.ops.cross_fit import cross_fitted
from tersor.ops.float8 import FLOAT8_LIMIT, float8_codes, float8_steps
from tersor.ops.moments import add_moments
from tersor.ops.refit import bias_shift


def fits_float8(site: Site, statistics: SiteStatistics) -> bool:
    """Whether a site may compute on 8-bit floats: a linear whose input was seen to vary."""
    is_read = site.op_kind == "linear" and site.tensor is not None
    return is_read and statistics.high > statistics.low


def float8_quantizer(statistics: SiteStatistics) -> Quantizer:
    """The grid of the tensor that a layer reads; it depends on the tensor alone, so readers share it."""
    largest = max(abs(statistics.low), abs(statistics.high), 1e-12)
    return Quantizer(
        step=largest / FLOAT8_LIMIT,
        low=-FLOAT8_LIMIT,
        high=FLOAT8_LIMIT,
        channel_dim=statistics.channel_dim,
        kind="fp8",
    )


def float8_change(site: Site, statistics: SiteStatistics) -> SiteChange:
    """The change for the current weight and statistics.

    Raises:
        ConfigError: Another op than a linear, or one whose input never varied.
    """
    if not fits_float8(site, statistics):
        raise ConfigError(
            f"{site.name}: a {site.op_kind} whose input lies in [{statistics.low}, {statistics.high}]; fp8 "
            "is for linears whose input varies"
        )
    quantizer = float8_quantizer(statistics)
    halves = (
        (statistics.moments(),)
        if statistics.moments_of is None
        else statistics.moments_of(_with(rounded, quantizer), _with(scaled, quantizer))
    )
    target, damping = cross_fitted(statistics.weight, halves)
    step = float8_steps(target).float().double()  # codes belong to the step that is stored
    codes = float8_codes((target / step.unsqueeze(-1)).float())
    dequantized = codes.double() * step.unsqueeze(-1)
    shift = bias_shift(statistics.weight, dequantized, reduce(add_moments, halves))
    bias = shift + (0.0 if statistics.bias is None else statistics.bias)
    return SiteChange(
        site=site,
        level="fp8",
        codes=codes.reshape(site.shape),
        scale=step.reshape(-1).float(),
        bias=bias.reshape(-1).float(),
        quantizer=quantizer,
        report={"refit_damping": damping},
    )


def _with(
    change: Callable[[Tensor, Quantizer], Tensor], quantizer: Quantizer
) -> Callable[[Tensor], Tensor]:
    def changed(x: Tensor) -> Tensor:
        return change(x, quantizer)

    return changed
