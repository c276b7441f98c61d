"""Codes of 4 bits, two a byte, and what codes with tables take.

The first of two codes is the low half of the byte. A row of odd length ends with a zero half, so that
rows begin at bytes.
"""

import torch
from jaxtyping import UInt8
from torch import Tensor

from tersor.core.errors import ConfigError, ShapeError

NIBBLE = 16  # codes of four bits are below


def pack_nibbles(codes: UInt8[Tensor, "*rows n"]) -> UInt8[Tensor, "*rows bytes"]:
    """Two codes a byte, along the last dimension, which becomes ceil(n / 2).

    Raises:
        ConfigError: A code of 16 or more.
    """
    if codes.numel() and int(codes.max()) >= NIBBLE:
        raise ConfigError(
            f"codes {tuple(codes.shape)}: found {int(codes.max())}, wanted 0..15 for four bits; store larger codes as bytes"
        )
    even, odd = codes[..., 0::2], codes[..., 1::2]
    padded = torch.zeros_like(even)
    padded[..., : odd.shape[-1]] = odd
    return even | (padded << 4)


def unpack_nibbles(packed: UInt8[Tensor, "*rows bytes"], length: int) -> UInt8[Tensor, "*rows n"]:
    """The inverse of ``pack_nibbles``.

    Args:
        packed: Two codes a byte; read only.
        length: n, codes of a row.

    Raises:
        ShapeError: The bytes of a row do not fit the length.
    """
    if length < 0 or packed.shape[-1] != (length + 1) // 2:
        raise ShapeError(
            f"packed codes {tuple(packed.shape)}: {packed.shape[-1]} bytes a row, wanted {(length + 1) // 2} for "
            f"{length} codes; pass the number of inputs of the weight"
        )
    halves = torch.stack([packed & (NIBBLE - 1), packed >> 4], dim=-1)
    return halves.flatten(-2)[..., :length].contiguous()


def codebook_bytes(
    codes: UInt8[Tensor, "g m n"], tables: tuple[int, int, int], value_dtype: torch.dtype
) -> int:
    """Bytes of packed codes and tables, without headers.

    Args:
        codes: Codes; only their sizes count.
        tables: Blocks of outputs, blocks of inputs, entries.
        value_dtype: Of the entries.
    """
    groups, outputs, inputs = codes.shape
    row = (inputs + 1) // 2 if tables[2] <= NIBBLE else inputs
    return groups * outputs * row + torch.Size(tables).numel() * value_dtype.itemsize
