"""Trying switches: first whether one works, then whether it is faster, then what the loss says."""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tersor.core.errors import NumericalError
from tersor.core.progress import Progress, Silent
from tersor.core.records import Timing
from tersor.timing.protocol import Protocol, Ratio, measure, paired_noise, ratio
from tersor.train.switches import ResidentData, Switch
from tersor.train.tune_arena import Arena, Block, Configuration, Single
from tersor.train.tune_records import (
    LossCheck,
    LossRule,
    SwitchReport,
    TimeRule,
    steps_to_save,
)
from tersor.train.tune_steps import Recipe

READY_STEPS = 3  # that compile, allocate and choose kernels
LOOK_STEPS = 5  # of the first look
# In a first look, so much slower is not noise: blocks of steps would only cost time.
CLEARLY_SLOWER = 1.3
ENOUGH = 0.005  # standard error of a step's time, a sixth of the least gain that counts
# From turn to turn; a ratio that spreads more tells of other processes, as in a verdict on speed.
MOST_NOISE = 0.25
_WARM_UPS = 10

Measure = Callable[[Mapping[str, Any], Protocol], dict[str, Timing]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Faster:
    """A configuration beside what is on: times as fast, its spread, and what a step saves."""

    ratio: Ratio
    noise: float
    saved_seconds: float


@dataclass(slots=True)
class Trials:
    """The state of one tuning: what is on, and what the plain step's losses are.

    Attributes:
        on: The configuration so far.
        plain: Losses of the plain step, one run a seed; of the switches that were asked for by name
            where those change convergence.
        base_seconds: Of one step of ``on``, by a first look.
        last: Makes the switch that ``on`` ends with, where others are to come in front of it.
    """

    arena: Arena
    time_rule: TimeRule
    loss_rule: LossRule
    seed: int = 0
    progress: Progress = field(default_factory=Silent)
    measure: Measure = measure
    clock: Callable[[], float] = time.perf_counter
    on: Configuration = ()
    base_seconds: float = 0.0
    plain: list[list[float]] = field(default_factory=list)
    last: Callable[[], Switch] | None = None
    _ends: dict[Switch, Switch] = field(default_factory=dict)

    def _with(self, switch: Switch) -> Configuration:
        """What is on, and a switch; always the same end for one switch, which may have recorded it."""
        if self.last is None:
            return (*self.on, switch)
        end = self._ends.get(switch)
        if end is None:
            end = self._ends[switch] = self.last()
        return (*self.on[:-1], switch, end)

    def look(self) -> float:
        """Seconds of one step of the current configuration, the median of a few."""
        return statistics.median(self.arena.seconds(1) for _ in range(LOOK_STEPS))

    def start(self) -> None:
        """The time of a plain step."""
        self.arena.enter(self.on)
        self.arena.run(READY_STEPS)
        self.base_seconds = self.look()
        self.arena.job = replace(self.arena.job, plain_seconds=self.base_seconds)

    def learn_spread(self) -> None:
        """Losses of what is on, for every seed.

        Raises:
            NumericalError: They are not finite.
        """
        rule = self.loss_rule
        self.progress.stage("losses of the plain step", rule.seeds)
        self.plain = []
        for seed in range(self.seed, self.seed + rule.seeds):
            losses = self.arena.losses(self.on, seed, self.seed, rule.steps)
            bad = next((i for i, v in enumerate(losses) if not math.isfinite(v)), None)
            if bad is not None:
                raise NumericalError(
                    f"step: the plain loss is {losses[bad]} at step {bad + 1} (seed {seed}), wanted "
                    "finite losses; lower the learning rate, clip gradients in after_backward, or "
                    "tune once training is stable"
                )
            self.plain.append(losses)
            self.progress.advance()

    def stage(self, switches: Sequence[Switch]) -> list[SwitchReport]:
        """Try several choices of one name beside each other; the best that may stays on."""
        reports: dict[int, SwitchReport] = {}
        ready: list[Switch] = []
        for i, switch in enumerate(switches):
            reason = switch.refusal(self.arena.job, self._recipe())
            found = _report(switch, why=reason) if reason else self._prepare(switch)
            reports[i] = found
            if found.is_tried and not found.why:
                ready.append(switch)
        self._judge(switches, ready, reports)
        return [reports[i] for i in range(len(switches))]

    def _recipe(self) -> Recipe:
        """The recipe of what is on."""
        self.arena.enter(self.on)
        return self.arena.recipe

    def _prepare(self, switch: Switch) -> SwitchReport:
        """Make the first steps with a switch; the reason is empty where it is worth blocks of them."""
        start = self.clock()
        try:
            self.arena.enter(self._with(switch))
            self.arena.run(READY_STEPS)
            seconds = max(0.0, self.clock() - start - READY_STEPS * self.base_seconds)
            switch.ready()
            slowness = self._slowness()
        except Exception as error:  # noqa: BLE001 - the caller's step and torch may raise anything
            self.arena.enter(self.on)
            return _report(switch, is_tried=True, why=f"it fails: {first_line(error)}")
        report = _report(switch, is_tried=True, why="", seconds=seconds)
        if slowness > CLEARLY_SLOWER and not switch.changes_convergence:
            why = f"slower: {slowness:.2f}x the time in a first look"
            report = replace(report, why=why, speedup=1 / slowness)
        return report

    def _slowness(self) -> float:
        """Time of the current configuration over that of what is on, by a first look.

        Where it seems clearly slower, what is on is looked at again: another process may have come.
        """
        looked = self.look()
        slowness = looked / self.base_seconds
        if slowness > CLEARLY_SLOWER:
            self.arena.enter(self.on)
            self.arena.run(1)
            slowness = min(slowness, looked / self.look())
        return slowness

    def _judge(
        self, switches: Sequence[Switch], ready: Sequence[Switch], reports: dict[int, SwitchReport]
    ) -> None:
        """Time all that are ready, interleaved; the fastest that the rules allow is on."""
        if not ready:
            return
        places = {id(s): i for i, s in enumerate(switches)}
        try:
            found = self.compare([self._with(switch) for switch in ready])
        except Exception as error:  # noqa: BLE001 - as above
            for switch in ready:
                i = places[id(switch)]
                reports[i] = replace(reports[i], why=f"it fails: {first_line(error)}")
            self.arena.enter(self.on)
            return
        ranked = sorted(zip(ready, found, strict=True), key=lambda pair: -pair[1].ratio.value)
        chosen: Switch | None = None
        for switch, faster in ranked:
            i = places[id(switch)]
            report = _timed(reports[i], faster)
            report = self._decided(switch, report) if chosen is None else _beaten(report, chosen)
            reports[i] = report
            if report.is_on:
                chosen = switch
        if chosen is not None:
            self.on = self._with(chosen)
            self.arena.enter(self.on)
            self.base_seconds = self.look()

    def compare(self, others: Sequence[Configuration]) -> list["Faster"]:
        """Speed of configurations beside what is on."""
        timings = self.times([self.on, *others])
        base = timings[0]
        return [
            Faster(
                ratio=ratio(base, other),
                noise=paired_noise(base, other),
                saved_seconds=(base.median_ms - other.median_ms) / 1e3,
            )
            for other in timings[1:]
        ]

    def times(self, configurations: Sequence[Configuration]) -> list[Timing]:
        """Interleaved blocks of steps of all of them."""
        rule, arena = self.time_rule, self.arena
        is_cpu = arena.job.device.type == "cpu"
        calls: dict[str, Any] = {
            str(i): Single(arena, c) if is_cpu else Block(arena, c, rule.block)
            for i, c in enumerate(configurations)
        }
        runs = rule.block if is_cpu else 1
        protocol = Protocol(
            rounds=rule.rounds, runs=runs, min_runs=runs, warmups=_WARM_UPS, enough=ENOUGH
        )
        found = self.measure(calls, protocol)
        return [found[name] for name in calls]

    def _decided(self, switch: Switch, report: SwitchReport) -> SwitchReport:
        """Both rules on one switch; a loss is looked at only where the time would do."""
        gain = self.time_rule.gain
        if not switch.changes_convergence and not is_faster(report, gain):
            return decide(report, switch, gain, self.arena.job.steps)
        try:
            report = replace(report, loss=self._loss_check(switch))
        except Exception as error:  # noqa: BLE001 - as above
            self.arena.enter(self.on)
            return replace(report, why=f"it fails: {first_line(error)}")
        return decide(report, switch, gain, self.arena.job.steps)

    def _loss_check(self, switch: Switch) -> LossCheck:
        if isinstance(switch, ResidentData):
            is_same = switch.gives_the_same(self.arena.job)
            return LossCheck(kind="same batches", is_ok=is_same)
        rule = self.loss_rule
        losses = self.arena.losses(self._with(switch), self.seed, self.seed, rule.steps)
        check = check_losses(losses, self.plain, rule)
        if switch.changes_convergence:
            is_finite = all(map(math.isfinite, losses))
            return replace(check, kind="by name", is_ok=is_finite)
        return check


def check_losses(
    losses: Sequence[float], plain: Sequence[Sequence[float]], rule: LossRule
) -> LossCheck:
    """Compare a run with the plain one of the same seed, by what seeds do to it.

    Args:
        losses: Of the run with a switch.
        plain: Of the plain step: the first has the run's seed.
        rule: Which steps, and the least tolerance.
    """

    def beside(pick: Callable[[Sequence[float]], Sequence[float]]) -> tuple[float, float, float]:
        value = statistics.fmean(pick(losses))
        means = [statistics.fmean(pick(run)) for run in plain]
        return value, means[0], max(max(means) - min(means), rule.tolerance * abs(means[0]))

    mean, plain_mean, allowed_mean = beside(lambda run: run)
    end, plain_end, allowed_end = beside(lambda run: run[-rule.end :])
    is_ok = abs(mean - plain_mean) <= allowed_mean and abs(end - plain_end) <= allowed_end
    return LossCheck(
        kind="seed spread",
        is_ok=is_ok and all(map(math.isfinite, losses)),
        mean=mean,
        plain_mean=plain_mean,
        end=end,
        plain_end=plain_end,
        allowed_mean=allowed_mean,
        allowed_end=allowed_end,
    )


def is_faster(report: SwitchReport, gain: float) -> bool:
    """By enough, and not only by chance."""
    is_sure = (report.low or 0.0) > 1 and (report.noise or 0.0) <= MOST_NOISE
    return (report.speedup or 0.0) >= 1 + gain and is_sure


def decide(report: SwitchReport, switch: Switch, gain: float, steps: int | None) -> SwitchReport:
    """On or off, and why."""
    words = f"{report.speedup or 0:.2f}x as fast ({report.low or 0:.2f} to {report.high or 0:.2f})"
    if report.loss is not None:
        words += f", {report.loss.describe()}"
    against = switch.complaint() or _objection(report, switch, gain, steps)
    if against:
        return replace(report, why=f"{against}: {words}")
    needed = report.break_even_steps
    if report.seconds >= 1 and needed is not None:
        words += f"; {report.seconds:.0f} s to get ready, saved after {needed} steps"
    if switch.changes_convergence:
        words = f"asked for by name: {words}"
    return replace(report, is_on=True, why=words)


def _objection(report: SwitchReport, switch: Switch, gain: float, steps: int | None) -> str:
    """Time first, then the loss, then the length of the run; "" for none."""
    check, needed = report.loss, report.break_even_steps
    if switch.changes_convergence:
        return "" if check is None or check.is_ok else "its loss is not finite"
    if (report.speedup or 0.0) < 1 + gain:
        return f"less than {gain:.0%} faster"
    if not is_faster(report, gain):
        return "too noisy to say that it is faster"
    if check is not None and not check.is_ok:
        return "the loss is off"
    if steps is not None and needed is not None and needed > steps:
        return (
            f"{report.seconds:.0f} s to get ready, saved after {needed} steps; the run has {steps}"
        )
    return ""


def first_line(error: BaseException) -> str:
    """Type and first line of an error."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


def _report(switch: Switch, **values: Any) -> SwitchReport:
    return SwitchReport(name=switch.name, choice=switch.choice, **values)


def _timed(report: SwitchReport, faster: Faster) -> SwitchReport:
    return replace(
        report,
        speedup=faster.ratio.value,
        low=faster.ratio.low,
        high=faster.ratio.high,
        noise=faster.noise,
        break_even_steps=steps_to_save(report.seconds, faster.saved_seconds),
    )


def _beaten(report: SwitchReport, by: Switch) -> SwitchReport:
    return replace(
        report, why=f"{report.speedup:.2f}x as fast; {by.choice} is faster and was taken"
    )
