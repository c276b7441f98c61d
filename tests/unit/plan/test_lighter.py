"""What takes no time ends in fewer bytes where a quality budget allows it."""

from dataclasses import replace
from types import ModuleType

import pytest

from tersor.plan import search
from tersor.plan.ledger import Ledger, draft_of
from tersor.plan.lighter import lighter
from tersor.plan.search import choose
from tersor.plan.task import Limits


def native_ledger(world, limit: float, **settings):  # noqa: ANN001, ANN003 - a helper of this file
    ledger = Ledger(world.task(Limits(max_loss=limit), **settings), world.tools())
    return ledger, draft_of(0, ledger.problem(0).native_assignment())


def test_all_layers_that_take_no_time_are_stored_where_the_quality_holds(lab: ModuleType) -> None:
    world = lab.make_world(3, n=7)
    ledger, native = native_ledger(world, 1e9)
    found = lighter(ledger, native)
    here, there = ledger.totals(native), ledger.totals(found)
    assert set(found.assignment.values()) == {"int8_weight"}
    assert there.ms == pytest.approx(here.ms)
    assert there.size_bytes < here.size_bytes


def test_where_all_of_them_lose_too_much_those_stay_that_save_most(lab: ModuleType) -> None:
    world = lab.make_world(3, n=7)
    rows = world.problem.levels()
    saved = {s: row["f32"].size_bytes - row["int8_weight"].size_bytes for s, row in rows.items()}
    most = max(saved, key=lambda s: saved[s])
    _, native = native_ledger(world, 1e9)
    alone = world.loss({**native.assignment, most: "int8_weight"})
    ledger, native = native_ledger(world, alone * 1.0001)
    found = lighter(ledger, native)
    assert found.assignment[most] == "int8_weight"
    assert world.loss(found.assignment) <= alone * 1.0001
    strict, native = native_ledger(world, 0.0)
    assert lighter(strict, native) == native
    blind, native = native_ledger(world, 1e9, max_evaluations=0)
    assert lighter(blind, native) == native


def test_the_fastest_plan_has_what_gains_no_speed_in_fewer_bytes(lab: ModuleType) -> None:
    world = lab.make_world(3, n=7)
    first = next(iter(world.truth.ops))
    ops = {
        s: {**row, "int8": 2 * row["f32"]} for s, row in world.truth.ops.items() if s != "pinned"
    }
    ops[first]["int8"] = 0.1 * ops[first]["f32"]
    table = replace(world.truth, ops={**world.truth.ops, **ops}, quantizers={})
    world = replace(world, truth=table, problem=replace(world.problem, table=table))
    plan = choose(world.task(Limits(max_loss=1e9)), world.tools()).plan
    wanted = dict.fromkeys(world.problem.candidates, "int8_weight") | {first: "int8"}
    assert dict(plan.assignment) == wanted


@pytest.mark.parametrize(
    ("factor", "least", "is_taken"),
    [
        (1.0, None, True),
        (1.015, None, True),
        (1.1, None, False),
        (1.0, 0.98, True),
        (1.1, 1.05, False),
        (1.1, 1.01, True),  # it may well be as fast
    ],
)
def test_what_is_surely_slower_is_not_taken(
    lab: ModuleType, factor: float, least: float | None, is_taken: bool
) -> None:
    """Beside the plan itself where the tools can: at another moment the machine has another speed."""
    is_beside = least is not None
    world = lab.make_world(3, n=7)

    def measure(plans):  # noqa: ANN001, ANN202 - a tool of this test
        stored = ["int8_weight" in p.assignment.values() for p in plans]
        times = zip(world.measure(plans), stored, strict=True)
        moment = 5.0 if is_beside and all(stored) else 1.0
        return [ms * moment * (factor if is_stored else 1.0) for ms, is_stored in times]

    def beside(plan, other):  # noqa: ANN001, ANN202 - a tool of this test
        mine, others = measure([plan, other])
        return mine / others, least

    tools = replace(world.tools(), measure=measure, beside=beside if is_beside else None)
    ledger = Ledger(world.task(Limits(max_loss=1e9)), tools)
    native = draft_of(0, ledger.problem(0).native_assignment())
    ledger.measure([native])
    found = search._lighter(ledger, native)
    assert (found != native) == is_taken
    if is_taken:
        assert ledger.measured[found] == pytest.approx(factor * ledger.measured[native], rel=0.05)


@pytest.mark.parametrize(("budget", "is_taken"), [(1.005, False), (1.1, True)])
def test_fewer_bytes_cost_no_latency_that_was_asked_for(
    lab: ModuleType, budget: float, is_taken: bool
) -> None:
    world = lab.make_world(3, n=7)
    tools = replace(world.tools(), beside=lambda _plan, _other: (1.02, 0.99))
    plain = Ledger(world.task(Limits(max_loss=1e9)), tools)
    native = draft_of(0, plain.problem(0).native_assignment())
    (native_ms,) = world.measure([plain.plan(native)])
    limits = Limits(max_loss=1e9, max_ms=budget * native_ms)
    ledger = Ledger(world.task(limits), tools)
    ledger.measure([native])
    assert (search._lighter(ledger, native) != native) == is_taken


def test_a_pair_is_measured_anew_where_one_of_it_was_slow_at_a_moment_of_its_own(
    lab: ModuleType,
) -> None:
    world = lab.make_world(3, n=7)
    tools = replace(world.tools(), beside=lambda _plan, _other: (1.0, 0.99))
    ledger = Ledger(world.task(Limits(max_loss=1e9)), tools)
    native = draft_of(0, ledger.problem(0).native_assignment())
    ledger.measure([native])
    small = lighter(ledger, native)
    ledger.measured[small] = 2 * ledger.measured[native]
    assert search._lighter(ledger, native) == small
    assert ledger.measured[small] == ledger.measured[native]
