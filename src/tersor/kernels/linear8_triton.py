"""One Triton kernel: 8-bit product, scale, offset, activation, and the next layer's codes.

Blocks of [M, N] outputs; the grid walks down a few blocks of rows before it moves to the next columns, so
that both operands stay in the second-level cache. Both operands lie along K, as tensor cores want 8-bit
ones. Tiles are chosen by measuring, for each shape (``tiles``).
"""

from collections.abc import Callable
from functools import cache
from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from tersor.kernels.activations_triton import HAS_ASSEMBLY, activated
from tersor.kernels.tiles import Chosen, choose

Tile = tuple[int, int, int, int, int]  # M, N, K, warps, stages
# The first of each is the fastest at most shapes of BERT-base (H200): two blocks of four warps share a
# multiprocessor, so that one multiplies while the other one finishes its results.
_TALL: tuple[Tile, ...] = ((128, 128, 128, 4, 3), (128, 128, 64, 4, 4), (64, 128, 128, 4, 4))
_FLAT: tuple[Tile, ...] = (
    (16, 128, 128, 4, 5), (16, 64, 256, 4, 4), (32, 64, 128, 4, 5), (64, 64, 128, 4, 5),
)  # fmt: skip
_FINISH = (16, 256)  # rows and columns of a block that follows a library's product
_FEW = 64  # rows up to which flat tiles are tried
_GROUP = 8
# Kernels are marked @no_type_check: a checker of types wraps functions, and Triton would look for their
# names in the wrapper's module.
Key = tuple[int, int, int, torch.dtype, torch.dtype, int, str]
CHOSEN: Chosen[Key, Tile] = Chosen()


@triton.jit
@no_type_check
def _finished(  # noqa: ANN202
    total, scale, offset, inverse, zero, low, high,  # noqa: ANN001
    ACTIVATION: tl.constexpr, TO_CODES: tl.constexpr, ROUNDS: tl.constexpr, SHORT: tl.constexpr,
):  # fmt: skip
    """Products [M, N] -> what is stored (``epilogue.finished``)."""
    # torch's compiler hands Python's floats over in double precision (torch 2.11), which all that follows
    # would be computed in.
    zero, low, high = tl.cast(zero, tl.float32), tl.cast(low, tl.float32), tl.cast(high, tl.float32)
    y = activated(total.to(tl.float32) * scale[None, :] + offset[None, :], ACTIVATION, SHORT)
    if TO_CODES:
        y = tl.minimum(tl.maximum(y * inverse[None, :] + zero, low), high)
        if ROUNDS:
            # Adding 1.5 * 2**23 leaves whole numbers, rounded half to even as torch does.
            y = (y + 12582912.0) - 12582912.0
    return y


