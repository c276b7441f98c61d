"""Codes as the kernel reads them: layout, what they stand for, and what is refused by name."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tersor.core.errors import ConfigError, NumericalError, ShapeError, TersorError
from tersor.kernels.codebook_weight import coded_weight, codes_of, expanded


def drawn(seed: int, *shape: int, bits: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**bits, shape, generator=generator, dtype=torch.uint8)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 9), st.integers(1, 700), st.sampled_from([4, 8]))
def test_codes_come_back_and_padding_is_code_zero(seed: int, out: int, inp: int, bits: int) -> None:
    codes = drawn(seed, out, inp, bits=bits)
    found = coded_weight(codes, bits=bits, scales=torch.ones(out, 1))
    chunk = 32 * 32 // bits
    assert found.words.shape == (out, -(-inp // chunk) * 32)
    whole = codes_of(found.words, bits, -(-inp // chunk) * chunk)
    assert torch.equal(whole[:, :inp], codes.int())
    assert not bool(whole[:, inp:].any())


@pytest.mark.parametrize("bits", [4, 8])
def test_layout_is_the_documented_one(bits: int) -> None:
    codes, places = drawn(0, 2, 600, bits=bits), 32 // bits
    words = coded_weight(codes, bits=bits, scales=torch.ones(2, 1)).words
    for row in range(2):
        for k in range(600):
            word = int(words[row, k // (32 * places) * 32 + k % 32]) & 0xFFFFFFFF
            assert word >> (bits * (k // 32 % places)) & (2**bits - 1) == int(codes[row, k])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("owner", ["tensor", "row", "group"])
@pytest.mark.parametrize("scaled", [None, "row", "group"])
def test_values_are_those_of_loops(bits: int, owner: str, scaled: str | None) -> None:
    out, inp, group = 3, 150, 64
    groups = -(-inp // group)
    generator = torch.Generator().manual_seed(5)
    codes = drawn(1, out, inp, bits=bits)
    shape = {"tensor": (1, 1), "row": (out, 1), "group": (out, groups)}[owner]
    tables = torch.randn(*shape, 2**bits, generator=generator).half()
    count = {None: 0, "row": 1, "group": groups}[scaled]
    scales = torch.randn(out, count, generator=generator) if count else None
    kept = codes.clone()
    weight = coded_weight(codes, bits=bits, tables=tables, scales=scales, group=group)
    found = expanded(weight.words, weight.tables, weight.scales, bits, inp, group)
    for n in range(out):
        for k in range(inp):
            table = tables[n if shape[0] > 1 else 0, k // group if shape[1] > 1 else 0]
            wanted = table[int(codes[n, k])].float()
            if scales is not None:
                wanted = wanted * scales[n, k // group if count > 1 else 0]
            assert found[n, k] == wanted
    assert torch.equal(codes, kept)
    has_planes = bits == 4 and owner != "group"
    assert (weight.planes is not None) == has_planes


@pytest.mark.parametrize("bits", [4, 8])
def test_uniform_values_are_integers_around_zero(bits: int) -> None:
    codes = torch.arange(2**bits).reshape(1, -1)
    weight = coded_weight(codes, bits=bits, scales=torch.tensor([[0.25]]))
    found = expanded(weight.words, None, weight.scales, bits, 2**bits, 0)
    assert torch.equal(found[0], (torch.arange(2**bits) - 2 ** (bits - 1)) * 0.25)


def test_planes_hold_the_bytes_of_the_tables() -> None:
    tables = torch.randn(3, 1, 16, generator=torch.Generator().manual_seed(0)).half()
    weight = coded_weight(drawn(0, 3, 64, bits=4), bits=4, tables=tables)
    assert weight.planes is not None
    for row in range(3):
        lower, upper = (
            [int(w) >> (8 * j) & 0xFF for w in part for j in range(4)]
            for part in (weight.planes[row, :4], weight.planes[row, 4:])
        )
        wanted = tables[row, 0].view(torch.int16).int() & 0xFFFF
        assert [a | b << 8 for a, b in zip(lower, upper, strict=True)] == wanted.tolist()


CODES = torch.zeros(4, 64, dtype=torch.uint8)
ONES = torch.ones(4, 1)
LARGE = torch.zeros(1, dtype=torch.uint8).expand(2**16, 2**15)


@pytest.mark.parametrize(
    ("fields", "error", "said"),
    [
        ({"bits": 3}, ConfigError, "3 bits"),
        ({"scales": None}, ConfigError, "neither tables nor scales"),
        ({"codes": CODES + 16}, ConfigError, r"from 16 to 16, wanted 0\.\.15"),
        ({"codes": CODES.to(torch.int8) - 1}, ConfigError, "from -1 to -1"),
        ({"codes": CODES.float()}, ConfigError, "float32, wanted integers"),
        ({"codes": CODES[:0]}, ShapeError, r"\(0, 64\)"),
        ({"codes": CODES[0]}, ShapeError, r"\(64,\)"),
        ({"codes": LARGE}, ShapeError, "split a larger weight"),
        ({"group": 48}, ShapeError, "groups of 48"),
        ({"group": -32}, ShapeError, "groups of -32"),
        ({"scales": torch.ones(4, 3), "group": 32}, ShapeError, r"\(4, 3\)"),
        ({"scales": ONES * torch.inf}, NumericalError, "scale"),
        ({"tables": torch.zeros(2, 1, 16)}, ShapeError, r"\(2, 1, 16\)"),
        ({"tables": torch.zeros(4, 1, 15)}, ShapeError, r"\(4, 1, 15\)"),
        ({"tables": torch.full((4, 1, 16), 1e-9)}, NumericalError, "float16"),
        ({"tables": torch.full((4, 1, 16), torch.nan)}, NumericalError, "float16"),
        ({"tables": torch.full((4, 1, 16), torch.inf)}, NumericalError, "float16"),
    ],
)
def test_refused_by_name(fields: dict[str, Any], error: type[TersorError], said: str) -> None:
    settings: dict[str, Any] = {"codes": CODES, "bits": 4, "scales": ONES, **fields}
    with pytest.raises(error, match=said):
        coded_weight(settings.pop("codes"), **settings)


def test_any_strides_of_codes() -> None:
    codes = drawn(3, 64, 10, bits=4)
    found = coded_weight(codes.t(), bits=4, scales=torch.ones(10, 1))
    assert torch.equal(codes_of(found.words, 4, 64), codes.t().int())
