"""The number formats of a site, and which of them are a way to store a weight and no more.

A stored format takes few bytes in the artifact and runs as the floats that it stands for, so that all
of them cost the time of the build's own precision: one class of prices, however many there are.
"""

from typing import Literal, get_args

from tersor.core.rank_levels import RankLevel

Format = Literal[
    "f32",
    "bf16",
    "int8",
    "fp8",
    "int8_weight",
    "int4_weight",
    "int3_weight",
    "int2_weight",
    "lut8_weight",
    "lut4_weight",
    "sparse50_weight",
    "sparse70_weight",
    "sparse90_weight",
    "hardswish",
    "relu",
    "sparse50_int4_weight",
    "sparse2of4_weight",
    "sparse2of4_int4_weight",
]
# What a site may be set to: a number format, one with a rank, a width's kept units, or what is left
# of a branch.
Level = Format | RankLevel | int
# Stored formats have one price; it goes by this name in tables.
STORED_PRICE: Format = "int8_weight"
STORED: frozenset[str] = frozenset(name for name in get_args(Format) if name.endswith("_weight"))
# What an activation may be replaced by; it has no other level but those of the build's precision.
ACTIVATIONS: tuple[Format, ...] = ("hardswish", "relu")
# Of those stored, what no graph holds as codes: its weight is floats there, and packed in the artifact.
PACKED: frozenset[str] = STORED - {STORED_PRICE}


def priced_as(level: Level) -> Level:
    """The level whose time a level has: that of one stored format for all of them."""
    return STORED_PRICE if level in PACKED else level
