"""A plan chooses nothing inside of a branch that it removes, however cheap that looks."""

from tersor.core.records import BaselineRow, BuildChoice, Candidate, PriceTable, Term
from tersor.plan.ledger import Ledger, draft_of
from tersor.plan.problem import Problem
from tersor.plan.solve import optimise
from tersor.plan.swaps import neighbours
from tersor.plan.task import Limits, Task, Tools
from tests.unit.plan.conftest import timing

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


def test_neighbours_are_settled() -> None:
    task = Task(
        candidates=CANDIDATES,
        tables=(TABLE,),
        tensors={},
        fixed_bytes=0,
        limits=Limits(max_loss=1.0),
        baseline=BaselineRow(name="best", choice=CHOICE, timing=timing(5.2), size_bytes=100),
        inside=INSIDE,
    )
    tools = Tools(evaluate=lambda _: 0.0, measure=lambda _: [], correct=lambda t, *_: t)
    ledger = Ledger(task, tools)
    around = neighbours(ledger, draft_of(0, {"branch:b": 2, "width:w": 4}))
    assert {"branch:b": 0, "width:w": 8} in [d.assignment for d in around]
    assert {"branch:b": 0, "width:w": 4} not in [d.assignment for d in around]
