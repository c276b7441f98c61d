"""Curves of plans: what latency, size and error trade for each other."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from tersor.core.errors import NumericalError
from tersor.plan.problem import Problem, Totals
from tersor.plan.solve import Solution, optimise

# Below this share of the largest error nothing is told apart on a geometric sweep.
SMALLEST_SHARE = 1e-3


def pareto(problem: Problem, n_points: int) -> tuple[Solution, ...]:
    """Plans of which none is at least as good as another in latency, size and error.

    Sweeps the error budget for the least latency and for the least size, and the latency budget
    for the least error, each point to one per cent. The problem's own budgets hold all along; its objective is ignored.

    Args:
        problem: Candidates, table and budgets.
        n_points: Points of each sweep, at least 2.

    Returns:
        Distinct plans from the fastest to the slowest; empty if the budgets can't be met.
    """
    fastest = optimise(replace(problem, objective="latency"))
    mildest = optimise(replace(problem, objective="error"))
    smallest = optimise(replace(problem, objective="size"))
    if not fastest.is_feasible:
        return ()
    found = [fastest, mildest, smallest]
    found += sweep_error(problem, n_points, fastest=fastest, mildest=mildest)
    top = max(smallest.totals.error, mildest.totals.error)
    for error in error_grid(mildest.totals.error, top, n_points):
        found += _point(replace(problem, objective="size", max_error=error))
    for ms in np.linspace(fastest.totals.ms, mildest.totals.ms, n_points)[1:-1]:
        found += _point(replace(problem, objective="error", max_ms=float(ms)))
    by_totals = {s.totals: s for s in reversed(found) if s.is_feasible}
    return tuple(by_totals[totals] for totals in non_dominated(list(by_totals)))


def sweep_error(
    problem: Problem, n_points: int, *, fastest: Solution, mildest: Solution
) -> list[Solution]:
    """The fastest plan at each of a geometric series of error budgets, smallest budget first."""
    top = max(fastest.totals.error, mildest.totals.error)
    grid = error_grid(mildest.totals.error, top, n_points)
    return [
        solution
        for error in grid
        for solution in _point(replace(problem, objective="latency", max_error=error))
    ]


def _point(problem: Problem) -> list[Solution]:
    """The plan of one point; none where the solver ran out of time before it had one."""
    try:
        return [optimise(problem, is_rough=True)]
    except NumericalError:
        return []


def error_grid(low: float, high: float, n_points: int) -> list[float]:
    """A geometric series of error budgets from ``low`` (which may be 0) to ``high``."""
    start = max(low, high * SMALLEST_SHARE)
    if high <= 0 or start >= high:
        return [low]
    inner = np.geomspace(start, high, n_points)
    # The ends exactly: rounding in geomspace must not make the first budget infeasible.
    return [low, *(float(e) for e in inner[1:-1]), high]


def non_dominated(points: Sequence[Totals]) -> list[Totals]:
    """The distinct points that no other one equals or beats everywhere, fastest first."""
    return sorted(t for t in set(points) if not any(_dominates(other, t) for other in points))


def _dominates(a: Totals, b: Totals) -> bool:
    return a != b and all(x <= y for x, y in zip(a, b, strict=True))


def error_budget(evaluated: Sequence[tuple[float, float]], max_loss: float) -> float:
    """The largest predicted error whose evaluated loss should hold, from (error, loss) pairs.

    The loss is taken as the least rising curve above the pairs, straight between them, from
    (0, 0); past the last pair it goes on in proportion. Where no pair loses anything, the largest
    error that was evaluated: nothing is known beyond it.
    """
    errors, losses = _envelope(evaluated)
    last_error, last_loss = errors[-1], losses[-1]
    if last_loss <= 0:
        return last_error
    if max_loss >= last_loss:
        return last_error * max_loss / last_loss
    i = int(np.searchsorted(losses, max_loss, side="right"))
    share = (max_loss - losses[i - 1]) / (losses[i] - losses[i - 1])
    return errors[i - 1] + share * (errors[i] - errors[i - 1])


def expected_loss(evaluated: Sequence[tuple[float, float]], error: float) -> float:
    """The loss that a predicted error should cost: the same curve, read the other way."""
    errors, losses = _envelope(evaluated)
    if error > errors[-1] > 0:
        return losses[-1] * error / errors[-1]
    return float(np.interp(error, errors, losses))


def _envelope(evaluated: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    best: dict[float, float] = {0.0: 0.0}
    highest = 0.0
    for error, loss in sorted(evaluated):
        highest = max(highest, loss)
        best[error] = highest
    return list(best), list(best.values())
