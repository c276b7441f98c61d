"""Plans one or two moves away from one, that hold the budgets.

A move sets one site to another level: any format, the two next counts below and above. Pairs are one
move that softens and one that hardens, so that the latency stays about what it was.
"""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from tersor.core.records import Level
from tersor.plan.problem import Problem

# Pairs that are priced a round; where there are more a sample stands for all.
MAX_PAIRS = 300
REACH = 2  # counts below and above

Move = tuple[str, Level]


def moved(
    problem: Problem, plan: Mapping[str, Level], generator: np.random.Generator
) -> list[dict[str, Level]]:
    """Every plan one move away, and plans two moves away; budgets are not checked."""
    singles = single_moves(problem, plan)
    found = [problem.settled({**plan, **dict([move])}) for move in singles]
    pairs = [
        (i, j)
        for i in range(len(singles))
        for j in range(i + 1, len(singles))
        if singles[i][0] != singles[j][0]
    ]
    if len(pairs) > MAX_PAIRS:
        picked = generator.choice(len(pairs), MAX_PAIRS, replace=False)
        pairs = [pairs[int(k)] for k in np.sort(picked)]
    return found + [problem.settled({**plan, **dict([singles[i], singles[j]])}) for i, j in pairs]


def single_moves(problem: Problem, plan: Mapping[str, Level]) -> list[Move]:
    """Sites with another level."""
    return [
        (site, level)
        for site, row in problem.levels().items()
        for level in next_levels(row, plan[site])
    ]


def next_levels(levels: Iterable[Level], here: Level, reach: int = REACH) -> Sequence[Level]:
    """Every other format; of a count the next few below and above."""
    if not isinstance(here, int):
        return [level for level in levels if level != here]
    counts = sorted(level for level in levels if isinstance(level, int))
    place = counts.index(here)
    return [*counts[max(0, place - reach) : place], *counts[place + 1 : place + 1 + reach]]
