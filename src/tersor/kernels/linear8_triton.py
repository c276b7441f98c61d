"""One Triton kernel: 8-bit product, scale, offset, activation, and the next layer's codes.

Blocks of [M, N] outputs; the grid walks down a few blocks of rows before it moves to the next columns, so
that both operands stay in the second-level cache. Both operands lie along K, as tensor cores want 8-bit
ones. Tile sizes are found by measuring, for each shape.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

_CODES = {"none": 0, "relu": 1, "gelu": 2, "gelu_tanh": 3, "silu": 4}
_TALL = (  # M, N, K, warps, stages
    (128, 256, 128, 8, 3),
    (128, 128, 128, 8, 4),
    (128, 128, 128, 4, 3),
    (64, 128, 128, 4, 4),
)
_FLAT = ((16, 64, 256, 4, 4), (16, 128, 128, 4, 5), (32, 64, 128, 4, 5), (64, 64, 128, 4, 5))
_FEW = 64  # rows up to which flat tiles are tried


def _configs(tiles: tuple[tuple[int, ...], ...]) -> list[triton.Config]:
    return [
        triton.Config({"BM": m, "BN": n, "BK": k, "GROUP": 8}, num_warps=w, num_stages=s)
        for m, n, k, w, s in tiles
    ]


@triton.jit
def _erf(x):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    """Abramowitz and Stegun 7.1.26: 1.5e-7 off at most, in half the steps of the library's."""
    a = tl.abs(x)
    t = 1.0 / (1.0 + 0.3275911 * a)
    p = 1.421413741 + t * (-1.453152027 + t * 1.061405429)
    y = 1.0 - t * (0.254829592 + t * (-0.284496736 + t * p)) * tl.exp(-a * a)
    return tl.where(x < 0, -y, y)


@triton.jit
def _activated(y, ACTIVATION: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    if ACTIVATION == 1:
        y = tl.maximum(y, 0.0)
    elif ACTIVATION == 2:
        y = 0.5 * y * (1.0 + _erf(y * 0.7071067811865476))
    elif ACTIVATION == 3:
        inner = 0.7978845608028654 * (y + 0.044715 * y * y * y)
        y = y * tl.sigmoid(2.0 * inner)
    elif ACTIVATION == 4:
        y = y * tl.sigmoid(y)
    return y


@triton.jit
def linear8_kernel(  # type: ignore[no-untyped-def]  # noqa: ANN201, PLR0915
    a_ptr, b_ptr, c_ptr, scale_ptr, offset_ptr, inverse_ptr,  # noqa: ANN001
    M, N, K, zero, low, high,  # noqa: ANN001
    IS_INT: tl.constexpr, ACTIVATION: tl.constexpr, TO_CODES: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
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
    # Rows beyond the end read the first ones again: what they give is not stored.
    a = a_ptr + (offs_m % M).to(tl.int64)[:, None] * K + offs_k[None, :]
    b = b_ptr + (offs_n % N).to(tl.int64)[None, :] * K + offs_k[:, None]
    if IS_INT:
        total = tl.zeros((BM, BN), dtype=tl.int32)
    else:
        total = tl.zeros((BM, BN), dtype=tl.float32)
    for k in range(0, tl.cdiv(K, BK)):
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
    y = total.to(tl.float32) * scale[None, :] + offset[None, :]
    y = _activated(y, ACTIVATION)
    if TO_CODES:
        inverse = tl.load(inverse_ptr + offs_n, mask=inside_n, other=0.0)
        y = y * inverse[None, :] + zero
        if IS_INT:
            # Adding 1.5 * 2**23 leaves whole numbers, rounded half to even as torch does.
            y = tl.minimum(tl.maximum(y, low), high)
            y = (y + 12582912.0) - 12582912.0
        else:
            y = tl.minimum(tl.maximum(y, low), high)
    c = c_ptr + offs_m.to(tl.int64)[:, None] * N + offs_n[None, :]
    inside = (offs_m < M)[:, None] & inside_n[None, :]
    tl.store(c, y.to(c_ptr.dtype.element_ty), mask=inside)


_tall = triton.autotune(_configs(_TALL), key=["M", "N", "K"])(linear8_kernel)
_flat = triton.autotune(_configs(_FLAT), key=["M", "N", "K"])(linear8_kernel)


@triton_op("tersor::linear8", mutates_args={})
def linear8_op(
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
    """[rows, inp] x [out, inp] -> [rows, out]."""
    M, K = codes.shape
    N = weight.shape[0]
    result = torch.empty((M, N), dtype=dtype, device=codes.device)

    def grid(meta: dict[str, int]) -> tuple[int]:
        return (triton.cdiv(M, meta["BM"]) * triton.cdiv(N, meta["BN"]),)

    wrap_triton(_flat if M <= _FEW else _tall)[grid](
        codes, weight, result, scale, offset, inverse, M, N, K, zero, low, high,
        IS_INT=codes.dtype == torch.int8, ACTIVATION=activation, TO_CODES=to_codes,
    )  # fmt: skip
    return result


def linear8_cuda(
    codes: Tensor,
    weight: Tensor,
    scale: Tensor,
    offset: Tensor,
    dtype: torch.dtype,
    activation: str,
    inverse: Tensor | None,
    zero: float,
    low: int,
    high: int,
) -> Tensor:
    """As ``linear8.linear8``, by the kernel."""
    rows = codes.reshape(-1, codes.shape[-1]).contiguous()
    limit = float(high) if dtype == torch.int8 or inverse is None else torch.finfo(dtype).max
    least = float(low) if dtype == torch.int8 or inverse is None else -limit
    found: Tensor = linear8_op(
        rows, weight, scale, offset, scale if inverse is None else inverse,
        dtype, _CODES[activation], inverse is not None, zero, least, limit,
    )  # fmt: skip
    return found.reshape(*codes.shape[:-1], weight.shape[0])
