"""Cheaper functions in a smooth activation's place: s(a x) / a, and the fit of what reads it.

GELU and SiLU take an error function or an exponential a value; hardswish is a clamp and a product,
ReLU a comparison. hardswish(a x) / a runs from ReLU (a large) to a parabola (a small), so that one
factor fits it to either, for the values that a layer really sees.

Axes: t rows, n values of a row, m outputs of the linear layer that reads them.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from tersor.core.errors import ConfigError
from tersor.ops.cross_fit import cross_fitted
from tersor.ops.moments import Moments, add_moments, moments_of
from tersor.ops.refit import bias_shift

# Factors to choose from; 1.7 is hardswish's best for GELU on normal values, 1.0 for SiLU.
FACTORS = (0.8, 1.0, 1.2, 1.4, 1.55, 1.7, 1.85, 2.0, 2.3, 2.7, 3.2)
FUNCTIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "hardswish": torch.nn.functional.hardswish,
}


def cheaper(x: Float[Tensor, "*shape"], kind: str, factor: float) -> Float[Tensor, "*shape"]:
    """s(factor x) / factor; a ReLU has no use for a factor.

    Raises:
        ConfigError: No such function, or a factor that is not positive.
    """
    if kind not in FUNCTIONS or not factor > 0:
        raise ConfigError(
            f"activation {kind!r} with factor {factor}: wanted one of {', '.join(FUNCTIONS)} and a "
            "factor above 0"
        )
    if kind == "relu":
        return torch.relu(x)
    return FUNCTIONS[kind](x * factor) / factor


def best_factor(
    before: Float[Tensor, "t n"],
    wanted: Float[Tensor, "t n"],
    weight: Float[Tensor, "m n"] | None,
    kind: str,
    factors: Sequence[float] = FACTORS,
) -> tuple[float, float]:
    """The factor whose values, read by the layer behind, come closest.

    Args:
        before: What the activation reads; read only.
        wanted: What it gave in the original.
        weight: Of the layer behind; None: the values themselves count.
        kind: Of the function.
        factors: To choose from; a ReLU has none.

    Returns:
        The factor, and the mean squared error it leaves over the variance of what is wanted, the
        means of the outputs taken out, as a bias takes those up.
    """

    def read(values: Tensor) -> Tensor:
        outputs = values if weight is None else values @ weight.mT
        return outputs - outputs.mean(0)

    target = read(wanted)
    scale = float(target.square().sum()) or 1.0
    errors = {
        factor: float((read(cheaper(before, kind, factor)) - target).square().sum()) / scale
        for factor in ((1.0,) if kind == "relu" else factors)
    }
    best = min(errors, key=errors.__getitem__)
    return best, errors[best]


def refitted(
    given: Float[Tensor, "t n"],
    wanted: Float[Tensor, "t n"],
    weight: Float64[Tensor, "m n"],
) -> tuple[Float64[Tensor, "m n"], Float64[Tensor, " m"], float | None]:
    """The weight of the layer behind for other inputs, and what its bias gains.

    Least squares of its original outputs on what it reads now, with the ridge that does best from
    one half of the rows to the other; no refit at all is among the choices.

    Args:
        given: What the layer reads now; read only.
        wanted: What it read in the original.
        weight: Of the original; read only.

    Returns:
        Weight, bias shift, and the ridge; None where the weight stayed.

    Raises:
        NumericalError: Values that are not finite.
    """
    halves = tuple(
        moments_of(given[i::2].unsqueeze(1), wanted[i::2].unsqueeze(1)) for i in range(2)
    )
    whole: Moments = add_moments(*halves)
    new, damping = cross_fitted(weight.unsqueeze(0), halves)
    shift = bias_shift(weight.unsqueeze(0), new, whole)
    return new[0], shift[0], damping
