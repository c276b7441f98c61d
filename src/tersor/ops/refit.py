"""The best weight for the input that a compressed layer really sees, in closed form.

A layer behind compressed layers sees xh instead of x, and its output is added to a stream sh
instead of s. The weight and bias shift that bring W' xh + sh closest to W x + s are a regression
on xh. For a constraint set (kept columns, a grid, a rank) the same holds: take this weight as the
new original and solve with the metric of xh, since the two differ by a constant only.

Where whole inputs and outputs were removed before, ``refit_across`` regresses the outputs that are
left, as the original inputs make them, on the inputs that are left.

Axes: g groups, m outputs and n inputs of a group, p inputs of a group of the original layer.
"""

import math

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from tersor.core.errors import ShapeError
from tersor.ops.damping import damped_cholesky
from tersor.ops.moments import (
    Moments,
    centred,
    drift_covariance,
    drift_variance,
    means,
    original_covariance,
    output_covariance,
    output_variance,
)
from tersor.ops.remembered import remembered


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
    return _ratio(error, original_variance(W, moments))


@remembered  # every level of a layer is measured in units of it
def original_variance(weight: Float[Tensor, "g m p"], moments: Moments) -> Float64[Tensor, " g"]:
    """Variance of the original output, summed over outputs.

    Raises:
        ShapeError: No rows, or the second moment of the original input was not collected.
    """
    return layer_loss(weight, original_covariance(moments))


def refit_across(
    weight_original: Float[Tensor, "g m p"],
    moments: Moments,
    prior: Float[Tensor, "g m n"],
    damping: float = 1e-3,
) -> tuple[Float64[Tensor, "g m n"], Float64[Tensor, "g m"], float]:
    """Least-squares weight and bias shift where inputs and outputs were removed.

    W' minimises E|W x + d - W' xh - b|^2 + lam |W' - prior|^2, lam = damping * mean(diag Cov(xh)):
    W' = prior + (Cov(W x + d, xh) - prior Cov(xh)) (Cov(xh) + lam I)^-1. With all inputs kept and
    W as the prior this is ``refit``.

    Args:
        weight_original: W, the rows of the original weight that were kept; read only.
        moments: xh the inputs that were kept, x the original ones, d over the outputs that were kept.
        prior: What strong damping leads to, usually W at the kept inputs; read only.
        damping: Multiple of the mean diagonal, >= 0; 0 is plain least squares.

    Returns:
        W'; the bias shift E[W x + d] - W' E[xh], to be added to the bias of the kept outputs; the
        damping in use.

    Raises:
        ShapeError: Weights and moments differ in size, or the moments have no rows.
        NumericalError: The moments are not finite or not positive semi-definite.

    Source: as ``refit``; for channel pruning He et al. 2017, arXiv:1707.06168, eq. 4.
    """
    _check_across(weight_original, prior, moments)
    before = prior.to(torch.float64)
    covariance, _ = centred(moments)
    L, used = damped_cholesky(covariance, damping)
    missing = output_covariance(weight_original, moments) - before @ covariance
    refitted = before + torch.cholesky_solve(missing.mT, L).mT
    return refitted, bias_shift_across(weight_original, refitted, moments), used


def bias_shift_across(
    weight_original: Float[Tensor, "g m p"], weight_new: Float[Tensor, "g m n"], moments: Moments
) -> Float64[Tensor, "g m"]:
    """``bias_shift`` where inputs were removed: E[W x + d] - W' E[xh].

    Args:
        weight_original: W, the rows of the original weight that were kept; read only.
        weight_new: W', as it will be executed; read only.
        moments: As for ``refit_across``.

    Raises:
        ShapeError: Weights and moments differ in size, or the moments have no rows.
    """
    _check_across(weight_original, weight_new, moments)
    mean, mean_original = (value.unsqueeze(2) for value in means(moments))
    W, new = weight_original.to(torch.float64), weight_new.to(torch.float64)
    shift = (W @ mean_original - new @ mean).squeeze(2)
    return shift if moments.d is None else shift + moments.d / moments.count


def relative_error_across(
    weight_original: Float[Tensor, "g m p"], weight_new: Float[Tensor, "g m n"], moments: Moments
) -> float:
    """``relative_error`` where inputs were removed, in units of the variance of the kept outputs.

    Args:
        weight_original: W, the rows of the original weight that were kept; read only.
        weight_new: W', the weight on the kept inputs; read only.
        moments: As for ``refit_across``.

    Returns:
        A number >= 0, good to some float64 roundings of (|W x + d| / |W x|)^2: it is a difference of
        variances, and cannot resolve an error far below them as ``relative_error`` does.

    Raises:
        ShapeError: Sizes differ, no rows, or the moments of the original input or of d are incomplete.
    """
    _check_across(weight_original, weight_new, moments)
    new = weight_new.to(torch.float64)
    mixed = (output_covariance(weight_original, moments) * new).sum((1, 2))
    error = output_variance(weight_original, moments) - 2 * mixed
    error = error + layer_loss(new, centred(moments)[0])
    return _ratio(error, original_variance(weight_original, moments))


def _ratio(error: Float64[Tensor, " g"], variance: Float64[Tensor, " g"]) -> float:
    numerator, denominator = max(0.0, float(error.sum())), float(variance.sum())
    if denominator <= 0:
        return math.inf if numerator > 0 else 0.0
    return numerator / denominator


def _check(weight: Float[Tensor, "g m n"], moments: Moments) -> None:
    groups, outputs, inputs = weight.shape
    _check_sizes(weight, moments, {"x": (groups, inputs), "d": (groups, outputs)})
    _check_sizes(weight, moments, {"x_original": (groups, inputs)})


def _check_across(
    weight_original: Float[Tensor, "g m p"], weight_new: Float[Tensor, "g m n"], moments: Moments
) -> None:
    groups, outputs, inputs = weight_new.shape
    _check_sizes(weight_new, moments, {"x": (groups, inputs), "d": (groups, outputs)})
    original = "x" if moments.x_original is None else "x_original"
    _check_sizes(weight_original, moments, {original: (groups, weight_original.shape[2])})


def _check_sizes(weight: Tensor, moments: Moments, wanted: dict[str, tuple[int, int]]) -> None:
    for name, shape in wanted.items():
        value = getattr(moments, name)
        if value is not None and tuple(value.shape) != shape:
            raise ShapeError(
                f"weight {tuple(weight.shape)} [group, out, in] and moments `{name}` {tuple(value.shape)} differ, "
                f"wanted {shape}; collect the moments at this layer's input, unfolded for a convolution"
            )
