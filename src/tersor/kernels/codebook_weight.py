"""Weights as 4- or 8-bit codes, laid out for ``codebook_linear``, and what they stand for.

W = table[code] * scale. A table of 16 or 256 values belongs to the whole weight, to an output row or to a
group of inputs of a row; without tables the values are the integers around zero: uniform int4 and int8.

Layout: a word of 32 bits holds one code of each of ``places`` runs of 32 inputs, so that 32 neighbouring
words, which a warp reads at once, hold 32 neighbouring inputs at every place: no value has to move to
another thread before it meets its input. With ``places = 32 / bits``, input ``k`` of a row lies in word
``k // (32 places) * 32 + k % 32``, at bit ``bits * (k // 32 % places)``.

Axes: out rows, inp inputs, words of a row, groups of inputs, tables (1 or out).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tersor.core.errors import ConfigError, NumericalError, ShapeError

WORD = 32  # bits; also the words, and the neighbouring inputs at one place, of a chunk
BITS = (4, 8)
# Offsets have 32 bits.
MOST = 2**31 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class CodedWeight:
    """A weight [out, inp] as the kernel reads it.

    Attributes:
        words: Codes [out, words] int32, filled up with code 0 to whole chunks.
        tables: Values [tables, groups, 2**bits] float16; None of a uniform grid.
        planes: The bytes of 16 values in two planes [tables, 8] int32, the lower bytes first, for lookups
            by byte permutation; None where a table has 256 values or belongs to a group.
        scales: Factors of the values [out, groups] float32, or None.
        bits: Of a code, 4 or 8.
        inputs: Of a row.
        group: Neighbouring inputs that share a scale or a table where those have groups; 0: all.
    """

    words: Tensor
    tables: Tensor | None
    planes: Tensor | None
    scales: Tensor | None
    bits: int
    inputs: int
    group: int = 0


def coded_weight(
    codes: Tensor,
    *,
    bits: int,
    tables: Tensor | None = None,
    scales: Tensor | None = None,
    group: int = 0,
) -> CodedWeight:
    """Lay a weight out for the kernel, once.

    Args:
        codes: [out, inp] integers from 0; read only. Without tables code c is the number
            c - 2**(bits - 1).
        bits: 4 or 8.
        tables: Values [1 or out, groups, 2**bits], each a float16 number.
        scales: [out, groups], finite in float32. A dimension ``groups`` of 1 is shared by all inputs.
        group: Neighbouring inputs that share a table or a scale, a multiple of 32; 0: all.

    Raises:
        ConfigError: Other bits, a code outside of them, or neither tables nor scales.
        NumericalError: A value of a table that is no finite float16 number, or a scale that is not finite.
        ShapeError: An empty weight, one with 2**31 weights or more, a group that is no multiple of 32, or
            tables or scales that do not fit.
    """
    _check_codes(codes, bits)
    out, inp = codes.shape
    _check_group(inp, group)
    if tables is None and scales is None:
        raise ConfigError("coded weight: found neither tables nor scales, wanted at least one")
    if tables is not None:
        _check_tables(tables, out, bits, _groups(inp, group))
    if scales is not None:
        _check_scales(scales, out, _groups(inp, group))
    values = None if tables is None else tables.to(torch.float16).contiguous()
    factors = None if scales is None else scales.to(codes.device, torch.float32).contiguous()
    return CodedWeight(
        words=_packed(codes, bits),
        tables=None if values is None else values.to(codes.device),
        planes=_planes(values, codes.device),
        scales=factors,
        bits=bits,
        inputs=inp,
        group=group,
    )


def _check_codes(codes: Tensor, bits: int) -> None:
    if bits not in BITS:
        raise ConfigError(f"coded weight: found {bits} bits, wanted one of {BITS}")
    if codes.dim() != 2 or not codes.numel() or codes.numel() > MOST:
        raise ShapeError(
            f"coded weight: found codes of shape {tuple(codes.shape)}, wanted [out, inp] with 1 to {MOST} "
            "of them; split a larger weight by its outputs"
        )
    if codes.is_floating_point() or codes.dtype == torch.bool:
        raise ConfigError(f"coded weight: found codes of type {codes.dtype}, wanted integers")
    low, high = int(codes.amin()), int(codes.amax())
    if low < 0 or high >= 2**bits:
        raise ConfigError(
            f"coded weight: codes run from {low} to {high}, wanted 0..{2**bits - 1} for {bits} bits"
        )


def _check_group(inp: int, group: int) -> None:
    if group < 0 or group % WORD or group > MOST:
        raise ShapeError(
            f"coded weight of {inp} inputs: found groups of {group}, wanted a multiple of {WORD}, or 0 for "
            "one group"
        )


def _groups(inp: int, group: int) -> int:
    return -(-inp // group) if group else 1


def _check_tables(tables: Tensor, out: int, bits: int, groups: int) -> None:
    fits = tables.dim() == 3 and tables.shape[0] in (1, out) and tables.shape[1] in (1, groups)
    if not fits or tables.shape[2] != 2**bits:
        raise ShapeError(
            f"coded weight: found tables {tuple(tables.shape)}, wanted [1 or {out}, 1 or {groups}, "
            f"{2**bits}]"
        )
    if tables.numel() > MOST:
        raise ShapeError(
            f"coded weight: found tables {tuple(tables.shape)}, wanted at most {MOST} values; use larger "
            "groups"
        )
    half = tables.to(torch.float16)
    if not bool((half.to(tables.dtype) == tables).all()) or not bool(half.isfinite().all()):
        raise NumericalError(
            "coded weight: found a table value that is no finite float16 number; round the tables first"
        )


def _check_scales(scales: Tensor, out: int, groups: int) -> None:
    if scales.dim() != 2 or scales.shape[0] != out or scales.shape[1] not in (1, groups):
        raise ShapeError(
            f"coded weight: found scales {tuple(scales.shape)}, wanted [{out}, 1 or {groups}]"
        )
    if not bool(scales.float().isfinite().all()):
        raise NumericalError("coded weight: found a scale that is not finite in float32")


def _packed(codes: Tensor, bits: int) -> Tensor:
    places = WORD // bits
    out, inp = codes.shape
    chunk = WORD * places
    filled = torch.nn.functional.pad(codes, [0, -inp % chunk])
    runs = filled.reshape(out, -1, places, WORD)
    words = torch.zeros(out, runs.shape[1], WORD, dtype=torch.int32, device=codes.device)
    for place in range(places):
        words |= runs[:, :, place].to(torch.int32) << (bits * place)
    return words.reshape(out, -1)


def _planes(tables: Tensor | None, device: torch.device) -> Tensor | None:
    if tables is None or tables.shape[1:] != (1, 16):
        return None
    pairs = tables.view(torch.uint8).reshape(-1, 16, 2)
    return pairs.transpose(1, 2).contiguous().view(torch.int32).reshape(-1, 8).to(device)


def codes_of(words: Tensor, bits: int, inputs: int) -> Tensor:
    """The codes [out, inp] of words, as int32."""
    places = WORD // bits
    shifts = torch.arange(0, WORD, bits, dtype=torch.int32, device=words.device)
    runs = words.reshape(words.shape[0], -1, 1, WORD) >> shifts.reshape(places, 1)
    return (runs & ((1 << bits) - 1)).reshape(words.shape[0], -1)[:, :inputs]


def expanded(
    words: Tensor,
    tables: Tensor | None,
    scales: Tensor | None,
    bits: int,
    inputs: int,
    group: int,
) -> Tensor:
    """The weight [out, inp] that codes stand for, in float32.

    A product of an 8-bit code and a float16 step, and a value of a table without a scale, are exact.
    """
    codes = codes_of(words, bits, inputs)
    if tables is not None:
        groups = _group_of(inputs, group, tables.shape[1], words.device)
        rows = torch.arange(codes.shape[0], device=words.device) if tables.shape[0] > 1 else 0
        table = rows * tables.shape[1] + groups.unsqueeze(1)
        weight = tables.float().reshape(-1)[(table << bits).t() + codes]
    else:
        weight = (codes - (1 << (bits - 1))).float()
    if scales is not None:
        weight = weight * scales[:, _group_of(inputs, group, scales.shape[1], words.device)]
    return weight


def _group_of(inputs: int, group: int, groups: int, device: torch.device) -> Tensor:
    """The group of every input; all zeros where there is one."""
    numbers = torch.arange(inputs, device=device)
    return numbers // group if groups > 1 else numbers * 0


def codebook_linear_reference(
    x: Tensor,
    words: Tensor,
    tables: Tensor | None,
    planes: Tensor | None,
    scales: Tensor | None,
    bias: Tensor | None,
    bits: int,
    inputs: int,
    group: int,
) -> Tensor:
    """As ``codebook_linear``, in torch's own ops: the weight is expanded, and rounded to x's type."""
    del planes
    weight = expanded(words, tables, scales, bits, inputs, group).to(x.dtype)
    return torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))
