"""``narrow_linear`` on a CUDA device: which tile a shape gets, and the call.

A norm behind the product needs whole rows in a program, so that its tiles are as wide as a row. Which tile is
measured when a call is first made outside of a compiler (``tiles``).
"""

from functools import cache, partial
from typing import Any, NamedTuple

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
    inputs = x.shape[-1]
    z = x.new_empty(*x.shape[:-1], width)
    rows = x.numel() // inputs
    if isinstance(rows, int) and not rows:
        return z
    programs = (triton.cdiv(rows, tile.rows) * triton.cdiv(width, tile.columns * tile.sums),)
    wrap_triton(_tiled(narrow_linear_kernel, tile))[programs](
        x, weight, bias, bias if sums is None else sums, x if added is None else added,
        bias if scale is None else scale, bias if shift is None else shift, z, rows, first_eps, last_eps,
        K=inputs, KP=weight.shape[0], D=width, DP=weight.shape[1], NORM_FIRST=sums is not None,
        ACTIVATION=ACTIVATION_CODES[activation], SHORT=HAS_ASSEMBLY, ADD=added is not None,
        NORM_LAST=scale is not None,
    )  # fmt: skip
    return z


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
    return result(call, is_measured=choose(_CHOSEN, key, known, call, _alike))


def _alike(one: Tile, other: Tile) -> bool:
    """The same but for what a row's width gives."""
    return one._replace(columns=0, sums=0) == other._replace(columns=0, sums=0)
