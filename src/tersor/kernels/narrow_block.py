"""Residual blocks of few channels: relu(conv(relu(conv(x))) + shortcut(x)), both convolutions 3x3.

Networks of 16 to 64 channels wait for launches, and for what is written between them. ``narrow_block`` is
what graphs call: on a CUDA device with Triton ``narrow_block_triton``, elsewhere
``narrow_block_reference``, the definition that the kernels are tested against. Weights are laid out once
by ``block_weights``. Compilers and exporters see one op, ``tersor::narrow_block``.
"""

from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import conv2d, pad

from tersor.core.errors import ShapeError

HAS_KERNEL = find_spec("triton") is not None
CHANNELS = (16, 32, 64)
DTYPES = (torch.float16, torch.bfloat16)
STRIDES = (1, 2)
MOST = 2**31 - 1  # elements that 32-bit offsets reach
_TAPS = 9
_KERNEL = (3, 3)


class BlockWeights(NamedTuple):
    """A block's weights as the kernels read them; norms are folded into them.

    Channels are filled up with zeros to 16, 32 or 64, but for the last bias, which tells how many are written.

    Attributes:
        first: [9 * inp, between]: taps in rows, then the channels of a tap.
        first_bias: [between] float32.
        second: [9 * between, out], likewise.
        second_bias: [written] float32, with the bias of the shortcut.
        short: Of a 1x1 shortcut [inp, out]; None: x itself is added.
    """

    first: Tensor
    first_bias: Tensor
    second: Tensor
    second_bias: Tensor
    short: Tensor | None


def block_weights(
    first: Tensor,
    first_bias: Tensor | None,
    second: Tensor,
    second_bias: Tensor | None,
    *,
    dtype: torch.dtype,
    short: Tensor | None = None,
    short_bias: Tensor | None = None,
) -> BlockWeights:
    """Lay out the weights of a block.

    Args:
        first: [between, inp, 3, 3] of the convolution that may have a stride.
        first_bias: [between]; None: zeros.
        second: [out, between, 3, 3].
        second_bias: [out]; None: zeros.
        dtype: float16 or bfloat16.
        short: [out, inp, 1, 1] where the shortcut is a convolution.
        short_bias: [out]; None: zeros.

    Raises:
        ShapeError: Other kernels, more than 64 channels, or another type.
    """
    between, inp = first.shape[:2]
    out = second.shape[0]
    shapes = (tuple(first.shape), tuple(second.shape))
    wanted = ((between, inp, *_KERNEL), (out, between, *_KERNEL))
    short_shape = (out, inp, 1, 1) if short is None else tuple(short.shape)
    if shapes != wanted or short_shape != (out, inp, 1, 1):
        raise ShapeError(
            f"narrow block: found weights {shapes[0]}, {shapes[1]} and a shortcut {short_shape}, wanted "
            "[between, inp, 3, 3], [out, between, 3, 3] and [out, inp, 1, 1]; other blocks stay convolutions"
        )
    if not all(1 <= n <= CHANNELS[-1] for n in (inp, between, out)):
        raise ShapeError(
            f"narrow block: found {inp} channels to {between} to {out}, wanted at most {CHANNELS[-1]} of each; "
            "leave the block as convolutions"
        )
    if dtype not in DTYPES:
        raise ShapeError(f"narrow block: found type {dtype}, wanted float16 or bfloat16")
    if short is None and inp != out:
        raise ShapeError(
            f"narrow block: found {inp} channels to {out} without a shortcut's weight, wanted one: x has "
            "another shape than what it is added to"
        )
    zeros = torch.zeros(max(between, out), dtype=torch.float32, device=first.device)
    own = zeros[:between] if first_bias is None else first_bias.float()
    biases = [zeros[:out] if b is None else b.float() for b in (second_bias, short_bias)]
    return BlockWeights(
        _rows(first, dtype),
        pad(own, (0, _filled(between) - between)),
        _rows(second, dtype),
        biases[0] + biases[1],
        None if short is None else _rows(short, dtype),
    )


def _filled(channels: int) -> int:
    """How many channels a product has."""
    return next(n for n in CHANNELS if n >= channels)


