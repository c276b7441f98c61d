"""A small allocation world: sites, candidates, tables, and a machine with its own true prices."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import ModuleType

import numpy as np
import pytest

from tersor.core.records import (
    BaselineRow,
    BuildChoice,
    Candidate,
    Format,
    Plan,
    PriceTable,
    Timing,
)
from tersor.plan.problem import Problem
from tersor.plan.task import Limits, Task, Tools


def timing(ms: float) -> Timing:
    return Timing(median_ms=ms, low_ms=ms, high_ms=ms, rounds_ms=(ms,), runs=1)


def random_problem(seed: int, n: int, precision: str = "f32", **budgets: object) -> Problem:
    """Sites with random prices, sizes and errors; neighbours share tensors."""
    rng = np.random.default_rng(seed)
    choice = BuildChoice(backend="fake", precision=precision)
    ops: dict[str, dict[str, float]] = {}
    candidates: dict[str, tuple[Candidate, ...]] = {}
    for i in range(n):
        site = f"s{i:03d}"
        native, size, error = rng.lognormal(-1, 1), int(rng.lognormal(12, 1)), rng.lognormal(-6, 1)
        ops[site] = {precision: native, "int8_weight": native}
        ops[site]["int8"] = native * rng.uniform(0.2, 1.1)
        rows = [
            Candidate(site=site, level="f32", method="q", size_bytes=4 * size),
            Candidate(site=site, level="int8", method="q", size_bytes=size, error=error),
            Candidate(
                site=site, level="int8_weight", method="q", size_bytes=size + 9, error=error / 3
            ),
        ]
        if precision == "bf16":
            rows[0] = replace(rows[0], level="bf16", error=error / 50, size_bytes=2 * size)
        candidates[site] = tuple(rows)
    tensors = {site: f"t{i // 2}" for i, site in enumerate(ops)}
    quantizers = {t: rng.uniform(0, 0.2) for t in sorted(set(tensors.values()))}
    ops["pinned"] = {precision: 0.3}
    table = PriceTable(
        choice=choice, ops=ops, quantizers=quantizers, glue_ms=rng.uniform(0, 0.5), scale=1.1
    )
    return Problem(candidates=candidates, table=table, tensors=tensors, fixed_bytes=1000, **budgets)


@dataclass
class World:
    """A machine and a metric that the search can only ask."""

    problem: Problem
    truth: PriceTable  # what the machine really takes
    baseline_ms: float
    losses: dict[str, float] = field(default_factory=dict)  # site -> loss of int8, beyond error
    seen: list[Mapping[str, Format]] = field(default_factory=list)
    measured: list[Plan] = field(default_factory=list)

    def loss(self, assignment: Mapping[str, Format]) -> float:
        """100 x the sum of errors, plus what the sum does not know."""
        extra = sum(self.losses.get(s, 0.0) for s, v in assignment.items() if v == "int8")
        return 100 * self.problem.totals(assignment).error + extra

    def evaluate(self, assignment: Mapping[str, Format]) -> float:
        self.seen.append(dict(assignment))
        return self.loss(assignment)

    def measure(self, plans: Sequence[Plan]) -> list[float]:
        self.measured += plans
        return [self.truth.predict_ms(p.assignment, self.problem.tensors) for p in plans]

    def tools(self) -> Tools:
        return Tools(evaluate=self.evaluate, measure=self.measure, correct=correct)

    def task(self, limits: Limits, **more: object) -> Task:
        choice = self.problem.table.choice
        size = self.problem.totals({}).size_bytes
        baseline = BaselineRow(
            name=choice.describe(), choice=choice, timing=timing(self.baseline_ms), size_bytes=size
        )
        fields: dict[str, object] = {
            "candidates": self.problem.candidates,
            "tables": (self.problem.table,),
            "tensors": self.problem.tensors,
            "fixed_bytes": self.problem.fixed_bytes,
            "limits": limits,
            "baseline": baseline,
            "pinned": {"pinned": "keep"},
        }
        return Task(**{**fields, **more})


def correct(
    table: PriceTable, assignment: Mapping[str, Format], tensors: Mapping[str, str], ms: float
) -> PriceTable:
    """What the price stage does: the running geometric mean of the ratios."""
    n = table.corrections + 1
    ratio = ms / table.predict_ms(assignment, tensors)
    return replace(table, scale=table.scale * ratio ** (1 / n), corrections=n)


def make_world(seed: int = 0, n: int = 12, factor: float = 1.0) -> World:
    """A machine whose true times are ``factor`` times the table's."""
    problem = random_problem(seed, n)
    truth = replace(problem.table, scale=problem.table.scale * factor)
    return World(problem=problem, truth=truth, baseline_ms=truth.predict_ms({}, problem.tensors))


@pytest.fixture
def world() -> World:
    return make_world()


@pytest.fixture(scope="session")
def lab() -> ModuleType:
    """This file: tests are no package, so that they can't import it."""
    return sys.modules[__name__]
