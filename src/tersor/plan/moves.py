"""Plans one or two moves away from one; whether they hold the budgets is not asked.

A move sets one site to another level: any format, or one of the two next counts below and above.
"""

import itertools

import numpy as np

from tersor.plan.ranks import Grid, Ranks

# Pairs that are priced; where there are more a sample stands for all.
MAX_PAIRS = 1000
REACH = 2  # counts below and above


def moved(grid: Grid, row: Ranks, generator: np.random.Generator) -> Ranks:
    """Every plan one move away from a row, then plans of two moves."""
    singles = grid.near(row, REACH)
    pairs = [
        (a, b) for a, b in itertools.combinations(range(len(singles)), 2)
        if singles[a][0] != singles[b][0]
    ]  # fmt: skip
    if len(pairs) > MAX_PAIRS:
        picked = generator.choice(len(pairs), MAX_PAIRS, replace=False)
        pairs = [pairs[int(k)] for k in np.sort(picked)]
    moves = [(k,) for k in range(len(singles))] + pairs
    found = np.repeat(row[None], len(moves), axis=0)
    for place, taken in enumerate(moves):
        for k in taken:
            found[place, singles[k][0]] = singles[k][1]
    return grid.settle_(found)