def _rows(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """[out, inp, h, w] -> [h * w * inp, out], both filled up."""
    more = [_filled(n) - n for n in weight.shape[:2]]
    whole = pad(weight, (0, 0, 0, 0, 0, more[1], 0, more[0]))
    return whole.permute(2, 3, 1, 0).reshape(-1, whole.shape[0]).to(dtype).contiguous()


def narrow_block(
    x: Tensor,
    first: Tensor,
    first_bias: Tensor,
    second: Tensor,
    second_bias: Tensor,
    short: Tensor | None,
    stride: int,
) -> Tensor:
    """relu(conv(y) + second_bias + shortcut(x)), y = relu(conv(x) + first_bias); borders of one zero.

    Args:
        x: [b, channels, h, w] float16 or bfloat16, no more channels than the weights have, any strides (channels
            last are read as they are), and no images at all.
        first: Of the weights, as all that follow: see ``BlockWeights``.
        first_bias: Added before the first ReLU.
        second: Of the convolution of y.
        second_bias: Added before the last ReLU.
        short: Of the shortcut, or None.
        stride: 1 or 2, of the first convolution and of the shortcut; 2 needs ``short``.

    Returns:
        [b, written, ceil(h / stride), ceil(w / stride)], channels last. Sums are taken in float32; y is rounded
        to x's type.

    Raises:
        ShapeError: Tensors that do not fit together, another type or stride, or 2**31 elements or more.
    """
    _check(x, first, second, second_bias, short, stride)
    last = x.contiguous(memory_format=torch.channels_last)
    call: Any = narrow_block_op()
    if x.is_cuda and HAS_KERNEL:
        from tersor.kernels.narrow_block_triton import narrow_block_cuda as call
    found: Tensor = call(last, first, first_bias, second, second_bias, short, stride)
    return found


def _check(
    x: Tensor, first: Tensor, second: Tensor, last: Tensor, short: Tensor | None, stride: int
) -> None:
    inp, between = first.shape[0] // _TAPS, first.shape[1]
    out, written = second.shape[1], last.shape[0]
    if x.dtype not in DTYPES or first.dtype != x.dtype or second.dtype != x.dtype:
        raise ShapeError(
            f"narrow block: found x in {x.dtype} and weights in {first.dtype} and {second.dtype}, wanted all "
            "in float16 or all in bfloat16"
        )
    fits = {inp, between, out} <= {*CHANNELS} and 1 <= written <= out
    if not fits or first.shape[0] != _TAPS * inp or second.shape[0] != _TAPS * between:
        raise ShapeError(
            f"narrow block: found weights {tuple(first.shape)} and {tuple(second.shape)} with a last bias of "
            f"{written}, wanted [9 * inp, between] and [9 * between, out], each one of {CHANNELS}: what "
            "block_weights gives"
        )
    if x.dim() != 4 or not 1 <= x.shape[1] <= inp:
        raise ShapeError(
            f"narrow block: found x {tuple(x.shape)} for {inp} channels to {out}, wanted [b, 1 to {inp}, h, w]"
        )
    if stride not in STRIDES or (short is None and (stride != 1 or x.shape[1] != written)):
        raise ShapeError(
            f"narrow block: found stride {stride} from {x.shape[1]} to {written} channels, wanted 1 or 2, and a "
            "shortcut's weight wherever x has another shape than the result"
        )
    sizes = [x.numel(), x.shape[0] * max(between, written) * x.shape[2] * x.shape[3]]
    if any(isinstance(n, int) and n > MOST for n in sizes):
        raise ShapeError(
            f"narrow block: found x {tuple(x.shape)}, wanted at most {MOST} elements in x and in the "
            "result; split the batch"
        )


def narrow_block_reference(
    x: Tensor,
    first: Tensor,
    first_bias: Tensor,
    second: Tensor,
    second_bias: Tensor,
    short: Tensor | None,
    stride: int,
) -> Tensor:
    """As ``narrow_block``, in torch's own ops in float32."""
    wide, read, written = x.float(), x.shape[1], second_bias.shape[0]
    kernel = _kernel(first, 3)[:, :read]
    y = conv2d(wide, kernel, first_bias, stride, 1).relu().to(x.dtype).float()
    z = conv2d(y, _kernel(second, 3)[:written], second_bias, 1, 1)
    branch = None if short is None else _kernel(short, 1)[:written, :read]
    z = z + (wide if branch is None else conv2d(wide, branch, None, stride))
    return z.relu().to(x.dtype).contiguous(memory_format=torch.channels_last)


def _kernel(rows: Tensor, side: int) -> Tensor:
    """[side * side * inp, out] -> [out, inp, side, side], float32."""
    return rows.float().reshape(side, side, -1, rows.shape[1]).permute(3, 2, 0, 1)


def narrow_block_op() -> Any:
    """What compilers and exporters see; the kernels' module takes a second to import."""
    if HAS_KERNEL:
        from tersor.kernels.narrow_block_triton import narrow_block_op as found

        return found
    return _plain_op


if not HAS_KERNEL:
    _plain_op: Any = torch.library.custom_op(
        "tersor::narrow_block", narrow_block_reference, mutates_args=()
    )

    @_plain_op.register_fake
    def _shape_of(
        x: Tensor,
        first: Tensor,
        first_bias: Tensor,
        second: Tensor,
        second_bias: Tensor,
        short: Tensor | None,
        stride: int,
    ) -> Tensor:
        del first, first_bias, second, short
        height, width = (-(-n // stride) for n in x.shape[2:])
        return x.new_empty(x.shape[0], second_bias.shape[0], height, width).contiguous(
            memory_format=torch.channels_last
        )
