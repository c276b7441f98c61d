"""Two-dimensional convolutions on 8-bit codes, from codes to floats or to the next layer's codes.

``conv8`` is what graphs call. On a CUDA device with Triton it is one implicit product of matrices
(``conv8_triton``) that ends with everything up to the next layer's codes; elsewhere it is
``conv8_reference``, the definition that the kernel is tested against.
"""

from collections.abc import Sequence
from importlib.util import find_spec

import torch
from torch import Tensor

from tersor.core.errors import ConfigError, ShapeError

HAS_KERNEL = find_spec("triton") is not None

CODES = (torch.int8, torch.float8_e4m3fn)
_EXACT = 1 << 24  # float32 holds every integer up to here
_PRODUCT = 1 << 14  # of two int8 codes, at most
_SIDES = 4  # dimensions of images, and of a weight
_LARGEST = 1 << 31  # elements whose places have 32 bits
_WIDEST = 255  # of an 8-bit code behind its zero point
_MOST_CUTS = 1 << 12  # ways to cut a window


def conv8(
    codes: Tensor,
    weight: Tensor,
    scale: Tensor,
    offset: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dtype: torch.dtype,
    low: float,
    high: float,
    residual: Tensor | None = None,
    residual_gain: float = 1.0,
    shift: float = 0.0,
    inner: Sequence[float] | None = None,
) -> Tensor:
    """Convolve codes, and end in floats or in codes of the next grid.

    1. z = scale * (sum of products of codes, 0 beyond the borders) + offset;
    2. with ``inner = (least, most, gain)``: z = clamp(round(z), least, most) * gain, what a quantiser
       between the convolution and an addition leaves;
    3. with a residual or ``inner``: z = z + residual * residual_gain + shift;
    4. clamp(z, low, high), rounded half to even where ``dtype`` is int8.

    Units are the caller's: a factor of the next grid belongs into ``scale``, ``offset``, the gains and
    ``shift``, its zero point into ``offset`` or ``shift``, an activation such as ReLU into the bounds.

    Args:
        codes: [n, inp, height, width], int8 or float8_e4m3fn; read with channels last, and copied
            where they are not.
        weight: [out, kernel height, kernel width, inp], contiguous, of the same type.
        scale: [out] float32.
        offset: [1, out] float32; or one row for each way in which borders cut windows
            (``border_offsets``), where code 0 is not what the padding stands for.
        stride: Down and across, at least 1.
        padding: On both sides, down and across: less than the kernel.
        dtype: Of the result: int8, float8_e4m3fn, or floats.
        low: Smallest result; -inf: none.
        high: Largest one.
        residual: Of the result's shape; int8 codes or floats.
        residual_gain: Units of the result for one of the residual.
        shift: Added with it.
        inner: Bounds, at most 255 from 0, and the gain behind them; int8 codes only.

    Returns:
        [n, out, height, width] with channels last.

    Raises:
        ConfigError: Types or numbers that there is no such convolution for.
        ShapeError: Shapes that do not fit each other, grouped weights, more than 2**31 elements.
    """
    arguments = (
        codes, weight, scale, offset, stride, padding, dtype, low, high,
        residual, residual_gain, shift, inner,
    )  # fmt: skip
    if not torch.compiler.is_compiling():
        _check(codes, weight, offset, stride, padding, dtype, residual, inner)
    if codes.is_cuda and HAS_KERNEL and codes.shape[0] > 0:
        from tersor.kernels.conv8_triton import conv8_cuda

        return conv8_cuda(*arguments)
    return conv8_reference(*arguments)


