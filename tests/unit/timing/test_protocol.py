"""The protocol on a clock that the callables move: every number is known beforehand."""

import gc
from collections.abc import Callable, Iterator
from itertools import cycle, repeat
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tersor.core.errors import ConfigError, MeasurementError
from tersor.core.records import Timing
from tersor.timing.protocol import (
    MIN_ROUNDS,
    SETTLED_MS,
    SLOW_MS,
    SLOW_WARMUPS,
    Clock,
    Protocol,
    _bounds,
    measure,
    noise,
    paired_noise,
    plan_rounds,
    ratio,
    standard_error,
)


class Machine:
    """A process whose time passes only when a callable spends it."""

    def __init__(self) -> None:
        self.wall = 0
        self.cpu = 0
        self.switches = 0
        self.log: list[str] = []
        self.clock = Clock(
            wall_ns=lambda: self.wall, cpu_ns=lambda: self.cpu, preemptions=lambda: self.switches
        )

    def spend(self, wall_ms: float, cpu_ms: float | None = None, switches: int = 0) -> None:
        self.wall += round(wall_ms * 1e6)
        self.cpu += round((wall_ms if cpu_ms is None else cpu_ms) * 1e6)
        self.switches += switches

    def callable(self, name: str, calls: Iterator[tuple[Any, ...]]) -> Callable[[], None]:
        def call() -> None:
            self.log.append(name)
            self.spend(*next(calls))

        return call


def timing(*rounds: float) -> Timing:
    median = float(np.median(rounds))
    return Timing(median_ms=median, low_ms=median, high_ms=median, rounds_ms=rounds, runs=1)


def test_rounds_are_interleaved_and_rotate_with_warmups_after_every_switch():
    machine = Machine()
    calls = {n: machine.callable(n, repeat((1.0,))) for n in "abc"}
    measure(calls, Protocol(rounds=3, runs=4, warmups=10), machine.clock)
    turns = ["abc", "bca", "cab"]
    expected = [n for n in "abc" for _ in range(2)]  # estimates
    expected += [n for turn in turns for n in turn for _ in range(10 + 4)]
    assert machine.log == expected


def test_the_median_is_over_the_timed_runs_only():
    machine = Machine()
    # Warm-ups take 10 ms, timed runs 1, 2, 3 ms.
    estimates = [(10.0,)] * 2
    turn = [(10.0,)] * 10 + [(1.0,), (2.0,), (3.0,)]
    calls = {"a": machine.callable("a", iter(estimates + turn * 3))}
    found = measure(calls, Protocol(rounds=3, runs=3), machine.clock)["a"]
    assert found == Timing(
        median_ms=2.0, low_ms=2.0, high_ms=2.0, rounds_ms=(2.0, 2.0, 2.0), runs=9, dropped=0
    )


def rounds_of(machine: Machine, rounds: list[list[tuple[Any, ...]]]) -> dict[str, Any]:
    """A callable with given timed runs by round, and quiet warm-ups."""
    quiet = [(1.0,)]
    script = quiet * 2
    for runs in rounds:
        script += quiet * 10 + runs
    return {"a": machine.callable("a", iter(script))}


def test_round_medians_come_in_order_and_bound_the_median():
    machine = Machine()
    rounds = [[(ms,)] * 3 for ms in (5.0, 1.0, 3.0, 2.0, 4.0)]
    found = measure(rounds_of(machine, rounds), Protocol(rounds=5, runs=3), machine.clock)["a"]
    assert found.rounds_ms == (5.0, 1.0, 3.0, 2.0, 4.0)
    assert found.median_ms == 3.0
    assert 1.0 <= found.low_ms < 3.0 < found.high_ms <= 5.0


@pytest.mark.parametrize(
    "preempted", [(9.0, 1.0, 1), (9.0, 1.0, 0)], ids=["switched", "cpu below wall"]
)
def test_preempted_runs_are_dropped_and_counted(preempted: Any):
    machine = Machine()
    rounds = [[(1.0,), preempted, (1.0,), (1.0,)]] * 3
    found = measure(rounds_of(machine, rounds), Protocol(rounds=3, runs=4), machine.clock)["a"]
    assert found.dropped == 3
    assert found.runs == 9
    assert found.rounds_ms == (1.0, 1.0, 1.0)


