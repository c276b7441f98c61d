"""Shares and savings by a clock of our own."""

import pytest

from tersor.train.pace import Pace


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def stepped(clock: Clock, pace: Pace, seconds: float, ours: float) -> None:
    clock.now += seconds - ours
    with pace.inside():
        clock.now += ours
    pace.tick()


def test_the_share_of_hooks_leaves_out_what_came_before_the_first_step() -> None:
    clock = Clock()
    pace = Pace(clock)
    stepped(clock, pace, 30.0, 20.0)
    for _ in range(4):
        stepped(clock, pace, 2.0, 0.1)
    assert pace.first_s == 30.0
    assert pace.share() == pytest.approx(0.05)


def test_compiling_again_has_to_be_saved_first() -> None:
    clock = Clock()
    pace = Pace(clock)
    stepped(clock, pace, 30.0, 0.0)
    for _ in range(5):
        stepped(clock, pace, 2.0, 0.0)
    assert pace.saves(100, 0.5) == pytest.approx(100 * 2.0 * 0.5 - 30.0)
    assert pace.saves(20, 0.5) < 0


def test_nothing_is_known_before_two_steps() -> None:
    pace = Pace(Clock())
    assert pace.share() == 0.0
    assert pace.saves(100, 0.5) == 0.0
