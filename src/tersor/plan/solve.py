"""The plan as a mixed-integer linear program, solved by HiGHS.

One binary for each (site, level) and one for each tensor that int8 sites read: its
quantiser is paid once, however many readers it has. Budgets are rows. Everything is scaled to the
order of 1 (milliseconds and bytes by the budget, errors likewise), as raw bytes beside raw errors
would meet the solver's absolute tolerances.

A budget that can't be met is named, with the least value that can be reached.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from scipy.sparse import coo_array

from tersor.core.records import Format
from tersor.plan.highs import Row, Vector, run_milp
from tersor.plan.problem import CONSTRAINTS, Constraint, Objective, Problem, Totals

# A site leaves its native format only for more than this share of the objective: fewer formats.
FORMAT_PENALTY = 1e-6
# Among equal plans, the one that is better in the other quantities. Bytes tie often (int8 weights
# take the same with and without int8 activations), so there the weight must be seen by the solver.
OTHER_QUANTITIES: dict[Objective, float] = {"latency": 1e-4, "error": 1e-6, "size": 1e-5}
RELATIVE_GAP = 1e-7
# The node limit keeps solutions reproducible; the time limit is the last resort of resolve().
NODE_LIMIT = 20_000
TIME_LIMIT_S = 5.0
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
    assignment: Mapping[str, Format] = field(default_factory=dict)
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
    if solution.totals.of(problem.objective) <= best * (1 + TOLERANCE) + TOLERANCE**2:
        return solution
    # Budgets on the objective itself never stop it.
    others: dict[Constraint, float] = {
        n: s for n, s in solution.slack.items() if CONSTRAINTS[n][0] != problem.objective
    }
    if not others:
        return solution
    return replace(solution, binding=min((slack, name) for name, slack in others.items())[1])


def optimise(problem: Problem) -> Solution:
    """Solve a problem without saying what stops it: one run of HiGHS."""
    model = _Model.of(problem)
    budgets = problem.budgets()
    if not model.columns:
        totals = problem.totals({})
        held = all(totals.of(CONSTRAINTS[n][0]) <= b for n, b in budgets.items())
        return Solution(status="optimal" if held else "infeasible", totals=totals)
    x, is_proven, gap = run_milp(
        model.cost(problem.objective),
        [model.structure(), *(model.budget_row(n, b) for n, b in budgets.items())],
        model.is_choice,
        {"mip_rel_gap": RELATIVE_GAP, "node_limit": NODE_LIMIT, "time_limit": TIME_LIMIT_S},
    )
    if x is None:
        return Solution(status="infeasible")
    chosen = [c for c, value in zip(model.columns, x, strict=False) if value > 0.5]
    assignment: dict[str, Format] = dict(chosen)
    totals = problem.totals(assignment)
    return Solution(
        status="optimal" if is_proven else "feasible",
        assignment=assignment,
        totals=totals,
        gap=gap,
        slack={n: _slack(totals.of(CONSTRAINTS[n][0]), b) for n, b in budgets.items()},
    )


def _slack(used: float, budget: float) -> float:
    if budget > 0:
        return 1 - used / budget
    return 0.0 if used <= budget else float("-inf")


@dataclass(frozen=True, slots=True)
class _Model:
    """Columns: the (site, level) pairs in order, then one for each tensor with int8 readers."""

    columns: tuple[tuple[str, Format], ...]
    readers: tuple[tuple[int, ...], ...]  # of each tensor: the columns of its int8 readers
    coefficients: Mapping[Objective, Vector]
    constants: Mapping[Objective, float]
    n_sites: int
    native: Format

    @classmethod
    def of(cls, problem: Problem) -> "_Model":
        table, levels = problem.table, problem.levels()
        columns = tuple((site, level) for site, row in levels.items() for level in row)
        readers: dict[str, list[int]] = {}
        for i, (site, level) in enumerate(columns):
            if level == "int8" and site in problem.tensors:
                readers.setdefault(problem.tensors[site], []).append(i)
        ms = [_price(problem, site, level) for site, level in columns]
        ms += [table.quantizers.get(t, 0.0) for t in readers]
        padding = [0.0] * len(readers)
        sizes = [float(levels[s][v].size_bytes) for s, v in columns]
        errors = [levels[s][v].error for s, v in columns]
        fixed = table.glue_ms + sum(
            row.get(problem.native, 0.0) for site, row in table.ops.items() if site not in levels
        )
        return cls(
            columns=columns,
            readers=tuple(tuple(r) for r in readers.values()),
            coefficients={
                "latency": np.array(ms, dtype=np.float64) * table.scale,
                "size": np.array(sizes + padding, dtype=np.float64),
                "error": np.array(errors + padding, dtype=np.float64),
            },
            constants={
                "latency": fixed * table.scale,
                "size": float(problem.fixed_bytes),
                "error": 0.0,
            },
            n_sites=len(levels),
            native=problem.native,
        )

    @property
    def n(self) -> int:
        return len(self.columns) + len(self.readers)

    @property
    def is_choice(self) -> Vector:
        """A tensor's variable needs no integrality: its rows pin it once the sites are chosen."""
        return np.array([1.0] * len(self.columns) + [0.0] * len(self.readers))

    def cost(self, objective: Objective) -> Vector:
        total = np.zeros(self.n)
        for name, values in self.coefficients.items():
            scale = float(np.abs(values).sum()) or 1.0
            total += values / scale * (1.0 if name == objective else OTHER_QUANTITIES[objective])
        changed = [float(level != self.native) for _, level in self.columns]
        total[: len(self.columns)] += FORMAT_PENALTY * np.array(changed)
        return total

    def structure(self) -> Row:
        """One level a site; a tensor is quantised if any reader is int8 (its price is >= 0)."""
        sites = sorted({site for site, _ in self.columns})
        row_of = {site: i for i, site in enumerate(sites)}
        entries = [(row_of[site], j, 1.0) for j, (site, _) in enumerate(self.columns)]
        low, high = [1.0] * len(sites), [1.0] * len(sites)
        for k, readers in enumerate(self.readers):
            z = len(self.columns) + k
            for j in readers:  # x_j <= z
                entries += [(len(low), j, 1.0), (len(low), z, -1.0)]
                low.append(-np.inf)
                high.append(0.0)
        rows, columns, values = zip(*entries, strict=True) if entries else ((), (), ())
        matrix = coo_array((values, (rows, columns)), shape=(len(low), self.n)).tocsr()
        return matrix, np.array(low), np.array(high)

    def budget_row(self, name: Constraint, budget: float) -> Row:
        objective = CONSTRAINTS[name][0]
        values, constant = self.coefficients[objective], self.constants[objective]
        scale = budget if budget > 0 else float(np.abs(values).max(initial=0.0)) or 1.0
        return values[None, :] / scale, -np.inf, (budget - constant) / scale


def _price(problem: Problem, site: str, level: Format) -> float:
    row = problem.table.ops.get(site, {})
    return row.get(level, row.get(problem.native, 0.0))


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
