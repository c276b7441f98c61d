"""Triton kernels of ``narrow_block``: 3x3 convolutions of few channels as products, one or two a launch.

A convolution is a product of [pixels, taps * channels] by [taps * channels, outputs], its left side read
where it lies: images have their channels last, so that a tap of a pixel is a run of channels, and three
neighbouring taps of a row are one run three times as long. What lies outside of an image is a masked load.
Nine shifted reads of one pixel come from the first-level cache; that is also how the second convolution of
a block gets its input with its neighbours: a program computes whole images, writes what is between the
convolutions, waits for its own threads, and reads it again, shifted, while it is still in a cache.

Letters: H, W of the input, OH, OW of the result, CI, CO channels, S stride, BM pixels of a tile,
TAPS neighbouring taps of one product (1 or 3), KP its inputs rounded up to a power of two.
Kernels are marked @no_type_check: a checker of types wraps functions, and Triton would look for their names
in the wrapper's module.
"""

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check
def _weight(  # noqa: ANN202
    w_ptr, step: tl.constexpr,  # noqa: ANN001
    CI: tl.constexpr, CO: tl.constexpr, TAPS: tl.constexpr, KP: tl.constexpr,
):  # fmt: skip
    """The taps of one product, [KP, CO]."""
    k = tl.arange(0, KP)
    n = tl.arange(0, CO)
    at = w_ptr + (step * TAPS * CI + k)[:, None] * CO + n[None, :]
    if KP == TAPS * CI:
        w = tl.load(at)
    else:
        w = tl.load(at, mask=(k < TAPS * CI)[:, None], other=0.0)
    return w


@triton.jit
@no_type_check
def _weights(  # noqa: ANN202
    w_ptr, CI: tl.constexpr, CO: tl.constexpr, TAPS: tl.constexpr, KP: tl.constexpr,  # noqa: ANN001
    KEEP: tl.constexpr,
):  # fmt: skip
    """All of a convolution where they are kept in shared memory, or else what they are loaded from."""
    if not KEEP:
        found = w_ptr
    elif TAPS == 3:
        found = (
            _weight(w_ptr, 0, CI, CO, TAPS, KP), _weight(w_ptr, 1, CI, CO, TAPS, KP),
            _weight(w_ptr, 2, CI, CO, TAPS, KP),
        )  # fmt: skip
    else:
        found = (
            _weight(w_ptr, 0, CI, CO, TAPS, KP), _weight(w_ptr, 1, CI, CO, TAPS, KP),
            _weight(w_ptr, 2, CI, CO, TAPS, KP), _weight(w_ptr, 3, CI, CO, TAPS, KP),
            _weight(w_ptr, 4, CI, CO, TAPS, KP), _weight(w_ptr, 5, CI, CO, TAPS, KP),
            _weight(w_ptr, 6, CI, CO, TAPS, KP), _weight(w_ptr, 7, CI, CO, TAPS, KP),
            _weight(w_ptr, 8, CI, CO, TAPS, KP),
        )  # fmt: skip
    return found


