"""Packed codes come back; the layout is the documented one, byte by byte."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tersor.core.errors import ConfigError, ShapeError
from tersor.ops.bit_packing import pack, unpack
from tersor.ops.group_grids import packed_bytes


def codes_of(seed: int, bits: int, *shape: int) -> torch.Tensor:
    half = 2 ** (bits - 1)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-half, half, shape, generator=generator, dtype=torch.int8)


def by_hand(row: list[int], bits: int) -> list[int]:
    """The row as one long number, its bytes from the lowest."""
    number = sum((code + 2 ** (bits - 1)) << (bits * i) for i, code in enumerate(row))
    return list(number.to_bytes(-(-len(row) * bits // 8), "little"))


@given(st.integers(0, 2**32 - 1), st.integers(2, 8), st.integers(0, 19))
@settings(max_examples=60)
def test_bytes_are_the_definition_and_codes_come_back(seed: int, bits: int, n: int) -> None:
    codes = codes_of(seed, bits, 2, 3, n)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (2, 3, packed_bytes(n, bits))
    assert packed.tolist() == [[by_hand(row, bits) for row in part] for part in codes.tolist()]
    assert torch.equal(unpack(packed, bits, n), codes)


def test_golden_bytes() -> None:
    assert pack(torch.tensor([-8, 7, 0], dtype=torch.int8), 4).tolist() == [0xF0, 0x08]
    assert pack(torch.tensor([-2, -1, 0, 1], dtype=torch.int8), 2).tolist() == [0b11100100]
    assert pack(torch.tensor([-4, 3, -4, 3, -4, 3, -4, 3], dtype=torch.int8), 3).tolist() == [
        0b00111000,
        0b10001110,
        0b11100011,
    ]


def test_wrong_arguments_are_refused() -> None:
    codes = torch.tensor([[2]], dtype=torch.int8)
    with pytest.raises(ConfigError, match=r"codes run from 2 to 2, wanted -2\.\.1 for 2 bits"):
        pack(codes, 2)
    with pytest.raises(ConfigError, match=r"bits must be 2\.\.8, got 9"):
        pack(codes, 9)
    with pytest.raises(ConfigError, match=r"bits must be 2\.\.8, got 1"):
        unpack(pack(codes, 4), 1, 1)
    with pytest.raises(ShapeError, match=r"found 1 bytes a row, wanted 2 for 3 codes of 4 bits"):
        unpack(pack(codes, 4), 4, 3)
