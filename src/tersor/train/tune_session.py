"""One tuning from start to end: the plain step, every switch in turn, all of them together."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch

from tersor.core.errors import ConfigError
from tersor.core.progress import Progress, Silent
from tersor.timing.protocol import measure, ratio
from tersor.train.switches import (
    ChannelsLast,
    Compiled,
    Half,
    ResidentData,
    Switch,
    Threads,
    thread_counts,
)
from tersor.train.switches_cuda import CudaGraph, CudnnBenchmark, OptimizerGraph
from tersor.train.switches_optimizer import KERNELS, FusedOptimizer, Muon, ScheduleFree, require
from tersor.train.tune_arena import Arena, Configuration
from tersor.train.tune_batches import Pool, describe
from tersor.train.tune_checks import check_first_step
from tersor.train.tune_records import LossRule, SwitchReport, TimeRule, TuneReport
from tersor.train.tune_state import Snapshot, generators_of, without_hooks
from tersor.train.tune_steps import Job, Recipe
from tersor.train.tune_trials import READY_STEPS, Measure, Trials, first_line

BY_NAME = ("muon", "schedule_free")  # they change convergence
# In the order in which they are decided: what changes types and layouts before what compiles them.
AUTOMATIC = (
    "resident_data",
    "threads",
    "bf16",
    "channels_last",
    "fused_optimizer",
    "cudnn_benchmark",
    "compile",
    "cuda_graph",
    "optimizer_graph",
)


def candidates(name: str, job: Job) -> Sequence[Switch]:
    """All choices of a name."""
    if name == Threads.name:
        return [Threads(count) for count in thread_counts(job.platform.cores)]
    if name == FusedOptimizer.name:
        return [FusedOptimizer(choice) for choice in KERNELS]
    kinds: tuple[Callable[[], Switch], ...] = (
        ResidentData, Half, ChannelsLast, CudnnBenchmark, Compiled, CudaGraph, OptimizerGraph, Muon,
        ScheduleFree,
    )  # fmt: skip
    return [kind() for kind in kinds if kind.name == name]  # type: ignore[attr-defined]


# What launches hide: it is tried again once they are recorded, in the same order; all but the compiler
# (who takes long) once more where one of them came on: 16 bits may want channels last, and the other way round.
AGAIN = ("bf16", "channels_last", "fused_optimizer", "cudnn_benchmark")


def _may_gain(report: SwitchReport, switch: Switch) -> bool:
    """Whether it was off for its time alone, or waits for a recorded step."""
    if switch.only_recorded and report.why == switch.only_recorded:
        return True
    return not report.is_on and report.speedup is not None and report.loss is None


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """How one tuning decides; its clock and its measurement may be others in a test."""

    loss_rule: LossRule = field(default_factory=LossRule)
    time_rule: TimeRule = field(default_factory=TimeRule)
    seed: int = 0
    progress: Progress = field(default_factory=Silent)
    measure: Measure = measure
    clock: Callable[[], float] = time.perf_counter

    def tuned(self, job: Job, wanted: tuple[str, ...] | TuneReport) -> tuple[Recipe, TuneReport]:
        """The recipe that training goes on with, in place, and how it was found.

        Args:
            job: What the caller gave; model and optimizer are at the start of training afterwards,
                in the form that the recipe needs.
            wanted: Names of the switches to try, or what an earlier tuning found.

        Raises:
            ConfigError, ShapeError, NumericalError: The plain step can't be used; see
                ``check_first_step`` and ``Trials.learn_spread``.
            MissingDependencyError: A switch asked for by name needs a package.
        """
        begun = self.clock()
        names = wanted if isinstance(wanted, tuple) else tuple(s.name for s in wanted.on)
        require(names, job)
        generators = generators_of(job.source)
        snapshot = Snapshot(job.model, job.optimizer, job.scaler, generators)
        arena = Arena(job, snapshot, self.clock)
        with without_hooks(job.optimizer) as hooks:
            try:
                arena.run_safely(check_first_step)
                if isinstance(wanted, TuneReport):
                    on, report = self._repeated(arena, wanted)
                else:
                    on, report = self._measured(arena, wanted)
                recipe = arena.stay(on)
            except BaseException:
                arena.leave()
                raise
            finally:
                self.progress.close()
        report = replace(
            report,
            notes=(*report.notes, *_notes(job, recipe, hooks)),
            seconds=self.clock() - begun,
            steps_made=arena.steps_made,
        )
        for line in report.lines()[len(report.switches) :]:
            self.progress.note(line)
        return recipe, report

    def _measured(self, arena: Arena, names: tuple[str, ...]) -> tuple[Configuration, TuneReport]:
        trials = Trials(
            arena=arena,
            time_rule=self.time_rule,
            loss_rule=self.loss_rule,
            seed=self.seed,
            progress=self.progress,
            measure=self.measure,
            clock=self.clock,
        )
        self.progress.stage("plain step")
        trials.start()
        report = self._empty(arena.job)
        if names:
            trials.learn_spread()
        rows: list[SwitchReport] = []
        for name in (n for n in (*BY_NAME, *AUTOMATIC) if n in names):
            self.progress.stage(name)
            found = self._tried(trials, candidates(name, arena.job))
            for row in found:
                self.progress.note(row.describe())
            rows += found
            if name in BY_NAME and any(row.is_on for row in found):
                trials.learn_spread()
            if name == CudaGraph.name and any(row.is_on for row in found):
                rows = self._again(trials, rows)
        return self._together(trials, replace(report, switches=tuple(rows)))

    def _tried(self, trials: Trials, switches: Sequence[Switch]) -> list[SwitchReport]:
        """All choices of a name, or why they wait."""
        if not any(switch.only_recorded for switch in switches):
            return trials.stage(switches)
        return [
            SwitchReport(
                name=switch.name,
                choice=switch.choice,
                why=switch.refusal(trials.arena.job, trials.arena.recipe) or switch.only_recorded,
            )
            for switch in switches
        ]

    def _again(self, trials: Trials, rows: Sequence[SwitchReport]) -> list[SwitchReport]:
        """What only time spoke against, once more: a recorded step no longer waits for launches."""
        trials.last = CudaGraph
        found = list(rows)
        for _ in range(2):
            came_on = [name for name in AGAIN if self._once_more(trials, found, name)]
            if not came_on:
                break
        self._once_more(trials, found, Compiled.name)
        trials.last = None
        return found

    def _once_more(self, trials: Trials, found: list[SwitchReport], name: str) -> bool:
        """Try what may gain now, and put what is found in its place; True where it is on."""
        places = {(r.name, r.choice): i for i, r in enumerate(found) if r.name == name}
        switches = [
            s
            for s in candidates(name, trials.arena.job)
            if (s.name, s.choice) in places and _may_gain(found[places[s.name, s.choice]], s)
        ]
        if not switches or any(found[i].is_on for i in places.values()):
            return False
        self.progress.stage(f"{name}, recorded")
        rows = trials.stage(switches)
        for row in rows:
            i = places[row.name, row.choice]
            before, said = found[i].speedup, f"{row.why}, recorded"
            if before is not None:
                said += f"; {before:.2f}x before that"
            found[i] = replace(row, why=said)
            self.progress.note(found[i].describe())
        return any(row.is_on for row in rows)

    def _together(self, trials: Trials, report: TuneReport) -> tuple[Configuration, TuneReport]:
        """The plain step and the tuned one side by side; a sum that is no gain is not kept."""
        if not trials.on:
            return (), report
        self.progress.stage("all together")
        plain, tuned = trials.times([(), trials.on])
        faster = ratio(plain, tuned)
        if faster.value <= 1 and not any(s.changes_convergence for s in trials.on):
            why = f"with all others together only {faster.value:.2f}x as fast as the plain step"
            rows = [replace(r, is_on=False, why=why) if r.is_on else r for r in report.switches]
            ms = plain.median_ms
            return (), replace(report, switches=tuple(rows), plain_ms=ms, tuned_ms=ms)
        return trials.on, replace(
            report,
            plain_ms=plain.median_ms,
            tuned_ms=tuned.median_ms,
            speedup=faster.value,
            low=faster.low,
            high=faster.high,
        )

    def _repeated(self, arena: Arena, given: TuneReport) -> tuple[Configuration, TuneReport]:
        """What was on in an earlier tuning, as far as it works here."""
        on: Configuration = ()
        rows: list[SwitchReport] = []
        for old in given.switches:
            if not old.is_on:
                rows.append(old)
                continue
            switch = self._of(old, arena.job)
            arena.enter(on)
            reason = switch.refusal(arena.job, arena.recipe)
            try:
                if not reason:
                    arena.enter((*on, switch))
                    arena.run(READY_STEPS)
            except Exception as error:  # noqa: BLE001 - the caller's step and torch may raise anything
                reason = f"it fails: {first_line(error)}"
            arena.enter(on)
            if reason:
                rows.append(replace(old, is_on=False, why=reason))
            else:
                on = (*on, switch)
                rows.append(replace(old, why="on in the report that was given"))
        note = "the switches are those of the report that was given, its times too"
        return on, replace(given, switches=tuple(rows), notes=(note,))

    @staticmethod
    def _of(old: SwitchReport, job: Job) -> Switch:
        if old.name == Threads.name:  # of that machine, which may have other numbers worth trying
            return Threads(int(old.choice))
        found = [s for s in candidates(old.name, job) if s.choice == old.choice]
        if not found:
            raise ConfigError(
                f"switches: the report has {old.label}, which is not known; known are "
                f"{[*AUTOMATIC, *BY_NAME]}"
            )
        return found[0]

    def _empty(self, job: Job) -> TuneReport:
        ms = 1e3 * job.plain_seconds
        return TuneReport(
            device=str(job.device),
            device_name=job.platform.name,
            torch=torch.__version__,
            threads=torch.get_num_threads(),
            batch=describe(job.pool.batches[0]),
            steps=job.steps,
            plain_ms=ms,
            tuned_ms=ms,
            seed=self.seed,
            time_rule=self.time_rule,
            loss_rule=self.loss_rule,
        )


def without_pool(job: Job) -> Job:
    """The same without the batches that only tuning needs."""
    return replace(job, pool=Pool((), 0, is_static=job.pool.is_static))


def _notes(job: Job, recipe: Recipe, hooks: int) -> tuple[str, ...]:
    found = []
    if not job.model.training:
        found.append(
            "note: the model is in evaluation mode, and was tuned so; if training runs otherwise, call "
            "model.train() and tune again"
        )
    if hooks:
        found.append(f"note: {hooks} step hooks of the optimizer were left off while tuning")
    # By name, another optimizer has taken some parameters of the caller's, or all of them.
    groups = [group for optimizer in recipe.optimizers for group in optimizer.param_groups]
    owned = {id(p) for group in groups for p in group["params"]}
    free = [n for n, p in job.model.named_parameters() if p.requires_grad and id(p) not in owned]
    if free:
        found.append(
            f"note: {len(free)} parameters have gradients and are not in the optimizer, as {free[0]}"
        )
    return tuple(found)
