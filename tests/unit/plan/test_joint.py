"""Widths, branches and formats in one plan, against enumeration."""

import itertools
import json
import math
from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tersor.plan.products
import tersor.plan.solve
from tersor.core.errors import ConfigError, NumericalError
from tersor.core.jsonable import dumps, from_json
from tersor.core.rank_levels import RankLevel, rank_of
from tersor.core.records import Candidate, Level, PriceTable, Term
from tersor.plan.ledger import Ledger, draft_of
from tersor.plan.model import FORMAT_PENALTY, OTHER_QUANTITIES, Model
from tersor.plan.problem import CONSTRAINTS, Problem, Totals
from tersor.plan.products import Reduced, blocks_of, home_of
from tersor.plan.ranks import Grid
from tersor.plan.resolve import curve, resolve
from tersor.plan.search import choose
from tersor.plan.solve import JOINT_GAP, TOLERANCE, Solution, optimise, solve
from tersor.plan.sweep import pareto
from tersor.plan.task import Choice, Limits

# Sums of a dozen doubles near 1.
ROUNDING = 1e-12


def enumerate_all(problem: Problem) -> list[tuple[dict[str, Level], Totals]]:
    """Every assignment with its totals: the definition."""
    levels = problem.levels()
    every = (dict(zip(levels, c, strict=True)) for c in itertools.product(*levels.values()))
    return [(assignment, problem.totals(assignment)) for assignment in every]


def holds(problem: Problem, totals: Totals, slack: float = 0.0) -> bool:
    budgets = problem.budgets().items()
    return all(totals.of(CONSTRAINTS[n][0]) <= b * (1 + slack) for n, b in budgets)


