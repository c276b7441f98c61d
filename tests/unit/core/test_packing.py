"""Sizes of layouts, counted by hand, and what is no layout."""

from typing import Any

import pytest

from tersor.core.errors import ConfigError
from tersor.core.formats import PACKED, STORED, priced_as
from tersor.core.packing import Packing


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        # 5 rows of 3 x 7 codes: 21 x 3 bits are 63, so 8 bytes; 21 inputs are three groups of 8.
        ({"kind": "grid", "bits": 3, "group": 8}, (5 * 8, 5 * 3 * 2)),
        ({"kind": "grid", "bits": 2}, (5 * 6, 5 * 2)),
        ({"kind": "grid", "bits": 4, "group": 64}, (5 * 11, 5 * 2)),  # one group, not filled
        ({"kind": "table", "bits": 4}, (5 * 11, 16 * 2)),
        ({"kind": "table", "bits": 8, "per_output": True}, (5 * 21, 5 * 256 * 2)),
        # 105 bits of a mask are 14 bytes; 50 codes of 3 bits are 150, so 19 bytes.
        ({"kind": "sparse", "bits": 8, "kept": 50}, (14, 5 * 2, 50)),
        ({"kind": "sparse", "bits": 3, "kept": 50}, (14, 5 * 2, 19)),
        ({"kind": "sparse", "bits": 32, "kept": 50}, (14, 0, 200)),
        # 21 inputs of two bytes; six groups of four a row are 30, in 10 bytes; 60 codes.
        ({"kind": "pairs", "bits": 8}, (42, 10, 5 * 2, 60)),
        ({"kind": "pairs", "bits": 3}, (42, 10, 5 * 2, 23)),
        ({"kind": "pairs", "bits": 32}, (42, 10, 0, 240)),
    ],
)
def test_sizes(fields: dict[str, Any], parts: tuple[int, ...]) -> None:
    packing = Packing(shape=(5, 3, 7), **fields)
    assert packing.parts() == parts
    assert packing.size_bytes() == sum(parts)


def test_a_cut_weight_keeps_its_layout_and_its_share_of_zeros() -> None:
    packing = Packing(kind="sparse", shape=(8, 10), bits=8, kept=20)
    cut = packing.resized((4, 10))
    assert (cut.shape, cut.kept, cut.bits) == ((4, 10), 10, 8)
    pairs = Packing(kind="pairs", shape=(8, 12), bits=4)
    assert pairs.resized((7, 9)).parts() == (18, 7, 14, 21)
    long = Packing(kind="pairs", shape=(1, 2**16 + 4), bits=4)  # numbers beyond uint16
    assert long.parts()[0] == 4 * (2**16 + 4)
    grid = Packing(kind="grid", shape=(8, 64), bits=4, group=32)
    assert grid.resized((8, 40)).parts() == (8 * 20, 8 * 2 * 2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "table", "bits": 3}, r"table: found 3 bits, wanted \(4, 8\)"),
        ({"kind": "grid", "bits": 32}, "grid: found 32 bits"),
        ({"kind": "grid", "bits": 4, "shape": ()}, "wanted 1 to 8 sizes of 1 or more"),
        ({"kind": "grid", "bits": 4, "shape": (3, 0)}, "wanted 1 to 8 sizes of 1 or more"),
        ({"kind": "grid", "bits": 4, "shape": (1,) * 9}, "wanted 1 to 8 sizes of 1 or more"),
        ({"kind": "grid", "bits": 4, "group": -1}, "groups of -1"),
        ({"kind": "sparse", "bits": 8, "kept": 7}, "7 kept weights"),
    ],
)
def test_what_is_no_layout(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Packing(**{"shape": (2, 3), **fields})


def test_stored_formats_have_one_price() -> None:
    assert {"int8_weight"} == STORED - PACKED
    assert {priced_as(level) for level in sorted(STORED)} == {"int8_weight"}  # type: ignore[arg-type]
    assert [priced_as(level) for level in ("f32", "bf16", "int8", 64)] == [
        "f32",
        "bf16",
        "int8",
        64,
    ]
