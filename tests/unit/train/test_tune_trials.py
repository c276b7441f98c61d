"""How it is decided: on times that are known beforehand, and on losses that are."""

import math
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tersor.core.errors import ConfigError, NumericalError
from tersor.core.jsonable import from_json, to_json
from tersor.timing.device import SelfTimed
from tersor.train.switches import Switch
from tersor.train.tune_arena import Arena, Block, Single, order
from tersor.train.tune_records import (
    LossCheck,
    LossRule,
    SwitchReport,
    TimeRule,
    TuneReport,
    steps_to_save,
)
from tersor.train.tune_state import Snapshot
from tersor.train.tune_steps import Job, Recipe
from tersor.train.tune_trials import Trials, check_losses, decide, first_line
from tests.unit.train.tuning import job, platform, step, told

RULE = LossRule(steps=10, seeds=3)


class Scaled(Switch):
    """Multiplies the loss: with 1 it changes nothing."""

    name = "scaled"

    def __init__(self, factor: float = 1.0, choice: str = "") -> None:
        self.factor, self.choice = factor, choice
        self.log: list[str] = []

    def apply(self, job: Job, recipe: Recipe) -> Recipe:
        self.log.append("apply")
        return replace(recipe, loss=lambda model, batch: self.factor * job.step(model, batch))

    def settle(self, job: Job) -> None:  # noqa: ARG002
        self.log.append("settle")

    def undo(self, job: Job) -> None:  # noqa: ARG002
        self.log.append("undo")


class Failing(Scaled):
    def apply(self, job: Job, recipe: Recipe) -> Recipe:
        super().apply(job, recipe)
        with torch.no_grad():
            job.model[0].weight.add_(1)
        raise RuntimeError("no such kernel\nand a long trace")


class FailsInSteps(Scaled):
    def apply(self, job: Job, recipe: Recipe) -> Recipe:  # noqa: ARG002
        def loss(model: nn.Module, batch: Any) -> Tensor:
            raise NotImplementedError

        return replace(recipe, loss=loss)


