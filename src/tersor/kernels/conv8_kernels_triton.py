"""Triton kernels of 8-bit convolutions: sums of products, and what follows them.

Blocks of [pixels, output channels]: rows are pixels of the result in all images, in their order in memory.
The operand of images is gathered as it is read, zeros where a window leaves its image; nothing is
unfolded in memory. Kernels are marked @no_type_check as those of ``linear8_triton`` are.
"""

from typing import no_type_check

import triton
import triton.language as tl

# How the inner dimension is walked over: it has the input's channels of one pixel; of one pixel after
# another (whole blocks of channels); or a kernel's row at a time, whose pixels lie side by side.
POINT, TAPS, LINES = 0, 1, 2


@triton.jit
@no_type_check
def _share(a, b, c, NATIVE: tl.constexpr):  # noqa: ANN001, ANN202
    """A * b + c between 0 and 1: one instruction."""
    if NATIVE:
        return tl.inline_asm_elementwise(
            "fma.rn.sat.f32 $0, $1, $2, $3;", "=f,f,f,f", [a, b, c],
            dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    return tl.minimum(tl.maximum(a * b + c, 0.0), 1.0)


@triton.jit
@no_type_check
def _floats(values):  # noqa: ANN001, ANN202
    """Bytes as float32, by their place in the mantissa of 1.5 * 2**23: conversions are slow."""
    whole = values.to(tl.int32) + 0x4B400000
    return whole.to(tl.float32, bitcast=True) - 12582912.0


@triton.jit
@no_type_check
def _offset(  # noqa: ANN202
    m, pixels, columns, offset_ptr, M, N, H, W, OH, OW,  # noqa: ANN001
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    PH: tl.constexpr, PW: tl.constexpr, BORDER: tl.constexpr,
):  # fmt: skip
    """[1, channels], or [pixels, channels] where borders count."""
    here = columns < N
    if BORDER:
        rest = tl.minimum(m + pixels, M - 1) % (OH * OW)
        top = (rest // OW) * SH - PH
        left = (rest % OW) * SW - PW
        place = tl.maximum(-top, 0) * (PH + 1) + tl.maximum(top + KH - H, 0)
        place = place * (PW + 1) + tl.maximum(-left, 0)
        place = place * (PW + 1) + tl.maximum(left + KW - W, 0)
        offsets = offset_ptr + place[:, None] * N + columns[None, :]
        found = tl.load(offsets, mask=here[None, :], other=0.0)
    else:
        found = tl.load(offset_ptr + columns, mask=here, other=0.0)[None, :]
    return found


@triton.jit
@no_type_check
def _added(residual_ptr, at, inside):  # noqa: ANN001, ANN202
    """The residual as float32."""
    other = tl.load(residual_ptr + at, mask=inside, other=0.0)
    if other.dtype == tl.int8:
        # Starts with a widening of integers, which the compiler moves behind the exchange between threads.
        found = _floats(other)
    else:
        found = other.to(tl.float32)
    return found


@triton.jit
@no_type_check
def _inner_code(y, scale, offset, low, high, NATIVE: tl.constexpr):  # noqa: ANN001, ANN202
    """clamp(round(y * scale + offset), low, high), as float32."""
    share = 1.0 / tl.maximum(high - low, 0.5)  # bounds of codes are whole
    part = _share(y, scale * share, (offset - low) * share, NATIVE)
    return (part * (high - low) + (12582912.0 + low)) - 12582912.0


@triton.jit
@no_type_check
def _finish(  # noqa: ANN202
    total, m, pixels, columns,  # noqa: ANN001
    y_ptr, scale_ptr, offset_ptr, residual_ptr,  # noqa: ANN001
    M, N, H, W, OH, OW,  # noqa: ANN001
    gain, residual_gain, shift, low, high, inner_low, inner_high,  # noqa: ANN001
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    PH: tl.constexpr, PW: tl.constexpr, BORDER: tl.constexpr, INNER: tl.constexpr,
    RESIDUAL: tl.constexpr, ROUND: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """Scale, offset, inner codes, residual, bounds, codes; writes one block.

    What is rounded is first a share of its bounds, as an instruction that multiplies and adds ends between
    0 and 1 for nothing. Then it is put above 1.5 * 2**23, whose last bit counts 1: that rounds half to even
    as torch does, and the lowest byte is the code.
    """
    here = columns < N
    # torch's compiler hands Python's floats over in double precision (torch 2.11), which all that follows
    # would be computed in.
    gain, residual_gain, shift = (
        tl.cast(gain, tl.float32),
        tl.cast(residual_gain, tl.float32),
        tl.cast(shift, tl.float32),
    )
    low, high = tl.cast(low, tl.float32), tl.cast(high, tl.float32)
    inner_low, inner_high = tl.cast(inner_low, tl.float32), tl.cast(inner_high, tl.float32)
    scale = tl.load(scale_ptr + columns, mask=here, other=0.0)[None, :]
    offset = _offset(
        m, pixels, columns, offset_ptr, M, N, H, W, OH, OW, KH, KW, SH, SW, PH, PW, BORDER
    )
    at = (m + pixels)[:, None] * N + columns[None, :]
    inside = (pixels < M - m)[:, None] & here[None, :]
    y = total.to(tl.float32)
    if INNER:
        y = _inner_code(y, scale, offset, inner_low, inner_high, NATIVE)
        scale, offset = gain, shift
    elif RESIDUAL:
        offset += shift
    if ROUND:
        share = 1.0 / tl.maximum(high - low, 0.5)
        scale, offset, residual_gain = scale * share, (offset - low) * share, residual_gain * share
    if RESIDUAL:
        offset = _added(residual_ptr, at, inside) * residual_gain + offset
    if ROUND:
        y = _share(y, scale, offset, NATIVE) * (high - low) + (12582912.0 + low)
        y = y.to(tl.int32, bitcast=True).to(tl.int8)
    else:
        y = tl.minimum(tl.maximum(y * scale + offset, low), high)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
@no_type_check
def conv8_kernel(  # noqa: ANN201, PLR0912, PLR0915, C901
    x_ptr, w_ptr, y_ptr, parts_ptr, scale_ptr, offset_ptr, residual_ptr,  # noqa: ANN001
    M, N, H, W, OH, OW, UNITS, STEPS, SHARE,  # noqa: ANN001
    gain, residual_gain, shift, low, high, inner_low, inner_high,  # noqa: ANN001
    UNIT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    PH: tl.constexpr, PW: tl.constexpr, WALK: tl.constexpr, BLOCKS: tl.constexpr,
    EVEN: tl.constexpr, IS_INT: tl.constexpr, BORDER: tl.constexpr, INNER: tl.constexpr,
    RESIDUAL: tl.constexpr, ROUND: tl.constexpr, NATIVE: tl.constexpr, IS_SHARE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One block of the result, or of the sums over a share of the steps.

    A step is ``BK`` of the inner dimension. ``UNITS * UNIT`` input channels: what a compiler knows of the
    second factor lets it read as many codes at once. All addresses have 32 bits.
    """
    C = UNITS * UNIT
    pid = tl.program_id(0)
    rows, lines = tl.cdiv(M, BM), tl.cdiv(N, BN)
    width = GROUP * lines
    first = (pid // width) * GROUP
    size = tl.minimum(rows - first, GROUP)
    m = (first + (pid % width) % size) * BM
    n = ((pid % width) // size) * BN
    # Rows beyond the end read the last one again: what they give is not stored.
    pixels = tl.minimum(m + tl.arange(0, BM), M - 1)
    columns = tl.minimum(n + tl.arange(0, BN), N - 1)
    inner = tl.arange(0, BK)
    is_plain: tl.constexpr = WALK == 0 and SH == 1 and SW == 1
    if is_plain:
        base = pixels * C
        top, left = pixels, pixels  # of no use
    else:
        rest = pixels % (OH * OW)
        top = (rest // OW) * SH - PH
        left = (rest % OW) * SW - PW
        base = (((pixels // (OH * OW)) * H + top) * W + left) * C
    weights = columns * (KH * KW) * C
    if IS_INT:
        total = tl.zeros((BM, BN), dtype=tl.int32)
    else:
        total = tl.zeros((BM, BN), dtype=tl.float32)
    begin = tl.program_id(1) * SHARE
    for step in range(begin, tl.minimum(begin + SHARE, STEPS)):
        if WALK == 0:
            at = step * BK + inner
            x_at = base[:, None] + at[None, :]
            w_at = weights[None, :] + at[:, None]
            good = at < C  # a kernel of one pixel has no padding
            x_good = good[None, :]
        elif WALK == 1:
            tap = step // BLOCKS
            kh, kw = tap // KW, tap % KW
            x_at = (base + (kh * W + kw) * C + (step % BLOCKS) * BK)[:, None] + inner[None, :]
            w_at = weights[None, :] + (step * BK + inner)[:, None]
            y_in, x_in = top + kh, left + kw
            is_in = (y_in >= 0) & (y_in < H) & (x_in >= 0) & (x_in < W)
            good = inner < BK
            x_good = is_in[:, None]
        else:
            kh = step // BLOCKS
            at = (step % BLOCKS) * BK + inner
            x_at = (base + kh * W * C)[:, None] + at[None, :]
            w_at = weights[None, :] + (kh * KW * C + at)[:, None]
            good = at < KW * C
            y_in = top + kh
            x_in = (left * C)[:, None] + at[None, :]
            x_good = ((y_in >= 0) & (y_in < H))[:, None] & (x_in >= 0) & (x_in < W * C)
            x_good = x_good & good[None, :]
        if WALK == 0 and EVEN:
            a = tl.load(x_ptr + x_at)
        else:
            a = tl.load(x_ptr + x_at, mask=x_good, other=0.0)
        if EVEN:
            b = tl.load(w_ptr + w_at)
        else:
            b = tl.load(w_ptr + w_at, mask=good[:, None], other=0.0)
        if IS_INT:
            total = tl.dot(a, b, total, out_dtype=tl.int32)
        else:
            total = tl.dot(a, b, total)
    pixels, columns = tl.arange(0, BM), n + tl.arange(0, BN)
    if IS_SHARE:
        at = (m + pixels)[:, None] * N + columns[None, :]
        inside = (pixels < M - m)[:, None] & (columns < N)[None, :]
        tl.store(parts_ptr + tl.program_id(1) * M * N + at, total, mask=inside)
    else:
        _finish(
            total, m, pixels, columns, y_ptr, scale_ptr, offset_ptr, residual_ptr,
            M, N, H, W, OH, OW, gain, residual_gain, shift, low, high, inner_low, inner_high,
            KH, KW, SH, SW, PH, PW, BORDER, INNER, RESIDUAL, ROUND, NATIVE,
        )  # fmt: skip


@triton.jit
@no_type_check
def conv8_finish_kernel(  # noqa: ANN201
    parts_ptr, y_ptr, scale_ptr, offset_ptr, residual_ptr,  # noqa: ANN001
    SPLITS, M, N, H, W, OH, OW,  # noqa: ANN001
    gain, residual_gain, shift, low, high, inner_low, inner_high,  # noqa: ANN001
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    PH: tl.constexpr, PW: tl.constexpr, BORDER: tl.constexpr, INNER: tl.constexpr,
    RESIDUAL: tl.constexpr, ROUND: tl.constexpr, NATIVE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Adds the shares' sums, in their order, and finishes a block."""
    m, n = tl.program_id(0) * BM, tl.program_id(1) * BN
    pixels, columns = tl.arange(0, BM), n + tl.arange(0, BN)
    at = (m + pixels)[:, None] * N + columns[None, :]
    inside = (pixels < M - m)[:, None] & (columns < N)[None, :]
    total = tl.load(parts_ptr + at, mask=inside, other=0)
    for split in range(1, SPLITS):
        total += tl.load(parts_ptr + split * M * N + at, mask=inside, other=0)
    _finish(
        total, m, pixels, columns, y_ptr, scale_ptr, offset_ptr, residual_ptr,
        M, N, H, W, OH, OW, gain, residual_gain, shift, low, high, inner_low, inner_high,
        KH, KW, SH, SW, PH, PW, BORDER, INNER, RESIDUAL, ROUND, NATIVE,
    )  # fmt: skip