def conv8_reference(
    codes: Tensor,
    weight: Tensor,
    scale: Tensor,
    offset: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dtype: torch.dtype,
    low: float,
    high: float,
    residual: Tensor | None = None,
    residual_gain: float = 1.0,
    shift: float = 0.0,
    inner: Sequence[float] | None = None,
) -> Tensor:
    """As ``conv8``, in torch's own ops: the sums of int8 codes are exact integers."""
    y = _sums(codes, weight, stride, padding).float() * scale.reshape(-1, 1, 1)
    if offset.shape[0] == 1:
        y = y + offset.reshape(-1, 1, 1)
    else:
        cuts = _cuts(codes, weight, y, stride, padding)
        y = y + offset[cuts].permute(2, 0, 1)
    if inner is not None:
        least, most, gain = inner
        y = torch.clamp(torch.round(y), least, most) * gain
    if residual is not None:
        y = y + (residual.float() * residual_gain + shift)
    elif inner is not None:
        y = y + shift
    y = torch.clamp(y, low, high)
    if dtype == torch.int8:
        y = torch.round(y)
    return y.to(dtype).contiguous(memory_format=torch.channels_last)


def _sums(codes: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int]) -> Tensor:
    """Sums of products: whole numbers in float64 for int8, float64 sums for 8-bit floats."""
    kernel = weight.permute(0, 3, 1, 2)
    across = weight.shape[1] * weight.shape[2]
    most = _EXACT // (_PRODUCT * across)
    steps, sides = list(stride), list(padding)
    convolve = torch.nn.functional.conv2d
    if codes.dtype != torch.int8 or codes.is_cuda or most == 0:
        return convolve(codes.double(), kernel.double(), None, steps, sides)
    # As many channels at a time as float32 adds exactly, which is faster than float64.
    parts = [
        convolve(x.float(), w.float(), None, steps, sides)
        for x, w in zip(codes.split(most, 1), kernel.split(most, 1), strict=True)
    ]
    if len(parts) == 1:
        return parts[0]
    total = parts[0].double()
    for part in parts[1:]:
        total = total + part
    return total


def _cuts(
    codes: Tensor, weight: Tensor, y: Tensor, stride: Sequence[int], padding: Sequence[int]
) -> Tensor:
    """The row of ``border_offsets`` for each pixel of a result [height, width]."""
    found = []
    for dim in (0, 1):
        at = torch.arange(y.shape[2 + dim], device=y.device) * stride[dim] - padding[dim]
        before = (-at).clamp(min=0)
        behind = (at + weight.shape[1 + dim] - codes.shape[2 + dim]).clamp(min=0)
        found.append(before * (padding[dim] + 1) + behind)
    return found[0][:, None] * (padding[1] + 1) ** 2 + found[1][None, :]


def border_offsets(
    weight: Tensor, scale: Tensor, zero: int, bias: Tensor | None, padding: Sequence[int]
) -> Tensor:
    """What is added to scaled sums of codes whose zero point is not 0.

    Padding stands for the value 0, whose code is ``zero``; the sums take code 0 there. So what zero
    points add is a sum over the part of the window that lies inside of the image, one row for every
    number of lines that may be cut off above, below, left and right: [(ph + 1)**2 (pw + 1)**2, out].
    Without a zero point or padding one row is enough.

    Args:
        weight: [out, kernel height, kernel width, inp] codes.
        scale: [out].
        zero: Code of the value 0.
        bias: [out], in units of the result.
        padding: Down and across.

    Returns:
        [rows, out] float32.

    Raises:
        ConfigError: So much padding that there would be more than 4096 rows.
    """
    each = weight.sum(3, dtype=torch.float64)  # of all channels: [out, height, width]
    start = torch.zeros_like(scale, dtype=torch.float64) if bias is None else bias.double()
    down, across = (int(p) for p in padding) if zero else (0, 0)
    if (down + 1) ** 2 * (across + 1) ** 2 > _MOST_CUTS:
        raise ConfigError(
            f"conv8: padding {(down, across)} with zero point {zero} cuts windows in more than "
            f"{_MOST_CUTS} ways; use codes whose zero point is 0"
        )
    height, width = weight.shape[1], weight.shape[2]
    rows = [
        start - scale.double() * zero * each[:, top : height - bottom, left : width - right].sum((1, 2))
        for top in range(down + 1)
        for bottom in range(down + 1)
        for left in range(across + 1)
        for right in range(across + 1)
    ]  # fmt: skip
    return torch.stack(rows).float()


