"""The best weight for the input that a compressed layer really sees, in closed form.

A layer behind compressed layers sees xh instead of x, and its output is added to a stream sh
instead of s. The weight and bias shift that bring W' xh + sh closest to W x + s are a regression
on xh. For a constraint set (kept columns, a grid, a rank) the same holds: take this weight as the
new original and solve with the metric of xh, since the two differ by a constant only.

Axes: g groups, m outputs and n inputs of a group.
"""

import math

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from tersor.core.errors import ShapeError
from tersor.ops.damping import damped_cholesky
from tersor.ops.moments import Moments, centred, drift_covariance, drift_variance, means


def refit(
    weight: Float[Tensor, "g m n"], moments: Moments, damping: float = 1e-3
) -> tuple[Float64[Tensor, "g m n"], Float64[Tensor, "g m"], float]:
    """Least-squares weight and bias shift on the compressed input.

    W* = W + Cov(W x + d - W xh, xh) (Cov(xh) + lam I)^-1, lam = damping * mean(diag Cov(xh)):
    a ridge towards W, so that noise in few rows cannot carry the weight far from it.

    Args:
        weight: Weight of the original layer; read only.
        moments: Of the layer's inputs. Where they hold neither ``cross`` nor ``residual`` nothing
            has changed, and W* is W.
        damping: Multiple of the mean diagonal, >= 0; 0 is plain least squares.

    Returns:
        W*; the bias shift E[W x + d] - W* E[xh], to be added to the layer's bias; the damping in use.

    Raises:
        ShapeError: Weight and moments differ in size, or the moments have no rows.
        NumericalError: The moments are not finite or not positive semi-definite.

    Source: Li et al. 2025 (GPTAQ), arXiv:2504.02692, asymmetric objective; here with ridge and means.
    """
    _check(weight, moments)
    W = weight.to(torch.float64)
    covariance, _ = centred(moments)
    L, used = damped_cholesky(covariance, damping)
    drift = drift_covariance(weight, moments)
    refitted = W + torch.cholesky_solve(drift.mT, L).mT
    return refitted, bias_shift(weight, refitted, moments), used


def bias_shift(
    weight_original: Float[Tensor, "g m n"], weight_new: Float[Tensor, "g m n"], moments: Moments
) -> Float64[Tensor, "g m"]:
    """What to add to the bias so that the means of both outputs agree: E[W x + d] - W' E[xh].

    Args:
        weight_original: W; read only.
        weight_new: W', as it will be executed (rounded, pruned); read only.
        moments: Of the layer's inputs.

    Returns:
        The shift in float64; the best one for any W' in the mean square.

    Raises:
        ShapeError: Weight and moments differ in size, or the moments have no rows.

    Source: Nagel et al. 2019, arXiv:1906.04721, section 4.2.
    """
    _check(weight_original, moments)
    W, new = weight_original.to(torch.float64), weight_new.to(torch.float64)
    mean, mean_original = means(moments)
    # W (E[x] - E[xh]) + (W - W') E[xh]: exactly zero where nothing changed.
    shift = W @ (mean_original - mean).unsqueeze(2) + (W - new) @ mean.unsqueeze(2)
    if moments.d is None:
        return shift.squeeze(2)
    return shift.squeeze(2) + moments.d / moments.count


def layer_loss(delta: Float[Tensor, "g m n"], H: Float[Tensor, "g n n"]) -> Float64[Tensor, " g"]:
    """Mean squared change of a group's output, tr(D H D^T), summed over outputs, without damping.

    Args:
        delta: D, a change of the weight; read only.
        H: Second moment or covariance of the input (then with the best bias shift); read only.
    """
    D = delta.to(torch.float64)
    return ((D @ H.to(torch.float64)) * D).sum((1, 2))


def relative_error(
    weight: Float[Tensor, "g m n"], weight_new: Float[Tensor, "g m n"], moments: Moments
) -> float:
    """Squared error of a layer's output in units of the variance of the original output.

    E|W x + d - (W' xh + b)|^2 / E|W x - E[W x]|^2 with the best bias shift b, summed over outputs
    and groups, from moments alone.

    Args:
        weight: W, the original weight; read only.
        weight_new: W', the compressed weight; read only.
        moments: Of the layer's inputs.

    Returns:
        A number >= 0; 1 is what a constant output costs where d is 0. Where the original output is
        constant: 0 if the new one is too, else infinity.

    Raises:
        ShapeError: Sizes differ, no rows, or the moments of the original input or of d are incomplete.
    """
    _check(weight, moments)
    W = weight.to(torch.float64)
    D = W - weight_new.to(torch.float64)
    covariance, _ = centred(moments)
    # The error is D xh + v, with the drift v = W (x - xh) + d: no difference of large terms where it is small.
    mixed = (drift_covariance(weight, moments) * D).sum((1, 2))
    error = layer_loss(D, covariance) + 2 * mixed + drift_variance(weight, moments)
    numerator = max(0.0, float(error.sum()))
    denominator = float(layer_loss(W, _original_covariance(moments)).sum())
    if denominator <= 0:
        return math.inf if numerator > 0 else 0.0
    return numerator / denominator


def _original_covariance(moments: Moments) -> Float64[Tensor, "g n n"]:
    """Covariance of the original input."""
    if moments.xx_original is None or moments.x_original is None:
        return centred(moments)[0]
    original = Moments(count=moments.count, xx=moments.xx_original, x=moments.x_original)
    return centred(original)[0]


def _check(weight: Float[Tensor, "g m n"], moments: Moments) -> None:
    groups, outputs, inputs = weight.shape
    wanted = {"x": (groups, inputs), "d": (groups, outputs)}
    for name, shape in wanted.items():
        value = getattr(moments, name)
        if value is not None and tuple(value.shape) != shape:
            raise ShapeError(
                f"weight {tuple(weight.shape)} [group, out, in] and moments `{name}` {tuple(value.shape)} differ, "
                f"wanted {shape}; collect the moments at this layer's input, unfolded for a convolution"
            )
