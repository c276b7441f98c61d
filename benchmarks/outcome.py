"""What a result of ``tersor.compress`` kept, for rows of benchmarks."""

from typing import Any


def levels_of(result: Any) -> dict[str, int]:
    """Level -> how many layers have it."""
    levels: dict[str, int] = {}
    for level in result.plan.assignment.values():
        if isinstance(level, str):
            levels[level] = levels.get(level, 0) + 1
    return levels


def widths_of(result: Any) -> float:
    """Mean share of units that stay, of the widths in the plan; 1 without any."""
    session = result._run.session  # noqa: SLF001 - a benchmark of this package
    kept = [
        int(result.plan.assignment[s.name]) / s.units
        for s in session.widths
        if s.name in result.plan.assignment
    ]
    return sum(kept) / len(kept) if kept else 1.0
