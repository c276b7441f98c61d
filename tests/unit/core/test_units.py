from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tersor.core.errors import TargetError
from tersor.core.units import _SCALES, format_bytes, parse_quantity


@pytest.mark.parametrize(
    ("text", "dimension", "value"),
    [
        ("2x", "ratio", 2.0),
        ("1.5 x faster", "ratio", 1.5),
        ("4x smaller", "size_ratio", 4.0),
        ("5 ms", "ms", 5.0),
        ("250us", "ms", 0.25),
        ("2 s", "ms", 2000.0),
        ("10 MB", "mb", 10.0),
        ("500 kB", "mb", 0.5),
        ("1.5 GB", "mb", 1500.0),
        ("1 MiB", "mb", 1.048576),
        ("0.5 pt", "points", 0.5),
        (".5 pts", "points", 0.5),
        ("1 %", "points", 1.0),
        ("1e-3", "number", 0.001),
        (" -2 ", "number", -2.0),
    ],
)
def test_reads_what_people_write(text: str, dimension: Any, value: Any):
    found, number = parse_quantity(text)
    assert found == dimension
    assert number == pytest.approx(value, rel=1e-15)


@given(st.sampled_from(sorted(_SCALES)), st.integers(0, 10**6), st.booleans())
def test_a_unit_scales_the_number_and_ignores_case(unit: Any, number: Any, upper: Any):
    dimension, scale = _SCALES[unit]
    text = f"{number} {unit.upper() if upper else unit}"
    assert parse_quantity(text) == (dimension, number * scale)


@pytest.mark.parametrize("text", ["", "fast", "x2", "--2x", "2 2x ms"])
def test_an_unreadable_text_is_refused(text: str):
    with pytest.raises(TargetError, match=r"no number found|is not known"):
        parse_quantity(text)


def test_an_unknown_unit_lists_the_known_ones():
    with pytest.raises(TargetError, match=r"'3 parsec'.*unit 'parsec'.*known are .*ms.*mb"):
        parse_quantity("3 parsec")


def test_bytes_are_megabytes_of_a_million():
    assert format_bytes(1_234_567.0) == "1.23 MB"