def exactly(problem: Problem) -> Solution:
    """Solved to the gap of problems without products."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tersor.plan.solve, "JOINT_GAP", 1e-7)
        return solve(problem)


@settings(deadline=None, max_examples=25)
@given(
    st.integers(0, 10_000),
    st.sampled_from(["latency", "error", "size"]),
    st.lists(st.sampled_from(["latency", "size", "drop"]), unique=True, max_size=3),
)
def test_program_equals_enumeration(
    lab: ModuleType, seed: int, objective: str, kinds: list[str]
) -> None:
    problem = lab.random_joint(seed, objective=objective)
    every = enumerate_all(problem)
    rng = np.random.default_rng(seed + 1)
    for kind in kinds:
        of, field = CONSTRAINTS[kind]
        values = sorted(t.of(of) for _, t in every)
        budget = values[0] + rng.uniform(-0.05, 1) * (values[-1] - values[0])
        problem = replace(problem, **{field: budget})
    best = min((t.of(objective) for _, t in every if holds(problem, t)), default=None)
    solution, quick = exactly(problem), solve(problem)
    assert solution.is_feasible == quick.is_feasible == (best is not None)
    if best is None:
        return
    # What ties may give away, as a share of at most what the worst plan costs: the other two
    # quantities at their weight and a format penalty for each of four sites.
    worst = max(t.of(objective) for _, t in every)
    slop = (2 * OTHER_QUANTITIES[objective] + 4 * FORMAT_PENALTY + TOLERANCE) * worst
    assert solution.totals.of(objective) <= best + slop
    assert quick.totals.of(objective) <= best * (1 + JOINT_GAP) + slop
    for found in (solution, quick):
        assert found.totals == problem.totals(found.assignment)
        assert holds(problem, found.totals, TOLERANCE)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10_000))
def test_the_program_is_linear_in_what_totals_say(lab: ModuleType, seed: int) -> None:
    problem = lab.random_joint(seed)
    model = Model.of(problem)
    matrix, low, high = model.structure()
    rng = np.random.default_rng(seed)
    for _ in range(20):
        assignment = {s: list(row)[rng.integers(len(row))] for s, row in problem.levels().items()}
        x = point(problem, model, assignment)
        totals = problem.totals(assignment)
        for objective, values in model.coefficients.items():
            value = float(values @ x) + model.constants[objective]
            assert value == pytest.approx(totals.of(objective), rel=ROUNDING)
        assert bool(((low <= matrix @ x) & (matrix @ x <= high)).all())


def point(problem: Problem, model: Model, assignment: dict[str, Level]) -> np.ndarray:
    """The variables of an assignment, by what they mean."""
    x = [float(assignment[site] == level) for site, level in model.columns]
    x += [max(x[j] for j in readers) for readers in model.readers]
    for block in model.blocks:
        rows = [list(problem.levels()[site]) for site in block.sites]
        chosen = tuple(
            groups[row.index(assignment[site])]
            for site, row, groups in zip(block.sites, rows, block.groups, strict=True)
        )
        every = (range(max(groups) + 1) for groups in block.groups)
        x += [float(combination == chosen) for combination in itertools.product(*every)]
    return np.array(x)


def test_terms_over_the_same_sites_share_variables(lab: ModuleType) -> None:
    model = Model.of(lab.random_joint(0))
    # c with v and b; d with b, v and w; a with v and w: op.a and a.weight. norm, pinned, c.weight
    # and d.weight lie within those or on one site.
    assert [block.sites for block in model.blocks] == [
        ("branch:b", "d", "width:v", "width:w"),
        ("a", "width:v", "width:w"),
        ("branch:b", "c", "width:v"),
    ]
    assert [block.size for block in model.blocks] == [36, 27, 18]
    assert model.is_choice.sum() == sum(len(r) for r in lab.random_joint(0).levels().values())


def fused(problem: Problem, seed: int) -> Problem:
    """The op of a is computed in int8 only where c is int8 as well; what changes format costs more."""
    rng = np.random.default_rng(seed + 10_000)
    first = next(t for t in problem.table.terms if t.name == "op.a")
    sites = (*first.sites, "c")
    levels = (*first.levels, ("f32", "int8", "int8_weight"))

    def ms(at: dict[str, Level]) -> float:
        whole = at["a"] == at["c"] == "int8"
        return first.at({**at, "a": at["a"] if whole else "f32"})

    per_unit = rng.uniform(0, 0.01)
    rows = [dict(zip(sites, row, strict=True)) for row in itertools.product(*levels)]
    changes = [
        per_unit * int(r["width:v"]) * ((r["a"] == "int8") != (r["c"] == "int8")) for r in rows
    ]
    terms = (
        *(t for t in problem.table.terms if t.name != "op.a"),
        Term(name="op.a", sites=sites, levels=levels, values=tuple(map(ms, rows))),
        Term(name="op.a, format", sites=sites, levels=levels, values=tuple(changes)),
    )
    return replace(problem, table=replace(problem.table, terms=terms))


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 10_000))
def test_terms_of_two_formats_are_solved_and_priced_as_enumerated(
    lab: ModuleType, seed: int
) -> None:
    problem = fused(lab.random_joint(seed), seed)
    every = enumerate_all(problem)
    error = sorted(t.error for _, t in every)
    problem = replace(problem, max_error=error[0] + 0.4 * (error[-1] - error[0]))
    best = min(t.ms for _, t in every if holds(problem, t))
    worst = max(t.ms for _, t in every)
    slop = (2 * OTHER_QUANTITIES["latency"] + 4 * FORMAT_PENALTY + TOLERANCE) * worst
    assert exactly(problem).totals.ms <= best + slop
    grid, rng = Grid(problem), np.random.default_rng(seed)
    x = np.stack([rng.integers(0, len(row), 20) for row in grid.levels], 1)
    totals = [problem.totals(grid.decode(row)).ms for row in x]
    assert grid.ms(x) == pytest.approx(totals, rel=1e-12)
    model = Model.of(problem)
    for row in x:
        at = point(problem, model, grid.decode(row))
        value = float(model.coefficients["latency"] @ at) + model.constants["latency"]
        assert value == pytest.approx(problem.totals(grid.decode(row)).ms, rel=ROUNDING)
        matrix, low, high = model.structure()
        assert bool(((low <= matrix @ at) & (matrix @ at <= high)).all())


def test_levels_that_nothing_tells_apart_share_variables(lab: ModuleType) -> None:
    model = Model.of(fused(lab.random_joint(0), 0))
    sizes = {block.sites: block.shape for block in model.blocks}
    # To a's op c is int8 or not: two groups of three levels. The weight of a tells a's own apart.
    assert sizes["a", "c", "width:v", "width:w"] == (3, 2, 3, 3)
    groups = {block.sites: block.groups for block in model.blocks}
    assert groups["a", "c", "width:v", "width:w"][1] == (0, 1, 0)
    # c with v and b has a block of its own, in which all three of c are told apart.
    assert sizes["branch:b", "c", "width:v"] == (2, 3, 3)


def test_a_site_that_changes_nothing_is_left_out_of_a_term(lab: ModuleType) -> None:
    problem = lab.random_joint(0)
    sites, levels = ("width:w", "width:v"), ((64, 48, 32), (96, 64, 32))
    same = Term(name="same", sites=sites, levels=levels, values=(0.9, 0.6, 0.3) * 3)
    flat = replace(same, name="flat", values=(0.7,) * 9)
    table = replace(problem.table, terms=(same, flat))
    some = replace(problem, table=table, size_terms=())
    assert Model.of(some).blocks == ()
    assert solve(some).assignment["width:v"] == 32
    saved = some.totals({}).ms - some.totals({"width:v": 32}).ms
    assert saved == pytest.approx(0.6 * table.scale)
    grid = Grid(some)
    whole = grid.encode([some.native_assignment()])
    assert grid.ms(whole) == pytest.approx([some.totals({}).ms])


def test_a_quantiser_is_paid_once_where_prices_are_terms(lab: ModuleType) -> None:
    row = (("f32", "int8"),)
    terms = tuple(Term(name=s, sites=(s,), levels=row, values=(1.0, 0.7)) for s in ("a", "c"))
    problem = lab.random_joint(0)
    table = replace(problem.table, terms=terms, ops={}, quantizers={"t0": 0.5}, glue_ms=0.0)
    pair = {s: [c for c in problem.candidates[s] if c.level in row[0]] for s in ("a", "c")}
    both = replace(problem, table=replace(table, scale=1.0), candidates=pair, size_terms=())
    # Together the two save 0.6 and pay 0.5; each alone saves 0.3 and pays 0.5.
    assert solve(both).assignment == {"a": "int8", "c": "int8"}
    assert solve(both).totals.ms == pytest.approx(1.9)
    alone = replace(both, candidates={"a": pair["a"]})
    assert solve(alone).assignment == {"a": "f32"}


def test_a_level_that_one_term_lacks_is_left_out(lab: ModuleType) -> None:
    problem = lab.random_joint(0)
    more = {
        **problem.candidates,
        "width:v": [
            *problem.candidates["width:v"],
            Candidate(site="width:v", level=16, method="m", size_bytes=0, error=0.0),
        ],
    }
    assert list(replace(problem, candidates=more).levels()["width:v"]) == [96, 64, 32]
    norm = Term(name="n", sites=("width:v",), levels=((96, 32),), values=(1.0, 0.5))
    in_time = replace(problem, table=replace(problem.table, terms=(*problem.table.terms, norm)))
    assert list(in_time.levels()["width:v"]) == [96, 32]
    in_size = replace(problem, size_terms=(*problem.size_terms, norm))
    assert list(in_size.levels()["width:v"]) == [96, 32]
    assert solve(in_size).assignment["width:v"] in (96, 32)
    no_price = replace(problem, table=replace(problem.table, terms=()), size_terms=())
    assert [list(row) for s, row in no_price.levels().items() if s != "e"] == [
        ["f32"], [1], ["f32"], ["f32"], [96], [64],
    ]  # fmt: skip


def test_a_site_without_candidates_is_left_alone(lab: ModuleType) -> None:
    problem = lab.random_joint(3)
    fixed = {s: row for s, row in problem.candidates.items() if s not in ("width:w", "a")}
    held = replace(problem, candidates=fixed)
    solution = exactly(held)
    best = min(
        t.ms
        for assignment, t in enumerate_all(problem)
        if (assignment["width:w"], assignment["a"]) == (64, "f32")
    )
    assert solution.totals.ms == pytest.approx(best, rel=1e-3)
    assert "width:w" not in solution.assignment
    whole = {**solution.assignment, "width:w": 64, "a": "f32"}
    assert problem.totals(whole).ms == pytest.approx(solution.totals.ms, rel=ROUNDING)


def test_bytes_of_a_site_in_a_size_term_count_once(lab: ModuleType) -> None:
    problem = lab.random_joint(1)
    by_hand = 1000 + 10**5 + 4 * 10**5  # the branch and e by themselves
    by_hand += sum(term.values[0] for term in problem.size_terms)
    assert problem.totals({}).size_bytes == by_hand
    assert problem.totals({"width:v": 64}).size_bytes < by_hand


def test_too_many_combinations_are_refused(lab: ModuleType) -> None:
    problem = lab.random_joint(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tersor.plan.products, "MAX_COMBINATIONS", 20)
        with pytest.raises(
            ConfigError,
            match=r"op\.a: found 27 combinations of levels \(width:w: 3 x a: 3 x width:v: 3\), "
            r"wanted at most 20; offer fewer levels",
        ):
            solve(problem)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sites": ()}, r"t: found the sites \[\] with 1 lists"),
        ({"sites": ("w", "w"), "levels": ((1,), (1,))}, r"at least one site, each once"),
        ({"levels": ((64, 64),)}, r"t: a level is listed twice"),
        ({"values": (1.0,)}, r"t: found 1 values, wanted 2, one a combination of the levels of w"),
        ({"values": (1.0, math.nan)}, r"t: found a value that is not finite"),
    ],
)
def test_a_term_that_does_not_fit_itself_is_refused(
    fields: dict[str, object], message: str
) -> None:
    right: dict[str, object] = {
        "name": "t", "sites": ("w",), "levels": ((64, 32),), "values": (1.0, 0.5),
    }  # fmt: skip
    assert Term(**right).at({"w": 32}) == 0.5
    with pytest.raises(ConfigError, match=message):
        Term(**{**right, **fields})


def test_terms_without_a_native_price_are_refused(lab: ModuleType) -> None:
    problem = lab.random_joint(0)
    term = Term(name="t", sites=("width:v",), levels=((64, 32),), values=(1.0, 0.5))
    with pytest.raises(ConfigError, match=r"t: site width:v left alone is at 96, which has no pr"):
        replace(problem.table, terms=(term,))
    with pytest.raises(ConfigError, match=r"t: site width:v left alone is at 96, wanted one of"):
        replace(problem, size_terms=(term,))
    with pytest.raises(ConfigError, match=r"at 'f32', which .* list the full count of a width"):
        replace(problem.table, native={})


def test_a_site_offers_formats_or_counts(lab: ModuleType) -> None:
    problem = lab.random_joint(0)
    mixed = (*problem.candidates["a"], replace(problem.candidates["a"][0], level=3))
    with pytest.raises(ConfigError, match=r"site a: found candidates \[3, 'f32'.* either formats"):
        replace(problem, candidates={**problem.candidates, "a": mixed})
    few = {**problem.candidates, "width:w": problem.candidates["width:w"][1:]}
    with pytest.raises(ConfigError, match=r"site width:w: .* wanted one in 64, its full count"):
        replace(problem, candidates=few)


def test_widths_that_no_table_lists_are_whole_at_their_largest(lab: ModuleType) -> None:
    problem = lab.random_joint(0)
    bare = replace(problem, table=replace(problem.table, terms=(), native={}), size_terms=())
    assert bare.native == {
        "a": "f32", "branch:b": 1, "c": "f32", "d": "f32", "e": "f32", "width:v": 96, "width:w": 64,
    }  # fmt: skip


@pytest.mark.parametrize("seed", range(3))
def test_the_search_finds_the_fastest_plan_that_holds(lab: ModuleType, seed: int) -> None:
    world = lab.make_world(seed, joint=True)
    every = enumerate_all(world.problem)
    limit = 0.2 * max(world.loss(a) for a, _ in every)
    choice = choose(world.task(Limits(max_loss=limit), max_evaluations=40), world.tools())
    best = min(t.ms for a, t in every if world.loss(a) <= limit)
    assert world.loss(choice.plan.assignment) <= limit
    # Budgets are searched to 3 %; measured times within a hundredth count as equal.
    assert choice.plan.measured_ms <= best * 1.05
    assert choice.target_met_on_search
    kinds = {type(level) for level in choice.plan.assignment.values()}
    assert kinds == {str, int}
    keys = [tuple(sorted(a.items())) for a in world.seen]
    assert len(keys) == len(set(keys)) == len(choice.evaluations) <= 40


@pytest.mark.parametrize("seed", range(3))
def test_speed_and_size_with_widths(lab: ModuleType, seed: int) -> None:
    world = lab.make_world(seed, joint=True)
    native = world.problem.totals({})
    limits = Limits(max_ms=0.6 * native.ms, max_bytes=0.7 * native.size_bytes)
    choice = choose(world.task(limits), world.tools())
    assert choice.target_met_on_search
    milder = [
        t.error
        for _, t in enumerate_all(world.problem)
        if t.ms <= 0.95 * limits.max_ms and t.size_bytes <= limits.max_bytes
    ]
    assert choice.plan.predicted_error <= min(milder) * (1 + JOINT_GAP) + 1e-9
    assert choice == from_json(Choice, json.loads(dumps(choice)))


def test_the_baseline_keeps_every_unit(lab: ModuleType) -> None:
    world = lab.make_world(0, joint=True)
    choice = choose(world.task(Limits(max_ms=world.baseline_ms * 1.1)), world.tools())
    assert choice.is_baseline
    assert choice.plan.assignment == world.problem.native_assignment()
    assert choice.plan.assignment["width:w"] == 64
    ledger = Ledger(world.task(Limits(max_ms=1.0)), world.tools())
    native = draft_of(0, world.problem.native_assignment())
    assert ledger.is_baseline(native)
    fewer = draft_of(0, {**native.assignment, "width:w": 48})
    assert not ledger.is_baseline(fewer)


def test_a_width_moves_to_the_next_levels(lab: ModuleType) -> None:
    grid = Grid(lab.make_world(0, joint=True).problem)
    here = {**grid.problem.native_assignment(), "width:v": 64}
    by_site: dict[str, set[Level]] = {}
    for i, rank in grid.near(grid.encode([here])[0], 1):
        by_site.setdefault(grid.sites[i], set()).add(grid.levels[i][rank])
    assert by_site["width:v"] == {96, 32}
    assert by_site["width:w"] == {48}  # from 64, never to 32
    assert by_site["branch:b"] == {0}
    assert by_site["a"] == {"int8", "int8_weight"}
    further = grid.near(grid.encode([here])[0], 2)
    assert len(further) == sum(map(len, by_site.values())) + 1


@pytest.mark.parametrize("seed", range(6))
def test_plans_are_priced_all_at_once_as_one_by_one(lab: ModuleType, seed: int) -> None:
    problem = lab.random_joint(seed) if seed % 2 else lab.random_problem(seed, 9)
    grid, rng = Grid(problem), np.random.default_rng(seed)
    x = np.stack([rng.integers(0, len(row), 50) for row in grid.levels], 1)
    plans = [grid.decode(row) for row in x]
    assert (grid.encode(plans) == x).all()
    totals = [problem.totals(plan) for plan in plans]
    assert grid.ms(x) == pytest.approx([t.ms for t in totals], rel=1e-12)
    assert grid.size_bytes(x) == pytest.approx([t.size_bytes for t in totals], abs=0.5)


def test_words_name_ops_widths_and_weights(lab: ModuleType) -> None:
    world = lab.make_world(0, joint=True)
    slow = replace(
        world.problem.table,
        terms=(
            *world.problem.table.terms,
            Term(name="op.slow", sites=("width:pinned",), levels=((128,),), values=(50.0,)),
        ),
    )
    world.problem = replace(world.problem, table=slow)
    world.truth = slow
    world.baseline_ms = slow.predict_ms({}, world.problem.tensors)
    task = world.task(Limits(max_ms=0.1), pinned={"width:pinned": "an output"})
    plan = choose(task, world.tools()).plan
    share = 50 * slow.scale / plan.predicted_ms
    assert plan.binding == (
        f"latency: {share:.0%} of the predicted time is in op.slow, which stays as given "
        "(pinned: an output)"
    )
    free = choose(world.task(Limits(max_loss=1e9)), world.tools()).plan
    n = sum(v != world.problem.native[s] for s, v in free.assignment.items())
    assert free.binding == (
        f"nothing: {n} of 7 sites left their native level, and no other change is faster"
    )
    large = Term(name="big", sites=("width:pinned",), levels=((128,),), values=(3e6,))
    world.problem = replace(world.problem, size_terms=(*world.problem.size_terms, large))
    small = choose(world.task(Limits(max_bytes=10.0)), world.tools()).plan
    share = 3e6 / small.predicted_bytes
    assert f"; {share:.0%} of them in big; 0.00 MB are in no site" in small.binding


def test_resolve_and_curve_with_widths(lab: ModuleType) -> None:
    world = lab.make_world(2, joint=True)
    limit = 0.2 * max(world.loss(a) for a, _ in enumerate_all(world.problem))
    task = world.task(Limits(max_loss=limit))
    first = choose(task, world.tools())
    again = resolve(world.task(Limits(max_loss=limit / 2)), first.evaluations)
    assert world.loss(again.plan.assignment) <= limit / 2 * 1.05
    assert again.plan.predicted_ms >= first.plan.predicted_ms * (1 - JOINT_GAP)
    everything = resolve(world.task(Limits(max_loss=1e9)), first.evaluations)
    assert everything.binding == ""
    points = curve(task, first.evaluations, 4, first.finalists)
    built = [p.assignment for p in first.finalists]
    assert [p.measured for p in points] == [p.plan.assignment in built for p in points]
    assert [p.plan.predicted_ms for p in points if not p.measured] == sorted(
        p.plan.predicted_ms for p in points if not p.measured
    )
    totals = [s.totals for s in pareto(world.problem, 4)]
    assert not any(a != b and all(x <= y for x, y in zip(a, b, strict=True))
                   for a in totals for b in totals)  # fmt: skip


def test_tables_of_two_precisions_share_widths(lab: ModuleType) -> None:
    world = lab.make_world(1, joint=True)
    table = world.problem.table
    half = replace(
        table,
        choice=replace(table.choice, precision="bf16"),
        ops={"e": {"bf16": 0.2, "int8": 0.2}},
        terms=tuple(as_bf16(term) for term in table.terms),
    )
    offered = {
        site: (*row, replace(row[0], level="bf16", error=1e-5)) if row[0].level == "f32" else row
        for site, row in world.problem.candidates.items()
    }
    world.problem = replace(
        world.problem,
        candidates=offered,
        size_terms=tuple(map(with_bf16, world.problem.size_terms)),
    )
    task = world.task(Limits(max_loss=10.0), tables=(table, half), candidates=offered)
    ledger = Ledger(task, world.tools())
    drafts = ledger.solve("latency", may_be_slower=True)
    assert {d.table for d in drafts} == {0, 1}
    assert ledger.problem(1).native["a"] == "bf16"
    assert ledger.problem(1).native["width:w"] == 64
    assert task.baseline_assignment() == ledger.problem(0).native


def as_bf16(term: Term) -> Term:
    levels = tuple(tuple("bf16" if v == "f32" else v for v in row) for row in term.levels)
    return replace(term, levels=levels, values=tuple(v * 0.8 for v in term.values))


def with_bf16(term: Term) -> Term:
    """The same term with bf16 at half of the bytes of f32."""
    levels = tuple((*row, "bf16") if "f32" in row else row for row in term.levels)
    values = []
    for combination in itertools.product(*levels):
        there = {
            s: "f32" if v == "bf16" else v for s, v in zip(term.sites, combination, strict=True)
        }
        values.append(term.at(there) / (2 if "bf16" in combination else 1))
    return replace(term, levels=levels, values=tuple(values))


def test_prices_of_a_large_joint_plan_are_solved_to_the_gap(lab: ModuleType) -> None:
    """A network of eight blocks: 12 widths of 6 levels, 16 ops of 2 formats."""
    rng = np.random.default_rng(0)
    native = {f"width:r{i}": 64 for i in range(4)} | {f"width:i{i}": 64 for i in range(8)}
    counts = tuple(range(64, 0, -11))
    candidates = {
        s: [Candidate(site=s, level=k, method="m", size_bytes=0, error=h * (1 - k / 64) ** 2)
            for k in counts]
        for s, h in zip(native, rng.lognormal(0, 1, len(native)), strict=True)
    }  # fmt: skip
    terms = []
    for i in range(8):
        for op, pair in ((f"up{i}", (f"width:r{i // 2}", f"width:i{i}")),
                         (f"down{i}", (f"width:i{i}", f"width:r{i // 2}"))):  # fmt: skip
            error = float(rng.lognormal(-2, 1))
            candidates[op] = [
                Candidate(site=op, level=f, method="m", size_bytes=0, error=e)
                for f, e in (("f32", 0.0), ("int8", error))
            ]
            levels = (counts, counts, ("f32", "int8"))
            values = tuple(a * b / 4096 * (0.5 if f == "int8" else 1) + 0.01
                           for a, b, f in itertools.product(*levels))  # fmt: skip
            terms.append(Term(name=op, sites=(*pair, op), levels=levels, values=values))
    table = PriceTable(
        choice=lab.random_joint(0).table.choice, ops={}, quantizers={}, glue_ms=0.1,
        terms=tuple(terms), native=native,
    )  # fmt: skip
    problem = Problem(candidates=candidates, table=table, tensors={}, objective="error")
    solution = optimise(replace(problem, max_ms=problem.totals({}).ms / 2))
    assert solution.status == "optimal"
    assert solution.gap <= JOINT_GAP
    assert solution.totals.ms <= problem.totals({}).ms / 2 * (1 + TOLERANCE)
    # Any format-only or width-only plan at that speed is worse.
    widths = {s: row for s, row in candidates.items() if s in native}
    only = optimise(replace(problem, candidates=widths, max_ms=problem.totals({}).ms / 2))
    assert solution.totals.error < only.totals.error


@pytest.mark.parametrize("seed", range(6))
def test_a_program_that_takes_too_long_gives_the_best_plan_without_cuts(
    lab: ModuleType, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    problem = replace(lab.random_joint(seed), objective="size")
    (uncut,) = problem.simpler()
    assert not list(uncut.simpler())
    real, limits = tersor.plan.solve.run_milp, []

    def hurried(cost: Any, rows: Any, is_integer: Any, options: Any) -> Any:
        limits.append(options["time_limit"])
        is_whole = len(cost) > n_uncut
        if is_whole and limits[-1] <= tersor.plan.solve.TIME_LIMIT_S:
            raise NumericalError("the solver stopped without a plan")
        return real(cost, rows, is_integer, options)

    n_uncut = len(Model.of(uncut).cost("size"))
    monkeypatch.setattr(tersor.plan.solve, "run_milp", hurried)
    found = optimise(problem)
    assert (found.status, found.gap) == ("feasible", 1.0)
    widths = [s for s, own in problem.native.items() if isinstance(own, int)]
    assert all(found.assignment[s] == problem.native[s] for s in widths)
    assert found.totals == optimise(uncut).totals == problem.totals(found.assignment)
    # Where nothing holds without cuts, the whole program has more time.
    tight = replace(problem, max_bytes=found.totals.size_bytes - 1)
    exact = real_totals(tight, monkeypatch, real)
    monkeypatch.setattr(tersor.plan.solve, "run_milp", hurried)
    limits.clear()
    assert optimise(tight).totals.size_bytes == exact.size_bytes
    assert limits[-1] == tersor.plan.solve.PATIENCE * tersor.plan.solve.TIME_LIMIT_S
    with pytest.raises(NumericalError):  # one of dozens
        optimise(tight, is_rough=True)


def test_a_program_that_is_too_large_is_not_tried(
    lab: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = replace(lab.random_joint(1), objective="size")
    (uncut,) = problem.simpler()
    n_uncut, sizes, real = len(Model.of(uncut).cost("size")), [], tersor.plan.solve.run_milp

    def watched(cost: Any, *others: Any) -> Any:
        sizes.append(len(cost))
        return real(cost, *others)

    monkeypatch.setattr(tersor.plan.solve, "run_milp", watched)
    monkeypatch.setattr(tersor.plan.solve, "MOST_VARIABLES", n_uncut)
    assert optimise(problem).totals == optimise(uncut).totals
    assert sizes == [n_uncut, n_uncut]


def test_ranks_go_before_cuts(lab: ModuleType) -> None:
    problem = lab.random_joint(0)
    formats = [s for s, own in problem.native.items() if isinstance(own, str)]
    rows = dict(problem.candidates)
    for site in formats:
        rank = replace(rows[site][0], level=RankLevel("f32_rank8"), error=0.5)
        rows[site] = (*rows[site], rank)
    ops = {s: {**row, "f32_rank8": 0.1} for s, row in problem.table.ops.items()}
    both = replace(problem, candidates=rows, table=replace(problem.table, ops=ops))
    found = list(both.simpler())
    if any(rank_of(v) for row in both.levels().values() for v in row):
        assert len(found) == 2
        assert found[0].levels() == problem.levels()
    assert all(
        len(found[-1].levels()[s]) == 1 for s, own in problem.native.items() if isinstance(own, int)
    )


def real_totals(problem: Problem, patch: pytest.MonkeyPatch, real: Any) -> Totals:
    patch.setattr(tersor.plan.solve, "run_milp", real)
    return optimise(problem).totals


@pytest.mark.parametrize(("n_stored", "n_blocks"), [(3, 1), (12, 2)])
def test_bytes_that_tell_many_levels_apart_have_products_of_their_own(
    n_stored: int, n_blocks: int
) -> None:
    rng = np.random.default_rng(0)
    ms = rng.random((2, 8, 2, 2, 2))  # int8 or not, counts, three layers beside it
    time = Reduced(
        ("a", "b", "c", "d", "w"), ms[[0, *[1] * (n_stored - 1)]].transpose(0, 2, 3, 4, 1)
    )
    # Of the same sites as the bytes, which know neither the second from the third level nor all counts.
    own = Reduced(("a", "w"), rng.random((3, 8))[[0, 1, *[2] * (n_stored - 2)]])
    stored = rng.random((n_stored, 8))
    stored[1], stored[:, 7] = stored[2], stored[:, 6]
    size = Reduced(("a", "w"), stored)
    for terms in itertools.permutations((time, own, size)):
        blocks = blocks_of(terms)
        assert [b.sites for b in blocks] == [time.sites, size.sites][:n_blocks]
        for term in terms:
            home = home_of([b.sites for b in blocks], term)
            block = next(b for b in blocks if b.sites == home)
            flat = block.spread(term).reshape(block.shape)
            for at in itertools.product(*map(range, term.values.shape)):
                chosen = dict(zip(term.sites, at, strict=True))
                place = tuple(
                    row[chosen.get(s, 0)] for s, row in zip(block.sites, block.groups, strict=True)
                )
                assert flat[place] == term.values[at]
