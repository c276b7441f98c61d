"""The curve's points, as they are told."""

from typing import Any
from unittest.mock import Mock

from tersor.core.records import ParetoPoint, Plan
from tersor.plan.resolve import front


def point(ms: float, mb: float, drop: float, error: float = 0.0) -> ParetoPoint:
    plan: Any = Mock(spec=Plan)
    return ParetoPoint(latency_ms=ms, size_mb=mb, drop=drop, error=error, measured=False, plan=plan)


def test_beaten_points_go_and_the_fastest_comes_first() -> None:
    slow, fast, small = point(3, 2, 0), point(1, 2, 5), point(2, 1, 5)
    beaten, equal = point(2.5, 1, 6), point(3, 2, 0)
    assert front([slow, beaten, fast, equal, small]) == (fast, small, slow)


def test_what_is_expected_to_lose_as_much_at_a_smaller_error_stays() -> None:
    fast, safe = point(1, 1, 0, error=0.5), point(2, 1, 0, error=0.1)
    assert front([safe, fast]) == (fast, safe)