@pytest.mark.parametrize("n_bad", [3, 4])
def test_a_round_that_is_mostly_preempted_keeps_all_its_runs(n_bad: Any):
    machine = Machine()
    rounds = [[(2.0, 1.0, 1)] * n_bad + [(1.0,)] * (4 - n_bad)] * 3
    found = measure(rounds_of(machine, rounds), Protocol(rounds=3, runs=4), machine.clock)["a"]
    assert found.dropped == 0
    assert found.disturbed == 3 * n_bad  # and says so
    assert found.runs == 12
    assert found.median_ms == 2.0


@pytest.mark.parametrize(
    "runs",
    [[(2.0, 1.84)] * 3 + [(2.0, 1.0)], [(2.0, 4.0), (3.0, 4.0)]],
    ids=["waits", "many threads"],
)
def test_cpu_time_says_nothing_about_a_call_that_waits_or_has_threads(runs: Any):
    machine = Machine()
    calls = {"a": machine.callable("a", cycle(runs))}
    found = measure(calls, Protocol(rounds=3, runs=4), machine.clock)["a"]
    assert found.dropped == 0


@pytest.mark.parametrize("backwards", [0, -5])
def test_a_clock_that_stands_or_goes_back_is_refused(backwards: int):
    machine = Machine()
    calls = {"a": machine.callable("a", iter([(1.0,)] * 12 + [(backwards * 1e-6,)]))}
    with pytest.raises(MeasurementError, match=f"took {backwards} ns by the clock, wanted more"):
        measure(calls, Protocol(rounds=3, runs=4), machine.clock)


def test_rounds_stop_when_callables_beside_each_other_are_settled():
    """Drift of the whole machine is no reason to go on; noise of one callable is."""
    drift = [1.0, 1.5, 1.2, 2.0, 1.1, 1.7, 1.3]
    noisy = [1.0, 1.3, 0.9, 1.2, 0.8, 1.1, 1.0]
    for own, wanted in (([1.0] * 7, 3), (noisy, 7)):
        machine = Machine()
        script = [d * o for d, o in zip(drift, own, strict=True)]
        calls = {
            "a": machine.callable(
                "a", iter([(1.0,)] * 2 + [(d,) for d in script for _ in "x" * 13])
            ),
            "b": machine.callable(
                "b", iter([(1.0,)] * 2 + [(d,) for d in drift for _ in "x" * 13])
            ),
        }
        found = measure(calls, Protocol(rounds=7, runs=3, enough=0.01), machine.clock)
        assert len(found["a"].rounds_ms) == len(found["b"].rounds_ms) == wanted


def test_the_standard_error_is_that_of_means_beside_each_other():
    """4,000 runs of 5 rounds: the spread of a callable's mean log time around the true one."""
    rng = np.random.default_rng(0)
    errors, means = [], []
    for _ in range(4000):
        logs = 0.1 * rng.standard_normal((5, 1)) + 0.02 * rng.standard_normal((5, 6))
        errors.append(standard_error(np.exp(logs)))
        own = logs.mean(axis=0)
        means.append(own[0] - own[1])
    # A difference of two has twice the variance; 3 % is three standard errors of a deviation.
    assert np.sqrt(np.mean(np.square(errors))) == pytest.approx(np.std(means) / 2**0.5, rel=0.04)
    assert standard_error(np.ones((2, 3))) == np.inf
    assert standard_error(np.array([[1.0], [1.0], [1.0]])) == 0.0


def test_long_calls_have_fewer_runs_in_a_turn():
    protocol = Protocol(turn_ms=100.0, min_runs=3)
    _, turns = plan_rounds({"short": 1.0, "long": 25.0, "longer": 90.0}, protocol)
    assert {name: runs for name, (_, runs) in turns.items()} == {
        "short": 15,
        "long": 4,
        "longer": 3,
    }


@pytest.mark.parametrize("was_enabled", [True, False])
def test_garbage_collection_rests_meanwhile_and_is_as_before_after(was_enabled: Any):
    machine = Machine()
    states = []

    def fails() -> None:
        states.append(gc.isenabled())
        if len(states) > 5:
            raise ValueError("enough")

    (gc.enable if was_enabled else gc.disable)()
    try:
        with pytest.raises(ValueError, match="enough"):
            measure({"a": fails}, clock=machine.clock)
        assert gc.isenabled() == was_enabled
    finally:
        gc.enable()
    assert not any(states)


