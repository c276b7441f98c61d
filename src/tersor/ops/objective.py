"""The one quadratic that every constraint set is solved for: a rank, a kernel's shape, a codebook.

A layer behind compressed layers sees xh and should give W x + d. With the best bias the mean squared
error of a weight W' is, for the least-squares weight W* (``refit``) and D = W* - W',

    E(W') = floor + tr(D H D^T) + 2 tr(D R^T),    H = Cov(xh), R = Cov(W x + d - W* xh, xh).

Solvers minimise the damped form: E(W') + lam |W' - W|^2 = const + tr(D (H + lam I) D^T), where R
has gone, as W* is the minimum of the damped error. They report E itself.

Axes: g groups, m outputs and n inputs of a group.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from tersor.core.errors import ConfigError, ShapeError
from tersor.ops.damping import check_moment
from tersor.ops.moments import (
    Moments,
    centred,
    drift_covariance,
    drift_variance,
)
from tersor.ops.refit import bias_shift, layer_loss, original_variance, refit


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """Everything that the error of a new weight depends on; see the module."""

    weight: Float64[Tensor, "g m n"]  # W*; W itself where nothing changed before the layer
    H: Float64[Tensor, "g n n"]  # covariance of xh, not damped
    residual: Float64[Tensor, "g m n"]  # R; zero where nothing changed
    mean: Float64[Tensor, "g n"]  # of xh
    shift: Float64[Tensor, "g m"]  # of the bias, if W* were used
    floor: Float64[Tensor, " g"]  # error of W* itself
    variance: Float64[Tensor, " g"]  # of the original output, summed over outputs
    damping: float  # lam / mean(diag H), in use

    def damped(self) -> Float64[Tensor, "g n n"]:
        """H + lam I, lam = damping * mean(diag H) of each group; the metric that solvers use."""
        ridge = self.damping * self.H.diagonal(dim1=1, dim2=2).mean(1)
        metric = self.H.clone()
        metric.diagonal(dim1=1, dim2=2).add_(ridge.unsqueeze(1))
        return metric

    def error(self, weight_new: Float[Tensor, "g m n"]) -> Float64[Tensor, " g"]:
        """E(W'): mean squared error of a group's outputs with the best bias, summed over outputs.

        Raises:
            ShapeError: W' has another shape than W*.
        """
        D = self._missing(weight_new)
        return self.floor + layer_loss(D, self.H) + 2 * (D * self.residual).sum((1, 2))

    def bias(self, weight_new: Float[Tensor, "g m n"]) -> Float64[Tensor, "g m"]:
        """What to add to the layer's bias: E[W x + d] - W' E[xh], the best shift for W'.

        Raises:
            ShapeError: W' has another shape than W*.
        """
        return self.shift + (self._missing(weight_new) @ self.mean.unsqueeze(2)).squeeze(2)

    def _missing(self, weight_new: Float[Tensor, "g m n"]) -> Float64[Tensor, "g m n"]:
        if weight_new.shape != self.weight.shape:
            raise ShapeError(
                f"new weight {tuple(weight_new.shape)} [group, out, in], wanted {tuple(self.weight.shape)} "
                "as the objective has; multiply the factors out first"
            )
        return self.weight - weight_new.to(torch.float64)


def objective_of(
    weight: Float[Tensor, "g m n"], moments: Moments, damping: float = 1e-4
) -> Objective:
    """The objective of a layer, from moments alone.

    Args:
        weight: W, the original weight; read only.
        moments: Of the layer's inputs, unfolded for a convolution. With ``cross`` or ``residual`` the
            target is what the original layer gave on its own inputs.
        damping: lam in units of the mean diagonal of H, >= 0. 1e-4 where rows are many; 1e-2 where they
            are fewer than four times the inputs (ALGORITHMS 2.1). More if the refit needs it.

    Raises:
        ConfigError: Negative damping.
        ShapeError: Weight and moments differ in size, there are no rows, or a product was not collected.
        NumericalError: The moments are not finite or not positive semi-definite.
    """
    if not damping >= 0:
        raise ConfigError(f"damping must be >= 0, got {damping}; 1e-4 is the usual choice")
    W = weight.to(torch.float64)
    shift = bias_shift(weight, weight, moments)
    H, mean = centred(moments)
    check_moment(H)
    variance = original_variance(W, moments)
    if moments.cross is None and moments.residual is None:
        return Objective(
            weight=W,
            H=H,
            residual=torch.zeros_like(W),
            mean=mean,
            shift=shift,
            floor=torch.zeros_like(variance),
            variance=variance,
            damping=damping,
        )
    target, shift, used = refit(weight, moments, damping)
    drift, moved = drift_covariance(weight, moments), W - target
    floor = layer_loss(moved, H) + 2 * (drift * moved).sum((1, 2)) + drift_variance(weight, moments)
    return Objective(
        weight=target,
        H=H,
        residual=drift + moved @ H,
        mean=mean,
        shift=shift,
        floor=floor.clamp(min=0),
        variance=variance,
        damping=used,
    )
