"""Quantities with units, as people write them: ``2x``, ``10 MB``, ``5 ms``, ``0.5 pt``."""

import re

from tersor.core.errors import TargetError

BYTES_PER_MB = 10**6

_SCALES: dict[str, tuple[str, float]] = {
    "x": ("ratio", 1.0),
    "x faster": ("ratio", 1.0),
    "x smaller": ("size_ratio", 1.0),
    "us": ("ms", 1e-3),
    "ms": ("ms", 1.0),
    "s": ("ms", 1e3),
    "b": ("mb", 1e-6),
    "kb": ("mb", 1e-3),
    "mb": ("mb", 1.0),
    "gb": ("mb", 1e3),
    "mib": ("mb", 2**20 / BYTES_PER_MB),
    "pt": ("points", 1.0),
    "pts": ("points", 1.0),
    "points": ("points", 1.0),
    "%": ("points", 1.0),
}
_QUANTITY = re.compile(r"\s*([-+]?\d+(?:\.\d*)?(?:e[-+]?\d+)?|\.\d+)\s*(.*?)\s*", re.IGNORECASE)


def parse_quantity(text: str) -> tuple[str, float]:
    """Read one quantity; returns its dimension (ratio, size_ratio, ms, mb, points, number) and value.

    Raises:
        TargetError: No number, or a unit that is not known.
    """
    match = _QUANTITY.fullmatch(text)
    if match is None:
        raise TargetError(f"{text!r}: no number found; write for example '2x', '5 ms' or '10 MB'")
    number, unit = float(match.group(1)), match.group(2).lower()
    if not unit:
        return "number", number
    if unit not in _SCALES:
        raise TargetError(
            f"{text!r}: unit {match.group(2)!r} is not known; known are {', '.join(_SCALES)}"
        )
    dimension, scale = _SCALES[unit]
    return dimension, number * scale


def format_bytes(size: float) -> str:
    """Bytes as megabytes (10^6) with two digits after the point."""
    return f"{size / BYTES_PER_MB:.2f} MB"
