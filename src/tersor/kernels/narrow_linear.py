"""A linear layer with what is around it: norm(act(norm(x) W + bias) + added), either norm or none.

Layers of a few hundred channels wait for launches, and for what is written between them. ``narrow_linear`` is what
graphs call: on a CUDA device with Triton ``narrow_linear_triton``, elsewhere ``narrow_linear_reference``, the
definition that the kernel is tested against. Weights are laid out once by ``linear_weights``. Compilers and
exporters see one op, ``tersor::narrow_linear``.
"""

from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, pad

from tersor.core.errors import ShapeError
from tersor.kernels.epilogue import ACTIVATIONS, activated

HAS_KERNEL = find_spec("triton") is not None
DTYPES = (torch.float16, torch.bfloat16)
STEP, COLUMNS = 64, 128  # what inputs and outputs are filled up to multiples of
ROW = 512  # channels up to which whole rows stay in a program, to be normed behind the product
READ = 1024  # and in front of it, where rows are read into registers: beyond half of that some are spilled
MOST = 2**31 - 1  # elements that 32-bit offsets reach


class LinearWeights(NamedTuple):
    """A layer's weights as the kernel reads them, filled up with zeros.

    Attributes:
        weight: [inputs, outputs], multiples of 64 and 128.
        bias: [outputs] float32.
        sums: Of each column of the weight as it is stored [outputs] float32; None: there is no norm in front.
        scale: Of the norm behind, [outputs] float32; None: there is none.
        shift: Likewise.
    """

    weight: Tensor
    bias: Tensor
    sums: Tensor | None
    scale: Tensor | None
    shift: Tensor | None


def linear_weights(
    weight: Tensor,
    bias: Tensor | None,
    *,
    dtype: torch.dtype,
    first: tuple[Tensor | None, Tensor | None] | None = None,
    last: tuple[Tensor | None, Tensor | None] | None = None,
) -> LinearWeights:
    """Lay out the weights of a layer.

    Args:
        weight: [out, inp] as torch has it.
        bias: [out]; None: zeros.
        dtype: float16 or bfloat16.
        first: Scale and shift [inp] of the norm in front, which become part of weight and bias.
        last: Scale and shift [out] of the norm behind; None in a pair: ones, zeros.

    Raises:
        ShapeError: Tensors that do not fit together, another type, or too many channels for a norm.
    """
    out, inp = weight.shape
    if dtype not in DTYPES:
        raise ShapeError(f"narrow linear: found type {dtype}, wanted float16 or bfloat16")
    if (last is not None and out > ROW) or (first is not None and inp > READ):
        raise ShapeError(
            f"narrow linear: found {inp} channels to {out}, wanted at most {READ} with a norm in front and {ROW} with "
            "one behind; leave the norm as it is"
        )
    vectors = [(bias, out), *((v, inp) for v in first or ()), *((v, out) for v in last or ())]
    if any(v is not None and tuple(v.shape) != (n,) for v, n in vectors):
        found = [None if v is None else tuple(v.shape) for v, _ in vectors]
        raise ShapeError(
            f"narrow linear: found vectors {found} beside a weight {tuple(weight.shape)}"
        )
    own, shift = folded(weight, bias, first)
    sides = (0, -out % COLUMNS)
    norm = (None, None) if last is None else filled_norm(*last, weight.new_zeros(out).float())
    stored = pad(own.T, (*sides, 0, -inp % STEP)).to(dtype).contiguous()
    sums = None if first is None else stored.double().sum(0).float()
    return LinearWeights(stored, pad(shift, sides), sums, *norm)


