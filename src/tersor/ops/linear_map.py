"""The linear map that comes closest to what a piece of a network computes, from moments alone.

Axes: g groups, m outputs and n inputs of a group.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor

from tersor.core.errors import ShapeError
from tersor.ops.moments import Moments
from tersor.ops.refit import refit

# Relative to the mean diagonal of the inputs' covariance; from 1e-6 to 1e-2 changes little where
# the rows are 16 times the inputs (ALGORITHMS 3.2b).
DAMPING = 1e-4


@dataclass(frozen=True, slots=True)
class LinearMap:
    """y ~ weight x + bias.

    Attributes:
        loss: Share of the outputs' variance that is left, over the rows of the fit: 0 is exact, 1
            no better than the mean.
        damping: In use, relative to the mean diagonal.
    """

    weight: Float64[Tensor, "g m n"]
    bias: Float64[Tensor, "g m"]
    loss: float
    damping: float


def linear_map(moments: Moments, damping: float = DAMPING) -> LinearMap:
    """Ridge regression of y on x, both centred, in float64.

    W = Cov(y, x) (Cov(x) + lam I)^-1, lam = damping * mean(diag Cov(x)); b = E[y] - W E[x].

    Args:
        moments: ``moments_of(x, residual=y)``: y is what a layer of weight zero lacks.
        damping: Multiple of the mean diagonal, >= 0; 0 is plain least squares.

    Raises:
        ShapeError: The moments have no rows or lack those of y.
        ConfigError: Negative damping.
        NumericalError: The moments are not finite or not positive semi-definite.

    Source: Hoerl and Kennard 1970, doi:10.1080/00401706.1970.10488634, on centred variables.
    """
    if moments.residual is None or moments.d is None or moments.dd is None:
        raise ShapeError(
            "moments hold inputs alone, wanted those of the outputs, too; collect them with "
            "moments_of(x, residual=y)"
        )
    weight, bias, used = refit(torch.zeros_like(moments.residual), moments, damping)
    count = moments.count
    mean_x, mean_y = moments.x / count, moments.d / count
    covariance = moments.residual / count - mean_y.unsqueeze(2) * mean_x.unsqueeze(1)
    spread = moments.xx / count - mean_x.unsqueeze(2) * mean_x.unsqueeze(1)
    variance = float((moments.dd / count - mean_y.square().sum(1)).sum())
    explained = float((2 * covariance * weight - (weight @ spread) * weight).sum())
    return LinearMap(weight, bias, _share(variance - explained, variance), used)


def _share(left: float, variance: float) -> float:
    """Of two sums that may be rounding; a constant output leaves nothing."""
    return min(1.0, max(0.0, left / variance)) if variance > 0 else 0.0
