"""Triton kernels of ``narrow_block``: 3x3 convolutions of few channels as products, one or two a launch.

A convolution is nine products of [pixels, channels] by [channels, outputs], their left sides read where they
lie: images have their channels last, so that a tap of a pixel is a run of channels. What lies outside of an
image is a masked load. Nine shifted reads of one pixel come from the first-level cache; that is also how the
second convolution of a block gets its input with its neighbours: a program computes whole images, writes
what is between the convolutions, waits for its own threads, and reads it again, shifted, while it is still
in a cache.

Letters: H, W of the input, OH, OW of the result, CI, CM, CO channels read, between the convolutions and written, as
products have them, NI, NO how many of those read and written there are in memory, S stride, BM pixels of a tile.
Kernels are marked @no_type_check: a checker of types wraps functions, and Triton would look for their names
in the wrapper's module.
"""

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check
def _weight(w_ptr, tap: tl.constexpr, CI: tl.constexpr, CO: tl.constexpr):  # noqa: ANN001, ANN202
    """One tap, [CI, CO]."""
    k = tl.arange(0, CI)
    n = tl.arange(0, CO)
    return tl.load(w_ptr + (tap * CI + k)[:, None] * CO + n[None, :])


@triton.jit
@no_type_check
def _weights(w_ptr, CI: tl.constexpr, CO: tl.constexpr, KEEP: tl.constexpr):  # noqa: ANN001, ANN202
    """All nine taps where they are kept in shared memory, or else what they are loaded from."""
    if not KEEP:
        found = w_ptr
    else:
        found = (
            _weight(w_ptr, 0, CI, CO), _weight(w_ptr, 1, CI, CO), _weight(w_ptr, 2, CI, CO),
            _weight(w_ptr, 3, CI, CO), _weight(w_ptr, 4, CI, CO), _weight(w_ptr, 5, CI, CO),
            _weight(w_ptr, 6, CI, CO), _weight(w_ptr, 7, CI, CO), _weight(w_ptr, 8, CI, CO),
        )  # fmt: skip
    return found


@triton.jit
@no_type_check
def _tap(  # noqa: ANN202
    x_ptr, weights, tap: tl.constexpr, row, column, pixel, is_inside,  # noqa: ANN001
    H: tl.constexpr, W: tl.constexpr, NI: tl.constexpr, CI: tl.constexpr, CO: tl.constexpr,
    KEEP: tl.constexpr,
):  # fmt: skip
    """What one product multiplies: [BM, CI] of the image and [CI, CO] of the weight."""
    k = tl.arange(0, CI)
    dy = tap // 3 - 1
    dx = tap % 3 - 1
    is_row = is_inside & (row + dy >= 0) & (row + dy < H)
    mask = (is_row & (column + dx >= 0) & (column + dx < W))[:, None]
    if NI != CI:
        mask = mask & (k < NI)[None, :]
    x = tl.load(x_ptr + ((pixel + dy * W + dx) * NI)[:, None] + k[None, :], mask=mask, other=0.0)
    if KEEP:
        w = weights[tap]
    else:
        w = _weight(weights, tap, CI, CO)
    return x, w


@triton.jit
@no_type_check
def _taps(  # noqa: ANN202
    x_ptr, weights, total, image, oy, ox, is_inside,  # noqa: ANN001
    H: tl.constexpr, W: tl.constexpr, NI: tl.constexpr, CI: tl.constexpr, CO: tl.constexpr, S: tl.constexpr,
    KEEP: tl.constexpr,
):  # fmt: skip
    """Sums of a 3x3 convolution with a border of zeros, for [BM] pixels of the result.

    What the next product multiplies is loaded before this one: barriers would hold loads back otherwise.
    """
    row, column = oy * S, ox * S
    pixel = (image * H + row) * W + column
    x, w = _tap(x_ptr, weights, 0, row, column, pixel, is_inside, H, W, NI, CI, CO, KEEP)
    for tap in tl.static_range(1, 9):
        next_x, next_w = _tap(
            x_ptr, weights, tap, row, column, pixel, is_inside, H, W, NI, CI, CO, KEEP
        )
        total = tl.dot(x, w, total)
        x, w = next_x, next_w
    return tl.dot(x, w, total)


