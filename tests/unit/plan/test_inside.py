"""A plan chooses nothing inside of a branch that it removes, however cheap that looks."""

import numpy as np

from tersor.core.records import BuildChoice, Candidate, PriceTable, Term
from tersor.plan.moves import moved
from tersor.plan.problem import Problem
from tersor.plan.ranks import Grid
from tersor.plan.solve import optimise

CHOICE = BuildChoice(backend="fake")
CANDIDATES = {
    site: tuple(
        Candidate(site=site, level=level, method="m", size_bytes=10, error=0.1 * i)
        for i, level in enumerate(levels)
    )
    for site, levels in {"branch:b": (2, 0), "width:w": (8, 4)}.items()
}
TABLE = PriceTable(
    choice=CHOICE,
    ops={},
    quantizers={},
    glue_ms=1.0,
    native={"branch:b": 2, "width:w": 8},
    terms=(
        Term(
            name="op", sites=("width:w", "branch:b"), levels=((8, 4), (2, 0)),
            values=(4.0, 0.0, 2.0, 0.0),
        ),
        # A little glue that a narrow width seems to save also where it is gone.
        Term(name="glue", sites=("width:w",), levels=((8, 4),), values=(0.2, 0.1)),
    ),
)  # fmt: skip
INSIDE = {"branch:b": ("width:w",)}


def test_a_solution_is_settled() -> None:
    free = Problem(candidates=CANDIDATES, table=TABLE, tensors={})
    assert optimise(free).assignment == {"branch:b": 0, "width:w": 4}
    bound = Problem(candidates=CANDIDATES, table=TABLE, tensors={}, inside=INSIDE)
    found = optimise(bound)
    assert found.assignment == {"branch:b": 0, "width:w": 8}
    assert found.totals == bound.totals(found.assignment)


def test_moves_are_settled() -> None:
    grid = Grid(Problem(candidates=CANDIDATES, table=TABLE, tensors={}, inside=INSIDE))
    start = grid.encode([{"branch:b": 2, "width:w": 4}])[0]
    around = [grid.decode(row) for row in moved(grid, start, np.random.default_rng(0))]
    assert {"branch:b": 0, "width:w": 8} in around
    assert {"branch:b": 0, "width:w": 4} not in around
