"""The grid of 8-bit floats, E4M3 without infinities: sign, 4 bits of exponent, 3 of mantissa.

Normal values are spaced by 2^-3 of their power of two, from 2^-6 to 448, so that rounding is off by 2^-4 of a
value at most; below, values lie 2^-9 apart. Larger values saturate. A step puts the largest value
of a tensor at 448; how it is chosen beyond that hardly matters, as the error is relative to each value.

Source: Micikevicius et al. 2022, arXiv:2209.05433.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

FLOAT8 = torch.float8_e4m3fn
FLOAT8_LIMIT = 448
RELATIVE_ERROR = 2.0**-4  # of rounding to nearest, of normal values
# Mean squared error of rounding over the value squared: spacing^2 / 12, the spacing 2^-3 of the power of two
# below a value, and values' places between two powers spread evenly by their logarithms.
RELATIVE_VARIANCE = 3 / (8 * math.log(2)) * 2.0**-6 / 12
SMALLEST_ERROR = 2.0**-10  # of rounding below those


def float8_codes(x: Float[Tensor, "*shape"]) -> Tensor:
    """Values on the grid, in its own type: rounded half to even, saturated; not a number stays so."""
    return torch.clamp(x, -FLOAT8_LIMIT, FLOAT8_LIMIT).to(FLOAT8)


def float8_rounded(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Values on the grid, in the type of ``x``."""
    return float8_codes(x).to(x.dtype)


def float8_steps(weight: Float[Tensor, "g m n"]) -> Float[Tensor, "g m"]:
    """One step an output, above 0: its largest value becomes 448; an output of zeros gets 1."""
    largest = weight.abs().amax(2)
    return torch.where(largest > 0, largest / FLOAT8_LIMIT, torch.ones_like(largest))
