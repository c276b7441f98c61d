"""Linear layers whose weights stay 4- or 8-bit codes in memory: y = x @ W.T + b.

Only codes are read, which is what a product of few rows waits for. ``codebook_weight.coded_weight`` lays
codes out once; ``codebook_linear`` is what graphs call: on a CUDA device with Triton
``codebook_linear_triton``, elsewhere ``codebook_linear_reference``, the definition that the kernel is
tested against. Compilers and exporters see one op, ``tersor::codebook_linear``.
"""

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from tersor.core.errors import ShapeError
from tersor.kernels.codebook_weight import MOST, WORD, codebook_linear_reference

HAS_KERNEL = find_spec("triton") is not None


def codebook_linear(
    x: Tensor,
    words: Tensor,
    tables: Tensor | None,
    planes: Tensor | None,
    scales: Tensor | None,
    bias: Tensor | None,
    bits: int,
    inputs: int,
    group: int,
) -> Tensor:
    """Y = x @ W.T + bias, the weight as ``CodedWeight`` has it.

    Args:
        x: [..., inp] float32, bfloat16 or float16; any strides, and no rows at all.
        words: Of the weight, as all but ``bias``: see ``CodedWeight``.
        tables: Values.
        planes: The same in bytes.
        scales: Factors.
        bias: [out] or None.
        bits: Of a code.
        inputs: Of a row.
        group: Inputs that share a table or a scale.

    Returns:
        [..., out] in x's type; sums are taken in float32.

    Raises:
        ShapeError: Tensors that do not fit together, or 2**31 elements or more in x or the result.
    """
    _check_call(x, words, bias, bits, inputs)
    rows = x.reshape(-1, inputs)
    call: Any = codebook_linear_op()
    if x.is_cuda and HAS_KERNEL:
        from tersor.kernels.codebook_linear_triton import codebook_linear_cuda as call
    found: Tensor = call(rows, words, tables, planes, scales, bias, bits, inputs, group)
    return found.reshape(*x.shape[:-1], words.shape[0])


def _check_call(x: Tensor, words: Tensor, bias: Tensor | None, bits: int, inputs: int) -> None:
    out = words.shape[0]
    chunk = WORD * (WORD // bits)
    wanted = -(-inputs // chunk) * WORD
    bias_shape = (out,) if bias is None else tuple(bias.shape)
    if x.shape[-1] != inputs or words.shape[1] != wanted or bias_shape != (out,):
        raise ShapeError(
            f"codebook linear of {inputs} inputs and {bits} bits: found x {tuple(x.shape)}, words "
            f"{tuple(words.shape)} and bias {bias_shape}, wanted [..., {inputs}], [out, {wanted}] "
            "and [out]"
        )
    sizes = [n for n in (x.numel(), x.numel() // inputs * out) if isinstance(n, int)]
    if any(n > MOST for n in sizes):
        raise ShapeError(
            f"codebook linear: found x {tuple(x.shape)} and {out} outputs, wanted at most {MOST} elements "
            "in x and in the result; split the batch"
        )


def codebook_linear_op() -> Any:
    """What compilers and exporters see; the kernels' module takes a second to import."""
    if HAS_KERNEL:
        from tersor.kernels.codebook_linear_triton import codebook_linear_op as found

        return found
    return _plain_op


if not HAS_KERNEL:
    _plain_op: Any = torch.library.custom_op(
        "tersor::codebook_linear", codebook_linear_reference, mutates_args=()
    )

    @_plain_op.register_fake
    def _shape_of(
        x: Tensor,
        words: Tensor,
        tables: Tensor | None,
        planes: Tensor | None,
        scales: Tensor | None,
        bias: Tensor | None,
        bits: int,
        inputs: int,
        group: int,
    ) -> Tensor:
        del tables, planes, scales, bias, bits, inputs, group
        return x.new_empty(x.shape[0], words.shape[0])
