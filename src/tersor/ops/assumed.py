"""Moments that a layer's input is taken to have where no sample of it counts: by what stands before it.

A weight that is rounded by itself alone is rounded for inputs that do not depend on each other, all
of one size and without a mean: H = I. Often more is known without any data. Behind a norm with a
stored scale and shift, channel j has deviation |scale_j| and mean shift_j. Behind an activation all
channels have a mean of one sign, so that errors of a row's weights add up instead of cancelling: H is
the identity and a part in which all inputs agree. How large such values are in all is not known, nor
needed, as a common factor changes no rounding; but the bias can then not take up the mean, which
therefore stays in H.

Axes: g groups, n inputs of a group.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from tersor.ops.moments import Moments

# Of normal values by the trapezoid rule: beyond 8 deviations lies 1e-15 of the mass, and a kink between
# two points costs the square of their distance.
_REACH, _POINTS = 8.0, 4001


def plain_moments(groups: int, inputs: int) -> Moments:
    """No input tells anything about another one: second moment I, mean 0."""
    identity = torch.eye(inputs, dtype=torch.float64).expand(groups, -1, -1).contiguous()
    return Moments(count=1, xx=identity, x=torch.zeros(groups, inputs, dtype=torch.float64))


def norm_moments(scale: Float[Tensor, " n"], shift: Float[Tensor, " n"] | None) -> Moments:
    """Behind a norm: independent values of mean ``shift`` and deviation ``|scale|``.

    Args:
        scale: What the norm multiplies each channel by; read only.
        shift: What it adds; None: nothing.
    """
    gamma = scale.to(torch.float64)
    beta = torch.zeros_like(gamma) if shift is None else shift.to(torch.float64)
    square = torch.diag(gamma.square()) + torch.outer(beta, beta)
    return Moments(count=1, xx=square.unsqueeze(0), x=beta.unsqueeze(0))


def function_moments(function: Callable[[Tensor], Tensor], groups: int, inputs: int) -> Moments:
    """Behind an elementwise function of independent standard normal values.

    Args:
        function: Takes and gives a tensor of any shape.
        groups: Of the layer that reads it.
        inputs: Of each group.

    Returns:
        Second moment Var(f) I + E[f]^2 1 1^T of mean 0: the mean is part of it, see above. That of
        ``plain_moments`` where the function gives nothing finite, or only zeros.

    Source: Hernandez-Lobato and Adams 2015, arXiv:1502.05336, section 3.1 (independent normal values).
    """
    z = torch.linspace(-_REACH, _REACH, _POINTS, dtype=torch.float64)
    density = torch.exp(-z.square() / 2)
    density /= density.sum()
    values = function(z)
    mean = float((density * values).sum())
    variance = float((density * (values - mean).square()).sum())
    moments = plain_moments(groups, inputs)
    if not 0 < variance < float("inf"):
        return moments
    return Moments(count=1, xx=moments.xx * variance + mean**2, x=moments.x)
