"""Hooks on the user's own optimizer: choose, mask, shrink, and go on.

The user keeps the optimizer, the scheduler and the loop. A hook in front of the optimizer's step and one
behind it are all that runs; no wrapper class, no value read from the device but at a look.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tersor.core.errors import ConfigError
from tersor.train.algorithms import make
from tersor.train.checks import check_scores, check_shapes, no_steps, reader_beside
from tersor.train.closures import Closure, around, closure_of, with_closure
from tersor.train.committing import Commit, commit
from tersor.train.counting import Counter, Rate
from tersor.train.literals import macs_share
from tersor.train.pace import Pace
from tersor.train.parts import Parts
from tersor.train.planning import Counts
from tersor.train.ranks import agreed, agreed_counts, is_replicated, rewrapped
from tersor.train.report import Report, kept_of
from tersor.train.rescue import Rescue
from tersor.train.resuming import (
    VERSION,
    bind,
    check_run,
    check_structure,
    check_whole,
    course_of,
)
from tersor.train.rounding import Rounded
from tersor.train.scores import Scores
from tersor.train.sharding import gathered
from tersor.train.units import Units


class Shrinker:
    """A run of training in which a model becomes small; made by ``tersor.train.attach``."""

    def __init__(self, parts: Parts, state: Mapping[str, Any] | None = None) -> None:
        """Register the hooks.

        Args:
            parts: Of the run.
            state: Of a checkpoint to go on from; where it was cut already, the model is as well.
        """
        self._parts = parts
        self._counter = Counter()
        self.plan: Counts | None = None
        if parts.counts is not None:
            self.plan = Counts(keep=dict(parts.counts))
        is_cut = state is not None and bool(state["is_cut"])
        groups = [] if is_cut else list(parts.structure.groups.values())
        self._units = Units.of(parts.model, groups)
        self._scores = Scores()
        self._algorithm = make(
            parts.algorithm, self._units, parts.optimizer, parts.schedule, self._costs
        )
        # Without any width that may shrink (bits alone) there is nothing to choose.
        has_widths = bool(parts.structure.groups)
        self._commit: Commit | None = None if has_widths else Commit(parts, {}, is_cut=True)
        self._rounded: tuple[Rounded, ...] = ()
        self._before = sum(p.numel() for p in parts.model.parameters())
        self._seen = {p: p.shape for p in self._units.parameters()}
        self._rate = Rate()
        self._shrunk_at: int | None = None
        self._ended_at: int | None = None
        self._beside: tuple[str, str] | None = None
        self._notes: list[str] = []
        self._pace = Pace(time.perf_counter)
        folder = parts.rescue
        self._rescue = None if folder is None else Rescue(folder, time.monotonic)
        if state is not None:
            self._restore(state)
        optimizer = parts.optimizer
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]

    def _costs(self) -> dict[str, float]:
        """What a unit of each group costs: milliseconds where there are prices, else parameters."""
        if self._parts.planner is not None:
            return self._parts.planner.unit_costs()
        return {n: float(s.mean()) for n, s in self._units.sums(torch.ones_like).items()}

    @property
    def step(self) -> int:
        """Steps of the optimizer that are done."""
        return self._counter.done

    @property
    def model(self) -> nn.Module:
        """The plain module that trains."""
        return self._parts.model

    @property
    def is_settled(self) -> bool:
        """Whether the units are chosen for good."""
        return self._commit is not None

    @property
    def is_shrunk(self) -> bool:
        """Whether the model has lost the units that had to go."""
        return self._commit is not None and self._commit.is_cut

    def kept(self) -> dict[str, Tensor]:
        """Group -> indices of the units that live now, of those that it had at first."""
        if self._commit is not None:
            return dict(self._commit.kept)
        return {
            name: (~self._algorithm.dead[name]).nonzero()[:, 0].cpu()
            if name in self._algorithm.dead
            else torch.arange(group.units)
            for name, group in self._parts.structure.groups.items()
        }

    def _before_step(
        self, _: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        closure = closure_of(args, kwargs)
        if self._commit is not None:
            rounding = self._parts.rounding
            with self._pace.inside():
                rounding.before()
            pulled = around(closure, lambda: rounding.hide(self.step), rounding.reveal)
            return with_closure(args, kwargs, pulled)
        with self._pace.inside():
            is_look = self._parts.schedule.is_look(self.step + 1)
            if is_look:
                # A sharded model changes its parameters itself.
                own = self._parts.model if self._parts.shard is None else None
                check_shapes(self._seen, self.step, own)
            if is_look and closure is None:
                self._scores.update(self._units, self._parts.optimizer)
            self._algorithm.before()
        return with_closure(args, kwargs, self._masked(closure, is_look=is_look))

    def _masked(self, closure: Closure | None, *, is_look: bool) -> Closure | None:
        """The closure, with dead units at zero where no look wants the latents."""

        def before() -> None:
            if not is_look:
                self._algorithm.hide()

        def after() -> None:
            self._algorithm.reveal()
            if is_look:
                self._scores.update(self._units, self._parts.optimizer)

        return around(closure, before, after)

    def _after_step(self, optimizer: Optimizer, _: Any, __: Any) -> None:
        self._pace.tick()
        with self._pace.inside():
            self._counter.tick(optimizer)
            if self._commit is not None:
                self._commit.hold()
                self._pull()
                return
            if self._parts.schedule.is_look(self.step):
                self._look()
            if self.step >= self._parts.schedule.last:
                self._settle()
            else:
                self._algorithm.after(reveal=self._parts.schedule.is_look(self.step + 1))

    def _pull(self) -> None:
        """Weights that are to have few bits, a step nearer to their grid."""
        if self._parts.schedule.is_look(self.step):
            self._counter.settle()
        self._parts.rounding.after(self.step)

    def _look(self) -> None:
        """Decide anew which units are dead; the only place where values leave the device."""
        check_scores(self._scores, self.step, self._rescue)
        self._rate.follow(self._parts.optimizer)
        if self._rescue is not None:
            parts = self._parts
            self._rescue.keep(parts.model, parts.optimizer, self.state_dict(), self.step)
        self._counter.settle()
        schedule = self._parts.schedule
        if self.step < schedule.first:
            return
        scores, missing = self._scores.completed(self._units)
        if self.plan is None:
            assert self._parts.planner is not None
            self.plan = self._parts.planner.counts(scores.values)
            if is_replicated(self._parts.outer):  # each process has measured prices of its own
                device = self._units.parameters()[0].device
                self.plan = replace(self.plan, keep=agreed_counts(self.plan.keep, device))
            if self.plan.note:
                self._notes.append(self.plan.note)
        dead = {
            name: schedule.dead(self.step, group.units, self.plan.keep.get(name, group.units))
            for name, group in self._parts.structure.groups.items()
        }
        self._follow_beside()
        self._algorithm.look(scores, dead)
        for name in missing:
            self._note_once(name, dead[name])
        if is_replicated(self._parts.outer):
            self._algorithm.replace(agreed(self._algorithm.dead))

    def _note_once(self, group: str, dead: int) -> None:
        note = f"{group}: no look saw a gradient, so that its units go by the size of their weights"
        if dead and note not in self._notes:
            self._notes.append(note)

    def _follow_beside(self) -> None:
        """Remember a layer that the loss calls past ``forward``: at any look it may be without gradient."""
        parts = self._parts
        if self._beside is None and parts.shard is None and self.plan is not None:
            keep, groups = self.plan.keep, parts.structure.groups.items()
            shrinking = [g for n, g in groups if keep.get(n, g.units) < g.units]
            self._beside = reader_beside(parts.model, parts.structure.unread, shrinking)

    def _is_read_beside(self) -> bool:
        """Whether a layer might break at a cut, so that units stay at zero as long as it trains."""
        self._follow_beside()
        if self._beside is None:
            return False
        name, group = self._beside
        self._notes.append(
            f"{name} trains, and forward() of {type(self._parts.model).__name__} does not read it; it takes as many "
            f"inputs as {group} has units. As it could not follow a cut, units stay at zero until finish(). Call it in "
            f"forward() (in training mode alone, if need be), or leave the width whole with keep=({group!r},)"
        )
        return True

    def _settle(self) -> None:
        """The units are chosen for good: cut them out, or hold them at zero until that can be done."""
        self._algorithm.after(reveal=False)
        dead = self._algorithm.settle()
        groups = self._parts.structure.groups
        kept = {
            name: (~dead[name]).nonzero()[:, 0].cpu() if name in dead else torch.arange(g.units)
            for name, g in groups.items()
        }
        self._commit = commit(self._parts, self._units, kept)
        self._notes += self._rate.note()
        if not is_replicated(self._parts.outer) and not self._is_read_beside() and self._pays(kept):
            self._cut()
        self._pull()

    def _pays(self, kept: Mapping[str, Tensor]) -> bool:
        """Whether the steps that are left save what compiling again takes; eager steps always do."""
        if not isinstance(self._parts.outer, torch._dynamo.OptimizedModule):  # noqa: SLF001
            return True
        share = macs_share(self._parts.structure.axes, kept)
        saved = self._pace.saves(self._parts.schedule.total_steps - self.step, share)
        if saved <= 0:
            self._notes.append(
                f"the model stays compiled at its old size until finish(): compiling it again takes "
                f"{self._pace.first_s:.0f} s, {-saved:.0f} s more than the smaller steps would save"
            )
        return saved > 0

    def _cut(self) -> None:
        assert self._commit is not None
        self._parts.rounding.reveal()
        if self._commit.cut():
            self._shrunk_at = self._made
            self._parts = self._commit.parts  # a sharded model is another one now
        self._parts.rounding.resize(self.step)
        self._notes += [n for n in self._commit.notes if n not in self._notes]

    def epoch_end(self, model: nn.Module | None = None) -> nn.Module:
        """Shrink where the model lies on several processes: only between epochs, as it is wrapped anew.

        Args:
            model: As the caller has it; None: the one that ``attach`` was given.

        Returns:
            The model to go on with: a new one where it has shrunk now, else the same.
        """
        outer = self._parts.outer if model is None else model
        if self._commit is None or self._commit.is_cut or not is_replicated(outer):
            return outer
        self._cut()
        if self._parts.shard is not None:
            return self._parts.outer
        return rewrapped(outer, self._parts.model)

    def finish(
        self, validate: Callable[[nn.Module], float] | None = None
    ) -> tuple[nn.Module, Report]:
        """End the run: the model with exactly the planned counts, and what was done.

        Args:
            validate: Takes the small model and returns a number that the report shall have.

        Returns:
            The caller's own module, which has shrunk in place, and the report; of a sharded model a plain
            copy on every process. The hooks are gone.
        """
        if self._commit is None:
            self._end_early()
        if not self.is_shrunk:
            self._cut()
        self._harden()
        for handle in self._handles:
            handle.remove()
        self._handles = []
        small = self.model if self._parts.shard is None else gathered(self.model)
        return small, self._report(small, validate)

    def _harden(self) -> None:
        """Weights that are to have few bits lie on their grid from here on."""
        rounding = self._parts.rounding
        if rounding.coded and not self.step:
            raise ConfigError(no_steps(0, 1))
        self._notes += rounding.note(self._made)
        self._rounded = rounding.harden()

    @property
    def _made(self) -> int:
        """Steps that were made: ``finish`` goes on from where all units had to be gone."""
        return self.step if self._ended_at is None else self._ended_at

    def _end_early(self) -> None:
        last = self._parts.schedule.last
        if not self._scores.looks:
            raise ConfigError(no_steps(self.step, self._parts.schedule.every))
        self._ended_at = self.step
        self._notes.append(
            f"finish() was called after {self.step} steps, before step {last} at which the model would have "
            "shrunk: all units that had to go went at once"
        )
        self._counter.done = max(self.step, last)
        self._algorithm.reveal()
        self._look()
        self._settle()

    def _report(self, small: nn.Module, validate: Callable[[nn.Module], float] | None) -> Report:
        assert self._commit is not None
        parts, plan = self._parts, self.plan
        groups = parts.structure.groups
        after = sum(p.numel() for p in small.parameters())
        return Report(
            algorithm=parts.algorithm,
            steps=self._made,
            shrunk_at=self._shrunk_at,
            groups=kept_of(groups, self._commit.kept if self._commit.is_cut else {}),
            held=(*parts.structure.held, *parts.rounding.held),
            difference=self._commit.difference,
            parameters_before=self._before,
            parameters_after=after,
            predicted_ms=None if plan is None else plan.predicted_ms,
            measured=None if parts.planner is None else parts.planner.measure(small),
            validated=None if validate is None else float(validate(small)),
            hook_share=self._pace.share(),
            rate_share=self._rate.share,
            rounded=self._rounded,
            notes=tuple(self._notes),
        )

    def state_dict(self) -> dict[str, Any]:
        """Everything that a checkpoint needs beside the model's and the optimizer's own states.

        Tensors, numbers and texts: ``torch.load(weights_only=True)`` reads it. Where the model is sharded,
        every process must ask.
        """
        commit_ = self._commit
        plan = self.plan
        return {
            "version": VERSION,
            "structure": {n: g.units for n, g in self._parts.structure.groups.items()},
            "total_steps": self._parts.schedule.total_steps,
            "schedule": course_of(self._parts.schedule),
            "step": self.step,
            "plan": None if plan is None else dict(plan.keep),
            "predicted_ms": None if plan is None else plan.predicted_ms,
            "scores": self._scores.state_dict(),
            "algorithm": self._parts.algorithm,
            "units": self._algorithm.state_dict(),
            "kept": None if commit_ is None else dict(commit_.kept),
            "is_cut": commit_ is not None and commit_.is_cut,
            "difference": 0.0 if commit_ is None else commit_.difference,
            "shrunk_at": self._shrunk_at,
            "peak": self._rate.peak,
            "rounding": self._parts.rounding.state_dict(),
            "notes": list(self._notes),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the structure of a checkpoint; call it before the weights' and the optimizer's states.

        Raises:
            ConfigError: The checkpoint is of another structure or another schedule.
        """
        if self.is_shrunk and self._parts.structure.groups:
            raise ConfigError(
                "load_state_dict: this model has shrunk already; build it anew, attach, and load then"
            )
        check_structure(state, self._parts.structure)
        if state["is_cut"]:
            check_whole(self._parts.shard)
            kept = dict(state["kept"])
            cut = commit(self._parts, self._units, kept)
            cut.restore()
            self._units = Units({}, ())
            self._restore(state)
            self._notes += [n for n in cut.notes if n not in self._notes]
            return
        self._restore(state)

    def _restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint, of which the model has the structure."""
        check_structure(state, self._parts.structure)
        parts = self._parts
        check_run(
            state,
            parts.schedule.total_steps,
            parts.algorithm,
            schedule=parts.schedule,
            counts=parts.counts,
        )
        device = next(self._parts.model.parameters()).device
        self._counter.done, self._rate.peak = int(state["step"]), float(state["peak"])
        self._notes = list(state["notes"])
        self._shrunk_at = state["shrunk_at"]
        if state["plan"] is not None:
            self.plan = Counts(keep=dict(state["plan"]), predicted_ms=state["predicted_ms"])
        self._scores.load(state["scores"], device)
        self._parts.rounding.load(state.get("rounding"))
        if state["kept"] is None:
            self._algorithm.load(state["units"])
            return
        if state["is_cut"]:
            self._commit = Commit(self._parts, dict(state["kept"]), is_cut=True)
        else:
            self._commit = commit(self._parts, self._units, dict(state["kept"]))
        self._commit.difference = float(state["difference"])

    def bind(self, accelerator: Any) -> None:
        """Let an ``accelerate.Accelerator`` save and load the structure with its states.

        Attach to the plain optimizer before ``prepare``, then bind.
        """
        bind(self, accelerator)
