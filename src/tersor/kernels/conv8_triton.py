"""Launches of the kernels of 8-bit convolutions: how the inner dimension is walked over, and tiles.

Tiles are chosen by measuring, for each shape (``tiles``), among a few that suit it; small results share
their sums among more blocks, and a second kernel adds those, without atomics.
"""

from collections.abc import Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.library import triton_op, wrap_triton

from tersor.kernels import conv8_kernels_triton as kernels
from tersor.kernels.activations_triton import HAS_ASSEMBLY
from tersor.kernels.tiles import Chosen, Size, choose, is_real, result


class Tile(NamedTuple):
    """How a shape is launched."""

    pixels: int
    outputs: int
    inner: int
    warps: int
    stages: int
    splits: int = 1  # of the inner dimension


_GROUP = 8
_WORD = 16  # codes that are read at once where channels allow it
_LINE = 32  # codes that tensor cores multiply at once
_WIDE = 128  # of the inner dimension, where channels fill it
_FEW = 4096  # pixels up to which small tiles are tried
_BLOCKS = 132  # multiprocessors of the card that this was written for (H200)
_SMALL = ((64, 64), (32, 64), (16, 64), (64, 128))  # pixels, channels
_SHARES = 16
_FINISH = (16, 64, 4)  # pixels, channels, warps of the second kernel
_FINITE = torch.finfo(torch.float32).max  # no compiler has to write an infinity
_Key = tuple[Any, ...]
_CHOSEN: Chosen[_Key, Tile] = Chosen()


@cache
def _tiled(tile: Tile) -> Any:
    """The kernel with one tile: a list of one, so that no compiler has anything to tune."""
    sizes = {"BM": tile.pixels, "BN": tile.outputs, "BK": tile.inner, "GROUP": _GROUP}
    config = triton.Config(sizes, num_warps=tile.warps, num_stages=tile.stages)
    return triton.autotune([config], key=[])(kernels.conv8_kernel)


@cache
def _finisher() -> Any:
    config = triton.Config({"BM": _FINISH[0], "BN": _FINISH[1]}, num_warps=_FINISH[2])
    return triton.autotune([config], key=[])(kernels.conv8_finish_kernel)


def walk(kernel: tuple[int, int], inp: int, block: int) -> tuple[int, int, int, bool]:
    """How the inner dimension is walked over by steps of ``block``.

    Returns:
        The kind, steps in all, steps within one line or pixel of the kernel, and whether none of them
        reaches beyond.
    """
    down, across = kernel
    if down == across == 1:
        return kernels.POINT, triton.cdiv(inp, block), 1, inp % block == 0
    if inp % block == 0:
        each = inp // block
        return kernels.TAPS, down * across * each, each, True
    each = triton.cdiv(across * inp, block)
    return kernels.LINES, down * each, each, (across * inp) % block == 0


