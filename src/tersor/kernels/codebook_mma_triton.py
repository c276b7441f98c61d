"""Triton kernel of ``codebook_linear`` for few rows: each warp multiplies its own codes by tensor cores.

``codebook_kernels_triton`` leaves to the compiler where a value lies, and the compiler takes words and x
through shared memory, with barriers, and waits for every product. Here every tensor has one element a
thread, so that there is only one way to lay it out, and what a thread loads is, without any exchange, its
share of the operands of ``mma.sync.m16n8k16``: of a product the order of inputs is free, as long as both
operands have the same one, so that a thread's four neighbouring inputs take the places of the two pairs
that the instruction wants of it. Inputs are shared among the warps of a program, whose sums are added in
order at its end: no second launch where the outputs alone fill the card, and no barrier before the end.

What keeps the memory busy are the loads of the next step, which are under way while a step is computed.

Thread ``32 * warp + 4 * g + q`` has outputs ``g`` and ``g + 8`` of every tile of 16, row ``g`` of x, and
inputs ``4 q .. 4 q + 3`` of 16 as operands; of the result it has those two outputs for the rows ``2 q`` and
``2 q + 1`` of x.

Source: PTX ISA 8.7, "Matrix Fragments for mma.m16n8k16 with floating point type".
"""

from typing import no_type_check

import triton
import triton.language as tl

from tersor.kernels.codebook_kernels_triton import (
    _ARITHMETIC,
    _GROUP_SCALE,
    _PERMUTE,
    _ROW_SCALE,
    _code,
    _number,
    _permuted,
)

# Outputs and rows of x of one instruction, which takes 16 inputs; kernels have them as literals, since the
# interpreter does not compute with constants of a module in all ways that the compiler does.
TILE, SAMPLES = 16, 8


@triton.jit
@no_type_check
def _multiplied(low, high, x, total, BRAIN: tl.constexpr, NATIVE: tl.constexpr):  # noqa: ANN001, ANN202
    """Total + the products of 16 inputs: ``low`` and ``high`` are the values of outputs g and g + 8."""
    if NATIVE:
        TYPE: tl.constexpr = "bf16" if BRAIN else "f16"
        found = tl.inline_asm_elementwise(
            "{ .reg .b32 a, b; mov.b64 {a, b}, $8; mma.sync.aligned.m16n8k16.row.col.f32." + TYPE + "." + TYPE
            + ".f32 {$0, $1, $2, $3}, {$4, $6, $5, $7}, {a, b}, {$9, $10, $11, $12}; }",
            "=f,=f,=f,=f,r,r,r,r,l,f,f,f,f",
            [low[0], low[1], high[0], high[1], x, total[0], total[1], total[2], total[3]],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32), is_pure=True, pack=1,
        )  # fmt: skip
    else:  # the interpreter knows no assembly
        a, b = _products(low, x, BRAIN)
        c, d = _products(high, x, BRAIN)
        found = (total[0] + a, total[1] + b, total[2] + c, total[3] + d)
    return found


@triton.jit
@no_type_check
def _products(values, x, BRAIN: tl.constexpr):  # noqa: ANN001, ANN202
    """What the instruction makes of eight outputs: each thread's two rows of x."""
    WARPS: tl.constexpr = x.shape[0] // 32
    total = tl.zeros((WARPS, 8, 8), dtype=tl.float32)
    for i in tl.static_range(4):
        half = ((x >> (16 * i)) & 0xFFFF).to(tl.int32)
        if BRAIN:
            factor = (half << 16).to(tl.float32, bitcast=True)
        else:
            factor = half.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        left = tl.reshape(values[i], [WARPS, 8, 1, 4])
        total += tl.sum(left * tl.reshape(factor, [WARPS, 1, 8, 4]), 3)
    return tl.split(tl.reshape(total, [WARPS * 32, 2]))


