"""``narrow_linear`` on a CUDA device: which tile a shape gets, and the call.

A norm behind the product needs whole rows in a program, so that its tiles are as wide as a row. Which tile is
measured when a call is first made outside of a compiler (``tiles``).
"""

from functools import cache, partial
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.library import triton_op, wrap_triton

from tersor.kernels.activations_triton import ACTIVATION_CODES, HAS_ASSEMBLY
from tersor.kernels.narrow_encoder_kernels_triton import narrow_linear_kernel
from tersor.kernels.tiles import Chosen, Size, choose, is_real, result


class Tile(NamedTuple):
    """Rows of a tile, inputs of a step, columns of a sum, sums in a row, warps and stages."""

    rows: int
    step: int
    columns: int
    sums: int
    warps: int
    stages: int


# The fastest at the shapes of a ViT of 192 channels and of MiniLM at batch 64 (H200), the one to expect most of first.
_PLAIN = (Tile(64, 64, 128, 1, 4, 3), Tile(128, 64, 128, 1, 8, 3))
_FEW = (Tile(16, 64, 64, 1, 4, 4), Tile(32, 64, 64, 1, 4, 4))
_FEW_ROWS = 1024  # up to which those are tried
_PARTS = (64, 128)  # columns of a sum where a row is normed
_MOST_SUMS = 4
_Key = tuple[Any, ...]
_CHOSEN: Chosen[_Key, Tile] = Chosen()


def run(
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
    tile: Tile,
) -> Tensor:
    """The layer in one tile; as ``narrow_linear.narrow_linear`` otherwise, of x without gaps."""
    z = x.new_empty(*x.shape[:-1], width)
    if isinstance(x.numel(), int) and not x.numel():
        return z
    launch(
        x, weight, bias, Parts(sums=sums, added=added, scale=scale, shift=shift), z, width, activation,
        (first_eps, last_eps), tile,
    )  # fmt: skip
    return z


class Parts(NamedTuple):
    """Tensors of a layer that may be missing: see ``narrow_linear`` and ``narrow_linear8``."""

    factor: Tensor | None = None
    sums: Tensor | None = None
    added: Tensor | None = None
    scale: Tensor | None = None
    shift: Tensor | None = None


class Written(NamedTuple):
    """Codes that are written beside the floats, or in their place; of 8-bit floats also as they were before rounding."""

    codes: Tensor
    inverse: float
    zero: float
    low: float
    high: float


EIGHTS = {torch.int8: 1, torch.float8_e4m3fn: 2}


def launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    parts: Parts,
    z: Tensor | None,
    width: int,
    activation: str,
    eps: tuple[float, float],
    tile: "Tile",
    written: Written | None = None,
) -> None:
    """Write ``z``, and codes where they are wanted."""
    inputs, eight = x.shape[-1], EIGHTS.get(x.dtype, 0)
    filled, columns = weight.shape[::-1] if eight else weight.shape
    factor, sums, added, scale, shift = parts
    rows = x.numel() // inputs
    programs = (triton.cdiv(rows, tile.rows) * triton.cdiv(width, tile.columns * tile.sums),)
    codes, inverse, zero, low, high = written or Written(x, 1.0, 0.0, 0.0, 0.0)
    wrap_triton(_tiled(narrow_linear_kernel, tile))[programs](
        x, weight, bias if factor is None else factor, bias, bias if sums is None else sums,
        x if added is None else added, bias if scale is None else scale, bias if shift is None else shift,
        codes if z is None else z, codes, rows, *eps, inverse, zero, low, high,
        K=inputs, KP=filled, D=width, DP=columns, EIGHT=eight, NORM_FIRST=sums is not None,
        ACTIVATION=ACTIVATION_CODES[activation], SHORT=HAS_ASSEMBLY, ADD=added is not None,
        NORM_LAST=scale is not None, FLOATS=z is not None,
        CODES=0 if written is None else EIGHTS.get(codes.dtype, 2),
    )  # fmt: skip


@cache
def _tiled(kernel: Any, tile: Tile) -> Any:
    """The kernel with one tile: a list of one, so that no compiler has anything to tune."""
    sizes = {
        "BM": tile.rows, "BK": tile.step, "C": tile.columns, "N": tile.sums, "STAGES": tile.stages,
    }  # fmt: skip
    config = triton.Config(sizes, num_warps=tile.warps, num_stages=tile.stages)
    return triton.autotune([config], key=[])(kernel)


def tiles(rows: Any, width: int, *, is_normed: bool) -> tuple[Tile, ...]:
    """What is worth measuring, the one to expect most of first.

    Args:
        rows: Of x; not a number where it is open.
        width: Outputs.
        is_normed: Rows are normed behind the product.
    """
    is_few = isinstance(rows, int) and rows <= _FEW_ROWS
    if not is_normed:
        return (*_FEW, *_PLAIN[:1]) if is_few else _PLAIN
    columns = next(c for c in _PARTS if c * _MOST_SUMS >= width)
    sums = -(-width // columns)
    wide = (Tile(64, 64, columns, sums, 8, 3), Tile(64, 32, columns, sums, 8, 4))
    return (Tile(16, 64, columns, sums, 4, 3), *wide[:1]) if is_few else wide


def _key(
    x: Tensor, width: int, activation: str, *, has_first: bool, has_added: bool, has_last: bool
) -> _Key:
    rows = x.numel() // x.shape[-1]
    flags = (activation, has_first, has_added, has_last)
    return (Size(rows), Size(x.shape[-1]), Size(width), *flags, x.dtype, str(x.device))


@triton_op("tersor::narrow_linear", mutates_args={})
def narrow_linear_op(
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
    """[..., width] of x without gaps; on other devices than CUDA the reference."""
    if not x.is_cuda:
        from tersor.kernels.narrow_linear import narrow_linear_reference

        return narrow_linear_reference(
            x, weight, bias, sums, added, scale, shift, width, activation, first_eps, last_eps
        )
    rows: Any = x.numel() // x.shape[-1]
    tile = tiles(rows, width, is_normed=scale is not None)[0]
    if isinstance(rows, int):  # else open: any number of rows
        flags = {"has_first": sums is not None, "has_added": added is not None}
        key = _key(x, width, activation, has_last=scale is not None, **flags)
        tile = _CHOSEN.get(key, tile)
    return run(
        x, weight, bias, sums, added, scale, shift, width, activation, first_eps, last_eps, tile
    )


def narrow_linear_cuda(
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
    """As ``narrow_linear.narrow_linear``, by the kernel."""
    arguments = (x, weight, bias, sums, added, scale, shift, width, activation, first_eps, last_eps)
    call: partial[Tensor] = partial(narrow_linear_op, *arguments)
    if not is_real(x) or not x.numel():
        return call()
    flags = {"has_first": sums is not None, "has_added": added is not None}
    key = _key(x, width, activation, has_last=scale is not None, **flags)
    known = tiles(x.numel() // x.shape[-1], width, is_normed=scale is not None)
    return result(call, is_measured=choose(_CHOSEN, key, known, call, alike))


def alike(one: Tile, other: Tile) -> bool:
    """Whether two tiles are the same but for what a row's width gives."""
    return one._replace(columns=0, sums=0) == other._replace(columns=0, sums=0)
