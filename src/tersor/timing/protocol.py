"""The timing protocol: interleaved rounds, warm-ups after every switch, medians with bounds.

Two builds are comparable only if they ran in the same minutes, so every round visits every
callable, and the bounds treat a round, not a run, as the independent unit: drift of the clock
frequency and neighbours on the machine act on whole rounds.
"""

import gc
import math
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from tersor.core.errors import ConfigError, MeasurementError
from tersor.core.records import Timing
from tersor.timing.device import SelfTimed
from tersor.timing.interruptions import Sample, interrupted
from tersor.timing.pooled import pooled_medians
from tersor.timing.speed import factors, probe_ms

# Warm-ups refill caches and settle the clock frequency: this long is enough, and where calls are
# long, at least two of them.
SETTLED_MS = 100.0
SLOW_WARMUPS = 2
SLOW_MS = 200.0  # where time is short, the runs of callables above this are the first to go
MIN_ROUNDS = 3  # fewer show no spread between rounds
PROBED_MS = 5.0  # the machine's speed is read again after calls of this long
_NORMAL_QUARTILES = 1.349  # between the quartiles of a normal distribution, in deviations
RESAMPLES = 2000  # bootstrap; its own error on a bound is a small part of the spread
CONFIDENCE = 0.95
# 97.5 % quantiles of Student's t by degrees of freedom, for the small-sample correction; between
# two entries the smaller one counts, which widens the bounds.
_T_975 = {
    2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262,
    10: 2.228, 12: 2.179, 15: 2.131, 20: 2.086, 30: 2.042,
}  # fmt: skip

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Protocol:
    """How to measure.

    Args:
        rounds: How often every callable gets its turn; at least 3.
        runs: Timed calls of one callable in one round.
        warmups: Calls before them, after every switch; at least 10. Long calls get as many as
            take ``settled_ms``, but at least 2.
        settled_ms: Warm-ups of one turn need not take longer.
        min_runs: What ``runs`` may sink to where time is short.
        max_seconds: Time for all callables together. It is kept by fewer runs of the callables
            above 200 ms, then fewer rounds, then fewer runs of all; never below ``min_runs``
            and 3 rounds, even if those take longer. None: no limit.
        turn_ms: Timed calls of one turn, after its warm-ups, need not take longer: long calls get
            fewer, but at least ``min_runs``. None: always ``runs``.
        enough: Standard error, as a share of the latency, at which no more rounds are needed; at
            least 3. It is that of a callable beside the others of the run, so that drift which
            all of them share does not count. None: always ``rounds``.
        one_speed: Take out what follows the machine's own speed (``speed``). Only for callables
            with the same number of threads: threads that are still awake slow the probe beside
            their callable, which would then look faster than it is.
    """

    rounds: int = 7
    runs: int = 15
    warmups: int = 10
    min_runs: int = 3
    settled_ms: float = SETTLED_MS
    max_seconds: float | None = None
    turn_ms: float | None = None
    enough: float | None = None
    one_speed: bool = False

    def __post_init__(self) -> None:
        if self.rounds < MIN_ROUNDS:
            raise ConfigError(f"rounds: found {self.rounds}, wanted at least {MIN_ROUNDS}")
        if not 1 <= self.min_runs <= self.runs:
            raise ConfigError(f"min_runs: found {self.min_runs}, wanted 1 to runs={self.runs}")
        if self.warmups < 10:
            raise ConfigError(f"warmups: found {self.warmups}, wanted at least 10")
        for name in ("settled_ms", "max_seconds", "turn_ms", "enough"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"{name}: found {value}, wanted more than 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class Clock:
    """What is read around a call: nanoseconds, and how often the process was interrupted.

    ``probe_ms`` times a fixed piece of work every few milliseconds; see ``speed``.
    """

    wall_ns: Callable[[], int]
    cpu_ns: Callable[[], int]  # of all threads of the process
    preemptions: Callable[[], int]
    probe_ms: Callable[[], float] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratio:
    """A ratio with its 95 % bounds."""

    value: float
    low: float
    high: float


def _involuntary_switches() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


SYSTEM_CLOCK = Clock(
    wall_ns=time.perf_counter_ns,
    cpu_ns=time.process_time_ns,
    preemptions=_involuntary_switches,
    probe_ms=probe_ms,
)


def measure(
    callables: Mapping[str, Callable[[], object]],
    protocol: Protocol | None = None,
    clock: Clock = SYSTEM_CLOCK,
) -> dict[str, Timing]:
    """Latency of every callable, measured side by side in one process.

    A callable returns when its work is done (on a GPU it synchronises); one that reads its own time
    (``device.SelfTimed``) is timed by its device's clock. The order rotates from
    round to round, so that nobody always follows the same neighbour. Runs that the system
    interrupted are dropped and counted, unless that is more than half of a round: then
    interruption is how the machine is, the round keeps all its runs, and those are counted.

    Raises:
        ConfigError: No callables.
        MeasurementError: A call took no time, or less: the clock can't tell.
    """
    if not callables:
        raise ConfigError("nothing to measure: found no callables, wanted at least one")
    protocol = protocol or Protocol()
    on_device = any(isinstance(call, SelfTimed) for call in callables.values())
    if on_device or not protocol.one_speed:  # a probe of this processor says nothing of a GPU
        clock = replace(clock, probe_ms=None)
    with _no_garbage_collection():
        estimates = {name: _estimate_ms(call, clock) for name, call in callables.items()}
        rounds, turns = plan_rounds(estimates, protocol)
        samples: dict[str, list[list[Sample]]] = {name: [] for name in callables}
        names = list(callables)
        for r in range(rounds):
            shift = r % len(names)
            for name in names[shift:] + names[:shift]:
                samples[name].append(_turn(callables[name], *turns[name], clock))
            if protocol.enough is not None and standard_error(_medians(samples)) <= protocol.enough:
                break
    if clock.probe_ms is not None:
        samples = _at_one_speed(samples)
    return {name: _summarise(rows) for name, rows in samples.items()}


def plan_rounds(
    estimates_ms: Mapping[str, float], protocol: Protocol
) -> tuple[int, dict[str, tuple[int, int]]]:
    """Rounds, and (warm-ups, runs) of each callable, so that ``max_seconds`` holds if it can."""
    slow = {name for name, ms in estimates_ms.items() if ms > SLOW_MS}
    warmups = {
        n: min(protocol.warmups, max(SLOW_WARMUPS, math.ceil(protocol.settled_ms / max(ms, 1e-6))))
        for n, ms in estimates_ms.items()
    }
    runs = {n: _turn_runs(ms, protocol) for n, ms in estimates_ms.items()}
    rounds = protocol.rounds
    if protocol.max_seconds is not None:
        limit_ms = protocol.max_seconds * 1e3
        _shrink_runs(runs, slow, estimates_ms, warmups, (limit_ms / rounds, protocol.min_runs))
        round_ms = sum((warmups[n] + runs[n]) * ms for n, ms in estimates_ms.items())
        if round_ms > 0:
            rounds = max(MIN_ROUNDS, min(rounds, math.floor(limit_ms / round_ms)))
        _shrink_runs(runs, set(runs), estimates_ms, warmups, (limit_ms / rounds, protocol.min_runs))
    return rounds, {name: (warmups[name], runs[name]) for name in estimates_ms}


def _turn_runs(estimate_ms: float, protocol: Protocol) -> int:
    if protocol.turn_ms is None:
        return protocol.runs
    enough = math.ceil(protocol.turn_ms / max(estimate_ms, 1e-6))
    return max(protocol.min_runs, min(protocol.runs, enough))


def standard_error(rounds_ms: FloatArray) -> float:
    """Relative standard error of each callable's latency beside the others', pooled over all.

    What a round makes of all callables together is taken out first: what is left is noise.

    Args:
        rounds_ms: Medians [rounds, callables], above 0.

    Returns:
        Infinite for fewer rounds than ``MIN_ROUNDS``. A single callable has no others: its own
        spread counts.
    """
    rounds, count = rounds_ms.shape
    if rounds < MIN_ROUNDS:
        return math.inf
    logs = np.log(rounds_ms)
    logs = logs - logs.mean(axis=0)
    if count > 1:
        logs = logs - logs.mean(axis=1, keepdims=True)
    freedom = (rounds - 1) * max(1, count - 1)
    return math.sqrt(float(np.sum(np.square(logs))) / freedom / rounds)


def _medians(samples: Mapping[str, Sequence[Sequence[Sample]]]) -> FloatArray:
    """Medians of the rounds so far [rounds, callables]."""
    columns = [
        [float(np.median([s.wall_ms for s in row])) for row in rows] for rows in samples.values()
    ]
    return np.asarray(columns, dtype=np.float64).T


def ratio(a: Timing, b: Timing, seed: int = 0) -> Ratio:
    """How many times the latency of ``b`` is the latency of ``a``: ratio of medians a / b.

    The bounds come from a paired bootstrap over rounds: both sides are resampled with the same
    rounds, so that drift which slows both of them cancels.

    Raises:
        ConfigError: The two were not measured in the same rounds.
    """
    if len(a.rounds_ms) != len(b.rounds_ms):
        raise ConfigError(
            f"found {len(a.rounds_ms)} and {len(b.rounds_ms)} rounds, wanted as many; "
            "measure both in one call of measure()"
        )
    rows = np.asarray([a.rounds_ms, b.rounds_ms], dtype=np.float64)
    picks = _resample(rows.shape[1], seed)
    values = np.median(rows[0][picks], axis=1) / np.median(rows[1][picks], axis=1)
    low, high = _bounds(values, rows.shape[1])
    value = a.median_ms / b.median_ms
    return Ratio(value=value, low=min(low, value), high=max(high, value))


def noise(timing: Timing) -> float:
    """Relative spread between rounds: standard deviation of the rounds' medians / median."""
    if len(timing.rounds_ms) < 2:
        return math.inf
    return statistics.stdev(timing.rounds_ms) / timing.median_ms


def paired_noise(a: Timing, b: Timing) -> float:
    """Relative spread of the ratio of two callables from round to round, of one run.

    The middle half of the ratios, as the standard deviation that it would be of a normal one: a
    few bad rounds are what medians are for, many say that nothing can be said.
    """
    ratios = np.asarray(a.rounds_ms, dtype=np.float64) / np.asarray(b.rounds_ms, dtype=np.float64)
    low, middle, high = np.quantile(ratios, [0.25, 0.5, 0.75])
    return float((high - low) / _NORMAL_QUARTILES / middle)


def _shrink_runs(
    runs: dict[str, int],
    names: set[str],
    estimates_ms: Mapping[str, float],
    warmups: Mapping[str, int],
    limits: tuple[float, int],
) -> None:
    """Cut the runs of ``names`` by one factor, again without those that reach the minimum."""
    round_limit_ms, min_runs = limits
    while names := {n for n in names if runs[n] > min_runs}:
        total = sum((warmups[n] + runs[n]) * ms for n, ms in estimates_ms.items())
        free = sum(runs[n] * estimates_ms[n] for n in names)
        if total <= round_limit_ms or free <= 0:
            return
        share = max(0.0, 1 - (total - round_limit_ms) / free)
        for name in names:
            fewer = min(runs[name] - 1, math.floor(runs[name] * share))
            runs[name] = max(min_runs, fewer)


def _estimate_ms(call: Callable[[], object], clock: Clock) -> float:
    call()  # the first call may compile or allocate
    start = clock.wall_ns()
    call()
    return (clock.wall_ns() - start) / 1e6


def _turn(call: Callable[[], object], warmups: int, runs: int, clock: Clock) -> list[Sample]:
    for _ in range(warmups):
        call()
    if clock.probe_ms is None:
        return [_timed(call, clock) for _ in range(runs)]
    found: list[Sample] = []
    group: list[Sample] = []
    before = clock.probe_ms()
    for i in range(runs):
        group.append(_timed(call, clock))
        if i == runs - 1 or sum(s.wall_ms for s in group) >= PROBED_MS:
            after = clock.probe_ms()
            found += [replace(s, probe_ms=(before + after) / 2) for s in group]
            before, group = after, []
    return found


def _at_one_speed(samples: dict[str, list[list[Sample]]]) -> dict[str, list[list[Sample]]]:
    flat = {name: [s for row in rows for s in row] for name, rows in samples.items()}
    by_name = factors(
        {name: [s.wall_ms for s in row] for name, row in flat.items()},
        {name: [s.probe_ms for s in row] for name, row in flat.items()},
    )
    adjusted: dict[str, list[list[Sample]]] = {}
    for name, rows in samples.items():
        each = iter(by_name[name])
        adjusted[name] = [[_scaled(s, float(next(each))) for s in row] for row in rows]
    return adjusted


def _scaled(sample: Sample, factor: float) -> Sample:
    """Both times, so that their ratio still tells who was interrupted."""
    return replace(sample, wall_ms=sample.wall_ms * factor, cpu_ms=sample.cpu_ms * factor)


def _timed(call: Callable[[], object], clock: Clock) -> Sample:
    # Wall time is read innermost: the other two readings cost CPU time, never latency.
    if isinstance(call, SelfTimed):
        return _device_timed(call)
    preemptions = clock.preemptions()
    cpu = clock.cpu_ns()
    start = clock.wall_ns()
    call()
    wall = clock.wall_ns() - start
    cpu = clock.cpu_ns() - cpu
    if wall <= 0:
        raise MeasurementError(
            f"a timed call took {wall} ns by the clock, wanted more than 0: the clock stood still or "
            "went back; measure more work in one call, or on a machine with a steady clock"
        )
    return Sample(wall / 1e6, cpu / 1e6, clock.preemptions() - preemptions)


def _device_timed(call: SelfTimed) -> Sample:
    """By the device's own clock, which other processes do not interrupt."""
    ms = call.timed_ms()
    if not ms > 0:
        raise MeasurementError(
            f"a timed call took {ms} ms by the device's clock, wanted more than 0: measure more work "
            "in one call"
        )
    return Sample(ms, ms, 0)


def _summarise(rows: Sequence[Sequence[Sample]]) -> Timing:
    everything = [s for row in rows for s in row]
    flags = iter(interrupted(everything))
    marked = [[(s.wall_ms, next(flags)) for s in row] for row in rows]
    kept = [_kept_ms(row) for row in marked]
    pool = np.concatenate(kept)
    low, high = _bounds(pooled_medians(kept, _resample(len(kept), seed=0)), len(kept))
    median = float(np.median(pool))
    dropped = len(everything) - int(pool.size)
    return Timing(
        median_ms=median,
        low_ms=min(low, median),
        high_ms=max(high, median),
        rounds_ms=tuple(float(np.median(k)) for k in kept),
        runs=int(pool.size),
        dropped=dropped,
        disturbed=sum(flag for row in marked for _, flag in row) - dropped,
    )


def _kept_ms(row: Sequence[tuple[float, bool]]) -> FloatArray:
    """Times of a round without the interrupted runs, or all where those are more than half."""
    kept = [ms for ms, is_interrupted in row if not is_interrupted]
    return np.asarray(kept if 2 * len(kept) >= len(row) else [ms for ms, _ in row])


def _resample(n: int, seed: int) -> NDArray[np.int64]:
    return np.random.default_rng(seed).integers(0, n, size=(RESAMPLES, n))


def _bounds(values: FloatArray, n: int) -> tuple[float, float]:
    """95 % percentile bounds of a bootstrap over ``n`` units, expanded for small ``n``.

    The plain percentile bounds of few units are too narrow; the expanded ones take the
    percentiles at Phi(-sqrt(n / (n - 1)) t_{n-1}). Below six units even the extremes of the
    bootstrap hold less than 95 %; no resampling can know more.

    Source: Hesterberg 2015, The American Statistician 69(4), "expanded percentile".
    """
    degrees = max((d for d in _T_975 if d <= n - 1), default=min(_T_975))
    tail = statistics.NormalDist().cdf(-math.sqrt(n / (n - 1)) * _T_975[degrees])
    tail = min(tail, (1 - CONFIDENCE) / 2)
    low, high = np.quantile(values, [tail, 1 - tail])
    return float(low), float(high)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
