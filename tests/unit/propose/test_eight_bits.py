"""One format of 8 bits for all layers that may be in both."""

import math

import pytest

from tersor.core.records import Candidate, Level
from tersor.propose.eight_bits import in_one_format


def offer(site: str, level: Level, error: float) -> Candidate:
    return Candidate(site=site, level=level, method="quantize", size_bytes=1, error=error)


def levels(found: tuple[Candidate, ...]) -> dict[str, set[Level]]:
    rows: dict[str, set[Level]] = {}
    for candidate in found:
        rows.setdefault(candidate.site, set()).add(candidate.level)
    return rows


def both(site: str, int8: float, fp8: float) -> list[Candidate]:
    return [offer(site, "f32", 0.0), offer(site, "int8", int8), offer(site, "fp8", fp8)]


@pytest.mark.parametrize(
    ("fp8", "kept"), [(0.29, "fp8"), (0.3, "fp8"), (0.31, "int8"), (math.nan, "int8")]
)
def test_layers_take_the_format_that_errs_less_together(fp8: float, kept: Level) -> None:
    rows = [*both("a", 0.2, 0.0), *both("b", 0.1, fp8), offer("conv", "int8", 5.0)]
    wanted = {"a": {"f32", kept}, "b": {"f32", kept}, "conv": {"int8"}}
    assert levels(in_one_format(rows, {})) == wanted


def test_a_plan_keeps_what_it_has() -> None:
    rows = [*both("a", 0.2, 0.1), *both("b", 0.2, 0.1), offer("c", "fp8", 1.0)]
    found = levels(in_one_format(rows, {"a": "int8", "b": "f32"}))
    assert found == {"a": {"f32", "int8"}, "b": {"f32", "fp8"}, "c": {"fp8"}}


def test_nothing_changes_where_there_is_one_format() -> None:
    rows = [offer("a", "int8", 1.0), offer("b", "f32", 0.0)]
    assert in_one_format(rows, {}) == tuple(rows)
