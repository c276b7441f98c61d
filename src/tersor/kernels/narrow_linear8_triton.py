"""``narrow_linear8`` on a CUDA device: which tile a shape gets, and the call; the kernel is that of ``narrow_linear``."""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.library import triton_op

from tersor.kernels.narrow_linear8 import Layer, narrow_linear8_reference
from tersor.kernels.narrow_linear_triton import Parts, Tile, Written, alike, launch
from tersor.kernels.narrow_linear_triton import tiles as float_tiles
from tersor.kernels.tiles import Chosen, Size, choose, is_real, results

_PLAIN = (Tile(128, 128, 128, 1, 8, 3), Tile(64, 128, 128, 1, 4, 4), Tile(128, 128, 128, 1, 4, 3))
_FEW = (Tile(16, 128, 64, 1, 4, 4), Tile(32, 128, 64, 1, 4, 4))
_FEW_ROWS = 1024  # up to which those are tried
_PARTS = (64, 128)  # columns of a sum where a row is normed
_MOST_SUMS = 4
_LIMIT = torch.finfo(torch.float8_e4m3fn).max
_Key = tuple[Any, ...]
_CHOSEN: Chosen[_Key, Tile] = Chosen()


def run(x: Tensor, layer: Layer, tile: Tile) -> tuple[Tensor, Tensor]:
    """The layer in one tile; as ``narrow_linear8.narrow_linear8`` otherwise, of x without gaps."""
    shape = (*x.shape[:-1], layer.width)
    z = x.new_empty(shape if layer.is_written else (0,), dtype=layer.half)
    coded = x.new_empty(0, dtype=torch.float32)
    written = None
    if layer.codes is not None:
        coded = x.new_empty(shape, dtype=layer.codes)
        grid = (0.0, -_LIMIT, _LIMIT)
        if layer.codes == torch.int8:
            grid = (float(layer.zero), float(layer.low), float(layer.high))
        written = Written(coded, 1.0 / layer.step, *grid)
    is_empty = isinstance(x.numel(), int) and not x.numel()
    if not is_empty and (layer.is_written or written is not None):
        parts = Parts(layer.factor, layer.sums, layer.added, layer.scale, layer.shift)
        launch(
            x, layer.weight, layer.bias, parts, z if layer.is_written else None, layer.width,
            layer.activation, (layer.first_eps, layer.last_eps), tile, written,
        )  # fmt: skip
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


def _key(x: Tensor, layer: Layer) -> _Key:
    """Sizes, and all that makes another kernel."""
    flags = tuple(t is not None for t in (layer.sums, layer.added, layer.scale))
    sizes = (Size(x.numel() // x.shape[-1]), Size(x.shape[-1]), Size(layer.width))
    types = (x.dtype, layer.half, layer.codes, str(x.device))
    return (*sizes, layer.activation, *flags, layer.is_written, *types)


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
    layer = Layer(
        weight, factor, bias, sums, added, scale, shift, width, activation, first_eps, last_eps, half,
        is_written, codes, step, zero, low, high,
    )  # fmt: skip
    if not x.is_cuda:
        return narrow_linear8_reference(x, *layer)
    tile = tiles(x, width, is_normed=scale is not None)[0]
    if isinstance(x.numel(), int):  # else open: any number of rows
        tile = _CHOSEN.get(_key(x, layer), tile)
    return run(x, layer, tile)


def narrow_linear8_cuda(x: Tensor, layer: Layer) -> tuple[Tensor, Tensor]:
    """As ``narrow_linear8.narrow_linear8``, by the kernel."""
    call: partial[tuple[Tensor, Tensor]] = partial(narrow_linear8_op, x, *layer)
    if not is_real(x) or not x.numel():
        return call()
    known = tiles(x, layer.width, is_normed=layer.scale is not None)
    y, codes = results(call, is_measured=choose(_CHOSEN, _key(x, layer), known, call, alike))
    return y, codes
