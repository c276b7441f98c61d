"""Packing loses nothing and takes the bytes that it says."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tersor.core.errors import ConfigError, ShapeError
from tersor.ops.packing import codebook_bytes, pack_nibbles, unpack_nibbles


@given(st.integers(0, 2**32 - 1), st.integers(0, 9), st.integers(0, 4))
def test_round_trip(seed: int, length: int, rows: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(16, (2, rows, length), generator=generator, dtype=torch.uint8)
    before = codes.clone()
    packed = pack_nibbles(codes)
    assert packed.shape == (2, rows, -(-length // 2))
    assert torch.equal(unpack_nibbles(packed, length), codes)
    assert torch.equal(codes, before)


def test_bytes_are_fixed() -> None:
    """Files depend on it."""
    codes = torch.tensor([1, 2, 15, 0, 7], dtype=torch.uint8)
    assert bytes(pack_nibbles(codes).tolist()).hex() == "210f07"


def test_sizes_count_what_is_stored() -> None:
    codes = torch.zeros(2, 3, 5, dtype=torch.uint8)
    packed = pack_nibbles(codes)
    tables = torch.zeros(6, 1, 16, dtype=torch.float16)
    assert codebook_bytes(codes, (6, 1, 16), torch.float16) == packed.nbytes + tables.nbytes
    assert codebook_bytes(codes, (1, 1, 256), torch.float32) == 30 + 1024


def test_messages() -> None:
    with pytest.raises(ConfigError, match=r"found 16, wanted 0\.\.15"):
        pack_nibbles(torch.tensor([3, 16], dtype=torch.uint8))
    with pytest.raises(ShapeError, match="3 bytes a row, wanted 2 for 4 codes"):
        unpack_nibbles(torch.zeros(3, dtype=torch.uint8), 4)