@triton.jit
@no_type_check
def linear8_finish_kernel(  # noqa: ANN201
    total_ptr, c_ptr, scale_ptr, offset_ptr, inverse_ptr,  # noqa: ANN001
    M, N, zero, low, high,  # noqa: ANN001
    ACTIVATION: tl.constexpr, TO_CODES: tl.constexpr, ROUNDS: tl.constexpr, SHORT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """One block of what follows a library's product."""
    m, n = tl.program_id(0).to(tl.int64), tl.program_id(1)
    offs_m, offs_n = m * BM + tl.arange(0, BM), n * BN + tl.arange(0, BN)
    inside_n = offs_n < N
    inside = (offs_m < M)[:, None] & inside_n[None, :]
    places = offs_m[:, None] * N + offs_n[None, :]
    total = tl.load(total_ptr + places, mask=inside, other=0.0)
    scale = tl.load(scale_ptr + offs_n, mask=inside_n, other=0.0)
    offset = tl.load(offset_ptr + offs_n, mask=inside_n, other=0.0)
    inverse = scale
    if TO_CODES:
        inverse = tl.load(inverse_ptr + offs_n, mask=inside_n, other=0.0)
    y = _finished(
        total, scale, offset, inverse, zero, low, high, ACTIVATION, TO_CODES, ROUNDS, SHORT
    )
    tl.store(c_ptr + places, y.to(c_ptr.dtype.element_ty), mask=inside)


@triton.jit
@no_type_check
def linear8_kernel(  # noqa: ANN201, PLR0915
    a_ptr, b_ptr, c_ptr, scale_ptr, offset_ptr, inverse_ptr,  # noqa: ANN001
    M, N, K, zero, low, high,  # noqa: ANN001
    IS_INT: tl.constexpr, ACTIVATION: tl.constexpr, TO_CODES: tl.constexpr, ROUNDS: tl.constexpr,
    SHORT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """One block of the result."""
    pid = tl.program_id(0)
    rows, columns = tl.cdiv(M, BM), tl.cdiv(N, BN)
    width = GROUP * columns
    first = (pid // width) * GROUP
    size = tl.minimum(rows - first, GROUP)
    m = first + (pid % width) % size
    n = (pid % width) // size
    offs_m = m * BM + tl.arange(0, BM)
    offs_n = n * BN + tl.arange(0, BN)
    offs_k = tl.arange(0, BK)
    # Offsets within a block have 32 bits, which halves the registers of addresses. Rows beyond the end
    # read the last one again: what they give is not stored.
    rows_m = tl.minimum(tl.arange(0, BM), M - 1 - m * BM)
    rows_n = tl.minimum(tl.arange(0, BN), N - 1 - n * BN)
    a = a_ptr + (m * BM).to(tl.int64) * K + rows_m[:, None] * K + offs_k[None, :]
    b = b_ptr + (n * BN).to(tl.int64) * K + rows_n[None, :] * K + offs_k[:, None]
    if IS_INT:
        total = tl.zeros((BM, BN), dtype=tl.int32)
    else:
        total = tl.zeros((BM, BN), dtype=tl.float32)
    for k in range(STEPS):  # blocks of K
        left = K - k * BK
        x = tl.load(a, mask=offs_k[None, :] < left, other=0.0)
        w = tl.load(b, mask=offs_k[:, None] < left, other=0.0)
        if IS_INT:
            total = tl.dot(x, w, total, out_dtype=tl.int32)
        else:
            total = tl.dot(x, w, total)
        a += BK
        b += BK
    inside_n = offs_n < N
    scale = tl.load(scale_ptr + offs_n, mask=inside_n, other=0.0)
    offset = tl.load(offset_ptr + offs_n, mask=inside_n, other=0.0)
    inverse = scale
    if TO_CODES:
        inverse = tl.load(inverse_ptr + offs_n, mask=inside_n, other=0.0)
    y = _finished(
        total, scale, offset, inverse, zero, low, high, ACTIVATION, TO_CODES, ROUNDS, SHORT
    )
    c = c_ptr + (m * BM).to(tl.int64) * N + tl.arange(0, BM)[:, None] * N + offs_n[None, :]
    inside = (offs_m < M)[:, None] & inside_n[None, :]
    tl.store(c, y.to(c_ptr.dtype.element_ty), mask=inside)


@cache
def _tiled(tile: Tile) -> Any:
    """The kernel with one tile: a list of one, so that no compiler has anything to tune."""
    m, n, k, warps, stages = tile
    sizes = {"BM": m, "BN": n, "BK": k, "GROUP": _GROUP}
    config = triton.Config(sizes, num_warps=warps, num_stages=stages)
    return triton.autotune([config], key=[])(linear8_kernel)


def _tiles(rows: int) -> tuple[Tile, ...]:
    return _FLAT if rows <= _FEW else _TALL


def choose_tile(key: Key, call: Callable[[], object]) -> bool:
    """Measure a shape's tiles by recorded calls on the device, once a process, and keep the fastest.

    Args:
        key: What tells calls of different speeds apart.
        call: The call itself; it reads ``CHOSEN``.

    Returns:
        Whether anything was measured.

    Raises:
        OutOfResources: The device has no room for any tile.
    """
    return choose(CHOSEN, key, _tiles(key[0]), call)


def launch(
    codes: Tensor,
    weight: Tensor,
    scale: Tensor,
    offset: Tensor,
    inverse: Tensor,
    dtype: torch.dtype,
    activation: int,
    to_codes: bool,
    zero: float,
    low: float,
    high: float,
) -> Tensor:
    """[rows, inp] x [out, inp] -> [rows, out] by the fused kernel."""
    M, K = codes.shape
    N = weight.shape[0]
    result = torch.empty((M, N), dtype=dtype, device=codes.device)
    tile = _tile_of(codes, weight, dtype, activation)

    def grid(meta: dict[str, Any]) -> tuple[int]:
        return (triton.cdiv(M, meta["BM"]) * triton.cdiv(N, meta["BN"]),)

    wrap_triton(_tiled(tile))[grid](
        codes, weight, result, scale, offset, inverse, M, N, K, zero, low, high,
        IS_INT=codes.dtype == torch.int8, ACTIVATION=activation, TO_CODES=to_codes,
        ROUNDS=dtype == torch.int8, SHORT=to_codes and HAS_ASSEMBLY, STEPS=triton.cdiv(K, tile[2]),
    )  # fmt: skip
    return result


def finish(
    total: Tensor,
    scale: Tensor,
    offset: Tensor,
    inverse: Tensor,
    dtype: torch.dtype,
    activation: int,
    to_codes: bool,
    zero: float,
    low: float,
    high: float,
) -> Tensor:
    """What follows a library's product [rows, out], by one kernel."""
    M, N = total.shape
    result = torch.empty((M, N), dtype=dtype, device=total.device)
    wrap_triton(linear8_finish_kernel)[(triton.cdiv(M, _FINISH[0]), triton.cdiv(N, _FINISH[1]))](
        total, result, scale, offset, inverse, M, N, zero, low, high,
        ACTIVATION=activation, TO_CODES=to_codes, ROUNDS=dtype == torch.int8,
        SHORT=to_codes and HAS_ASSEMBLY, BM=_FINISH[0], BN=_FINISH[1],
    )  # fmt: skip
    return result


def _tile_of(codes: Tensor, weight: Tensor, dtype: torch.dtype, activation: int) -> Tile:
    rows: Any = codes.shape[0]
    if not isinstance(rows, int):  # open: any number of rows
        return _TALL[0]
    return CHOSEN.get(key_of(codes, weight, dtype, activation), _tiles(rows)[0])


def key_of(codes: Tensor, weight: Tensor, dtype: torch.dtype, activation: int) -> Key:
    """What tells calls of different speeds apart."""
    rows, inp = codes.shape
    device = str(codes.device)
    return (rows, inp, weight.shape[0], codes.dtype, dtype, activation, device)
