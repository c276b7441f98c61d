"""The control variate: what follows the probe is taken out, and nothing else."""

import numpy as np
import pytest

from tersor.core.records import Timing
from tersor.timing.protocol import SYSTEM_CLOCK, Clock, Protocol, measure
from tersor.timing.speed import factors, probe_ms

RUNS = 400


def drawn(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """How slow the machine is, in two states with little noise; and noise of its own."""
    rng = np.random.default_rng(seed)
    state = np.where(rng.random(RUNS) < 0.5, 1.0, 1.3) * np.exp(0.01 * rng.standard_normal(RUNS))
    return state, np.exp(0.02 * rng.standard_normal(RUNS))


def spread(values: np.ndarray) -> float:
    return float(np.std(np.log(values)))


def test_what_follows_the_probe_is_taken_out():
    state, own = drawn()
    walls = {"a": 10 * state * own, "b": 3 * state[::-1] * own}
    found = factors(walls, {"a": 0.3 * state, "b": 0.3 * state[::-1]})
    for name, wall in walls.items():
        assert spread(wall) > 0.1
        assert spread(wall * found[name]) < 0.025  # their own noise is 0.02
    # The level is that of the median speed, of all: the same for both.
    a, b = (np.median(walls[name] * found[name]) for name in "ab")
    assert a / b == pytest.approx(10 / 3, rel=0.01)


def test_a_probe_that_says_nothing_changes_little():
    state, own = drawn()
    wall = 10 * own
    found = factors({"a": wall}, {"a": 0.3 * state})
    assert spread(wall * found["a"]) < 1.1 * spread(wall)
    assert np.median(wall * found["a"]) == pytest.approx(np.median(wall), rel=0.01)


def test_callables_that_ran_slow_and_fast_are_compared_at_one_speed():
    """The one that always met the slow state is no slower for it."""
    state, own = drawn()
    slow = np.sort(state)[::-1]
    walls = {"slow": 10 * slow[:150] * own[:150], "fast": 10 * slow[250:] * own[250:]}
    # Each alone shows hardly any change of speed: a third one shows the slope.
    walls["both"] = 5 * state * own
    found = factors(walls, {"slow": slow[:150], "fast": slow[250:], "both": state})
    a, b = (np.median(walls[name] * found[name]) for name in ("slow", "fast"))
    assert np.median(walls["slow"]) / np.median(walls["fast"]) > 1.25
    assert a / b == pytest.approx(1.0, abs=0.03)


def test_few_samples_and_a_steady_probe_change_nothing():
    assert list(factors({"a": [1.0, 2.0]}, {"a": [1.0, 3.0]})["a"]) == [1.0, 1.0]
    steady = factors({"a": [1.0 + i / 100 for i in range(20)]}, {"a": [2.0] * 20})["a"]
    assert list(steady) == [1.0] * 20


def test_never_more_than_the_probe_itself():
    """A callable that swings twice as far as the probe is brought half of the way."""
    state, _ = drawn()
    found = factors({"a": state**2}, {"a": state})["a"]
    assert np.allclose(found, np.median(state) / state)


def test_probe_takes_a_fraction_of_a_millisecond_and_measure_reads_it():
    assert 0 < probe_ms() < 50
    reads: list[float] = []

    def probe() -> float:
        reads.append(1.0)
        return 1.0

    clock = Clock(
        wall_ns=SYSTEM_CLOCK.wall_ns,
        cpu_ns=SYSTEM_CLOCK.cpu_ns,
        preemptions=SYSTEM_CLOCK.preemptions,
        probe_ms=probe,
    )
    call = {"a": lambda: sum(range(100))}
    measure(call, Protocol(rounds=3, runs=5), clock)
    assert not reads  # only where all callables have the same threads
    found = measure(call, Protocol(rounds=3, runs=5, one_speed=True), clock)["a"]
    assert isinstance(found, Timing)
    assert len(reads) == 6  # before and after each round: its calls are short
