"""Levels that give a layer a number format and a rank: ``f32_rank64``, ``int8_rank64``.

The only place that reads and writes these names. ``f32`` stands for float factors, whatever the
build computes them in, as it does for whole weights.
"""

import re
from typing import Literal, get_args

from tersor.core.errors import ConfigError

RankFormat = Literal["f32", "int8"]
# Formats that ops compute in. A plan gives a site one of them (``propose.eight_bits``), so that prices know
# 8 bits and floats.
EIGHT_BITS: tuple[Literal["int8"], Literal["fp8"]] = ("int8", "fp8")
_PATTERN = re.compile(r"(f32|int8)_rank([1-9][0-9]*)", re.ASCII)


class RankLevel(str):
    """A level's name, checked at birth; equal to the plain text, as keys of records are.

    Raises:
        ConfigError: Another text.
    """

    __slots__ = ()

    def __new__(cls, text: str) -> "RankLevel":  # noqa: PYI034 - run-time checks know no Self here
        """The level of that name."""
        if not _PATTERN.fullmatch(text):
            raise ConfigError(
                f"level: found {text!r}, wanted a format and a rank such as f32_rank64; formats "
                f"are {', '.join(get_args(RankFormat))}"
            )
        return super().__new__(cls, text)

    @classmethod
    def of(cls, form: RankFormat, rank: int) -> "RankLevel":
        """The level of a format and a rank >= 1."""
        return cls(f"{form}_rank{rank}")


def rank_of(level: object) -> int:
    """The rank of any level, of which most have none: 0."""
    found = _PATTERN.fullmatch(level) if isinstance(level, str) else None
    return int(found[2]) if found else 0


def format_of(level: str) -> str:
    """The number format of a format site's level, without its rank."""
    found = _PATTERN.fullmatch(level)
    return found[1] if found else level


def is_eight_bit(level: object) -> bool:
    """Whether a level computes in 8 bits, so that the op reads its tensor through a quantiser."""
    return isinstance(level, str) and format_of(level) in EIGHT_BITS