def filled_norm(scale: Tensor | None, shift: Tensor | None, zeros: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and shift of a norm behind a product, filled up with zeros; ``zeros`` [out] float32, where there are none."""
    sides = (0, -len(zeros) % COLUMNS)
    own = zeros + 1.0 if scale is None else scale.float()
    return pad(own, sides), pad(zeros if shift is None else shift.float(), sides)


def folded(
    weight: Tensor, bias: Tensor | None, norm: tuple[Tensor | None, Tensor | None] | None
) -> tuple[Tensor, Tensor]:
    """Weight [out, inp] and bias [out], float32, with the scale and shift of a norm in front."""
    own = weight.double()
    shift = own.new_zeros(own.shape[0]) if bias is None else bias.double()
    scale, moved = norm or (None, None)
    if moved is not None:
        shift = shift + own @ moved.double()
    if scale is not None:
        own = own * scale.double()
    return own.float(), shift.float()


def narrow_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    sums: Tensor | None,
    added: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    width: int,
    activation: str,
    first_eps: float,
    last_eps: float,
) -> Tensor:
    """norm(act(norm(x) W + bias) + added).

    Args:
        x: [..., inp] float16 or bfloat16.
        weight: Of the weights, as bias, sums, scale and shift: see ``LinearWeights``.
        bias: Added to the product.
        sums: Of the weight's columns; None: there is no norm in front.
        added: What it is added to is broadcast as torch does it; one with more elements than the product, or of
            another type, is added, and normed, behind the kernel. None: nothing.
        scale: Of the norm behind; None: there is none.
        shift: Likewise.
        width: Outputs that are written, out.
        activation: One of ``epilogue.ACTIVATIONS``.
        first_eps: Of the norm in front, whose scale and shift are in the weights.
        last_eps: Of the norm behind.

    Returns:
        [..., out] in x's type, or what an addition makes of it. Sums and norms are taken in float32, that in front behind its product: (x W - mean
        sums) / deviation, so that the product reads x as it is.

    Raises:
        ShapeError: Tensors that do not fit together, another type or activation, or 2**31 elements or more.
    """
    _check(x, weight, bias, width, activation)
    shape = (*x.shape[:-1], width)
    left = None
    if added is not None:
        whole = torch.broadcast_shapes(shape, added.shape)
        if tuple(whole) != shape or added.dtype != x.dtype:  # more elements, or another type
            left, added = added, None
    if left is not None and scale is not None and shift is not None:
        y = narrow_linear(
            x, weight, bias, sums, left, None, None, width, activation, first_eps, last_eps
        )
        own, moved = (t[:width].to(y.dtype) for t in (scale, shift))
        return layer_norm(y, (width,), own, moved, last_eps)
    if added is not None:
        added = added.expand(shape).contiguous()
    call: Any = narrow_linear_op()
    if x.is_cuda and HAS_KERNEL:
        from tersor.kernels.narrow_linear_triton import narrow_linear_cuda as call
    found: Tensor = call(
        x.contiguous(), weight, bias, sums, added, scale, shift, width, activation, first_eps, last_eps,
    )  # fmt: skip
    return found if left is None else found + left


def _check(x: Tensor, weight: Tensor, bias: Tensor, width: int, activation: str) -> None:
    if x.dtype not in DTYPES or weight.dtype != x.dtype:
        raise ShapeError(
            f"narrow linear: found x in {x.dtype} and a weight in {weight.dtype}, wanted both in float16 or both in "
            "bfloat16"
        )
    inp, out = weight.shape
    is_laid_out = not inp % STEP and not out % COLUMNS and tuple(bias.shape) == (out,)
    if not is_laid_out or not 1 <= width <= out:
        raise ShapeError(
            f"narrow linear: found a weight {tuple(weight.shape)} and a bias {tuple(bias.shape)} for {width} outputs, "
            "wanted what linear_weights gives"
        )
    check_call(x, inp, max(inp, out), activation, STEP)


def check_call(x: Tensor, inputs: int, most: int, activation: str, step: int) -> None:
    """Refuse what no kernel of such layers takes.

    Args:
        x: What is read.
        inputs: That the weight has, filled up.
        most: Numbers of a row, in or out.
        activation: By name.
        step: What inputs are filled up to multiples of.

    Raises:
        ShapeError: Another number of inputs, no known activation, or 2**31 elements or more.
    """
    if x.dim() < 1 or not inputs - step < x.shape[-1] <= inputs:
        raise ShapeError(f"narrow linear: found x {tuple(x.shape)} for a weight of {inputs} inputs")
    if activation not in ACTIVATIONS:
        raise ShapeError(
            f"narrow linear: found activation {activation!r}, wanted one of {ACTIVATIONS}"
        )
    rows = x.numel() // x.shape[-1]
    if isinstance(rows, int) and rows * most > MOST:
        raise ShapeError(
            f"narrow linear: found x {tuple(x.shape)}, {most} numbers a row, wanted at most {MOST} elements; split the batch"
        )


def narrow_linear_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    sums: Tensor | None,
    added: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    width: int,
    activation: str,
    first_eps: float,
    last_eps: float,
) -> Tensor:
    """As ``narrow_linear``, in torch's own ops in float32; what is added has the result's shape."""
    y = float_product(x, weight, sums, width, first_eps)
    y = activated(y + bias[:width], activation)
    if added is not None:
        y = y + added.float()
    if scale is not None and shift is not None:
        y = layer_norm(y, (width,), scale[:width], shift[:width], last_eps)
    return y.to(x.dtype)


def float_product(x: Tensor, weight: Tensor, sums: Tensor | None, width: int, eps: float) -> Tensor:
    """norm(x) W [..., width] in float32, the norm behind its product; without ``sums`` x W."""
    read = x.float()
    y = read @ weight[: x.shape[-1], :width].float()
    if sums is None:
        return y
    mean = read.mean(-1, keepdim=True)
    deviation = ((read - mean).square().mean(-1, keepdim=True) + eps).sqrt()
    return (y - mean * sums[:width]) / deviation


def narrow_linear_op() -> Any:
    """What compilers and exporters see; the kernel's module takes a second to import."""
    if HAS_KERNEL:
        from tersor.kernels.narrow_linear_triton import narrow_linear_op as found

        return found
    return _plain_op


if not HAS_KERNEL:
    _plain_op: Any = torch.library.custom_op(
        "tersor::narrow_linear", narrow_linear_reference, mutates_args=()
    )

    @_plain_op.register_fake
    def _shape_of(x: Tensor, weight: Tensor, *others: Any) -> Tensor:
        del weight
        return x.new_empty(*x.shape[:-1], others[5])
