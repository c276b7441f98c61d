"""What is packed comes back to the last bit: against the ops' own dequantisation, and by hand."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tersor.core.errors import ConfigError, NumericalError, ShapeError
from tersor.core.packing import Packing
from tersor.ops import packed as packed_module
from tersor.ops.bit_packing import pack
from tersor.ops.codebook import Codebook, decode
from tersor.ops.group_grids import Steps, dequantize
from tersor.ops.packed import Packed, unpack_bits
from tersor.ops.storing import (
    fits,
    grid_of,
    kept_of,
    pack_grid,
    pack_nearest,
    pack_pairs,
    pack_sparse,
    pack_tables,
    scheme_of,
)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def codes_of(seed: int, bits: int, *shape: int) -> Tensor:
    half = 2 ** (bits - 1)
    return torch.randint(-half, half, shape, generator=generator(seed), dtype=torch.int8)


def halves(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator(seed)).half().double()


def steps_of(values: Tensor) -> Steps:
    return Steps(step=values, zero=torch.zeros(values.shape, dtype=torch.int8))


@given(st.integers(0, 2**32 - 1), st.integers(2, 8), st.integers(1, 40), st.integers(1, 3))
@settings(max_examples=60)
def test_codes_come_back_whatever_the_pieces(seed: int, bits: int, n: int, rows: int) -> None:
    codes = codes_of(seed, bits, rows, n)
    wanted = (codes.to(torch.int16) + 2 ** (bits - 1)).numpy()
    stream = pack(codes, bits).numpy()
    assert np.array_equal(unpack_bits(stream, bits, n), wanted)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed_module, "_CHUNK_CODES", 16)  # several pieces of rows, and of a row
        assert np.array_equal(unpack_bits(stream, bits, n), wanted)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [0, 8, 32])
def test_a_grid(bits: int, group: int) -> None:
    codes = codes_of(0, bits, 2, 3, 20)  # two groups of a convolution: six outputs
    packing = Packing(kind="grid", shape=(6, 5, 2, 2), bits=bits, group=group)
    steps = steps_of(halves(1, 2, 3, packing.steps))
    found = pack_grid(packing, codes, steps).expand()
    wanted = dequantize(codes, steps, grid_of(packing))
    assert found.dtype == np.float32
    assert found.shape == (6, 5, 2, 2)
    # A code of 8 bits times a float16 has 19 bits: float32 holds it as it is.
    assert np.array_equal(found.reshape(2, 3, 20).astype(np.float64), wanted.numpy())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("per_output", [False, True])
def test_tables(bits: int, per_output: bool) -> None:
    packing = Packing(kind="table", shape=(6, 9), bits=bits, per_output=per_output)
    codes = torch.randint(0, 2**bits, (1, 6, 9), generator=generator(2)).to(torch.uint8)
    tables = halves(3, packing.tables, 1, 2**bits).sort(dim=2).values
    book = Codebook(codes=codes, tables=tables)
    found = pack_tables(packing, book).expand()
    assert np.array_equal(found.astype(np.float64), decode(book)[0].numpy())


@pytest.mark.parametrize("bits", [3, 8, 32])
def test_a_mask(bits: int) -> None:
    keep = torch.rand(1, 5, 7, generator=generator(4)) < 0.4
    packing = Packing(kind="sparse", shape=(5, 7), bits=bits, kept=int(keep.sum()))
    steps = steps_of(halves(5, 1, 5, 1))
    if bits == 32:
        weight = torch.randn(1, 5, 7, generator=generator(6))
        packed, wanted = pack_sparse(packing, keep, weight, None), weight.double()
    else:
        codes = codes_of(6, bits, 1, 5, 7)
        packed, wanted = pack_sparse(packing, keep, codes, steps), codes.double() * steps.step
    found = packed.expand()
    for i in range(5):
        for j in range(7):
            assert float(found[i, j]) == (float(wanted[0, i, j]) if keep[0, i, j] else 0.0)


@pytest.mark.parametrize("inputs", [8, 7])  # the last group of a row may go beyond them
@pytest.mark.parametrize("bits", [3, 8, 32])
def test_pairs(bits: int, inputs: int) -> None:
    """By the definition: two of each four of an order, the others zero."""
    order = torch.randperm(inputs, generator=generator(3))
    keep = torch.zeros(1, 5, inputs, dtype=torch.bool)
    for i in range(5):
        for start in range(0, inputs, 4):
            own = order[start : start + 4]
            chosen = torch.randperm(len(own), generator=generator(i + start))[: i % 3]
            keep[0, i, own[chosen]] = True  # none, one or two of them
    packing = Packing(kind="pairs", shape=(5, inputs), bits=bits)
    steps = steps_of(halves(5, 1, 5, 1))
    if bits == 32:
        weight = torch.randn(1, 5, inputs, generator=generator(6)) * keep
        packed, wanted = pack_pairs(packing, order, keep, weight, None), weight.double()
    else:
        codes = codes_of(6, bits, 1, 5, inputs) * keep
        packed, wanted = pack_pairs(packing, order, keep, codes, steps), codes.double() * steps.step
    found = packed.expand()
    for i in range(5):
        for j in range(inputs):
            assert float(found[i, j]) == float(wanted[0, i, j])


def test_pairs_that_lie() -> None:
    packing = Packing(kind="pairs", shape=(1, 4), bits=8)
    good = np.array([3, 1, 0, 2], dtype="<u2").tobytes() + bytes([215]) + bytes(4)
    Packed(packing, good).expand()
    with pytest.raises(ShapeError, match="its order of 4 inputs does not name each once"):
        Packed(packing, np.array([3, 1, 0, 0], dtype="<u2").tobytes() + good[8:]).expand()
    with pytest.raises(
        ShapeError, match="a byte of 216 for the places of 3 pairs, wanted less than 216"
    ):
        Packed(packing, good[:8] + bytes([216]) + good[9:]).expand()
    keep = torch.tensor([[[True, True, True, False]]])
    codes = torch.ones(1, 1, 4, dtype=torch.int8)
    with pytest.raises(ConfigError, match="found 3 kept weights in a group of 4, wanted at most 2"):
        pack_pairs(packing, torch.arange(4), keep, codes, steps_of(halves(1, 1, 1, 1)))


@pytest.mark.parametrize("kept", [0, 6])
def test_nothing_and_all_of_a_mask(kept: int) -> None:
    packing = Packing(kind="sparse", shape=(2, 3), bits=8, kept=kept)
    packed = pack_nearest(torch.ones(1, 2, 3, dtype=torch.float64), packing)
    assert np.allclose(packed.expand(), kept > 0, atol=1e-3)  # of a float16 step


@pytest.mark.parametrize(
    "fields",
    [
        {"kind": "grid", "bits": 4, "group": 32},
        {"kind": "grid", "bits": 2},
        {"kind": "table", "bits": 4},
        {"kind": "table", "bits": 8, "per_output": True},
        {"kind": "sparse", "bits": 8, "kept": 1000},
        {"kind": "sparse", "bits": 32, "kept": 1000},
        {"kind": "pairs", "bits": 8},
        {"kind": "pairs", "bits": 32},
    ],
)
def test_a_weight_at_its_nearest_codes(fields: dict[str, Any]) -> None:
    weight = torch.randn(1, 20, 100, generator=generator(7), dtype=torch.float64)
    packing = Packing(shape=(20, 100), **fields)
    packed = pack_nearest(weight, packing)
    assert len(packed.data) == packing.size_bytes()
    found = torch.from_numpy(packed.expand()).double()
    off = float((found - weight[0]).square().mean())
    kept = packing.kept / weight.numel() if packing.kind == "sparse" else 1.0
    if packing.kind == "pairs":
        assert int((found.reshape(20, 25, 4) != 0).sum(2).max()) <= 2
        assert 0.1 < off < 0.18  # the smaller two of four: more than the smallest half
    elif kept < 1:
        assert int((found == 0).sum()) >= 2000 - packing.kept
        # What is left out are the smallest half of normal weights, whose squares sum to 7 % of all.
        assert 0.05 < off < 0.1
    else:  # normal weights, Lloyd-Max at 4 bits 0.0095, at 2 bits 0.118; uniform grids a third more
        assert off < {2: 0.17, 4: 0.013, 8: 1e-3}[packing.bits]


def test_bytes_that_do_not_fit() -> None:
    packing = Packing(kind="grid", shape=(2, 4), bits=4)
    with pytest.raises(ShapeError, match=r"\(2, 4\) \(grid, 4 bits\): found 7 bytes, wanted 8"):
        Packed(packing, bytes(7))
    sparse = Packing(kind="sparse", shape=(2, 4), bits=8, kept=2)
    data = bytes([0b111]) + bytes(4) + bytes(2)
    with pytest.raises(ShapeError, match="its mask keeps 3 weights, wanted 2"):
        Packed(sparse, data).expand()


def test_what_float16_does_not_hold() -> None:
    packing = Packing(kind="grid", shape=(1, 4), bits=4)
    with pytest.raises(NumericalError, match="float16 does not hold"):
        pack_grid(packing, codes_of(0, 4, 1, 1, 4), steps_of(torch.full((1, 1, 1), 0.1).double()))
    with pytest.raises(ConfigError, match=r"wanted -8\.\.7 for 4 bits"):
        pack_grid(packing, codes_of(0, 8, 1, 1, 4).clamp_min(9), steps_of(halves(0, 1, 1, 1)))
    assert fits(torch.tensor([6e4]))
    assert not fits(torch.tensor([-7e4]))


def test_schemes() -> None:
    assert kept_of((10, 3), 0.9) == 3
    assert scheme_of(Packing(kind="table", shape=(4, 4), bits=4, per_output=True)).outputs == 1


@pytest.mark.parametrize("per_output", [True, False])
def test_codes_and_entries_of_tables(per_output: bool) -> None:
    packing = Packing(kind="table", shape=(6, 30), bits=4, per_output=per_output)
    packed = pack_nearest(torch.randn(1, 6, 30, generator=generator(2)).double(), packing)
    codes, entries = packed.coded()
    assert entries.shape == (packing.tables, 16)
    rows = np.arange(6) if per_output else np.zeros(6, dtype=int)
    assert np.array_equal(entries[rows[:, None], codes], packed.expand())


def test_codes_and_steps_of_grids_and_of_nothing_else() -> None:
    weight = torch.randn(1, 6, 30, generator=generator(2)).double()
    packed = pack_nearest(weight, Packing(kind="grid", shape=(6, 30), bits=3, group=8))
    codes, steps = packed.coded()
    assert steps.shape == (6, 4)
    wanted = (codes.astype(np.float32) - 4) * np.repeat(steps, 8, axis=1)[:, :30]
    assert np.array_equal(wanted, packed.expand())
    sparse = pack_nearest(weight, Packing(kind="sparse", shape=(6, 30), bits=8, kept=90))
    with pytest.raises(ConfigError, match="kind sparse, wanted grid or table"):
        sparse.coded()
