import itertools
from dataclasses import replace
from types import ModuleType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tersor.core.errors import NumericalError
from tersor.plan import sweep
from tersor.plan.problem import Problem, Totals
from tersor.plan.solve import TOLERANCE, Solution, optimise, solve
from tersor.plan.sweep import (
    error_budget,
    error_grid,
    expected_loss,
    non_dominated,
    pareto,
    sweep_error,
)


def is_dominated(point: Totals, by: Totals) -> bool:
    return point != by and all(b <= p for p, b in zip(point, by, strict=True))


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 1000), st.sampled_from(["f32", "bf16"]))
def test_no_point_of_the_curve_is_dominated(lab: ModuleType, seed: int, precision: str) -> None:
    points = [s.totals for s in pareto(lab.random_problem(seed, 10, precision), 6)]
    assert len(points) == len(set(points)) >= 2
    assert points == sorted(points)
    assert not any(is_dominated(p, q) for p in points for q in points)


def test_the_curve_holds_the_best_of_each_quantity(lab: ModuleType) -> None:
    problem = lab.random_problem(5, 12)
    points = [s.totals for s in pareto(problem, 6)]
    fastest = solve(replace(problem, objective="latency")).totals
    smallest = solve(replace(problem, objective="size")).totals
    assert min(p.ms for p in points) == fastest.ms
    # Ties in size are broken for less than a ten-thousandth of it.
    assert min(p.size_bytes for p in points) <= smallest.size_bytes * 1.0001
    assert min(p.error for p in points) == 0.0  # every site f32


def test_budgets_of_the_problem_hold_on_the_curve(lab: ModuleType) -> None:
    problem = lab.random_problem(5, 12)
    cap = problem.totals({}).size_bytes / 2
    points = pareto(replace(problem, max_bytes=cap), 6)
    assert points
    assert all(s.totals.size_bytes <= cap * (1 + TOLERANCE) for s in points)
    assert pareto(replace(problem, max_bytes=1.0), 6) == ()


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 1000))
def test_a_larger_error_budget_is_never_slower(lab: ModuleType, seed: int) -> None:
    problem = lab.random_problem(seed, 12)
    fastest = optimise(replace(problem, objective="latency"))
    mildest = optimise(replace(problem, objective="error"))
    curve = sweep_error(problem, 8, fastest=fastest, mildest=mildest)
    times = [s.totals.ms for s in curve]
    assert all(s.is_feasible for s in curve)
    # The solver may give up its relative gap and the tie-breaks, a few millionths.
    assert all(b <= a * (1 + 1e-4) for a, b in itertools.pairwise(times))
    assert times[-1] == fastest.totals.ms <= times[0]


def test_error_grid_keeps_its_ends_exactly() -> None:
    grid = error_grid(0.1, 0.7, 5)
    assert (grid[0], grid[-1], len(grid)) == (0.1, 0.7, 5)
    assert grid == sorted(grid)
    assert error_grid(0.0, 0.0, 5) == [0.0]
    assert error_grid(0.0, 1.0, 3) == [0.0, pytest.approx(1e-3**0.5), 1.0]


def test_non_dominated_by_hand() -> None:
    a, b, c, d = Totals(1.0, 9, 0.3), Totals(2.0, 5, 0.3), Totals(2.0, 5, 0.4), Totals(3.0, 9, 0.1)
    assert non_dominated([d, c, b, a, a]) == [a, b, d]


PAIRS = [(0.1, 1.0), (0.2, 4.0), (0.4, 3.0), (0.5, 8.0)]


@pytest.mark.parametrize(
    ("loss", "budget"),
    [(0.5, 0.05), (1.0, 0.1), (2.5, 0.15), (4.0, 0.4), (6.0, 0.45), (8.0, 0.5), (16.0, 1.0)],
)
def test_error_budget_reads_the_rising_curve(loss: float, budget: float) -> None:
    # At 0.4 the curve stays at 4, as a loss of 4 was seen at a smaller error.
    assert error_budget(PAIRS, loss) == pytest.approx(budget)


def test_expected_loss_reads_it_the_other_way() -> None:
    assert expected_loss(PAIRS, 0.15) == pytest.approx(2.5)
    assert expected_loss(PAIRS, 0.3) == pytest.approx(4.0)
    assert expected_loss(PAIRS, 1.0) == pytest.approx(16.0)
    assert expected_loss([], 1.0) == 0.0


def test_nothing_is_promised_beyond_what_was_evaluated() -> None:
    assert error_budget([(0.1, 0.0), (0.3, 0.0)], 5.0) == 0.3
    assert error_budget([], 5.0) == 0.0
    assert error_budget([(0.1, -0.2)], 0.0) == 0.1


def test_a_point_that_takes_too_long_is_left_out(
    lab: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = lab.random_problem(5, 12)
    whole = pareto(problem, 6)
    asked: list[bool] = []

    def hurried(problem: Problem, *, is_rough: bool = False) -> Solution:
        asked.append(is_rough)
        if is_rough and len(asked) % 2:
            raise NumericalError("the solver stopped without a plan")
        return optimise(problem, is_rough=is_rough)

    monkeypatch.setattr(sweep, "optimise", hurried)
    points = pareto(problem, 6)
    assert asked[:3] == [False, False, False]  # the ends are proven
    assert all(asked[3:])
    assert {s.totals for s in points[:1]} == {whole[0].totals}
    assert 2 <= len(points) < len(whole)
