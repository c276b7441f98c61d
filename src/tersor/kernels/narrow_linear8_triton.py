"""``narrow_linear8`` on a CUDA device: which tile a shape gets, and the call; the kernel is that of ``narrow_linear``."""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.library import triton_op

from tersor.kernels.narrow_linear_triton import Parts, Tile, Written, alike, launch
from tersor.kernels.narrow_linear_triton import tiles as float_tiles
from tersor.kernels.tiles import Chosen, Size, choose, is_real, results

_PLAIN = (Tile(128, 128, 128, 1, 8, 3), Tile(64, 128, 128, 1, 4, 4), Tile(128, 128, 128, 1, 4, 3))
_FEW = (Tile(16, 128, 64, 1, 4, 4), Tile(32, 128, 64, 1, 4, 4))
_FEW_ROWS = 1024  # up to which those are tried
_PARTS = (64, 128)  # columns of a sum where a row is normed
_MOST_SUMS = 4
# Places of arguments behind x.
_SUMS, _SCALE, _WIDTH, _HALF = 3, 5, 7, 11
_LIMIT = torch.finfo(torch.float8_e4m3fn).max
_Key = tuple[Any, ...]
_CHOSEN: Chosen[_Key, Tile] = Chosen()


def run(
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
    tile: Tile,
) -> tuple[Tensor, Tensor]:
    """The layer in one tile; as ``narrow_linear8.narrow_linear8`` otherwise, of x without gaps."""
    shape = (*x.shape[:-1], width)
    z = x.new_empty(shape if is_written else (0,), dtype=half)
    coded = x.new_empty(0, dtype=torch.float32)
    written = None
    if codes is not None:
        coded = x.new_empty(shape, dtype=codes)
        grid = (
            (float(zero), float(low), float(high))
            if codes == torch.int8
            else (0.0, -_LIMIT, _LIMIT)
        )
        written = Written(coded, 1.0 / step, *grid)
    is_empty = isinstance(x.numel(), int) and not x.numel()
    if not is_empty and (is_written or codes is not None):
        parts = Parts(factor, sums, added, scale, shift)
        eps = (first_eps, last_eps)
        launch(
            x, weight, bias, parts, z if is_written else None, width, activation, eps, tile, written
        )
    return z, coded


def tiles(x: Tensor, width: int, *, is_normed: bool) -> tuple[Tile, ...]:
    """What is worth measuring, the one to expect most of first.

    Args:
        x: What is read.
        width: Outputs.
        is_normed: Rows are normed behind the product.
    """
    rows: Any = x.numel() // x.shape[-1]
    if x.dtype.itemsize > 1:
        return float_tiles(rows, width, is_normed=is_normed)
    is_few = isinstance(rows, int) and rows <= _FEW_ROWS
    if not is_normed:
        return (*_FEW, *_PLAIN[1:2]) if is_few else _PLAIN
    columns = next(c for c in _PARTS if c * _MOST_SUMS >= width)
    sums = -(-width // columns)
    wide = (Tile(64, 128, columns, sums, 8, 3), Tile(64, 64, columns, sums, 8, 4))
    return (Tile(16, 128, columns, sums, 4, 3), *wide[:1]) if is_few else wide


def _key(x: Tensor, arguments: tuple[Any, ...]) -> _Key:
    """Sizes, and all that makes another kernel."""
    sums, added, scale = arguments[_SUMS : _SCALE + 1]
    flags = (sums is not None, added is not None, scale is not None)
    rows, width = x.numel() // x.shape[-1], arguments[_WIDTH]
    activation, kinds = arguments[_WIDTH + 1], arguments[_HALF : _HALF + 3]
    return (
        Size(rows),
        Size(x.shape[-1]),
        Size(width),
        activation,
        *flags,
        x.dtype,
        *kinds,
        str(x.device),
    )


@triton_op("tersor::narrow_linear8", mutates_args={})
def narrow_linear8_op(
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
    """Y and codes [..., width] of x without gaps; on other devices than CUDA the reference."""
    arguments = (
        weight, factor, bias, sums, added, scale, shift, width, activation, first_eps, last_eps, half,
        is_written, codes, step, zero, low, high,
    )  # fmt: skip
    if not x.is_cuda:
        from tersor.kernels.narrow_linear8 import narrow_linear8_reference

        return narrow_linear8_reference(x, *arguments)
    tile = tiles(x, width, is_normed=scale is not None)[0]
    if isinstance(x.numel(), int):  # else open: any number of rows
        tile = _CHOSEN.get(_key(x, arguments), tile)
    return run(x, *arguments, tile)


def narrow_linear8_cuda(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    """As ``narrow_linear8.narrow_linear8``, by the kernel."""
    call: partial[tuple[Tensor, Tensor]] = partial(narrow_linear8_op, x, *arguments)
    if not is_real(x) or not x.numel():
        return call()
    width, scale = arguments[_WIDTH], arguments[_SCALE]
    known = tiles(x, width, is_normed=scale is not None)
    y, codes = results(call, is_measured=choose(_CHOSEN, _key(x, arguments), known, call, alike))
    return y, codes