@triton.jit
@no_type_check
def _first(  # noqa: ANN202
    x_ptr, weights, bias_ptr, y_ptr, start, end,  # noqa: ANN001
    H: tl.constexpr, W: tl.constexpr, OH: tl.constexpr, OW: tl.constexpr,
    NI: tl.constexpr, CI: tl.constexpr, CO: tl.constexpr, S: tl.constexpr,
    BM: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Pixels from ``start`` on, before ``end``: relu(conv(x) + bias)."""
    p = start + tl.arange(0, BM)
    n = tl.arange(0, CO)
    is_inside = p < end
    image = p // (OH * OW)
    rest = p % (OH * OW)
    total = tl.zeros((BM, CO), dtype=tl.float32)
    total = _taps(
        x_ptr, weights, total, image, rest // OW, rest % OW, is_inside,
        H, W, NI, CI, CO, S, KEEP,
    )  # fmt: skip
    y = tl.maximum(total + tl.load(bias_ptr + n)[None, :], 0.0)
    tl.store(
        y_ptr + p[:, None] * CO + n[None, :], y.to(y_ptr.dtype.element_ty), mask=is_inside[:, None]
    )


@triton.jit
@no_type_check
def _second(  # noqa: ANN202
    y_ptr, weights, bias_ptr, x_ptr, short_ptr, z_ptr, start, end,  # noqa: ANN001
    H: tl.constexpr, W: tl.constexpr, OH: tl.constexpr, OW: tl.constexpr,
    NI: tl.constexpr, NO: tl.constexpr, CI: tl.constexpr, CM: tl.constexpr, CO: tl.constexpr,
    S: tl.constexpr, SHORT: tl.constexpr, BM: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Pixels from ``start`` on, before ``end``: relu(conv(y) + bias + x), or a product of x in its place."""
    p = start + tl.arange(0, BM)
    n = tl.arange(0, CO)
    is_inside = p < end
    image = p // (OH * OW)
    rest = p % (OH * OW)
    oy, ox = rest // OW, rest % OW
    total = tl.zeros((BM, CO), dtype=tl.float32)
    if SHORT:
        k = tl.arange(0, CI)
        pixel = (image * H + oy * S) * W + ox * S
        mask = is_inside[:, None]
        if NI != CI:
            mask = mask & (k < NI)[None, :]
        x = tl.load(x_ptr + (pixel * NI)[:, None] + k[None, :], mask=mask, other=0.0)
        total = tl.dot(x, tl.load(short_ptr + k[:, None] * CO + n[None, :]), total)
    total = _taps(y_ptr, weights, total, image, oy, ox, is_inside, OH, OW, CM, CM, CO, 1, KEEP)
    if NO != CO:
        z = total + tl.load(bias_ptr + n, mask=n < NO, other=0.0)[None, :]
    else:
        z = total + tl.load(bias_ptr + n)[None, :]
    at = p[:, None] * NO + n[None, :]
    is_real = is_inside[:, None]
    if NO != CO:
        is_real = is_real & (n < NO)[None, :]
    if not SHORT:
        z += tl.load(x_ptr + at, mask=is_real, other=0.0).to(tl.float32)
    z = tl.maximum(z, 0.0)
    tl.store(z_ptr + at, z.to(z_ptr.dtype.element_ty), mask=is_real)


@triton.jit
@no_type_check
def narrow_first_kernel(  # noqa: ANN201
    x_ptr, w_ptr, bias_ptr, y_ptr, IMAGES,  # noqa: ANN001
    H: tl.constexpr, W: tl.constexpr, OH: tl.constexpr, OW: tl.constexpr,
    NI: tl.constexpr, CI: tl.constexpr, CM: tl.constexpr, S: tl.constexpr,
    BM: tl.constexpr,
):  # fmt: skip
    """One tile of the first convolution."""
    start = tl.program_id(0) * BM
    _first(
        x_ptr, w_ptr, bias_ptr, y_ptr, start, IMAGES * (OH * OW), H, W, OH, OW, NI, CI, CM, S,
        BM, False,
    )  # fmt: skip


@triton.jit
@no_type_check
def narrow_second_kernel(  # noqa: ANN201
    y_ptr, w_ptr, bias_ptr, x_ptr, short_ptr, z_ptr, IMAGES,  # noqa: ANN001
    H: tl.constexpr, W: tl.constexpr, OH: tl.constexpr, OW: tl.constexpr,
    NI: tl.constexpr, NO: tl.constexpr, CI: tl.constexpr, CM: tl.constexpr, CO: tl.constexpr,
    S: tl.constexpr, SHORT: tl.constexpr,
    BM: tl.constexpr,
):  # fmt: skip
    """One tile of the second convolution, with what is added to it."""
    start = tl.program_id(0) * BM
    _second(
        y_ptr, w_ptr, bias_ptr, x_ptr, short_ptr, z_ptr, start, IMAGES * (OH * OW),
        H, W, OH, OW, NI, NO, CI, CM, CO, S, SHORT, BM, False,
    )  # fmt: skip


@triton.jit
@no_type_check
def narrow_block_kernel(  # noqa: ANN201
    x_ptr, w1_ptr, bias1_ptr, y_ptr, w2_ptr, bias2_ptr, short_ptr, z_ptr, IMAGES,  # noqa: ANN001
    H: tl.constexpr, W: tl.constexpr, OH: tl.constexpr, OW: tl.constexpr,
    NI: tl.constexpr, NO: tl.constexpr, CI: tl.constexpr, CM: tl.constexpr, CO: tl.constexpr,
    S: tl.constexpr, SHORT: tl.constexpr,
    BM: tl.constexpr, G: tl.constexpr,
    KEEP: tl.constexpr,
):  # fmt: skip
    """G whole images: nothing that another program writes is read."""
    start = tl.program_id(0) * G * (OH * OW)
    end = tl.minimum(start + G * (OH * OW), IMAGES * (OH * OW))
    weights = _weights(w1_ptr, CI, CM, KEEP)
    for tile in range((G * OH * OW + BM - 1) // BM):
        _first(
            x_ptr, weights, bias1_ptr, y_ptr, start + tile * BM, end, H, W, OH, OW, NI, CI, CM, S,
            BM, KEEP,
        )  # fmt: skip
    tl.debug_barrier()
    others = _weights(w2_ptr, CM, CO, KEEP)
    for tile in range((G * OH * OW + BM - 1) // BM):
        _second(
            y_ptr, others, bias2_ptr, x_ptr, short_ptr, z_ptr, start + tile * BM, end,
            H, W, OH, OW, NI, NO, CI, CM, CO, S, SHORT, BM, KEEP,
        )  # fmt: skip
