"""Triton kernels of ``narrow_attention`` and ``narrow_linear``: what a transformer's layer does around its products.

``narrow_attention_kernel``: a program has one head of one sample, or two. It norms the sample's tokens and multiplies
them by the heads' queries, keys and values; nothing of these leaves the chip. ``narrow_linear_kernel``: a program
has a tile of rows and columns, or whole rows where they are normed; norm, product, activation and addition are
one launch.

Letters: T tokens of a sample, BT as products have them, S numbers of a head, SIZE of them written, K inputs, KP and
DP inputs and outputs as weights have them, D outputs, C columns of one of the N sums of a tile, BM rows, BK inputs a
step. Kernels are marked @no_type_check: a checker of types wraps functions, and Triton would look for their names
in the wrapper's module.
"""

from typing import no_type_check

import triton
import triton.language as tl

from tersor.kernels.activations_triton import activated

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
@no_type_check
def _row_moments(x_ptr, offset, is_row, D: tl.constexpr, BK: tl.constexpr, eps):  # noqa: ANN001, ANN202
    """Mean and inverse standard deviation of each row; a row is read at once and kept in 16 bits."""
    n = tl.arange(0, BK)
    parts = ()
    for start in tl.static_range(0, D, BK):
        mask = is_row[:, None] & (start + n < D)[None, :]
        found = tl.load(x_ptr + offset[:, None] + (start + n)[None, :], mask=mask, other=0.0)
        parts = parts + (found,)  # noqa: RUF005 - Triton unpacks none
    total = tl.sum(parts[0].to(tl.float32), 1)
    for i in tl.static_range(1, (D + BK - 1) // BK):
        total += tl.sum(parts[i].to(tl.float32), 1)
    mean = total / D
    square = tl.zeros_like(mean)
    for i in tl.static_range((D + BK - 1) // BK):
        x = parts[i].to(tl.float32) - mean[:, None]
        if (i + 1) * BK > D:
            x = tl.where((i * BK + n < D)[None, :], x, 0.0)
        square += tl.sum(x * x, 1)
    return mean, tl.rsqrt(square / D + eps)


@triton.jit
@no_type_check
def _attend(  # noqa: ANN202
    query, key, value, mask_ptr, y_ptr, sample, head, HEADS, scale, mask_b, mask_h, mask_q, mask_k,  # noqa: ANN001
    T: tl.constexpr, S: tl.constexpr, SIZE: tl.constexpr, MASK: tl.constexpr, ALIKE: tl.constexpr,
    CAUSAL: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """What one head of one sample gives."""
    rows = tl.arange(0, BT)
    n = tl.arange(0, S)
    is_row = rows < T
    scores = tl.dot(query, tl.trans(key)) * (scale * LOG2_E)
    keys = tl.arange(0, BT)
    if MASK != 0:
        from_ptr = mask_ptr + sample * mask_b + head * mask_h
        if ALIKE:
            at = (keys * mask_k)[None, :]
            inside = (keys < T)[None, :]
        else:
            at = rows[:, None] * mask_q + keys[None, :] * mask_k
            inside = is_row[:, None] & (keys < T)[None, :]
        if MASK == 1:
            scores += tl.load(from_ptr + at, mask=inside, other=0.0).to(tl.float32) * LOG2_E
        else:
            scores = tl.where(
                tl.load(from_ptr + at, mask=inside, other=0) != 0, scores, float("-inf")
            )
    is_seen = (keys < T)[None, :]
    if CAUSAL:
        is_seen = is_seen & (keys[None, :] <= rows[:, None])
    scores = tl.where(is_seen, scores, float("-inf"))
    most = tl.max(scores, 1)
    most = tl.where(most == float("-inf"), 0.0, most)  # nothing is seen: zeros, as torch gives
    p = tl.exp2(scores - most[:, None])
    whole = tl.sum(p, 1)
    y = tl.dot(p.to(value.dtype), value) / tl.where(whole == 0.0, 1.0, whole)[:, None]
    at = ((sample * T + rows) * HEADS + head)[:, None] * SIZE + n[None, :]
    tl.store(y_ptr + at, y.to(value.dtype), mask=is_row[:, None] & (n < SIZE)[None, :])


@triton.jit
@no_type_check
def _halves(x, BT: tl.constexpr, S: tl.constexpr):  # noqa: ANN001, ANN202
    """[BT, 2 S] as the first and the last S columns."""
    return tl.split(tl.permute(tl.reshape(x, (BT, 2, S)), (0, 2, 1)))


@triton.jit
@no_type_check
def narrow_attention_kernel(  # noqa: ANN201, PLR0915
    x_ptr, w_ptr, bias_ptr, mask_ptr, y_ptr, HEADS, eps, scale,  # noqa: ANN001
    mask_b, mask_h, mask_q, mask_k,  # noqa: ANN001
    T: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, S: tl.constexpr, SIZE: tl.constexpr,
    NORM: tl.constexpr, MASK: tl.constexpr, ALIKE: tl.constexpr, CAUSAL: tl.constexpr,
    BT: tl.constexpr, G: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """G heads, one or two, of one sample; ``MASK`` 0: none, 1: added to scores, 2: what is seen; ``ALIKE``: by all queries.

    Two heads read the sample's tokens once.
    """
    # torch's compiler hands Python's floats over in double precision (torch 2.11).
    eps, scale = tl.cast(eps, tl.float32), tl.cast(scale, tl.float32)
    program = tl.program_id(0)
    groups = HEADS // G
    sample, head = program // groups, program % groups * G
    rows = tl.arange(0, BT)
    n = tl.arange(0, G * S)
    is_row = rows < T
    offset = (sample * T + rows) * K
    dtype = w_ptr.dtype.element_ty
    if NORM:
        mean, inverse = _row_moments(x_ptr, offset, is_row, K, BK, eps)
    q = tl.zeros((BT, G * S), dtype=tl.float32)
    k = tl.zeros((BT, G * S), dtype=tl.float32)
    v = tl.zeros((BT, G * S), dtype=tl.float32)
    head_ptr = w_ptr + head * (3 * KP * S)
    column = n // S * (3 * KP * S) + n % S
    for start in tl.range(0, KP, BK, num_stages=STAGES):
        c = start + tl.arange(0, BK)
        inside = is_row[:, None] & (c < K)[None, :]
        x = tl.load(x_ptr + offset[:, None] + c[None, :], mask=inside, other=0.0)
        if NORM:
            x = ((x.to(tl.float32) - mean[:, None]) * inverse[:, None]).to(dtype)
        at = c[:, None] * S + column[None, :]
        q = tl.dot(x, tl.load(head_ptr + at), q)
        k = tl.dot(x, tl.load(head_ptr + KP * S + at), k)
        v = tl.dot(x, tl.load(head_ptr + 2 * KP * S + at), v)
    shift_ptr = bias_ptr + head * (3 * S) + n // S * (3 * S) + n % S
    query = (q + tl.load(shift_ptr)[None, :]).to(dtype)
    key = (k + tl.load(shift_ptr + S)[None, :]).to(dtype)
    value = (v + tl.load(shift_ptr + 2 * S)[None, :]).to(dtype)
    if G == 1:
        _attend(
            query, key, value, mask_ptr, y_ptr, sample, head, HEADS, scale, mask_b, mask_h, mask_q, mask_k,
            T, S, SIZE, MASK, ALIKE, CAUSAL, BT,
        )  # fmt: skip
    else:
        first_q, last_q = _halves(query, BT, S)
        first_k, last_k = _halves(key, BT, S)
        first_v, last_v = _halves(value, BT, S)
        _attend(
            first_q, first_k, first_v, mask_ptr, y_ptr, sample, head, HEADS, scale, mask_b, mask_h, mask_q, mask_k,
            T, S, SIZE, MASK, ALIKE, CAUSAL, BT,
        )  # fmt: skip
        _attend(
            last_q, last_k, last_v, mask_ptr, y_ptr, sample, head + 1, HEADS, scale, mask_b, mask_h, mask_q, mask_k,
            T, S, SIZE, MASK, ALIKE, CAUSAL, BT,
        )  # fmt: skip


@triton.jit
@no_type_check
def _normed(  # noqa: ANN202
    parts, eps, scale_ptr, shift_ptr, D: tl.constexpr, C: tl.constexpr, N: tl.constexpr  # noqa: ANN001
):  # fmt: skip
    """Rows in N parts of C channels, D of them real, normed, scaled and shifted."""
    n = tl.arange(0, C)
    total = tl.zeros_like(tl.sum(parts[0], 1))
    for i in tl.static_range(N):
        x = parts[i]
        if (i + 1) * C > D:
            x = tl.where((i * C + n < D)[None, :], x, 0.0)
        total += tl.sum(x, 1)
    mean = total / D
    square = tl.zeros_like(mean)
    for i in tl.static_range(N):
        x = parts[i] - mean[:, None]
        if (i + 1) * C > D:
            x = tl.where((i * C + n < D)[None, :], x, 0.0)
        square += tl.sum(x * x, 1)
    inverse = tl.rsqrt(square / D + eps)
    found = ()
    for i in tl.static_range(N):
        scale, shift = tl.load(scale_ptr + i * C + n), tl.load(shift_ptr + i * C + n)
        x = (parts[i] - mean[:, None]) * inverse[:, None]
        found = found + (x * scale[None, :] + shift[None, :],)  # noqa: RUF005 - Triton unpacks none
    return found


@triton.jit
@no_type_check
def narrow_linear_kernel(  # noqa: ANN201, C901, PLR0912, PLR0915
    x_ptr, w_ptr, factor_ptr, bias_ptr, sums_ptr, added_ptr, scale_ptr, shift_ptr, z_ptr, codes_ptr, ROWS,  # noqa: ANN001
    first_eps, last_eps, inverse, zero, low, high,  # noqa: ANN001
    K: tl.constexpr, KP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    EIGHT: tl.constexpr, NORM_FIRST: tl.constexpr, ACTIVATION: tl.constexpr, SHORT: tl.constexpr,
    ADD: tl.constexpr, NORM_LAST: tl.constexpr, FLOATS: tl.constexpr, CODES: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A tile of rows and N C columns: norm(act(norm(x) W + bias) + added), either norm or none.

    The norm in front is behind its product: (x W - mean sums) / deviation, so that products read x as it lies.
    ``EIGHT`` 1: x and the weight, which lies along K then, are int8, 2: 8-bit floats; ``FLOATS`` and ``CODES``: the
    result is written as floats, and as such codes.
    """
    first_eps, last_eps = tl.cast(first_eps, tl.float32), tl.cast(last_eps, tl.float32)
    columns: tl.constexpr = C * N
    tiles: tl.constexpr = (D + columns - 1) // columns
    program = tl.program_id(0)
    rows = program // tiles * BM + tl.arange(0, BM)
    is_row = rows < ROWS
    n = program % tiles * columns + tl.arange(0, C)
    offset = rows * K
    if NORM_FIRST:
        mean, inverse_deviation = _row_moments(x_ptr, offset, is_row, K, BK, first_eps)
    y = ()
    for _ in tl.static_range(N):
        if EIGHT == 1:
            y = y + (tl.zeros((BM, C), dtype=tl.int32),)  # noqa: RUF005 - Triton unpacks none
        else:
            y = y + (tl.zeros((BM, C), dtype=tl.float32),)  # noqa: RUF005 - Triton unpacks none
    for start in tl.range(0, KP, BK, num_stages=STAGES):
        k = start + tl.arange(0, BK)
        if K == KP:
            is_read = is_row[:, None]
        else:
            is_read = is_row[:, None] & (k < K)[None, :]
        x = tl.load(x_ptr + offset[:, None] + k[None, :], mask=is_read, other=0.0)
        new = ()
        for i in tl.static_range(N):
            if EIGHT == 0:
                w = tl.load(w_ptr + k[:, None] * DP + (i * C + n)[None, :])
                new = new + (tl.dot(x, w, y[i]),)  # noqa: RUF005 - Triton unpacks none
            else:
                w = tl.load(w_ptr + k[:, None] + (i * C + n)[None, :] * KP)
                if EIGHT == 1:
                    new = new + (tl.dot(x, w, y[i], out_dtype=tl.int32),)  # noqa: RUF005 - Triton unpacks none
                else:
                    new = new + (tl.dot(x, w, y[i]),)  # noqa: RUF005 - Triton unpacks none
        y = new
    z = ()
    for i in tl.static_range(N):
        part = y[i].to(tl.float32)
        if EIGHT != 0:
            part = part * tl.load(factor_ptr + i * C + n)[None, :]
        if NORM_FIRST:
            sums = tl.load(sums_ptr + i * C + n)
            part = (part - mean[:, None] * sums[None, :]) * inverse_deviation[:, None]
        part = activated(part + tl.load(bias_ptr + i * C + n)[None, :], ACTIVATION, SHORT)
        if ADD:
            inside = is_row[:, None] & (i * C + n < D)[None, :]
            at = rows[:, None] * D + (i * C + n)[None, :]
            part += tl.load(added_ptr + at, mask=inside, other=0.0).to(tl.float32)
        z = z + (part,)  # noqa: RUF005 - Triton unpacks none
    if NORM_LAST:
        z = _normed(z, last_eps, scale_ptr, shift_ptr, D, C, N)
    for i in tl.static_range(N):
        inside = is_row[:, None] & (i * C + n < D)[None, :]
        at = rows[:, None] * D + (i * C + n)[None, :]
        if FLOATS:
            tl.store(z_ptr + at, z[i].to(z_ptr.dtype.element_ty), mask=inside)
        if CODES != 0:
            codes = z[i] * tl.cast(inverse, tl.float32) + tl.cast(zero, tl.float32)
            codes = tl.minimum(
                tl.maximum(codes, tl.cast(low, tl.float32)), tl.cast(high, tl.float32)
            )
            if CODES == 1:
                # Adding 1.5 * 2**23 leaves whole numbers, rounded half to even as torch does.
                codes = (codes + 12582912.0) - 12582912.0
            tl.store(codes_ptr + at, codes.to(codes_ptr.dtype.element_ty), mask=inside)
