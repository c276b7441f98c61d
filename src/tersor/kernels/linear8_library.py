"""Products of 8-bit codes by the device's own library, in several ways; what follows is computed apart.

The library multiplies faster than one fused kernel, and its sums go through memory once more, in 16 or 32
bits. Which of the two is faster depends on the shape, and is measured (``linear8_ways``).
"""

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

Way = Literal["tensorwise", "rowwise", "integers"]
WAYS: tuple[Way, ...] = get_args(Way)
_ALIGNED = 16  # inputs and outputs of an fp8 product are a multiple
_ALIGNED_INTEGERS = 8
_MIN_ROWS = 17  # of an integer product; fewer rows of either kind are the fused kernel's


def library_ways(codes: Tensor, weight: Tensor, dtype: torch.dtype) -> tuple[Way, ...]:
    """The ways that take these shapes and types.

    Args:
        codes: [rows, inp].
        weight: [out, inp].
        dtype: Of the linear's result; ``rowwise`` has 16 bits of it at most.
    """
    rows, inp = codes.shape
    out = weight.shape[0]
    aligned = _ALIGNED_INTEGERS if codes.dtype == torch.int8 else _ALIGNED
    if rows < _MIN_ROWS or inp % aligned or out % aligned:
        return ()
    if codes.dtype == torch.int8:
        return ("integers",)
    return ("tensorwise",) if dtype in (torch.float32, torch.float16) else ("tensorwise", "rowwise")


def library_product(
    codes: Tensor, weight: Tensor, scale: Tensor, offset: Tensor, dtype: torch.dtype, way: Way
) -> Tensor:
    """Sums of products [rows, out].

    ``integers``: exact, int32. ``tensorwise``: of 8-bit floats, in bfloat16, or float32 where the result has
    more than 8 bits. ``rowwise``: with scale and offset applied, in bfloat16. The hardware adds 8-bit floats
    in about 14 bits.

    Raises:
        RuntimeError: The device or this version of torch does not have the way.
    """
    if way == "integers":
        return torch._int_mm(codes, weight.t())  # noqa: SLF001 - the only integer product there is
    product: Callable[..., Tensor] = torch._scaled_mm  # noqa: SLF001 - the only one of 8-bit floats
    if way == "tensorwise":
        one = torch.ones((), dtype=torch.float32, device=codes.device)
        kind = torch.float32 if dtype in (torch.float32, torch.float16) else torch.bfloat16
        return product(codes, weight.t(), one, one, out_dtype=kind, use_fast_accum=True)
    ones = torch.ones((codes.shape[0], 1), dtype=torch.float32, device=codes.device)
    return product(
        codes, weight.t(), ones, scale.reshape(1, -1), offset.to(torch.bfloat16),
        out_dtype=torch.bfloat16, use_fast_accum=True,
    )  # fmt: skip