@triton.jit
@no_type_check
def _tap(  # noqa: ANN202
    x_ptr, weights, step: tl.constexpr, row, column, pixel, is_inside,  # noqa: ANN001
    H: tl.constexpr, W: tl.constexpr, CI: tl.constexpr, CO: tl.constexpr,
    TAPS: tl.constexpr, KP: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """What one product multiplies: [BM, KP] of the image and [KP, CO] of the weight."""
    k = tl.arange(0, KP)
    dy = step // (3 // TAPS) - 1
    dx = step % (3 // TAPS) - 1
    is_row = is_inside & (row + dy >= 0) & (row + dy < H)
    at = x_ptr + ((pixel + dy * W + dx) * CI)[:, None] + k[None, :]
    if TAPS == 1:
        mask = (is_row & (column + dx >= 0) & (column + dx < W))[:, None]
    else:
        across = column[:, None] + (k // CI + dx)[None, :]
        mask = is_row[:, None] & (across >= 0) & (across < W) & (k < TAPS * CI)[None, :]
    x = tl.load(at, mask=mask, other=0.0)
    if KEEP:
        w = weights[step]
    else:
        w = _weight(weights, step, CI, CO, TAPS, KP)
    return x, w


@triton.jit
@no_type_check
def _taps(  # noqa: ANN202
    x_ptr, weights, total, image, oy, ox, is_inside,  # noqa: ANN001
    H: tl.constexpr, W: tl.constexpr, CI: tl.constexpr, CO: tl.constexpr, S: tl.constexpr,
    TAPS: tl.constexpr, KP: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Sums of a 3x3 convolution with a border of zeros, for [BM] pixels of the result.

    What the next product multiplies is loaded before this one: barriers would hold loads back otherwise.
    """
    row, column = oy * S, ox * S
    pixel = (image * H + row) * W + column
    x, w = _tap(x_ptr, weights, 0, row, column, pixel, is_inside, H, W, CI, CO, TAPS, KP, KEEP)
    for step in tl.static_range(1, 9 // TAPS):
        next_x, next_w = _tap(
            x_ptr, weights, step, row, column, pixel, is_inside, H, W, CI, CO, TAPS, KP, KEEP
        )
        total = tl.dot(x, w, total)
        x, w = next_x, next_w
    return tl.dot(x, w, total)


@triton.jit
@no_type_check
def _first(  # noqa: ANN202
    x_ptr, weights, bias_ptr, y_ptr, start, end,  # noqa: ANN001
    H: tl.constexpr, W: tl.constexpr, OH: tl.constexpr, OW: tl.constexpr,
    CI: tl.constexpr, CO: tl.constexpr, S: tl.constexpr,
    TAPS: tl.constexpr, KP: tl.constexpr, BM: tl.constexpr, KEEP: tl.constexpr,
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
        H, W, CI, CO, S, TAPS, KP, KEEP,
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
    CI: tl.constexpr, CO: tl.constexpr, S: tl.constexpr, SHORT: tl.constexpr,
    TAPS: tl.constexpr, KP: tl.constexpr, BM: tl.constexpr, KEEP: tl.constexpr,
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
        x = tl.load(x_ptr + (pixel * CI)[:, None] + k[None, :], mask=is_inside[:, None], other=0.0)
        total = tl.dot(x, tl.load(short_ptr + k[:, None] * CO + n[None, :]), total)
    total = _taps(
        y_ptr, weights, total, image, oy, ox, is_inside, OH, OW, CO, CO, 1, TAPS, KP, KEEP
    )
    z = total + tl.load(bias_ptr + n)[None, :]
    at = p[:, None] * CO + n[None, :]
    if not SHORT:
        z += tl.load(x_ptr + at, mask=is_inside[:, None], other=0.0).to(tl.float32)
    z = tl.maximum(z, 0.0)
    tl.store(z_ptr + at, z.to(z_ptr.dtype.element_ty), mask=is_inside[:, None])


@triton.jit
@no_type_check
def narrow_first_kernel(  # noqa: ANN201
    x_ptr, w_ptr, bias_ptr, y_ptr, IMAGES,  # noqa: ANN001
    H: tl.constexpr, W: tl.constexpr, OH: tl.constexpr, OW: tl.constexpr,
    CI: tl.constexpr, CO: tl.constexpr, S: tl.constexpr,
    TAPS: tl.constexpr, KP: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """One tile of the first convolution."""
    start = tl.program_id(0) * BM
    _first(
        x_ptr, w_ptr, bias_ptr, y_ptr, start, IMAGES * (OH * OW), H, W, OH, OW, CI, CO, S,
        TAPS, KP, BM, False,
    )  # fmt: skip


@triton.jit
@no_type_check
def narrow_second_kernel(  # noqa: ANN201
    y_ptr, w_ptr, bias_ptr, x_ptr, short_ptr, z_ptr, IMAGES,  # noqa: ANN001
    H: tl.constexpr, W: tl.constexpr, OH: tl.constexpr, OW: tl.constexpr,
    CI: tl.constexpr, CO: tl.constexpr, S: tl.constexpr, SHORT: tl.constexpr,
    TAPS: tl.constexpr, KP: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """One tile of the second convolution, with what is added to it."""
    start = tl.program_id(0) * BM
    _second(
        y_ptr, w_ptr, bias_ptr, x_ptr, short_ptr, z_ptr, start, IMAGES * (OH * OW),
        H, W, OH, OW, CI, CO, S, SHORT, TAPS, KP, BM, False,
    )  # fmt: skip


@triton.jit
@no_type_check
def narrow_block_kernel(  # noqa: ANN201
    x_ptr, w1_ptr, bias1_ptr, y_ptr, w2_ptr, bias2_ptr, short_ptr, z_ptr, IMAGES,  # noqa: ANN001
    H: tl.constexpr, W: tl.constexpr, OH: tl.constexpr, OW: tl.constexpr,
    CI: tl.constexpr, CO: tl.constexpr, S: tl.constexpr, SHORT: tl.constexpr,
    TAPS: tl.constexpr, KP1: tl.constexpr, KP2: tl.constexpr, BM: tl.constexpr, G: tl.constexpr,
    KEEP: tl.constexpr,
):  # fmt: skip
    """G whole images: nothing that another program writes is read."""
    start = tl.program_id(0) * G * (OH * OW)
    end = tl.minimum(start + G * (OH * OW), IMAGES * (OH * OW))
    weights = _weights(w1_ptr, CI, CO, TAPS, KP1, KEEP)
    for tile in range((G * OH * OW + BM - 1) // BM):
        _first(
            x_ptr, weights, bias1_ptr, y_ptr, start + tile * BM, end, H, W, OH, OW, CI, CO, S,
            TAPS, KP1, BM, KEEP,
        )  # fmt: skip
    tl.debug_barrier()
    others = _weights(w2_ptr, CO, CO, TAPS, KP2, KEEP)
    for tile in range((G * OH * OW + BM - 1) // BM):
        _second(
            y_ptr, others, bias2_ptr, x_ptr, short_ptr, z_ptr, start + tile * BM, end,
            H, W, OH, OW, CI, CO, S, SHORT, TAPS, KP2, BM, KEEP,
        )  # fmt: skip


@triton.jit
@no_type_check
def _row(  # noqa: ANN202
    x_ptr, base, column, is_inside, W: tl.constexpr, C: tl.constexpr, KP: tl.constexpr,  # noqa: ANN001
):  # fmt: skip
    """Three neighbouring pixels of a row, from ``column`` - 1 on, [BM, KP]; ``base``: of pixel 0 of the row."""
    k = tl.arange(0, KP)
    across = column[:, None] + (k // C - 1)[None, :]
    mask = is_inside[:, None] & (across >= 0) & (across < W) & (k < 3 * C)[None, :]
    return tl.load(x_ptr + (base + (column - 1) * C)[:, None] + k[None, :], mask=mask, other=0.0)


@triton.jit
@no_type_check
def narrow_rows_kernel(  # noqa: ANN201, PLR0915
    x_ptr, w1_ptr, bias1_ptr, y_ptr, w2_ptr, bias2_ptr, z_ptr, IMAGES,  # noqa: ANN001
    H: tl.constexpr, W: tl.constexpr, WP: tl.constexpr, C: tl.constexpr, KP: tl.constexpr,
    G: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """R rows of G images, from top to bottom; every row is read once for the three rows that it counts for.

    Three sums are on their way in each convolution: a row ends the one above it, goes on with its own, and
    begins the one below. What is between the convolutions is a ring of four rows of this program's own,
    read one step after it was written.
    """
    BM: tl.constexpr = G * WP
    part = tl.program_id(0) % ((H + R - 1) // R)
    group = tl.program_id(0) // ((H + R - 1) // R)
    start = part * R
    end = tl.minimum(start + R, H)
    m = tl.arange(0, BM)
    n = tl.arange(0, C)
    column = m % WP
    image = group * G + m // WP
    is_image = image < IMAGES
    is_inside = is_image & (column < W)
    base = image * (H * W * C)
    ring = tl.program_id(0) * (4 * BM * C) + (m // WP) * (WP * C)
    a0 = _weight(w1_ptr, 0, C, C, 3, KP)
    a1 = _weight(w1_ptr, 1, C, C, 3, KP)
    a2 = _weight(w1_ptr, 2, C, C, 3, KP)
    b0 = _weight(w2_ptr, 0, C, C, 3, KP)
    b1 = _weight(w2_ptr, 1, C, C, 3, KP)
    b2 = _weight(w2_ptr, 2, C, C, 3, KP)
    bias1 = tl.load(bias1_ptr + n)[None, :]
    bias2 = tl.load(bias2_ptr + n)[None, :]
    zero = tl.zeros((BM, C), dtype=tl.float32)
    y_above = zero
    y_own = zero
    z_above = zero
    z_own = zero
    first = start - 2 + m * 0  # one row, as a vector: masks are made of it
    x = _row(x_ptr, base + first * W * C, column, is_image & (first >= 0), W, C, KP)
    for step in range(R + 5):
        row = (
            first + step
        )  # of x; y ends one row above, is read one further above, and z ends above that
        y = _row(
            y_ptr, ring + ((step + 3) % 4) * (BM * C), column,
            is_image & (row > first) & (row >= 2) & (row - 2 < H), W, C, KP,
        )  # fmt: skip
        next_x = _row(
            x_ptr, base + (row + 1) * W * C, column, is_image & (row + 1 >= 0) & (row + 1 < H),
            W, C, KP,
        )  # fmt: skip
        is_stored = is_inside & (row - 3 >= start) & (row - 3 < end)
        at = (base + ((row - 3) * W + column) * C)[:, None] + n[None, :]
        added = tl.load(x_ptr + at, mask=is_stored[:, None], other=0.0)
        y_done = tl.dot(x, a2, y_above)
        y_above = tl.dot(x, a1, y_own)
        y_own = tl.dot(x, a0, zero)
        z_done = tl.dot(y, b2, z_above)
        z_above = tl.dot(y, b1, z_own)
        z_own = tl.dot(y, b0, zero)
        tl.store(
            y_ptr + (ring + (step % 4) * (BM * C) + column * C)[:, None] + n[None, :],
            tl.maximum(y_done + bias1, 0.0).to(y_ptr.dtype.element_ty),
        )
        z = tl.maximum(z_done + bias2 + added.to(tl.float32), 0.0)
        tl.store(z_ptr + at, z.to(z_ptr.dtype.element_ty), mask=is_stored[:, None])
        x = next_x
        tl.debug_barrier()
