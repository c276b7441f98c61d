"""The plan as a mixed-integer linear program, solved by HiGHS.

The variables and rows are ``model``'s. A budget that can't be met is named, with the least value
that can be reached.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from tersor.core.errors import NumericalError
from tersor.core.records import Level
from tersor.plan.highs import run_milp
from tersor.plan.model import Model
from tersor.plan.problem import CONSTRAINTS, Constraint, Problem, Totals

RELATIVE_GAP = 1e-7
# Where products of levels are priced the last tenths of a per cent take most of the time, and
# prices are off by ten times that (FINDINGS 1).
JOINT_GAP = 2e-3
# The node limit keeps solutions reproducible; the time limit is the last resort of resolve().
NODE_LIMIT = 20_000
TIME_LIMIT_S = 10.0
# HiGHS keeps no time limit while it simplifies a program: one of 57,000 variables found nothing in half a minute,
# one of more took six.
MOST_VARIABLES = 40_000
# Times as long for a program that has found nothing, not even without cuts.
PATIENCE = 6.0
# Of a point of a curve, of which there are dozens.
ROUGH_GAP = 1e-2
ROUGH_LIMIT_S = 2.0
# HiGHS holds rows to 1e-7 of the scaled budget and integers to 1e-6.
TOLERANCE = 1e-6
NOTHING = Totals(0.0, 0, 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Solution:
    """One level a site, or the reason why there is none.

    Attributes:
        assignment: Every site with candidates -> level; empty where infeasible.
        gap: Relative gap between the objective and its proven bound.
        binding: The constraint that stops the objective; "" where nothing does.
        slack: Constraint -> 1 - used / budget.
        reachable: Where infeasible, constraint -> the least value with the other budgets held
            (alone, where those can't be held either).
    """

    status: Literal["optimal", "feasible", "infeasible"]
    assignment: Mapping[str, Level] = field(default_factory=dict)
    totals: Totals = NOTHING
    gap: float = 0.0
    binding: Constraint | Literal[""] = ""
    slack: Mapping[Constraint, float] = field(default_factory=dict)
    reachable: Mapping[Constraint, float] = field(default_factory=dict)

    @property
    def is_feasible(self) -> bool:
        """Whether there is a plan."""
        return self.status != "infeasible"


def solve(problem: Problem) -> Solution:
    """Solve a problem and name what stops it.

    Raises:
        NumericalError: HiGHS gave up before it found any plan.
    """
    solution = optimise(problem)
    if not solution.is_feasible:
        return _explain_infeasible(problem)
    if not problem.budgets():
        return solution
    free = optimise(problem.without(*CONSTRAINTS))
    best = free.totals.of(problem.objective)
    if solution.totals.of(problem.objective) <= best * (1 + allowance(solution)) + TOLERANCE**2:
        return solution
    # Budgets on the objective itself never stop it.
    others: dict[Constraint, float] = {
        n: s for n, s in solution.slack.items() if CONSTRAINTS[n][0] != problem.objective
    }
    if not others:
        return solution
    return replace(solution, binding=min((slack, name) for name, slack in others.items())[1])


def allowance(*solutions: Solution) -> float:
    """The share by which objectives may differ and be the same: what the solver left open."""
    return max(TOLERANCE, *(solution.gap for solution in solutions))


def optimise(problem: Problem, *, is_rough: bool = False) -> Solution:
    """Solve a problem without saying what stops it: one run of HiGHS.

    Where that finds no plan in its time, or the program is too large for it, one without ranks is looked for, and one
    without cuts, whose programs have fewer products of levels; then the whole one in more time.

    Args:
        problem: To solve.
        is_rough: To one per cent, which prices do not tell apart, and two seconds.

    Raises:
        NumericalError: HiGHS gave up before it found any plan.
    """
    try:
        return _optimised(problem, is_rough=is_rough)
    except NumericalError:
        if is_rough:  # one of dozens: left out
            raise
    for simpler in problem.simpler():
        try:
            found = _optimised(simpler, is_rough=False)
        except NumericalError:
            continue
        if found.is_feasible:
            return replace(found, status="feasible", gap=1.0)
    return _optimised(problem, is_rough=False, patience=PATIENCE)


def _optimised(problem: Problem, *, is_rough: bool, patience: float = 1.0) -> Solution:
    model = Model.of(problem)
    budgets = problem.budgets()
    if not model.columns:
        totals = problem.totals({})
        held = all(totals.of(CONSTRAINTS[n][0]) <= b for n, b in budgets.items())
        return Solution(status="optimal" if held else "infeasible", totals=totals)
    cost = model.cost(problem.objective)
    if len(cost) > MOST_VARIABLES and patience == 1:
        raise NumericalError(f"the program has {len(cost)} variables, too many to solve at once")
    x, is_proven, gap = run_milp(
        cost,
        [model.structure(), *(model.budget_row(n, b) for n, b in budgets.items())],
        model.is_choice,
        {
            "mip_rel_gap": _gap(model, is_rough=is_rough),
            "node_limit": NODE_LIMIT,
            "time_limit": patience * (ROUGH_LIMIT_S if is_rough else TIME_LIMIT_S),
        },
    )
    if x is None:
        return Solution(status="infeasible")
    chosen = [c for c, value in zip(model.columns, x, strict=False) if value > 0.5]
    assignment: dict[str, Level] = problem.settled(dict(chosen))
    totals = problem.totals(assignment)
    return Solution(
        status="optimal" if is_proven else "feasible",
        assignment=assignment,
        totals=totals,
        gap=gap,
        slack={n: _slack(totals.of(CONSTRAINTS[n][0]), b) for n, b in budgets.items()},
    )


def _gap(model: Model, *, is_rough: bool) -> float:
    """Small programs are solved at once to the end, whatever is asked for."""
    if not model.blocks:
        return RELATIVE_GAP
    return ROUGH_GAP if is_rough else JOINT_GAP


def _slack(used: float, budget: float) -> float:
    if budget > 0:
        return 1 - used / budget
    return 0.0 if used <= budget else float("-inf")


def _explain_infeasible(problem: Problem) -> Solution:
    reachable: dict[Constraint, float] = {}
    excess: dict[Constraint, tuple[bool, float]] = {}
    for name, budget in problem.budgets().items():
        objective = CONSTRAINTS[name][0]
        alone = optimise(problem.without(*CONSTRAINTS, objective=objective)).totals.of(objective)
        held = optimise(problem.without(name, objective=objective))
        reachable[name] = held.totals.of(objective) if held.is_feasible else alone
        possible_alone = alone <= budget * (1 + TOLERANCE)
        excess[name] = (possible_alone, _slack(reachable[name], budget) * -1)
    # What can't be met even alone comes first; else the budget that would have to give the least.
    binding = min(excess, key=lambda name: (*excess[name], name))
    return Solution(status="infeasible", binding=binding, reachable=reachable)
