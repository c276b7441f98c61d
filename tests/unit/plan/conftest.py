"""A small allocation world: sites, candidates, tables, and a machine with its own true prices."""

import itertools
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
    Level,
    Plan,
    PriceTable,
    Term,
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


JOINT_LEVELS: dict[str, tuple[Level, ...]] = {
    "width:w": (64, 48, 32),
    "width:v": (96, 64, 32),
    "branch:b": (1, 0),
    "a": ("f32", "int8", "int8_weight"),
    "c": ("f32", "int8", "int8_weight"),
    "d": ("f32", "int8"),
    "width:pinned": (128,),
}


def random_term(rng: np.random.Generator, name: str, *sites: str) -> Term:
    """Random positive costs that fall with what is kept."""
    levels = tuple(JOINT_LEVELS[site] for site in sites)
    values = []
    for combination in itertools.product(*levels):
        kept = [v / max(JOINT_LEVELS[s]) if isinstance(v, int) else 1.0
                for s, v in zip(sites, combination, strict=True)]  # fmt: skip
        values.append(
            float(np.prod(kept) * rng.uniform(0.5, 1) * (0.5 + ("int8" not in combination)))
        )
    return Term(name=name, sites=sites, levels=levels, values=tuple(values))


def random_joint(seed: int, **budgets: object) -> Problem:
    """Two widths, a branch, a pinned width and four formats, coupled by one to four."""
    rng = np.random.default_rng(seed)
    candidates = {}
    for site, levels in JOINT_LEVELS.items():
        error = rng.lognormal(-3, 1)
        rows = [
            Candidate(site=site, level=v, method="m", size_bytes=10**5 * v if site == "branch:b" else 10**6,
                      error=0.0 if i == 0 else error * (i + rng.uniform()))
            for i, v in enumerate(levels)
        ]  # fmt: skip
        candidates[site] = tuple(rows)
    del candidates["width:pinned"]
    candidates["e"] = tuple(replace(c, site="e", size_bytes=10**5 * (4 - i))
                            for i, c in enumerate(candidates["a"]))  # fmt: skip
    terms = (
        random_term(rng, "op.a", "width:w", "a", "width:v"),
        random_term(rng, "op.c", "c", "width:v", "branch:b"),
        random_term(rng, "op.d", "d", "width:w", "branch:b", "width:v"),
        random_term(rng, "glue", "width:w"),
        random_term(rng, "pinned", "width:pinned", "width:v"),
        random_term(rng, "norm", "width:v", "width:w"),
    )
    sizes = (
        random_term(rng, "a.weight", "width:w", "width:v", "a"),
        random_term(rng, "c.weight", "width:v", "c"),
        random_term(rng, "d.weight", "width:pinned", "d", "width:w"),
    )
    table = PriceTable(
        choice=BuildChoice(backend="fake"),
        ops={"e": {"f32": 0.4, "int8_weight": 0.4, "int8": 0.2}, "pinned.op": {"f32": 0.3}},
        quantizers={"t0": rng.uniform(0, 0.3), "t1": rng.uniform(0, 0.3)},
        glue_ms=0.2,
        scale=1.3,
        terms=terms,
        native={"width:w": 64, "width:v": 96, "branch:b": 1, "width:pinned": 128},
    )
    return Problem(
        candidates=candidates,
        table=table,
        tensors={"a": "t0", "c": "t0", "d": "t1", "e": "t1"},
        fixed_bytes=1000,
        size_terms=tuple(
            replace(t, values=tuple(round(v * 1e5) * 1.0 for v in t.values)) for t in sizes
        ),
        **budgets,
    )


@dataclass
class World:
    """A machine and a metric that the search can only ask."""

    problem: Problem
    truth: PriceTable  # what the machine really takes
    baseline_ms: float
    losses: dict[str, float] = field(default_factory=dict)  # site -> loss of int8, beyond error
    seen: list[Mapping[str, Level]] = field(default_factory=list)
    measured: list[Plan] = field(default_factory=list)

    def loss(self, assignment: Mapping[str, Level]) -> float:
        """100 x the sum of errors, plus what the sum does not know."""
        extra = sum(self.losses.get(s, 0.0) for s, v in assignment.items() if v == "int8")
        return 100 * self.problem.totals(assignment).error + extra

    def evaluate(self, assignment: Mapping[str, Level]) -> float:
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
            "size_terms": self.problem.size_terms,
        }
        return Task(**{**fields, **more})


def correct(
    table: PriceTable, assignment: Mapping[str, Level], tensors: Mapping[str, str], ms: float
) -> PriceTable:
    """What the price stage does: the running geometric mean of the ratios."""
    n = table.corrections + 1
    ratio = ms / table.predict_ms(assignment, tensors)
    return replace(table, scale=table.scale * ratio ** (1 / n), corrections=n)


def make_world(seed: int = 0, n: int = 12, factor: float = 1.0, *, joint: bool = False) -> World:
    """A machine whose true times are ``factor`` times the table's."""
    problem = random_joint(seed) if joint else random_problem(seed, n)
    truth = replace(problem.table, scale=problem.table.scale * factor)
    return World(problem=problem, truth=truth, baseline_ms=truth.predict_ms({}, problem.tensors))


@pytest.fixture
def world() -> World:
    return make_world()


@pytest.fixture(scope="session")
def lab() -> ModuleType:
    """This file: tests are no package, so that they can't import it."""
    return sys.modules[__name__]
