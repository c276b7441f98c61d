"""Triton kernels of ``codebook_linear``: codes are read once, become values in registers, and meet x there.

Two forms. One row of x (``codebook_vector_kernel``): every thread multiplies its own values and adds in
float32; a thread has several output rows, so that what it reads of x serves all of them. More rows
(``codebook_dot_kernel``): the values are the left operand of the tensor cores, which takes it from
registers; the layout of the words (``codebook_weight``) is such that values are made where they are used.

Inputs may be cut into several programs (split K), so that a card has enough bytes in flight: each then
writes float32 sums, and ``codebook_sum_kernel`` adds them in order with the bias. No atomics: equal calls
give equal bits. ``codebook_expand_kernel`` makes the whole weight, for products of many rows.
"""

from typing import no_type_check

import triton
import triton.language as tl

# What a code becomes: its number by arithmetic; a value of its table that is read by address, through the
# first-level cache, or put together from the table's bytes in this thread's registers.
ARITHMETIC, LOAD, PERMUTE = range(3)
# Scales: none, one a row, one a group of inputs.
NO_SCALE, ROW_SCALE, GROUP_SCALE = range(3)
# Kernels read no other globals.
_ARITHMETIC, _PERMUTE = tl.constexpr(ARITHMETIC), tl.constexpr(PERMUTE)
_ROW_SCALE, _GROUP_SCALE = tl.constexpr(ROW_SCALE), tl.constexpr(GROUP_SCALE)