def test_plain_callables_get_the_whole_protocol():
    rounds, turns = plan_rounds({"a": 1.0, "b": SLOW_MS + 1}, Protocol())
    assert rounds == 7
    assert turns == {"a": (10, 15), "b": (SLOW_WARMUPS, 15)}


def test_slow_callables_give_way_first():
    # One round at full length: 25 x 1 ms + 17 x 300 ms = 5.1 s; 7 of them take 36 s.
    rounds, turns = plan_rounds({"fast": 1.0, "slow": 300.0}, Protocol(max_seconds=20.0))
    assert rounds == 7
    assert turns["fast"] == (10, 15)
    assert turns["slow"] == (SLOW_WARMUPS, 7)


def test_then_rounds_then_all_runs():
    rounds, turns = plan_rounds({"slow": 1000.0}, Protocol(max_seconds=21.0))
    assert rounds == 4  # (2 + 3) s each
    assert turns == {"slow": (SLOW_WARMUPS, 3)}
    rounds, turns = plan_rounds({"fast": 100.0}, Protocol(max_seconds=5.0))
    assert rounds == MIN_ROUNDS
    assert turns == {"fast": (SLOW_WARMUPS, 14)}  # 1.6 s a round


@given(
    st.dictionaries(st.sampled_from("abcd"), st.floats(1e-4, 2000), min_size=1),
    st.floats(1, 100),
)
def test_the_time_limit_holds_unless_the_floor_is_reached(estimates: Any, max_seconds: Any):
    protocol = Protocol(max_seconds=max_seconds)
    rounds, turns = plan_rounds(estimates, protocol)
    total_ms = rounds * sum((w + r) * estimates[n] for n, (w, r) in turns.items())
    is_floor = rounds == MIN_ROUNDS and all(r == protocol.min_runs for _, r in turns.values())
    # A thousandth for rounding in the sums.
    assert total_ms <= max_seconds * 1e3 * 1.001 or is_floor
    assert MIN_ROUNDS <= rounds <= protocol.rounds
    for name, (warmups, runs) in turns.items():
        assert protocol.min_runs <= runs <= protocol.runs
        assert SLOW_WARMUPS <= warmups <= 10
        assert warmups == 10 or warmups * estimates[name] >= SETTLED_MS
        assert warmups == SLOW_WARMUPS or (warmups - 1) * estimates[name] < SETTLED_MS


def test_warm_ups_take_as_long_as_asked_for():
    _, turns = plan_rounds({"a": 20.0, "b": 1.0, "c": 400.0}, Protocol(settled_ms=60.0))
    assert {n: w for n, (w, _) in turns.items()} == {"a": 3, "b": 10, "c": SLOW_WARMUPS}


def test_a_slow_callable_is_measured_within_its_time():
    machine = Machine()
    calls = {"a": machine.callable("a", repeat((500.0,)))}
    found = measure(calls, Protocol(max_seconds=20.0), machine.clock)["a"]
    assert machine.wall / 1e9 <= 20.0 + 2 * 0.5  # and two calls for the estimate
    assert found.median_ms == 500.0
    assert len(found.rounds_ms) == 7


def test_a_ratio_of_two_constant_timings_is_exact():
    found = ratio(timing(4.0, 4.0, 4.0), timing(2.0, 2.0, 2.0))
    assert (found.value, found.low, found.high) == (2.0, 2.0, 2.0)


def test_drift_that_slows_both_cancels():
    drift = np.array([1.0, 1.1, 1.5, 2.0, 1.3, 1.05, 1.7])
    a, b = timing(*(3.0 * drift)), timing(*(2.0 * drift))
    found = ratio(a, b)
    assert found.low == pytest.approx(1.5, rel=1e-12)
    assert found.high == pytest.approx(1.5, rel=1e-12)
    # Without the pairing the bounds would be wide.
    unpaired = ratio(a, timing(*(2.0 * drift[::-1])))
    assert unpaired.high - unpaired.low > 0.2