def _inner(kernel: tuple[int, int], inp: int) -> tuple[int, ...]:
    """Blocks of the inner dimension that waste little."""
    line = inp if kernel == (1, 1) else inp * kernel[1]
    if inp % _WIDE == 0 or (kernel == (1, 1) and inp > _WIDE):
        return (_WIDE, _WIDE // 2)
    if inp % (_WIDE // 2) == 0:
        return (_WIDE // 2,)
    return (min(_WIDE, max(_LINE, triton.next_power_of_2(line))),)


def tiles(pixels: int, out: int, kernel: tuple[int, int], inp: int) -> tuple[Tile, ...]:
    """Tiles that are worth measuring; the first is taken where nothing was measured.

    Args:
        pixels: Of the result, in all images.
        out: Its channels.
        kernel: Height and width.
        inp: Input channels.
    """
    blocks = _inner(kernel, inp)
    if pixels <= _FEW:
        return _small(pixels, out, kernel, inp, blocks[0])
    outputs = max(16, min(128, triton.next_power_of_2(out)))
    found = [Tile(128, outputs, block, 4, 3 if block == _WIDE else 4) for block in blocks]
    if outputs == _WIDE:
        found += [Tile(128, 128, blocks[0], 8, 3), Tile(128, 64, blocks[0], 4, 4)]
        found.append(Tile(64, 128, blocks[0], 4, 4))
        if out >= 2 * _WIDE:
            found.append(Tile(128, 256, blocks[0], 8, 3))
    else:
        found += [Tile(256, outputs, blocks[0], 8, 3), Tile(64, outputs, blocks[0], 4, 4)]
    return tuple(dict.fromkeys(found))


def _small(
    pixels: int, out: int, kernel: tuple[int, int], inp: int, block: int
) -> tuple[Tile, ...]:
    """Few pixels: enough blocks for every multiprocessor, by smaller tiles or shares of the sums."""
    steps = walk(kernel, inp, block)[1]
    found = []
    for rows, outputs in _SMALL:
        columns = min(outputs, max(16, triton.next_power_of_2(out)))
        count = triton.cdiv(pixels, rows) * triton.cdiv(out, columns)
        most = min(max(1, _BLOCKS // count), max(1, steps // 2), _SHARES)
        for shares in sorted({1, (most + 1) // 2, most}):
            share = triton.cdiv(steps, shares)
            found.append(Tile(rows, columns, block, 4, 5, triton.cdiv(steps, share)))
    return tuple(dict.fromkeys(found))


def choose_tile(key: _Key, candidates: Sequence[Tile], call: Any) -> bool:
    """Measure a shape's tiles by recorded calls on the device, once a process, and keep the fastest.

    Args:
        key: What tells calls of different speeds apart.
        candidates: To choose from, at least one.
        call: The call itself; it reads the table of chosen tiles.

    Returns:
        Whether anything was measured.

    Raises:
        OutOfResources: The device has no room for any tile.
    """
    return choose(_CHOSEN, key, candidates, call, _alike)


def _alike(measured: Tile, tile: Tile) -> bool:
    """The same but for what channels give: outputs and the block of the inner dimension."""
    same = measured.pixels == tile.pixels and measured.warps == tile.warps
    return same and (measured.splits > 1) == (tile.splits > 1)


@triton_op("tersor::conv8", mutates_args={})
def conv8_op(
    codes: Tensor,
    weight: Tensor,
    scale: Tensor,
    offset: Tensor,
    residual: Tensor | None,
    stride: list[int],
    padding: list[int],
    dtype: torch.dtype,
    low: float,
    high: float,
    residual_gain: float,
    shift: float,
    inner: list[float],
) -> Tensor:
    """[n, h, w, inp] x [out, kh, kw, inp] -> [n, oh, ow, out], all contiguous; ``inner`` may be empty."""
    tile = _tile_of(codes, weight, offset, residual, stride, padding, dtype, inner)
    return launched(
        wrap_triton(_tiled(tile)), wrap_triton(_finisher()), tile, codes, weight, scale, offset,
        residual, stride, padding, dtype, (low, high), (residual_gain, shift), inner,
    )  # fmt: skip


def launched(
    kernel: Any,
    finisher: Any,
    tile: Tile,
    codes: Tensor,
    weight: Tensor,
    scale: Tensor,
    offset: Tensor,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dtype: torch.dtype,
    bounds: tuple[float, float],
    added: tuple[float, float],
    inner: Sequence[float],
) -> Tensor:
    """The result, by the kernels as they are given: with their tiles, ready for a grid."""
    n, h, w, inp = codes.shape
    out, down, across, _ = weight.shape
    oh = (h + 2 * padding[0] - down) // stride[0] + 1
    ow = (w + 2 * padding[1] - across) // stride[1] + 1
    pixels = n * oh * ow
    result = torch.empty((n, oh, ow, out), dtype=dtype, device=codes.device)
    kind, steps, each, is_even = walk((down, across), inp, tile.inner)
    unit = next(u for u in (_WORD, 4, 2, 1) if inp % u == 0)
    least, most, gain = inner or (0.0, 0.0, 1.0)
    sizes = (pixels, out, h, w, oh, ow)
    numbers = (gain, *added, *bounds, least, most)
    ending = {
        "KH": down, "KW": across, "SH": stride[0], "SW": stride[1],
        "PH": padding[0], "PW": padding[1], "BORDER": offset.shape[0] > 1, "INNER": bool(inner),
        "RESIDUAL": residual is not None, "ROUND": dtype == torch.int8,
        "NATIVE": HAS_ASSEMBLY,
    }  # fmt: skip
    is_int = codes.dtype == torch.int8
    other = scale if residual is None else residual
    parts = result
    if tile.splits > 1:
        sums = torch.int32 if is_int else torch.float32
        parts = torch.empty((tile.splits, pixels, out), dtype=sums, device=codes.device)

    def grid(meta: dict[str, Any]) -> tuple[int, int]:
        return triton.cdiv(pixels, meta["BM"]) * triton.cdiv(out, meta["BN"]), tile.splits

    kernel[grid](
        codes, weight, result, parts, scale, offset, other,
        *sizes, inp // unit, steps, triton.cdiv(steps, tile.splits), *numbers,
        UNIT=unit, WALK=kind, BLOCKS=each, EVEN=is_even, IS_INT=is_int,
        IS_SHARE=tile.splits > 1, **ending,
    )  # fmt: skip
    if tile.splits > 1:

        def blocks(meta: dict[str, Any]) -> tuple[int, int]:
            return triton.cdiv(pixels, meta["BM"]), triton.cdiv(out, meta["BN"])

        finisher[blocks](
            parts, result, scale, offset, other, tile.splits, *sizes, *numbers, **ending
        )
    return result


def _tile_of(
    codes: Tensor,
    weight: Tensor,
    offset: Tensor,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dtype: torch.dtype,
    inner: Sequence[float],
) -> Tile:
    out, down, across, inp = weight.shape
    if not all(isinstance(size, int) for size in codes.shape):  # open: any number of images
        return tiles(_FEW + 1, out, (down, across), inp)[0]
    chosen = _CHOSEN.get(_key(codes, weight, offset, residual, stride, padding, dtype, inner))
    if chosen is not None:
        return chosen
    return tiles(_pixels(codes, weight, stride, padding), out, (down, across), inp)[0]


def _pixels(codes: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int]) -> int:
    n, h, w, _ = codes.shape
    _, down, across, _ = weight.shape
    oh = (h + 2 * padding[0] - down) // stride[0] + 1
    return int(n * oh * ((w + 2 * padding[1] - across) // stride[1] + 1))


def _key(
    codes: Tensor,
    weight: Tensor,
    offset: Tensor,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dtype: torch.dtype,
    inner: Sequence[float],
) -> _Key:
    other = None if residual is None else residual.dtype
    out, down, across, inp = weight.shape
    return (
        tuple(map(Size, codes.shape)), Size(out), down, across, Size(inp), tuple(stride), tuple(padding), codes.dtype,
        dtype, other, offset.shape[0] > 1, len(inner), str(codes.device),
    )  # fmt: skip


def conv8_cuda(
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
    """As ``conv8.conv8``, by the kernels."""
    images = codes.permute(0, 2, 3, 1).contiguous()
    kernel = weight.contiguous()
    other = None if residual is None else residual.permute(0, 2, 3, 1).contiguous()
    bounds = [] if inner is None else [*(float(round(v)) for v in inner[:2]), inner[2]]
    if dtype == torch.int8:  # bounds before or behind rounding are the same ones
        low, high = float(round(max(low, -128.0))), float(round(min(high, 127.0)))
    low, high = max(low, -_FINITE), min(high, _FINITE)
    steps = (list(stride), list(padding))

    call = partial(
        conv8_op, images, kernel, scale, offset, other, *steps, dtype, low, high,
        residual_gain, shift, bounds,
    )  # fmt: skip
    is_measured = True
    if is_real(images):
        out, down, across, inp = kernel.shape
        candidates = tiles(_pixels(images, kernel, *steps), out, (down, across), inp)
        key = _key(images, kernel, offset, other, *steps, dtype, bounds)
        is_measured = choose_tile(key, candidates, call)
    return result(call, is_measured=is_measured).permute(0, 3, 1, 2)