def result_size(size: int, kernel: int, stride: int, padding: int) -> int:
    """Pixels of a result along one side."""
    return (size + 2 * padding - kernel) // stride + 1


def _check(
    codes: Tensor,
    weight: Tensor,
    offset: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dtype: torch.dtype,
    residual: Tensor | None,
    inner: Sequence[float] | None,
) -> None:
    """Raises: as ``conv8`` says."""
    _check_types(codes, weight, dtype, inner)
    _check_window(codes, weight, offset, stride, padding)
    kernel = weight.shape[1:3]
    sides = [
        result_size(s, k, t, p)
        for s, k, t, p in zip(codes.shape[2:], kernel, stride, padding, strict=True)
    ]
    shape = (codes.shape[0], weight.shape[0], *sides)
    if residual is not None and tuple(residual.shape) != shape:
        raise ShapeError(
            f"conv8: residual {tuple(residual.shape)}, wanted the result's shape {shape}"
        )
    count = max(codes.numel(), shape[0] * shape[1] * shape[2] * shape[3], weight.numel())
    if count >= _LARGEST:
        raise ShapeError(
            f"conv8: {count} elements in one tensor, wanted less than 2**31; use a smaller batch"
        )


def _check_types(
    codes: Tensor, weight: Tensor, dtype: torch.dtype, inner: Sequence[float] | None
) -> None:
    if codes.dtype not in CODES or weight.dtype != codes.dtype:
        raise ConfigError(
            f"conv8: codes of {codes.dtype} and a weight of {weight.dtype}, wanted both int8 or "
            "both float8_e4m3fn"
        )
    if dtype in CODES and dtype != codes.dtype:
        raise ConfigError(f"conv8: from {codes.dtype} to {dtype}, wanted one kind of codes")
    if inner is not None and codes.dtype != torch.int8:
        raise ConfigError(f"conv8: inner bounds are for int8 codes, found {codes.dtype}")
    if inner is not None and max(abs(v) for v in inner[:2]) > _WIDEST:
        raise ConfigError(
            f"conv8: inner bounds {tuple(inner[:2])}, wanted codes: at most 255 from 0"
        )


def _check_window(
    codes: Tensor,
    weight: Tensor,
    offset: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
) -> None:
    if codes.dim() != _SIDES or weight.dim() != _SIDES:
        raise ShapeError(
            f"conv8: codes of {codes.dim()} dimensions and a weight of {weight.dim()}, wanted "
            "[n, inp, height, width] and [out, kernel height, kernel width, inp]"
        )
    out, down, across, inp = weight.shape
    if inp != codes.shape[1]:
        raise ShapeError(
            f"conv8: {codes.shape[1]} channels for a weight of {inp}; grouped convolutions are not "
            "computed on codes, leave them in floats"
        )
    fits = all(
        s >= 1 and 0 <= p < k for s, p, k in zip(stride, padding, (down, across), strict=True)
    )
    sides = zip(codes.shape[2:], padding, (down, across), strict=True)
    if not fits or any(size + 2 * p < k for size, p, k in sides):
        raise ShapeError(
            f"conv8: stride {tuple(stride)}, padding {tuple(padding)} and a kernel of "
            f"{(down, across)} on images of {tuple(codes.shape[2:])}; wanted a stride of at least 1, "
            "less padding than kernel, and a kernel that fits into the padded image"
        )
    rows = (1, (padding[0] + 1) ** 2 * (padding[1] + 1) ** 2)
    if offset.dim() != 2 or offset.shape[0] not in rows or offset.shape[1] != out:
        raise ShapeError(
            f"conv8: offset {tuple(offset.shape)}, wanted {out} channels in 1 or {rows[1]} rows"
        )
