"""A layer of ``narrow_linear`` that reads 8-bit codes, or writes them for the next one, or both.

A product of codes costs half of one of 16-bit floats, and what is between two such products is written in half of the
bytes. ``narrow_linear8`` is what graphs call: on a CUDA device with Triton ``narrow_linear8_triton``, elsewhere
``narrow_linear8_reference``, the definition that the kernel is tested against. Weights of codes are laid out by
``linear8_weights``, those of floats by ``narrow_linear.linear_weights``. Compilers and exporters see one op,
``tersor::narrow_linear8``.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, pad

from tersor.core.errors import ShapeError
from tersor.kernels.epilogue import activated
from tersor.kernels.narrow_linear import (
    COLUMNS,
    DTYPES,
    HAS_KERNEL,
    ROW,
    STEP,
    check_call,
    filled_norm,
    float_product,
)

EIGHTS = (torch.int8, torch.float8_e4m3fn)
DEEP = 128  # what inputs of codes are filled up to multiples of


class CodedWeights(NamedTuple):
    """A layer's weights as the kernel reads them, filled up with zeros.

    Attributes:
        weight: [outputs, inputs] int8 or float8_e4m3fn, multiples of 128.
        factor: Units of y a unit of the product [outputs] float32.
        bias: [outputs] float32, with what zero points add.
        scale: Of the norm behind, [outputs] float32; None: there is none.
        shift: Likewise.
    """

    weight: Tensor
    factor: Tensor
    bias: Tensor
    scale: Tensor | None
    shift: Tensor | None


class Layer(NamedTuple):
    """All but x that ``narrow_linear8`` takes, in its order."""

    weight: Tensor
    factor: Tensor | None
    bias: Tensor
    sums: Tensor | None
    added: Tensor | None
    scale: Tensor | None
    shift: Tensor | None
    width: int
    activation: str
    first_eps: float
    last_eps: float
    half: torch.dtype
    is_written: bool
    codes: torch.dtype | None
    step: float
    zero: int
    low: int
    high: int


def linear8_weights(
    weight: Tensor,
    factor: Tensor,
    bias: Tensor,
    last: tuple[Tensor | None, Tensor | None] | None = None,
) -> CodedWeights:
    """Lay out the weights of a layer that reads codes.

    Args:
        weight: [out, inp] int8 or float8_e4m3fn.
        factor: Units of y a unit of the product [out].
        bias: [out].
        last: Scale and shift [out] of the norm behind; None in a pair: ones, zeros.

    Raises:
        ShapeError: Tensors that do not fit together, another type, or too many channels for a norm.
    """
    out, inp = weight.shape
    vectors = [factor, bias, *(v for v in last or () if v is not None)]
    if weight.dtype not in EIGHTS or any(tuple(v.shape) != (out,) for v in vectors):
        raise ShapeError(
            f"narrow linear: found a weight {tuple(weight.shape)} in {weight.dtype} beside vectors "
            f"{[tuple(v.shape) for v in vectors]}, wanted int8 or float8_e4m3fn and one number an output"
        )
    if last is not None and out > ROW:
        raise ShapeError(
            f"narrow linear: found {out} outputs, wanted at most {ROW} with a norm behind; leave the norm as it is"
        )
    sides = (0, -out % COLUMNS)
    norm = (None, None) if last is None else filled_norm(*last, torch.zeros_like(factor).float())
    # As bits: not every device fills up 8-bit floats.
    stored = pad(weight.contiguous().view(torch.int8), (0, -inp % DEEP, *sides)).view(weight.dtype)
    return CodedWeights(
        stored.contiguous(), pad(factor.float(), sides), pad(bias.float(), sides), *norm
    )


def narrow_linear8(
    x: Tensor,
    weight: Tensor,
    factor: Tensor | None,
    bias: Tensor,
    sums: Tensor | None,
    added: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    width: int,
    activation: str,
    first_eps: float,
    last_eps: float,
    half: torch.dtype,
    is_written: bool,
    codes: torch.dtype | None,
    step: float,
    zero: int,
    low: int,
    high: int,
) -> tuple[Tensor, Tensor]:
    """Y = norm(act(norm(x) W + bias) + added), as floats, as codes, or both.

    Args:
        x: [..., inp] codes, int8 or float8_e4m3fn; or float16 or bfloat16.
        weight: As ``linear8_weights`` gives it for codes, ``linear_weights`` for floats; likewise bias, scale, shift.
        factor: Units of y a unit of the product of codes; None: of floats.
        bias: Added to the product.
        sums: Of the columns of a weight of floats; None: there is no norm in front, as always of codes.
        added: See ``narrow_linear.narrow_linear``.
        scale: Of the norm behind; None: there is none.
        shift: Likewise.
        width: Outputs, out.
        activation: One of ``epilogue.ACTIVATIONS``.
        first_eps: Of the norm in front.
        last_eps: Of the norm behind.
        half: Type of y, float16 or bfloat16.
        is_written: Whether y is wanted.
        codes: Type of the codes of y, int8 or float8_e4m3fn; None: they are not wanted.
        step: Units of y a unit of the codes, above 0.
        zero: Code of the value 0; of int8 alone.
        low: Smallest code; of int8 alone.
        high: Largest code; of int8 alone.

    Returns:
        y [..., out], and its codes [..., out], which are taken before y is rounded to 16 bits; [0] what is not wanted.

    Raises:
        ShapeError: Tensors that do not fit together, another type or activation, or 2**31 elements or more.
    """
    _check(x, weight, factor, width, activation)
    if half not in DTYPES or codes not in (*EIGHTS, None):
        raise ShapeError(
            f"narrow linear: found results in {half} and {codes}, wanted float16 or bfloat16 and int8 or float8_e4m3fn"
        )
    shape = (*x.shape[:-1], width)
    grid = (codes, step, zero, low, high)
    if added is not None:
        whole = torch.broadcast_shapes(shape, added.shape)
        if tuple(whole) != shape or added.dtype != half:  # more elements, or another type
            plain = (None, None, None, width, activation, first_eps, last_eps, half, True)
            y, _ = narrow_linear8(x, weight, factor, bias, sums, *plain, None, *grid[1:])
            y = y + added
            if scale is not None and shift is not None:
                own, moved = (t[:width].to(y.dtype) for t in (scale, shift))
                y = layer_norm(y, (width,), own, moved, last_eps)
            return y, y.new_empty(0) if codes is None else _coded(y, *grid)
        added = added.expand(shape).contiguous()
    layer = Layer(
        weight, factor, bias, sums, added, scale, shift, width, activation, first_eps, last_eps, half,
        is_written, *grid,
    )  # fmt: skip
    x = x.contiguous()
    if x.is_cuda and HAS_KERNEL:
        from tersor.kernels.narrow_linear8_triton import narrow_linear8_cuda

        return narrow_linear8_cuda(x, layer)
    found: tuple[Tensor, Tensor] = narrow_linear8_op()(x, *layer)
    return found


def _check(x: Tensor, weight: Tensor, factor: Tensor | None, width: int, activation: str) -> None:
    is_coded = x.dtype in EIGHTS
    if (
        x.dtype not in (*DTYPES, *EIGHTS)
        or weight.dtype != x.dtype
        or is_coded != (factor is not None)
    ):
        raise ShapeError(
            f"narrow linear: found x in {x.dtype} and a weight in {weight.dtype} "
            f"{'without' if factor is None else 'with'} factors, wanted both in one type of 8 bits with factors, or of "
            "16 bits without"
        )
    inp, out = weight.shape[::-1] if is_coded else weight.shape
    step = DEEP if is_coded else STEP
    if inp % step or out % COLUMNS or not 1 <= width <= out:
        raise ShapeError(
            f"narrow linear: found a weight {tuple(weight.shape)} for {width} outputs, wanted what linear8_weights or "
            "linear_weights gives"
        )
    check_call(x, inp, max(inp, out), activation, step)


def narrow_linear8_reference(
    x: Tensor,
    weight: Tensor,
    factor: Tensor | None,
    bias: Tensor,
    sums: Tensor | None,
    added: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    width: int,
    activation: str,
    first_eps: float,
    last_eps: float,
    half: torch.dtype,
    is_written: bool,
    codes: torch.dtype | None,
    step: float,
    zero: int,
    low: int,
    high: int,
) -> tuple[Tensor, Tensor]:
    """As ``narrow_linear8``, in torch's own ops in float32; what is added has the result's shape."""
    inputs = x.shape[-1]
    if factor is not None:  # sums of int8 codes are exact integers of up to 32 bits
        y = x.double() @ weight[:width, :inputs].double().T
        y = y.float() * factor[:width]
    else:
        y = float_product(x, weight, sums, width, first_eps)
    y = activated(y + bias[:width], activation)
    if added is not None:
        y = y + added.float()
    if scale is not None and shift is not None:
        y = layer_norm(y, (width,), scale[:width], shift[:width], last_eps)
    nothing = y.new_empty(0)
    floats = y.to(half) if is_written else nothing.to(half)
    return floats, nothing if codes is None else _coded(y, codes, step, zero, low, high)


def _coded(
    y: Tensor, dtype: torch.dtype | None, step: float, zero: int, low: int, high: int
) -> Tensor:
    """Codes of a tensor: those of ``linear8.quantize_codes`` or ``quantize_floats``."""
    from tersor.kernels.linear8 import quantize_codes, quantize_floats

    if dtype == torch.int8:
        return quantize_codes(y, step, zero, low, high)
    return quantize_floats(y, step)


def narrow_linear8_op() -> Any:
    """What compilers and exporters see; the kernel's module takes a second to import."""
    if HAS_KERNEL:
        from tersor.kernels.narrow_linear8_triton import narrow_linear8_op as found

        return found
    return _plain_op


if not HAS_KERNEL:
    _plain_op: Any = torch.library.custom_op(
        "tersor::narrow_linear8", narrow_linear8_reference, mutates_args=()
    )

    @_plain_op.register_fake
    def _shapes_of(x: Tensor, weight: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
        del weight
        width, half, is_written, codes = others[6], *others[10:13]
        shape = (*x.shape[:-1], width)
        y = x.new_empty(shape if is_written else (0,), dtype=half)
        if codes is None:
            return y, x.new_empty(0, dtype=torch.float32)
        return y, x.new_empty(shape, dtype=codes)