@triton.jit
@no_type_check
def _pair(words, PLACE: tl.constexpr, BITS: tl.constexpr, BRAIN: tl.constexpr):  # noqa: ANN001, ANN202
    """As ``_half_numbers`` of ``codebook_kernels_triton``, of two words in a register pair."""
    BYTE: tl.constexpr = BITS * PLACE // 8
    HIGH: tl.constexpr = BITS == 4 and PLACE % 2 == 1
    AT: tl.constexpr = 4 if HIGH and not BRAIN else 0
    MANTISSA: tl.constexpr = 7 if BRAIN else 10
    BIAS: tl.constexpr = 127 if BRAIN else 15
    MASK: tl.constexpr = (((1 << BITS) - 1) << AT) * 0x10001
    EXPONENT: tl.constexpr = ((MANTISSA - AT + BIAS) << MANTISSA) * 0x10001
    ZERO: tl.constexpr = EXPONENT | (((1 << (BITS - 1)) << AT) * 0x10001)
    SELECTOR: tl.constexpr = ((4 + BYTE) << 8) | BYTE
    SHIFT: tl.constexpr = "shr.u32 a, a, 4; " if BRAIN and HIGH else ""
    TYPE: tl.constexpr = "bf16x2" if BRAIN else "f16x2"
    return tl.inline_asm_elementwise(
        "{ .reg .b32 a, b; mov.b64 {a, b}, $1; prmt.b32 a, a, b, $2; " + SHIFT
        + "lop3.b32 a, a, $3, $4, 0xEA; sub." + TYPE + " $0, a, $5; }",
        "=r,l,r,r,r,r", [words, SELECTOR, MASK, EXPONENT, ZERO], dtype=tl.int32, is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
@no_type_check
def _rounded(first, second, BRAIN: tl.constexpr):  # noqa: ANN001, ANN202
    """Two numbers in a register, the first in its lower half."""
    TYPE: tl.constexpr = "bf16x2" if BRAIN else "f16x2"
    return tl.inline_asm_elementwise(
        "cvt.rn." + TYPE + ".f32 $0, $2, $1;", "=r,f,f", [first, second], dtype=tl.int32, is_pure=True, pack=1
    )  # fmt: skip


@triton.jit
@no_type_check
def _value(  # noqa: ANN202
    word, planes, tables_ptr, PLACE: tl.constexpr, BITS: tl.constexpr, LOOKUP: tl.constexpr,  # noqa: ANN001
    NATIVE: tl.constexpr,
):  # fmt: skip
    """What a word's code at a place stands for, before scales."""
    if LOOKUP == _ARITHMETIC:
        found = _number(word, PLACE, BITS, NATIVE)
    elif LOOKUP == _PERMUTE:
        a, b, c, d, e, f, g, h = planes
        found = _permuted(word, PLACE, a, b, c, d, e, f, g, h, NATIVE)
    else:
        found = tl.load(tables_ptr + _code(word, PLACE, BITS)).to(tl.float32)
    return found


@triton.jit
@no_type_check
def _values(  # noqa: ANN202
    words, planes, tables_ptr, PLACE: tl.constexpr, BITS: tl.constexpr,  # noqa: ANN001
    LOOKUP: tl.constexpr, BRAIN: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """An output's values at a place of two pairs of words: two registers; for the interpreter four numbers."""
    first, second = words
    PAIRS: tl.constexpr = NATIVE and LOOKUP == _ARITHMETIC and (BITS == 4 or not BRAIN)
    if PAIRS:
        found = (_pair(first, PLACE, BITS, BRAIN), _pair(second, PLACE, BITS, BRAIN))
    else:
        a = _value(first.to(tl.int32), planes, tables_ptr, PLACE, BITS, LOOKUP, NATIVE)
        b = _value((first >> 32).to(tl.int32), planes, tables_ptr, PLACE, BITS, LOOKUP, NATIVE)
        c = _value(second.to(tl.int32), planes, tables_ptr, PLACE, BITS, LOOKUP, NATIVE)
        d = _value((second >> 32).to(tl.int32), planes, tables_ptr, PLACE, BITS, LOOKUP, NATIVE)
        if NATIVE:
            found = (_rounded(a, b, BRAIN), _rounded(c, d, BRAIN))
        else:
            found = (a, b, c, d)
    return found


@triton.jit
@no_type_check
def _four(at, chunk, end, NATIVE: tl.constexpr):  # noqa: ANN001, ANN202
    """Four words by one load, which leaves the first-level cache to x; none of chunks beyond the end."""
    if NATIVE:
        found = tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.lt.s32 p, $3, $4; "
            "@p ld.global.L1::no_allocate.L2::128B.v2.b64 {$0, $1}, [$2]; }", "=l,=l,l,r,r",
            [at.to(tl.int64, bitcast=True), chunk, end], dtype=(tl.int64, tl.int64), is_pure=True, pack=1,
        )  # fmt: skip
    else:  # the interpreter knows no assembly
        found = (tl.load(at, mask=chunk < end, other=0), tl.load(at + 1, mask=chunk < end, other=0))
    return found


@triton.jit
@no_type_check
def _words(at, chunk, end, NATIVE: tl.constexpr):  # noqa: ANN001, ANN202
    """Of outputs g, then g + 8, of every tile: the words of inputs 4 q and on, then of 16 + 4 q and on.

    Of chunks beyond the end whatever the registers hold: any code is a finite value, and its x is 0.
    """
    inner = chunk * 16
    found = ()
    for i in tl.static_range(len(at)):
        found += (
            _four(at[i] + inner, chunk, end, NATIVE),
            _four(at[i] + (inner + 8), chunk, end, NATIVE),
        )
    return found


@triton.jit
@no_type_check
def _inputs(  # noqa: ANN202
    at, chunk, end, q, K, PLACES: tl.constexpr, WHOLE: tl.constexpr,  # noqa: ANN001
):  # fmt: skip
    """Of every row of x: the inputs of a chunk that are a thread's, four in each of its runs of 16."""
    found = ()
    for j in tl.static_range(len(at)):
        for half in tl.static_range(2 * PLACES):
            if WHOLE:
                found += (tl.load(at[j] + 4 * half),)
            else:
                inside = (chunk * (32 * PLACES) + 16 * half + 4 * q < K) & (chunk < end)
                found += (tl.load(at[j] + 4 * half, mask=inside, other=0),)
    return found


@triton.jit
@no_type_check
def _factors(  # noqa: ANN202
    scales_ptr, rows, chunk, GROUP: tl.constexpr, GROUPS,  # noqa: ANN001
    SCALE: tl.constexpr, PLACES: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """The scales of a chunk's groups, of every output; none where a row has one."""
    found = ()
    if SCALE == _GROUP_SCALE:
        for run in tl.static_range(PLACES // RUN):
            group = tl.minimum((chunk * PLACES + RUN * run) * 32 // GROUP, GROUPS - 1)
            for i in tl.static_range(len(rows)):
                found += (tl.load(scales_ptr + (rows[i] * GROUPS + group)),)
    return found


@triton.jit
@no_type_check
def _moved(at, by, here):  # noqa: ANN001, ANN202
    """Addresses further on, where there is something."""
    found = ()
    for i in tl.static_range(len(at)):
        found += (tl.where(here, at[i] + by, at[i]),)
    return found


@triton.jit
@no_type_check
def _joined(total):  # noqa: ANN001, ANN202
    """The four results of one, two or four products as further dimensions: sample, output, product."""
    found = ()
    for i in tl.static_range(len(total)):
        low, high = tl.join(total[i][0], total[i][1]), tl.join(total[i][2], total[i][3])
        found += (tl.join(low, high),)
    if len(found) == 1:
        all_of = found[0]
    elif len(found) == 2:
        all_of = tl.join(found[0], found[1])
    else:
        all_of = tl.join(tl.join(found[0], found[1]), tl.join(found[2], found[3]))
    return all_of


@triton.jit
@no_type_check
def codebook_mma_kernel(  # noqa: ANN201, C901, PLR0912, PLR0915
    x_ptr, words_ptr, tables_ptr, planes_ptr, scales_ptr, bias_ptr, y_ptr,  # noqa: ANN001
    M, N, K, WORDS, TABLE_STRIDE, PLANE_STRIDE, GROUPS, STEPS,  # noqa: ANN001
    GROUP: tl.constexpr, BITS: tl.constexpr, LOOKUP: tl.constexpr, SCALE: tl.constexpr,
    GROUPED: tl.constexpr, RUN: tl.constexpr, BIAS: tl.constexpr, NATIVE: tl.constexpr,
    BN: tl.constexpr, BM: tl.constexpr, TALL: tl.constexpr, WARPS: tl.constexpr,
    AHEAD: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """BN outputs of BM rows of x, over STEPS times as many chunks as warps share the inputs.

    x is bfloat16 or float16, its rows begin at addresses that 8 divides (K is a multiple of 4) and those of
    ``words`` at ones that 16 does, BM is a multiple of 8. A warp has TALL tiles of 16 outputs (at most 32 / BM).
    AHEAD: what a step reads is loaded in the step before, into twice the registers. WHOLE: K inputs are
    exactly the chunks of all steps of all programs.
    """
    PLACES: tl.constexpr = 32 // BITS
    BRAIN: tl.constexpr = x_ptr.dtype.element_ty == tl.bfloat16
    ALONG: tl.constexpr = BN // (16 * TALL)
    DEEP: tl.constexpr = WARPS // ALONG
    COLUMNS: tl.constexpr = BM // 8
    tl.static_assert(TALL * COLUMNS <= 4, "more products of a warp than are joined at the end")
    thread = tl.arange(0, 32 * WARPS)
    g = thread % 32 // 4
    q = thread % 4
    split = tl.program_id(1)
    blocks = tl.cdiv(N, BN)
    tile = tl.program_id(0) % blocks * BN + thread // (32 * DEEP) * (16 * TALL)
    sample = tl.program_id(0) // blocks * BM
    chunk = split * STEPS * DEEP + thread // 32 % DEEP
    end = tl.minimum((split + 1) * STEPS * DEEP, WORDS // 32)
    # Torch's compiler, which takes assembly as touching no memory, is to see that words are read; Triton's
    # drops a load that nobody uses.
    tl.load(words_ptr)
    # Two words, or four numbers of x, at once.
    words_at = words_ptr.to(tl.pointer_type(tl.int64), bitcast=True)
    x_from = x_ptr.to(tl.pointer_type(tl.int64), bitcast=True)
    rows, at, planes = (), (), ()
    for i in tl.static_range(2 * TALL):
        row = tl.minimum(tile + (g + 8 * i), N - 1)  # what rows beyond the end give is not stored
        rows += (row,)
        at += (words_at + (row.to(tl.int64) * (WORDS // 2) + 2 * q),)
        if LOOKUP == _PERMUTE:
            own = planes_ptr + row * PLANE_STRIDE
            planes += ((
                tl.load(own), tl.load(own + 1), tl.load(own + 2), tl.load(own + 3),
                tl.load(own + 4), tl.load(own + 5), tl.load(own + 6), tl.load(own + 7),
            ),)  # fmt: skip
        else:
            planes += ((),)
    x_at = ()
    for j in tl.static_range(COLUMNS):
        own_row = tl.minimum(sample + 8 * j + g, M - 1).to(tl.int64)
        x_at += (x_from + (own_row * (K // 4) + chunk * (8 * PLACES) + q),)
    nothing = tl.zeros((32 * WARPS,), dtype=tl.float32)
    zeros = (nothing, nothing, nothing, nothing)
    total = ()
    for _ in tl.static_range(TALL * COLUMNS):
        total += (zeros,)
    # The compiler leaves loads of a step until shortly before they are used, and what is waited for in turn
    # adds up; what is carried into the next step can't be left so long.
    if AHEAD:
        next_words = _words(at, chunk, end, NATIVE)
        next_x = _inputs(x_at, chunk, end, q, K, PLACES, WHOLE)
        next_factors = _factors(scales_ptr, rows, chunk, GROUP, GROUPS, SCALE, PLACES, RUN)
    for _ in range(STEPS):
        here = chunk
        if AHEAD:
            words, x, factors = next_words, next_x, next_factors
        else:
            words = _words(at, chunk, end, NATIVE)
            x = _inputs(x_at, chunk, end, q, K, PLACES, WHOLE)
            factors = _factors(scales_ptr, rows, chunk, GROUP, GROUPS, SCALE, PLACES, RUN)
        chunk += DEEP
        x_at = _moved(x_at, 8 * PLACES * DEEP, chunk < end)
        if AHEAD:
            next_words = _words(at, chunk, end, NATIVE)
            next_x = _inputs(x_at, chunk, end, q, K, PLACES, WHOLE)
            next_factors = _factors(scales_ptr, rows, chunk, GROUP, GROUPS, SCALE, PLACES, RUN)
        for run in tl.static_range(PLACES // RUN):
            tables = ()
            group = tl.minimum((here * PLACES + RUN * run) * 32 // GROUP, GROUPS - 1)
            for i in tl.static_range(2 * TALL):
                if GROUPED:
                    tables += (tables_ptr + (rows[i] * TABLE_STRIDE + (group << BITS)),)
                else:
                    tables += (tables_ptr + rows[i] * TABLE_STRIDE,)
            part = total
            if SCALE == _GROUP_SCALE:
                part = ()
                for _ in tl.static_range(TALL * COLUMNS):
                    part += (zeros,)
            for half in tl.static_range(2 * RUN):
                value = ()
                for i in tl.static_range(2 * TALL):
                    value += (
                        _values(
                            words[2 * i + half % 2], planes[i],
                            tables[i], run * RUN + half // 2, BITS, LOOKUP, BRAIN, NATIVE,
                        ),
                    )  # fmt: skip
                sums = ()
                for i in tl.static_range(TALL * COLUMNS):
                    low, high = value[i // COLUMNS * 2], value[i // COLUMNS * 2 + 1]
                    own_x = x[i % COLUMNS * 2 * PLACES + 2 * RUN * run + half]
                    sums += (_multiplied(low, high, own_x, part[i], BRAIN, NATIVE),)
                part = sums
            if SCALE == _GROUP_SCALE:
                sums = ()
                for i in tl.static_range(TALL * COLUMNS):
                    low = factors[2 * TALL * run + i // COLUMNS * 2]
                    high = factors[2 * TALL * run + i // COLUMNS * 2 + 1]
                    a, b, c, d = total[i]
                    e, f, u, v = part[i]
                    sums += ((a + e * low, b + f * low, c + u * high, d + v * high),)
                part = sums
            total = part
    # After the sum over the warps that shared the inputs: outputs of a program by results of a thread.
    RESULTS: tl.constexpr = 4 * TALL * COLUMNS
    y = tl.sum(tl.reshape(_joined(total), [ALONG, DEEP, 32, RESULTS]), 1)
    lane = tl.arange(0, 32)[None, :, None]
    index = tl.arange(0, RESULTS)[None, None, :]
    part = index % (TALL * COLUMNS)
    if TALL * COLUMNS == 4:  # joined in pairs
        part = part // 2 + part % 2 * 2
    column = index // (TALL * COLUMNS) // 2
    high = index // (TALL * COLUMNS) % 2
    first = (tl.program_id(0) % blocks * BN + tl.arange(0, ALONG) * (16 * TALL))[:, None, None]
    row = first + 16 * (part // COLUMNS) + 8 * high + lane // 4
    m = sample + 8 * (part % COLUMNS) + lane % 4 * 2 + column
    known = tl.minimum(row, N - 1)
    if SCALE == _ROW_SCALE:
        y *= tl.load(scales_ptr + known)
    if BIAS:
        y += tl.load(bias_ptr + known).to(tl.float32)
    out = y_ptr + (split.to(tl.int64) * M + m) * N + row
    tl.store(out, y.to(y_ptr.dtype.element_ty), mask=(row < N) & (m < M))
