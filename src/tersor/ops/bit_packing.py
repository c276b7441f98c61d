"""Codes of 2 to 8 bits as bytes, and back.

Each row is a stream of bits of its own, least significant bit first, filled up with zeros to a whole
byte: 4-bit codes lie two in a byte, the first in its lower half, 2-bit codes four in a byte, eight
3-bit codes in three bytes. A code is stored as code + 2^(bits - 1), so that it is never negative.

Axes: n codes of a row, b bytes of a row.
"""

import torch
from jaxtyping import Int8, UInt8
from torch import Tensor

from tersor.core.errors import ConfigError, ShapeError
from tersor.ops.group_grids import packed_bytes


def pack(codes: Int8[Tensor, "*rows n"], bits: int) -> UInt8[Tensor, "*rows b"]:
    """Pack signed codes.

    Args:
        codes: Within -2^(bits - 1)..2^(bits - 1) - 1; read only.
        bits: Width of a code, 2..8.

    Returns:
        ceil(n * bits / 8) bytes a row.

    Raises:
        ConfigError: ``bits`` outside 2..8, or a code that does not fit.
    """
    _check_bits(bits)
    half = 2 ** (bits - 1)
    if codes.numel() and not -half <= int(codes.amin()) <= int(codes.amax()) < half:
        raise ConfigError(
            f"codes run from {int(codes.amin())} to {int(codes.amax())}, wanted {-half}..{half - 1} for {bits} bits"
        )
    shifted = codes.to(torch.int16) + half
    places = torch.arange(bits, device=codes.device, dtype=torch.int16)
    stream = ((shifted.unsqueeze(-1) >> places) & 1).to(torch.uint8).flatten(-2)
    n_bytes = packed_bytes(codes.shape[-1], bits)
    stream = torch.nn.functional.pad(stream, [0, 8 * n_bytes - stream.shape[-1]])
    packed: Tensor = _weigh(stream.unflatten(-1, (n_bytes, 8))).to(torch.uint8)
    return packed


def unpack(packed: UInt8[Tensor, "*rows b"], bits: int, n_codes: int) -> Int8[Tensor, "*rows n"]:
    """The codes that ``pack`` was given.

    Args:
        packed: Bytes; read only.
        bits: Width of a code, 2..8.
        n_codes: Codes of a row.

    Raises:
        ConfigError: ``bits`` outside 2..8.
        ShapeError: Rows of another number of bytes than so many codes take.
    """
    _check_bits(bits)
    wanted = packed_bytes(n_codes, bits)
    if packed.shape[-1] != wanted:
        raise ShapeError(
            f"packed {tuple(packed.shape)}: found {packed.shape[-1]} bytes a row, wanted {wanted} "
            f"for {n_codes} codes of {bits} bits"
        )
    places = torch.arange(8, device=packed.device, dtype=torch.uint8)
    stream = ((packed.unsqueeze(-1) >> places) & 1).flatten(-2)[..., : n_codes * bits]
    values = _weigh(stream.unflatten(-1, (n_codes, bits)))
    codes: Tensor = (values - (1 << (bits - 1))).to(torch.int8)
    return codes


def _weigh(stream: UInt8[Tensor, "*rows bits"]) -> Tensor:
    """Numbers whose bits these are."""
    powers = 2 ** torch.arange(stream.shape[-1], device=stream.device, dtype=torch.int16)
    numbers: Tensor = (stream.to(torch.int16) * powers).sum(-1, dtype=torch.int16)
    return numbers


def _check_bits(bits: int) -> None:
    if not 2 <= bits <= 8:
        raise ConfigError(f"bits must be 2..8, got {bits}")
