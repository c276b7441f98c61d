"""Activations inside of Triton kernels."""

from typing import no_type_check

import triton
import triton.language as tl
from triton import knobs

ACTIVATION_CODES = {"none": 0, "relu": 1, "gelu": 2, "gelu_tanh": 3, "silu": 4}
# The interpreter that tests on CPUs use knows no assembly.
HAS_ASSEMBLY = not knobs.runtime.interpret


@triton.jit
@no_type_check
def _erf(x):  # noqa: ANN001, ANN202
    """Abramowitz and Stegun 7.1.26: 1.5e-7 off at most, in half the steps of the library's."""
    a = tl.abs(x)
    t = 1.0 / (1.0 + 0.3275911 * a)
    p = 1.421413741 + t * (-1.453152027 + t * 1.061405429)
    y = 1.0 - t * (0.254829592 + t * (-0.284496736 + t * p)) * tl.exp(-a * a)
    return tl.where(x < 0, -y, y)


@triton.jit
@no_type_check
def _tanh(x):  # noqa: ANN001, ANN202
    """One instruction, 2**-11 off at most."""
    return tl.inline_asm_elementwise(
        "tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
@no_type_check
def activated(y, ACTIVATION: tl.constexpr, SHORT: tl.constexpr):  # noqa: ANN001, ANN201
    """One of ``ACTIVATION_CODES`` of float32 values; short: GELU by one instruction, 2**-11 off at most."""
    if ACTIVATION == 1:
        y = tl.maximum(y, 0.0)
    elif ACTIVATION == 2:
        if SHORT:
            # erf(y / sqrt 2) = tanh(y p(y^2)) to 2.5e-5, p fitted to the largest error on [0, 6].
            z = tl.minimum(y * y, 30.0)
            p = 0.797507866 + z * (0.0370056606 - z * 0.000351518896)
            half = 0.5 * y
            y = half + half * _tanh(y * p)
        else:
            y = 0.5 * y * (1.0 + _erf(y * 0.7071067811865476))
    elif ACTIVATION == 3:
        inner = 0.7978845608028654 * (y + 0.044715 * y * y * y)
        y = y * tl.sigmoid(2.0 * inner)
    elif ACTIVATION == 4:
        y = y * tl.sigmoid(y)
    return y
