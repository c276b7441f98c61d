"""Linear layers on 8-bit codes, from codes to floats or to the next layer's codes.

``linear8`` is what graphs call. On a CUDA device with Triton it is one fused kernel
(``linear8_triton``), or the library's
product and what follows it (``linear8_library``), whichever was measured faster at a shape, elsewhere ``linear8_reference``, the definition that the kernel is tested against.
"""

from importlib.util import find_spec

import torch
from torch import Tensor

from tersor.kernels.epilogue import ACTIVATIONS, activated, finished

HAS_KERNEL = find_spec("triton") is not None

_INT8 = (-128, 127)


def quantize_codes(x: Tensor, step: float, zero: int, low: int, high: int) -> Tensor:
    """Codes of a tensor on a grid, as int8: clamp(round(x / step) + zero, low, high).

    The division is a multiplication by 1 / step in float32, as torch's own quantiser has it.

    Args:
        x: Any shape; floats, computed in float32.
        step: Of the grid, above 0.
        zero: Code of the value 0.
        low: Smallest code, at least -128.
        high: Largest code, at most 127.
    """
    codes = torch.round(x.float() * (1.0 / step)) + zero
    return torch.clamp(codes, low, high).to(torch.int8)


def quantize_floats(x: Tensor, step: float) -> Tensor:
    """Codes of a tensor as 8-bit floats, E4M3: x / step, rounded half to even, saturated at 448.

    Args:
        x: Any shape; floats, computed in float32.
        step: Units of x a unit of the codes, above 0.
    """
    limit = torch.finfo(torch.float8_e4m3fn).max
    return torch.clamp(x.float() * (1.0 / step), -limit, limit).to(torch.float8_e4m3fn)


def linear8(
    codes: Tensor,
    weight: Tensor,
    scale: Tensor,
    offset: Tensor,
    dtype: torch.dtype,
    activation: str = "none",
    inverse: Tensor | None = None,
    zero: float = 0.0,
    low: int = _INT8[0],
    high: int = _INT8[1],
) -> Tensor:
    """Y = activation(scale * (codes @ weight.T) + offset), or the codes of y.

    Args:
        codes: [..., inp] int8, or float8_e4m3fn.
        weight: [out, inp], of the same type.
        scale: Units of y a unit of the product [out], float32.
        offset: [out] float32: the bias, and what zero points add.
        dtype: Of the result; int8 or float8_e4m3fn: codes of y on the next grid.
        activation: One of ``ACTIVATIONS``, before the result is rounded.
        inverse: Codes a unit of y [out], float32; needed where ``dtype`` has 8 bits.
        zero: Added to the codes before they are rounded.
        low: Smallest int8 code.
        high: Largest one.

    Returns:
        [..., out].
    """
    if codes.is_cuda and HAS_KERNEL:
        from tersor.kernels.linear8_cuda import linear8_cuda

        return linear8_cuda(
            codes, weight, scale, offset, dtype, activation, inverse, zero, low, high
        )
    return linear8_reference(
        codes, weight, scale, offset, dtype, activation, inverse, zero, low, high
    )


def linear8_reference(
    codes: Tensor,
    weight: Tensor,
    scale: Tensor,
    offset: Tensor,
    dtype: torch.dtype,
    activation: str = "none",
    inverse: Tensor | None = None,
    zero: float = 0.0,
    low: int = _INT8[0],
    high: int = _INT8[1],
) -> Tensor:
    """As ``linear8``, in torch's own ops: the sums of int8 codes are exact integers."""
    rows = codes.reshape(-1, codes.shape[-1])
    total = _product(rows, weight)
    y = finished(total, scale, offset, dtype, activation, inverse, zero, low, high)
    return y.reshape(*codes.shape[:-1], weight.shape[0])


def _product(rows: Tensor, weight: Tensor) -> Tensor:
    if rows.dtype != torch.int8:
        return rows.float() @ weight.float().t()
    if rows.is_cuda:  # its integer product wants more than 16 rows and whole tiles
        return rows.double() @ weight.double().t()
    if rows.shape[1] == 1:  # wrong numbers in torch 2.13 on processors with 512-bit vectors
        return rows.int() * weight.int().t()
    return torch._int_mm(rows, weight.t())  # noqa: SLF001 - the only integer product there is


__all__ = [
    "ACTIVATIONS",
    "activated",
    "linear8",
    "linear8_reference",
    "quantize_codes",
    "quantize_floats",
]