@triton.jit
@no_type_check
def _and_or(words, MASK: tl.constexpr, MORE: tl.constexpr, NATIVE: tl.constexpr):  # noqa: ANN001, ANN202
    """(words & MASK) | MORE in one instruction, which not every version of the compiler finds."""
    if NATIVE:
        found = tl.inline_asm_elementwise(
            "lop3.b32 $0, $1, $2, $3, 0xEA;", "=r,r,r,r", [words, MASK, MORE],
            dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    else:  # the interpreter knows no assembly
        found = (words & MASK) | MORE
    return found


@triton.jit
@no_type_check
def _number(words, PLACE: tl.constexpr, BITS: tl.constexpr, NATIVE: tl.constexpr):  # noqa: ANN001, ANN202
    """Code - 2**(BITS - 1) at a place, as float32, without a conversion.

    A code lies among the 23 bits of a float32's mantissa: with the exponent above it, at which a unit of
    the code is 1, the bits read 2**e + code. Places beyond that are shifted down first.
    """
    LOW: tl.constexpr = BITS * PLACE
    SHIFT: tl.constexpr = 0 if LOW + BITS <= 23 else (12 if BITS == 4 else 16)
    AT: tl.constexpr = LOW - SHIFT
    MASK: tl.constexpr = ((1 << BITS) - 1) << AT
    EXPONENT: tl.constexpr = (127 + 23 - AT) << 23
    ZERO: tl.constexpr = (1 << (23 - AT)) + (1 << (BITS - 1))
    bits = _and_or(words >> SHIFT, MASK, EXPONENT, NATIVE)
    return bits.to(tl.float32, bitcast=True) - ZERO


@triton.jit
@no_type_check
def _half_numbers(words, PLACE: tl.constexpr, BITS: tl.constexpr, BRAIN: tl.constexpr):  # noqa: ANN001, ANN202
    """As ``_number``, in float16 or (``BRAIN``, 4 bits only) bfloat16, two neighbouring words at once.

    One permutation takes the byte with the code out of both words; the exponent above it makes it a number,
    two in a register, which is the form in which tensor cores take them: five instructions for four codes
    of 4 bits, a shift more in bfloat16, whose mantissa has no room for the upper half of a byte. Exact, as
    every number has at most 8 bits.
    """
    BYTE: tl.constexpr = BITS * PLACE // 8
    HIGH: tl.constexpr = BITS == 4 and PLACE % 2 == 1
    AT: tl.constexpr = 4 if HIGH and not BRAIN else 0
    MANTISSA: tl.constexpr = 7 if BRAIN else 10
    BIAS: tl.constexpr = 127 if BRAIN else 15
    MASK: tl.constexpr = (((1 << BITS) - 1) << AT) * 0x10001
    EXPONENT: tl.constexpr = ((MANTISSA - AT + BIAS) << MANTISSA) * 0x10001
    # The same exponent, with the code of zero.
    ZERO: tl.constexpr = EXPONENT | (((1 << (BITS - 1)) << AT) * 0x10001)
    SELECTOR: tl.constexpr = ((4 + BYTE) << 8) | BYTE
    if BRAIN and HIGH:
        found = tl.inline_asm_elementwise(
            "{ .reg .b32 t; prmt.b32 t, $1, $2, $3; shr.u32 t, t, 4; lop3.b32 t, t, $5, $7, 0xEA; "
            "sub.bf16x2 $0, t, $9; }",
            "=r,r,r,r,r,r,r,r,r,r,r", [words, SELECTOR, MASK, EXPONENT, ZERO],
            dtype=tl.bfloat16, is_pure=True, pack=2,
        )  # fmt: skip
    elif BRAIN:
        found = tl.inline_asm_elementwise(
            "{ .reg .b32 t; prmt.b32 t, $1, $2, $3; lop3.b32 t, t, $5, $7, 0xEA; sub.bf16x2 $0, t, $9; }",
            "=r,r,r,r,r,r,r,r,r,r,r", [words, SELECTOR, MASK, EXPONENT, ZERO],
            dtype=tl.bfloat16, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        found = tl.inline_asm_elementwise(
            "{ .reg .b32 t; prmt.b32 t, $1, $2, $3; lop3.b32 t, t, $5, $7, 0xEA; sub.f16x2 $0, t, $9; }",
            "=r,r,r,r,r,r,r,r,r,r,r", [words, SELECTOR, MASK, EXPONENT, ZERO],
            dtype=tl.float16, is_pure=True, pack=2,
        )  # fmt: skip
    return found


@triton.jit
@no_type_check
def _code(words, PLACE: tl.constexpr, BITS: tl.constexpr):  # noqa: ANN001, ANN202
    return (words >> (BITS * PLACE)) & ((1 << BITS) - 1)


@triton.jit
@no_type_check
def _bytes(low, high, selector, NATIVE: tl.constexpr):  # noqa: ANN001, ANN202
    """Four of the eight bytes of two words, by the four lower hex digits of a selector, each 0 to 7."""
    if NATIVE:
        found = tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [low, high, selector],
            dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    else:  # the interpreter knows no assembly
        found = selector & 0
        for j in tl.static_range(4):
            digit = (selector >> (4 * j)) & 7
            source = tl.where(digit < 4, low, high)
            found = found | (((source >> ((digit & 3) * 8)) & 0xFF) << (8 * j))
    return found


@triton.jit
@no_type_check
def _planes(planes_ptr, rows, STRIDE):  # noqa: ANN001, ANN202
    """Sixteen values a row as four words of their lower and four of their higher bytes."""
    at = planes_ptr + rows * STRIDE
    return (
        tl.load(at)[:, None], tl.load(at + 1)[:, None], tl.load(at + 2)[:, None],
        tl.load(at + 3)[:, None], tl.load(at + 4)[:, None], tl.load(at + 5)[:, None],
        tl.load(at + 6)[:, None], tl.load(at + 7)[:, None],
    )  # fmt: skip


@triton.jit
@no_type_check
def _permuted(words, PLACE: tl.constexpr, a, b, c, d, e, f, g, h, NATIVE: tl.constexpr):  # noqa: ANN001, ANN202
    """The value at a place by byte permutation: four codes are one selector.

    A permutation picks from eight bytes: one for codes below 8, one for those from 8 on, and a third that
    takes for each code the one or the other, by its highest bit. What the places share is computed once.
    """
    sixteen = words >> (16 * (PLACE // 4))
    digits = sixteen & 0x7777
    which = _and_or(sixteen >> 1, 0x4444, 0x3210, NATIVE)
    lower = _bytes(_bytes(a, b, digits, NATIVE), _bytes(c, d, digits, NATIVE), which, NATIVE)
    upper = _bytes(_bytes(e, f, digits, NATIVE), _bytes(g, h, digits, NATIVE), which, NATIVE)
    # Two values a word, of this pair of places.
    J: tl.constexpr = 2 * ((PLACE % 4) // 2)
    PAIR: tl.constexpr = J | ((4 + J) << 4) | ((1 + J) << 8) | ((5 + J) << 12)
    pair = _bytes(lower, upper, PAIR, NATIVE)
    half = (pair >> (16 * (PLACE % 2))).to(tl.int16)
    return half.to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
@no_type_check
def codebook_vector_kernel(  # noqa: ANN201, C901, PLR0912, PLR0915
    x_ptr, words_ptr, tables_ptr, planes_ptr, scales_ptr, bias_ptr, y_ptr,  # noqa: ANN001
    N, K, WORDS, TABLE_STRIDE, PLANE_STRIDE, GROUPS, STEPS,  # noqa: ANN001
    GROUP: tl.constexpr, BITS: tl.constexpr, LOOKUP: tl.constexpr, SCALE: tl.constexpr,
    GROUPED: tl.constexpr, RUN: tl.constexpr, BIAS: tl.constexpr, NATIVE: tl.constexpr,
    BN: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """BN outputs of one row of x, over STEPS times BW words; whole sums or those of a part.

    RUN places share a group; TABLE_STRIDE and PLANE_STRIDE are 0 where all rows have one table.
    """
    PLACES: tl.constexpr = 32 // BITS
    CHUNKS: tl.constexpr = BW // 32
    split = tl.program_id(1)
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    inside = rows < N
    rows = tl.minimum(rows, N - 1)  # what rows beyond the end give is not stored
    lane = tl.arange(0, 32)
    chunk = split * STEPS * CHUNKS + tl.arange(0, CHUNKS)
    end = tl.minimum((split + 1) * STEPS * CHUNKS, WORDS // 32)
    # [outputs, chunks, words of a chunk]: a chunk has one group a place.
    at = words_ptr + rows.to(tl.int64)[:, None, None] * WORDS
    at += chunk[None, :, None] * 32 + lane[None, None, :]
    tables = tables_ptr + (rows * TABLE_STRIDE)[:, None, None]
    if LOOKUP == _PERMUTE:
        a, b, c, d, e, f, g, h = _planes(planes_ptr, rows, PLANE_STRIDE)
        a, b, c, d = a[:, :, None], b[:, :, None], c[:, :, None], d[:, :, None]
        e, f, g, h = e[:, :, None], f[:, :, None], g[:, :, None], h[:, :, None]
    total = tl.zeros((BN, CHUNKS, 32), dtype=tl.float32)
    words = tl.load(at, mask=(chunk < end)[None, :, None], other=0)
    for _ in range(STEPS):
        # The next words are on their way while these are used.
        at += BW
        following = tl.load(at, mask=(chunk + CHUNKS < end)[None, :, None], other=0)
        for run in tl.static_range(PLACES // RUN):
            start = chunk * (32 * PLACES) + 32 * RUN * run
            group = tl.minimum(start // GROUP, GROUPS - 1)
            part = tl.zeros((BN, CHUNKS, 32), dtype=tl.float32)
            for within in tl.static_range(RUN):
                k = (start + 32 * within)[:, None] + lane[None, :]
                x = tl.load(x_ptr + k, mask=k < K, other=0.0).to(tl.float32)
                if LOOKUP == _ARITHMETIC:
                    value = _number(words, run * RUN + within, BITS, NATIVE)
                elif LOOKUP == _PERMUTE:
                    value = _permuted(words, run * RUN + within, a, b, c, d, e, f, g, h, NATIVE)
                else:
                    entry = _code(words, run * RUN + within, BITS)
                    if GROUPED:
                        entry += group[None, :, None] << BITS
                    value = tl.load(tables + entry).to(tl.float32)
                part += value * x[None, :, :]
            if SCALE == _GROUP_SCALE:
                scale = tl.load(scales_ptr + (rows * GROUPS)[:, None] + group[None, :])
                part *= scale[:, :, None]
            total += part
        words = following
        chunk += CHUNKS
    y = tl.sum(tl.sum(total, 2), 1)
    if SCALE == _ROW_SCALE:
        y *= tl.load(scales_ptr + rows)
    if BIAS:
        y += tl.load(bias_ptr + rows).to(tl.float32)
    out = y_ptr + split.to(tl.int64) * N + rows
    tl.store(out, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
@no_type_check
def _side_by_side(values):  # noqa: ANN001, ANN202
    """One, two or four tiles [outputs, 32] as one of all their inputs; no value leaves its thread."""
    BN: tl.constexpr = values[0].shape[0]
    if len(values) == 1:
        found = values[0]
    elif len(values) == 2:
        found = tl.reshape(tl.permute(tl.join(values[0], values[1]), (0, 2, 1)), [BN, 64])
    else:
        pairs = tl.join(tl.join(values[0], values[1]), tl.join(values[2], values[3]))
        found = tl.reshape(tl.permute(pairs, (0, 3, 2, 1)), [BN, 128])
    return found


@triton.jit
@no_type_check
def codebook_dot_kernel(  # noqa: ANN201, C901, PLR0912, PLR0915
    x_ptr, words_ptr, tables_ptr, planes_ptr, scales_ptr, bias_ptr, y_ptr,  # noqa: ANN001
    M, N, K, WORDS, TABLE_STRIDE, PLANE_STRIDE, GROUPS, STEPS,  # noqa: ANN001
    GROUP: tl.constexpr, BITS: tl.constexpr, LOOKUP: tl.constexpr, SCALE: tl.constexpr,
    GROUPED: tl.constexpr, RUN: tl.constexpr, BIAS: tl.constexpr, NATIVE: tl.constexpr,
    BN: tl.constexpr, BM: tl.constexpr, JOINED: tl.constexpr,
):  # fmt: skip
    """BN outputs of BM rows of x, over STEPS chunks of 32 words.

    JOINED places, 1, 2 or 4 of a group, are one product: the compiler waits for each, as their values are in
    registers, and x comes in runs of as many times 32 inputs.
    """
    PLACES: tl.constexpr = 32 // BITS
    BRAIN: tl.constexpr = x_ptr.dtype.element_ty == tl.bfloat16
    # The interpreter knows no assembly; in bfloat16 a byte has no room below an exponent.
    PAIRS: tl.constexpr = NATIVE and (x_ptr.dtype.element_ty == tl.float16 or (BRAIN and BITS == 4))
    split = tl.program_id(1)
    blocks = tl.cdiv(N, BN)
    rows = tl.program_id(0) % blocks * BN + tl.arange(0, BN)
    inside_n = rows < N
    rows = tl.minimum(rows, N - 1)
    samples = tl.program_id(0) // blocks * BM + tl.arange(0, BM)
    inside_m = samples < M
    lane = tl.arange(0, 32)
    at = words_ptr + rows.to(tl.int64)[:, None] * WORDS + lane[None, :]
    inputs = tl.arange(0, 32 * JOINED)
    x_at = x_ptr + tl.minimum(samples, M - 1).to(tl.int64)[None, :] * K + inputs[:, None]
    tables = tables_ptr + (rows * TABLE_STRIDE)[:, None]
    if LOOKUP == _PERMUTE:
        a, b, c, d, e, f, g, h = _planes(planes_ptr, rows, PLANE_STRIDE)
    total = tl.zeros((BN, BM), dtype=tl.float32)
    for step in range(STEPS):
        chunk = split * STEPS + step
        words = tl.load(at + chunk * 32, mask=(chunk * 32 + lane)[None, :] < WORDS, other=0)
        for run in tl.static_range(PLACES // RUN):
            start = chunk * (32 * PLACES) + 32 * RUN * run
            group = tl.minimum(start // GROUP, GROUPS - 1)
            part = tl.zeros((BN, BM), dtype=tl.float32)
            for within in tl.static_range(RUN // JOINED):
                k = start + 32 * JOINED * within
                x = tl.load(x_at + k, mask=(k + inputs)[:, None] < K, other=0.0)
                values = ()
                for j in tl.static_range(JOINED):
                    if LOOKUP == _ARITHMETIC and PAIRS:
                        value = _half_numbers(words, run * RUN + within * JOINED + j, BITS, BRAIN)
                    elif LOOKUP == _ARITHMETIC:
                        value = _number(words, run * RUN + within * JOINED + j, BITS, NATIVE)
                    elif LOOKUP == _PERMUTE:
                        value = _permuted(
                            words, run * RUN + within * JOINED + j, a, b, c, d, e, f, g, h, NATIVE
                        )
                    else:
                        entry = _code(words, run * RUN + within * JOINED + j, BITS)
                        if GROUPED:
                            entry += group << BITS
                        value = tl.load(tables + entry).to(tl.float32)
                    values += (value.to(x.dtype),)
                part = tl.dot(_side_by_side(values), x, part, input_precision="ieee")
            # What a step adds up is used in that step, so that its products are waited for there. Carried into
            # the next one's products they were not: Triton 3.6 lets its loads write the registers that are
            # still read. (A choice, as the compiler makes a plain sum the product's own start again.)
            if SCALE == _GROUP_SCALE:
                total += part * tl.load(scales_ptr + rows * GROUPS + group)[:, None]
            else:
                total += tl.where(inside_n[:, None], part, 0.0)
    if SCALE == _ROW_SCALE:
        total *= tl.load(scales_ptr + rows)[:, None]
    if BIAS:
        total += tl.load(bias_ptr + rows).to(tl.float32)[:, None]
    out = y_ptr + (split.to(tl.int64) * M + samples)[None, :] * N + rows[:, None]
    inside = inside_n[:, None] & inside_m[None, :]
    tl.store(out, total.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
@no_type_check
def codebook_sum_kernel(  # noqa: ANN201
    parts_ptr, bias_ptr, y_ptr, M, N, SPLITS: tl.constexpr, BIAS: tl.constexpr, BN: tl.constexpr,  # noqa: ANN001
):  # fmt: skip
    """The parts of every sum [SPLITS, M, N], added in order, and the bias."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    inside = columns < N
    y = tl.zeros((BN,), dtype=tl.float32)
    for split in tl.static_range(SPLITS):
        y += tl.load(parts_ptr + (split * M + row) * N + columns, mask=inside, other=0.0)
    if BIAS:
        y += tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * N + columns, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
@no_type_check
def codebook_expand_kernel(  # noqa: ANN201
    words_ptr, tables_ptr, scales_ptr, weight_ptr, N, K, WORDS, TABLE_STRIDE, GROUPS,  # noqa: ANN001
    GROUP: tl.constexpr, BITS: tl.constexpr, LOOKUP: tl.constexpr, SCALE: tl.constexpr,
    GROUPED: tl.constexpr, NATIVE: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """BN rows of a chunk of the weight, as floats."""
    PLACES: tl.constexpr = 32 // BITS
    chunk = tl.program_id(0) % (WORDS // 32)
    rows = tl.program_id(0) // (WORDS // 32) * BN + tl.arange(0, BN)
    inside = rows < N
    rows = tl.minimum(rows, N - 1)
    lane = tl.arange(0, 32)
    words = tl.load(words_ptr + rows.to(tl.int64)[:, None] * WORDS + (chunk * 32 + lane)[None, :])
    for place in tl.static_range(PLACES):
        start = (chunk * PLACES + place) * 32
        group = tl.minimum(start // GROUP, GROUPS - 1)
        if LOOKUP == _ARITHMETIC:
            value = _number(words, place, BITS, NATIVE)
        else:
            entry = _code(words, place, BITS) + (rows * TABLE_STRIDE)[:, None]
            if GROUPED:
                entry += group << BITS
            value = tl.load(tables_ptr + entry).to(tl.float32)
        if SCALE == _GROUP_SCALE:
            value *= tl.load(scales_ptr + rows * GROUPS + group)[:, None]
        elif SCALE == _ROW_SCALE:
            value *= tl.load(scales_ptr + rows)[:, None]
        k = start + lane
        out = weight_ptr + rows.to(tl.int64)[:, None] * K + k[None, :]
        tl.store(
            out, value.to(weight_ptr.dtype.element_ty), mask=inside[:, None] & (k < K)[None, :]
        )