def test_a_ratio_is_repeatable_and_its_seed_counts():
    rng = np.random.default_rng(1)
    a, b = timing(*rng.lognormal(size=9)), timing(*rng.lognormal(size=9))
    assert ratio(a, b) == ratio(a, b, seed=0)
    bounds = {(r.low, r.high) for r in (ratio(a, b, seed=s) for s in range(5))}
    assert len(bounds) > 1


@pytest.mark.parametrize("n", [7, 15])
def test_the_bounds_hold_the_true_ratio_as_often_as_they_say(n: int):
    rng = np.random.default_rng(0)
    n_trials, true = 400, 1.25
    hits = 0
    for _ in range(n_trials):
        drift = rng.lognormal(0, 0.1, n)
        a = timing(*(true * drift * rng.lognormal(0, 0.02, n)))
        b = timing(*(drift * rng.lognormal(0, 0.02, n)))
        found = ratio(a, b)
        hits += found.low <= true <= found.high
    # 95 % less three standard errors of a share over 400 trials.
    assert hits / n_trials >= 0.95 - 3 * (0.95 * 0.05 / n_trials) ** 0.5


@pytest.mark.parametrize(
    ("n", "tail"),
    # Phi(-sqrt(n / (n - 1)) t), t = 4.303, 2.447, 2.042 (df 30 stands for all above), by tables.
    [(3, 6.8e-8), (7, 0.00411), (1000, 0.02055)],
)
def test_few_rounds_widen_the_percentiles(n: int, tail: float):
    values = np.linspace(0, 1, 100_001)
    low, high = _bounds(values, n)
    assert low == pytest.approx(tail, rel=0.01)
    assert high == pytest.approx(1 - tail, rel=1e-4)


def test_timings_of_other_rounds_have_no_ratio():
    with pytest.raises(ConfigError, match="found 3 and 4 rounds, wanted as many; measure both"):
        ratio(timing(1.0, 1.0, 1.0), timing(1.0, 1.0, 1.0, 1.0))


def test_noise_is_the_relative_spread_of_rounds():
    assert noise(timing(2.0, 2.0, 2.0)) == 0.0
    # Deviations -1, 0, 1 around 10: standard deviation 1.
    assert noise(timing(9.0, 10.0, 11.0)) == pytest.approx(0.1, rel=1e-12)
    assert noise(timing(90.0, 100.0, 110.0)) == pytest.approx(0.1, rel=1e-12)
    assert noise(timing(1.0)) == float("inf")


def test_paired_noise_knows_no_drift_and_no_single_bad_round():
    slower = timing(1.0, 2.0, 3.0, 4.0, 50.0)
    assert paired_noise(slower, timing(2.0, 4.0, 6.0, 8.0, 10.0)) == 0.0
    # Ratios 0.8, 0.9, 1.0, 1.1, 1.2: quartiles 0.9 and 1.1.
    spread = paired_noise(timing(8.0, 9.0, 10.0, 11.0, 12.0), timing(*[10.0] * 5))
    assert spread == pytest.approx(0.2 / 1.349, rel=1e-9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounds": 2}, "rounds: found 2, wanted at least 3"),
        ({"warmups": 9}, "warmups: found 9, wanted at least 10"),
        ({"min_runs": 0}, "min_runs: found 0, wanted 1 to runs=15"),
        ({"runs": 2}, "min_runs: found 3, wanted 1 to runs=2"),
        ({"max_seconds": 0.0}, "max_seconds: found 0.0, wanted more than 0"),
        ({"max_seconds": float("nan")}, "max_seconds: found nan"),
        ({"turn_ms": 0.0}, "turn_ms: found 0.0, wanted more than 0"),
        ({"enough": -1.0}, "enough: found -1.0, wanted more than 0"),
    ],
)
def test_a_bad_protocol_is_refused(options: Any, message: str):
    with pytest.raises(ConfigError, match=message):
        Protocol(**options)


def test_nothing_to_measure_is_refused():
    with pytest.raises(ConfigError, match="found no callables"):
        measure({})


def test_the_system_clock_measures_work():
    x = np.random.default_rng(0).random((64, 64))
    found = measure({"one": lambda: x @ x}, Protocol(rounds=3, runs=3))["one"]
    assert 0 < found.low_ms <= found.median_ms <= found.high_ms < 1000
    assert found.runs + found.dropped == 9
