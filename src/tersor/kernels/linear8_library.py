"""Products of 8-bit floats by the device's own library; what follows is computed apart.

The library multiplies faster than one fused kernel, and its sums go through memory once more, in 16 or 32
bits. Which of the two is faster depends on the shape, and is measured (``linear8_cuda``). Its product of
int8 codes is left out: it gives 32 bits, and with what follows it took 1.2 to 2.3 times as long as the
fused kernel at the shapes of BERT-base and ViT-B (H200, torch 2.11).
"""

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

Way = Literal["tensorwise", "rowwise"]
WAYS: tuple[Way, ...] = get_args(Way)
_ALIGNED = 16  # inputs and outputs of an fp8 product are a multiple
_MIN_ROWS = 17  # fewer are one block of rows of the fused kernel


def library_ways(
    codes: Tensor, weight: Tensor, dtype: torch.dtype, *, is_last: bool
) -> tuple[Way, ...]:
    """The ways that take these shapes and types.

    Args:
        codes: [rows, inp].
        weight: [out, inp].
        dtype: Of the linear's result.
        is_last: Nothing but scale and offset follows, which ``rowwise`` has in it, in 16 bits.
    """
    rows, inp = codes.shape
    out = weight.shape[0]
    if codes.dtype == torch.int8 or rows < _MIN_ROWS or inp % _ALIGNED or out % _ALIGNED:
        return ()
    return ("tensorwise", "rowwise") if is_last and dtype == torch.bfloat16 else ("tensorwise",)


def library_product(
    codes: Tensor, weight: Tensor, scale: Tensor, offset: Tensor, dtype: torch.dtype, way: Way
) -> Tensor:
    """Sums of products [rows, out].

    ``tensorwise``: in bfloat16, or float32 where the result has more bits than that. ``rowwise``: with scale
    and offset applied, in bfloat16. The hardware adds in about 14 bits.

    Raises:
        RuntimeError: The device or this version of torch does not have the way.
    """
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