@pytest.fixture(autouse=True)
def still_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A first look sees no difference, unless a test says so."""
    monkeypatch.setattr(Trials, "look", lambda _: 1.0)


def made(task: Job, *milliseconds: float, **changes: Any) -> Trials:
    arena = Arena(task, Snapshot(task.model, task.optimizer), lambda: 0.0)
    values: dict[str, Any] = {
        "arena": arena,
        "time_rule": TimeRule(rounds=3),
        "loss_rule": RULE,
        "measure": told(*milliseconds),
        "clock": lambda: 0.0,
        "base_seconds": 1.0,
    }
    found = Trials(**{**values, **changes})
    found.learn_spread()
    return found


def test_a_faster_switch_with_the_same_loss_is_on() -> None:
    found = made(job(), 10.0, 9.0)
    switch = Scaled()
    (report,) = found.stage([switch])
    assert (report.is_tried, report.is_on) == (True, True)
    assert report.speedup == pytest.approx(10 / 9)
    assert report.loss is not None
    assert report.loss.mean == report.loss.plain_mean  # the very same steps
    assert report.loss.is_ok
    assert found.on == (switch,)
    assert "1.11x as fast (1.11 to 1.11), loss" in report.why


def test_what_comes_in_front_of_a_record_is_compared_with_a_record_of_its_own() -> None:
    ends: list[Scaled] = []

    def end() -> Scaled:
        ends.append(Scaled(choice=f"end {len(ends)}"))
        return ends[-1]

    first, old = Scaled(choice="first"), Scaled(choice="old end")
    found = made(job(), 10.0, 9.0, on=(first, old), last=end)
    slower, faster = Scaled(choice="slower"), Scaled(choice="faster")
    (report,) = found.stage([faster])
    assert report.is_on
    assert found.on == (first, faster, ends[0])
    assert len(ends) == 1  # one record for the look, the times and the losses
    found.measure = told(10.0, 9.9)
    (report,) = found.stage([slower])
    assert not report.is_on
    assert found.on == (first, faster, ends[0])
    assert found.arena.steps_made > 0


@pytest.mark.parametrize(("milliseconds", "is_on"), [(9.8, False), (9.709, False), (9.7, True)])
def test_three_percent_are_needed(milliseconds: float, is_on: bool) -> None:
    found = made(job(), 10.0, milliseconds)
    (report,) = found.stage([Scaled()])
    assert report.is_on is is_on
    assert ("less than 3% faster" in report.why) is not is_on
    assert (report.loss is None) is not is_on  # a loss is looked at only where the time would do
    assert found.on == ((found.arena.current[0],) if is_on else ())


def test_a_switch_that_changes_the_loss_is_off() -> None:
    found = made(job(), 10.0, 5.0)
    (report,) = found.stage([Scaled(3.0)])
    assert not report.is_on
    assert "the loss is off" in report.why
    assert report.loss is not None
    assert report.loss.mean > 2 * report.loss.plain_mean
    assert report.speedup == 2.0
    assert found.on == ()


def test_a_loss_that_is_not_finite_is_off() -> None:
    (report,) = made(job(), 10.0, 5.0).stage([Scaled(math.inf)])
    assert "the loss is off" in report.why


@pytest.mark.parametrize(
    ("kind", "reason"),
    [(Failing, "it fails: RuntimeError: no such kernel"), (FailsInSteps, "NotImplementedError")],
)
def test_a_switch_that_raises_is_off_and_leaves_nothing_behind(
    kind: type[Scaled], reason: str
) -> None:
    task = job()
    found = made(task, 10.0, 9.0)
    found.arena.reset()
    before = [p.detach().clone() for p in task.model.parameters()]
    (report,) = found.stage([kind()])
    assert (report.is_tried, report.is_on) == (True, False)
    assert report.why.endswith(reason)
    assert "trace" not in report.why
    assert found.arena.current == ()
    after = list(task.model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_switch_that_raises_later_is_off_too() -> None:
    def breaks(*_: Any) -> Any:
        raise MemoryError("no more")

    found = made(job(), 10.0, 9.0, measure=breaks)
    (report,) = found.stage([Scaled()])
    assert report.why == "it fails: MemoryError: no more"
    assert found.arena.current == ()


def test_the_fastest_of_several_choices_is_on_and_the_next_where_its_loss_is_off() -> None:
    found = made(job(), 10.0, 9.0, 5.0, 6.0)
    reports = found.stage([Scaled(choice="a"), Scaled(3.0, "b"), Scaled(choice="c")])
    assert [r.is_on for r in reports] == [False, False, True]
    assert "c is faster and was taken" in reports[0].why
    assert "the loss is off" in reports[1].why
    assert [s.choice for s in found.on] == ["c"]


def test_a_first_look_is_enough_where_it_is_clearly_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trials, "look", lambda self: 2.0 if self.arena.current else 1.0)
    found = made(job(), 10.0, 9.0, base_seconds=1.0)
    (report,) = found.stage([Scaled()])
    assert report.why == "slower: 2.00x the time in a first look"
    assert (report.speedup, report.low, report.is_on) == (0.5, None, False)


def test_a_first_look_that_another_process_disturbed_is_not_believed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Trials, "look", lambda _: 2.0)  # what is on has become as slow
    (report,) = made(job(), 10.0, 9.0, base_seconds=1.0).stage([Scaled()])
    assert report.is_on


def test_what_is_refused_is_not_tried() -> None:
    class Refused(Scaled):
        def refusal(self, *_: Any) -> str:
            return "not here"

    switch = Refused()
    (report,) = made(job(), 10.0, 9.0).stage([switch])
    assert (report.is_tried, report.is_on, report.why) == (False, False, "not here")
    assert switch.log == []


def test_a_complaint_wins() -> None:
    class Sulking(Scaled):
        def complaint(self) -> str:
            return "compiled over and over"

    (report,) = made(job(), 10.0, 9.0).stage([Sulking()])
    assert not report.is_on
    assert report.why.startswith("compiled over and over: 1.11x")


def test_asked_for_by_name_is_not_judged_by_time_or_loss() -> None:
    class Other(Scaled):
        changes_convergence = True

    (report,) = made(job(), 10.0, 12.0).stage([Other(3.0)])
    assert report.is_on
    assert report.loss is not None
    assert report.loss.kind == "by name"
    assert "not judged" in report.why
    (report,) = made(job(), 10.0, 12.0).stage([Other(math.nan)])
    assert not report.is_on
    assert "its loss is not finite" in report.why


def report(**values: Any) -> SwitchReport:
    given = {"name": "x", "why": "", "is_tried": True, "speedup": 1.1, "low": 1.05, "high": 1.2}
    return SwitchReport(**{**given, **values})


@pytest.mark.parametrize(
    ("values", "steps", "reason"),
    [
        ({}, None, ""),
        ({"low": 1.0}, None, "too noisy"),
        ({"noise": 0.26}, None, "too noisy"),
        ({"noise": 0.25}, None, ""),
        ({"speedup": 1.02}, None, "less than 3% faster"),
        ({"seconds": 60.0, "break_even_steps": 1000}, 999, "the run has 999"),
        ({"seconds": 60.0, "break_even_steps": 1000}, 1000, ""),
        ({"seconds": 60.0, "break_even_steps": 1000}, None, ""),
    ],
)
def test_decisions(values: dict[str, Any], steps: int | None, reason: str) -> None:
    found = decide(report(**values), Switch(), 0.03, steps)
    assert found.is_on is not bool(reason)
    assert reason in found.why
    if values.get("seconds") and not reason:
        assert "60 s to get ready, saved after 1000 steps" in found.why


def test_what_gets_ready_for_long_has_to_save_it_within_the_run() -> None:
    ticks = iter(range(0, 10**9, 100))
    found = made(job(steps=50), 10_000.0, 9_000.0, clock=lambda: float(next(ticks)))
    (row,) = found.stage([Scaled()])
    assert row.seconds == 100.0 - 3 * 1.0  # without the three steps themselves
    assert row.break_even_steps == 97
    assert not row.is_on
    assert "97 s to get ready, saved after 97 steps; the run has 50" in row.why


@given(st.just(0.0) | st.floats(1e-9, 1e6), st.floats(1e-6, 1e3))
def test_steps_to_save_are_the_fewest(seconds: float, saved: float) -> None:
    found = steps_to_save(seconds, saved)
    assert found is not None
    assert found * saved >= seconds * (1 - 1e-9)
    assert (found - 1) * saved <= seconds * (1 + 1e-9)


@pytest.mark.parametrize("saved", [0.0, -1.0, math.nan])
def test_nothing_is_saved_by_what_is_not_faster(saved: float) -> None:
    assert steps_to_save(10.0, saved) is None


# Losses


def test_losses_may_differ_by_what_seeds_make_of_them() -> None:
    plain = [[1.0] * 10, [1.2] * 10, [0.9] * 10]
    for value, is_ok in ((1.29, True), (0.71, True), (1.31, False), (0.69, False)):
        check = check_losses([value] * 10, plain, RULE)
        assert check.is_ok is is_ok
        assert check.allowed_mean == pytest.approx(0.3)
        assert (check.plain_mean, check.mean) == (1.0, pytest.approx(value))


def test_a_run_that_goes_wrong_at_its_end_is_seen() -> None:
    plain = [[1.0] * 10, [1.2] * 9 + [1.0], [0.9] * 9 + [1.0]]
    late = [1.0] * 8 + [1.2, 1.2]
    check = check_losses(late, plain, RULE)
    assert abs(check.mean - check.plain_mean) <= check.allowed_mean
    assert not check.is_ok
    assert check.end == pytest.approx(1.2)


def test_seeds_without_a_spread_leave_room_for_rounding() -> None:
    plain = [[2.0] * 10] * 3
    assert check_losses([2.0001] * 10, plain, RULE).is_ok
    assert not check_losses([2.001] * 10, plain, RULE).is_ok


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_one_loss_that_is_not_finite_is_enough(bad: float) -> None:
    assert not check_losses([1.0] * 9 + [bad], [[1.0] * 10, [2.0] * 10, [3.0] * 10], RULE).is_ok


def test_the_spread_comes_from_other_orders_and_numbers() -> None:
    found = made(job(), 1.0)
    assert len(found.plain) == 3
    assert len({tuple(run) for run in found.plain}) == 3
    again = made(job(), 1.0)
    assert again.plain == found.plain  # the same seeds give the same runs


def test_a_plain_step_that_diverges_is_an_error() -> None:
    def diverging(model: nn.Module, batch: Any) -> Tensor:
        return step(model, batch) * 1e30

    with pytest.raises(NumericalError, match=r"the plain loss is .* at step \d+ \(seed 0\)"):
        made(job(step=diverging), 1.0)


@given(st.integers(1, 9), st.integers(1, 40), st.integers(0, 99))
def test_an_order_takes_every_batch_before_any_again(count: int, steps: int, seed: int) -> None:
    found = order(count, steps, seed)
    assert len(found) == steps
    counts = Counter(found)
    assert max(counts.values()) - min([counts[i] for i in range(count)]) <= 1
    assert order(count, steps, None) == [i % count for i in range(steps)]


# The arena


def test_what_two_configurations_share_at_their_beginning_is_not_touched() -> None:
    task = job()
    arena = Arena(task, Snapshot(task.model, task.optimizer), lambda: 0.0)
    first, second, third = Scaled(), Scaled(), Scaled()
    arena.enter((first, second))
    arena.enter((first, third))
    assert [s.log.count("apply") for s in (first, second, third)] == [1, 1, 1]
    assert [s.log.count("undo") for s in (first, second, third)] == [0, 1, 0]
    assert first.log[-1] == "settle"  # after every restore
    before = list(first.log)
    arena.enter((first, third))
    assert first.log == before
    arena.leave()
    assert first.log[-1] == "undo"


def test_every_turn_begins_at_the_start_of_training() -> None:
    task = job()
    arena = Arena(task, Snapshot(task.model, task.optimizer), lambda: 0.0)
    before = [p.detach().clone() for p in task.model.parameters()]
    arena.run(3)
    assert not torch.equal(before[0], next(task.model.parameters()).detach())
    arena.enter((Scaled(),))
    assert all(torch.equal(a, b) for a, b in zip(before, task.model.parameters(), strict=True))
    assert task.optimizer.state == {}


def test_steps_are_timed_alone_on_a_cpu_and_in_blocks_elsewhere() -> None:
    seen: dict[str, Any] = {}

    def measure(calls: Any, protocol: Any) -> Any:
        seen.update(calls=list(calls.values()), protocol=protocol)
        return told(1.0, 1.0)(calls, protocol)

    found = made(job(), 1.0, measure=measure)
    found.times([(), ()])
    assert all(isinstance(c, Single) and not isinstance(c, SelfTimed) for c in seen["calls"])
    assert (seen["protocol"].runs, seen["protocol"].rounds) == (20, 3)


def test_a_block_waits_before_and_after_and_never_between() -> None:
    events: list[str] = []

    def watched(model: nn.Module, batch: Any) -> Tensor:
        events.append("step")
        return step(model, batch)

    task = job(step=watched, platform=platform(synchronize=lambda: events.append("wait")))
    ticks = iter([10.0, 12.0])
    arena = Arena(task, Snapshot(task.model, task.optimizer), lambda: next(ticks))
    block = Block(arena, (), 20)
    assert isinstance(block, SelfTimed)
    assert block.timed_ms() == 100.0  # of one step
    assert events == ["wait", *["step"] * 20, "wait"]


# Records


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (TimeRule, {"gain": -0.1}, "found gain=-0.1"),
        (TimeRule, {"block": 19}, "found block=19, wanted at least 20"),
        (TimeRule, {"rounds": 2}, "found rounds=2, wanted at least 3"),
        (LossRule, {"steps": 9}, "found steps=9, wanted at least 10"),
        (LossRule, {"seeds": 2}, "found seeds=2, wanted at least 3"),
        (LossRule, {"tolerance": 1.0}, "found tolerance=1.0"),
    ],
)
def test_rules_out_of_range_are_refused(kind: Any, values: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        kind(**values)


def test_a_report_is_json_and_back() -> None:
    check = LossCheck(kind="seed spread", is_ok=True, mean=1.0)
    rows = (report(is_on=True, loss=check, why="faster"), report(name="y", choice="2", why="slow"))
    whole = TuneReport(
        device="cpu", device_name="x", torch="2", threads=1, batch="[1] float32", steps=None,
        plain_ms=10.0, tuned_ms=8.0, speedup=1.25, switches=rows, seconds=1.0,
    )  # fmt: skip
    again = from_json(TuneReport, to_json(whole))
    assert to_json(again) == to_json(whole)  # a NaN is not equal to itself
    assert [s.name for s in again.on] == ["x"]
    assert whole.break_even_steps == 500
    lines = whole.lines()
    assert lines[0] == "on  x: faster"
    assert lines[1] == "off y (2): slow"
    assert lines[-1].startswith("10.00 -> 8.00 ms a step on x: 1.25x")
    assert lines[-1].endswith("saved after 500 steps")


def test_first_lines() -> None:
    assert first_line(ValueError("a\nb")) == "ValueError: a"
    assert first_line(ValueError()) == "ValueError"
