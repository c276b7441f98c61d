"""Layers become pairs of thinner ones in the middle of a run: dense until their spectra settle, then of low rank.

At every look the stable ranks of all layers that can be replaced are measured. Once none has changed by 2 % in
an epoch, or at the end of the window, the moments of what the layers read are gathered up to the next look. Then
each chosen layer is replaced by the best pair of its rank, in the user's own module and in their optimizer; the
moments of the new parameters begin anew, and the learning rate is warmed up again over 1 % of the run. Where
the outputs are no numbers after that, or off by more than their own size, everything is put back.

Source: Wang et al. 2023, arXiv:2305.02538 (Cuttlefish: stable ranks tell when to factorise); gathered inputs, the
prices and the way back are ours.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from tersor.core.errors import ConfigError
from tersor.ops.rank_forms import as_form
from tersor.train.counting import Counter, Rate
from tersor.train.factoring import Factored, Factoring
from tersor.train.gathering import Gathering
from tersor.train.pace import Pace
from tersor.train.rank_planning import Ranks
from tersor.train.ranks import agreed, is_replicated, rewrapped, summed
from tersor.train.report import Report
from tersor.train.rescue import Rescue
from tersor.train.resuming import VERSION, bind, check_run, check_shape, course_of
from tersor.train.settling import StableRanks
from tersor.train.spectral_parts import SpectralParts

WARM_UP = (
    0.01  # share of the run in which the learning rate comes back after the layers are replaced
)


class Factorizer:
    """A run of training in which layers become pairs; made by ``tersor.train.attach``."""

    def __init__(self, parts: SpectralParts, state: Mapping[str, Any] | None = None) -> None:
        """Register the hooks.

        Args:
            parts: Of the run.
            state: Of a checkpoint to go on from; where layers were replaced already, those of the model are.
        """
        self._parts = parts
        self._counter = Counter()
        self._rate = Rate()
        self._pace = Pace(time.perf_counter)
        self._notes: list[str] = []
        self._before = parts.parameters
        self._stable = StableRanks(parts.model, parts.names)
        named = {n: parts.layers.by_name[n] for n in parts.names}
        self._gathering = Gathering(parts.model, named)
        self._factoring = Factoring(parts)
        self.plan: Ranks | None = None
        self._cut_at: int | None = None  # steps after which the layers are replaced
        self._is_done = False
        self._shrunk_at: int | None = None
        folder = parts.rescue
        self._rescue = None if folder is None else Rescue(folder, time.monotonic)
        self._rates: list[Any] | None = None  # of the groups, while they are warmed up
        if state is not None:
            self._restore(state)
        optimizer = parts.optimizer
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]

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
        """Whether it is known when the layers are replaced."""
        return self._cut_at is not None

    @property
    def is_shrunk(self) -> bool:
        """Whether layers have been replaced, or have been found not to be worth it."""
        return self._is_done

    def ranks(self) -> dict[str, int]:
        """Layer -> rank of the pair that stands in its place now."""
        return {n: row.rank for n, row in self._factoring.done.items()}

    def _before_step(self, optimizer: Optimizer, _: Any, __: Any) -> None:
        self._cool(optimizer)  # where a step has failed in between
        if self._shrunk_at is None:
            return
        steps = max(1, round(WARM_UP * self._parts.schedule.total_steps))
        done = self.step - self._shrunk_at
        if done < steps:
            self._rates = [group["lr"] for group in optimizer.param_groups]
            for group in optimizer.param_groups:
                group["lr"] = group["lr"] * ((done + 1) / (steps + 1))

    def _cool(self, optimizer: Optimizer) -> None:
        """The groups' learning rates as their scheduler knows them."""
        if self._rates is not None:
            for group, rate in zip(optimizer.param_groups, self._rates, strict=True):
                group["lr"] = rate
            self._rates = None

    def _after_step(self, optimizer: Optimizer, _: Any, __: Any) -> None:
        self._pace.tick()
        with self._pace.inside():
            self._cool(optimizer)
            self._counter.tick(optimizer)
            if self._is_done:
                return
            schedule = self._parts.schedule
            if self._cut_at is None and schedule.is_look(self.step):
                self._look()
            if self._cut_at is None and self.step >= schedule.last - schedule.every:
                self._cut_at = schedule.last
            if self._cut_at is None:
                return
            if self.step < self._cut_at:
                self._gathering.begin(self._parts.outer)
            elif not is_replicated(self._parts.outer):
                self._replace()

    def _look(self) -> None:
        """Measure the stable ranks; where they have settled, say when the layers are replaced."""
        schedule = self._parts.schedule
        self._counter.settle()
        self._rate.follow(self._parts.optimizer)
        hint = "" if self._rescue is None else self._rescue.describe()
        self._stable.measure(self.step, schedule.epoch_steps, hint)
        if self._rescue is not None:
            parts = self._parts
            self._rescue.keep(parts.model, parts.optimizer, self.state_dict(), self.step)
        is_settled = self._stable.is_settled(schedule.epoch_steps)
        if is_replicated(self._parts.outer):
            flag = torch.tensor(is_settled, device=next(self.model.parameters()).device)
            is_settled = bool(agreed({"settled": flag})["settled"])
        if self.step >= schedule.first and is_settled:
            self._cut_at = min(self.step + schedule.every, schedule.last)

    def _replace(self) -> None:
        """Put the pairs into the model, where they are worth it and its outputs stay sound."""
        parts = self._parts
        self._counter.settle()
        self._rate.follow(parts.optimizer)
        self._gathering.end()
        missing = self._gathering.ask(parts.probe)
        if missing:
            self._notes.append(
                f"no training step has shown what {', '.join(missing[:3])} read: the example had to do"
            )
        moments = self._gathering.moments
        if is_replicated(parts.outer):
            moments = {n: summed(m) for n, m in sorted(moments.items())}
        self.plan = self._factoring.plan(moments)
        notes = self._factoring.replace(self.plan, moments)
        self._notes += [*([self.plan.note] if self.plan.note else []), *notes]
        if self._factoring.done:
            self._shrunk_at = self.step
            self._notes += self._rate.note()
            self._notes += self._compiled_note()
        self._gathering.moments = {}
        self._is_done = True

    def _compiled_note(self) -> tuple[str, ...]:
        """What compiling again costs, where it does; the pairs have to train, whatever that takes."""
        parts = self._parts
        if not isinstance(parts.outer, torch._dynamo.OptimizedModule):  # noqa: SLF001
            return ()
        saved = self._pace.saves(parts.schedule.total_steps - self.step, self._factoring.share())
        if saved > 0:
            return ()
        said = (
            f"compiling the model again takes {-saved:.0f} s more than the smaller steps save: pairs have to "
            "train, so that they were put in place nevertheless"
        )
        return (said,)

    def epoch_end(self, model: nn.Module | None = None) -> nn.Module:
        """Replace where the model is replicated over processes: only between epochs, as it is wrapped anew.

        Args:
            model: As the caller has it; None: the one that ``attach`` was given.

        Returns:
            The model to go on with: a new wrapper where layers were replaced now, else the same one.
        """
        outer = self._parts.outer if model is None else model
        due = self._cut_at is not None and self.step >= self._cut_at
        if self._is_done or not due or not is_replicated(outer):
            return outer
        self._replace()
        return rewrapped(outer, self._parts.model)

    def finish(
        self, validate: Callable[[nn.Module], float] | None = None
    ) -> tuple[nn.Module, Report]:
        """End the run: the model with its pairs, and what was done.

        Args:
            validate: Takes the small model and returns a number that the report shall have.

        Returns:
            The caller's own module, whose layers have become pairs in place, and the report. The hooks are
            gone.

        Raises:
            ConfigError: The optimizer has made no step.
        """
        if not self._is_done:
            self._end_early()
        for handle in self._handles:
            handle.remove()
        self._handles = []
        return self.model, self._report(validate)

    def _end_early(self) -> None:
        last = self._parts.schedule.last
        if not self.step:
            raise ConfigError(
                "finish() after 0 steps: wanted some of the optimizer that attach() was given; is it the one "
                "that trains?"
            )
        if self._cut_at is None or self.step < self._cut_at:
            self._notes.append(
                f"finish() was called after {self.step} steps, before step {last} by which layers would have "
                "become pairs: they were replaced at once, and have not trained"
            )
        else:
            self._notes.append(
                f"epoch_end() was not called after step {self._cut_at}: layers were replaced at the end of the "
                "run, and have not trained"
            )
        self._replace()

    def _report(self, validate: Callable[[nn.Module], float] | None) -> Report:
        parts = self._parts
        chosen = self.plan.reasons if self.plan is not None else {}
        rows = tuple(
            self._factoring.done.get(n)
            or Factored(
                layer=n,
                rank=0,
                form="",
                loss=0.0,
                reason=self._factoring.reasons.get(n, chosen.get(n, "it was given no rank")),
            )
            for n in parts.layers.by_name
        )
        return Report(
            algorithm="spectral",
            steps=self.step,
            shrunk_at=self._shrunk_at,
            groups=(),
            held=parts.layers.held,
            difference=self._factoring.difference,
            parameters_before=self._before,
            parameters_after=sum(p.numel() for p in self.model.parameters()),
            predicted_ms=None if self.plan is None else self.plan.predicted_ms,
            measured=None if parts.planner is None else parts.planner.measure(self.model),
            validated=None if validate is None else float(validate(self.model)),
            hook_share=self._pace.share(),
            rate_share=self._rate.share,
            notes=tuple(self._notes),
            factored=rows,
        )

    def state_dict(self) -> dict[str, Any]:
        """Everything that a checkpoint needs beside the model's and the optimizer's own states.

        Tensors, numbers and texts: ``torch.load(weights_only=True)`` reads it.
        """
        plan = self.plan
        return {
            "version": VERSION,
            "algorithm": "spectral",
            "structure": self._parts.shapes,
            "total_steps": self._parts.schedule.total_steps,
            "schedule": course_of(self._parts.schedule),
            "plan": None if self._parts.counts is None else dict(self._parts.counts),
            "step": self.step,
            "cut_at": self._cut_at,
            "is_cut": self._is_done,
            "shrunk_at": self._shrunk_at,
            "peak": self._rate.peak,
            "stable": self._stable.state_dict(),
            "moments": self._gathering.state_dict(),
            "pairs": self._factoring.state_dict(),
            "reasons": {} if plan is None else dict(plan.reasons),
            "predicted_ms": None if plan is None else plan.predicted_ms,
            "notes": list(self._notes),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the structure of a checkpoint; call it before the weights' and the optimizer's states.

        Raises:
            ConfigError: The checkpoint is of another structure or another schedule.
        """
        if self._is_done:
            raise ConfigError(
                "load_state_dict: layers of this model are pairs already; build it anew, attach, and load then"
            )
        check_shape(state, self._parts.shapes, "spectral")
        if state["is_cut"]:
            self._factoring.restore(state["pairs"])
        self._restore(state)

    def _restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint, of which the model has the structure."""
        check_shape(state, self._parts.shapes, "spectral")
        schedule, counts = self._parts.schedule, self._parts.counts
        check_run(state, schedule.total_steps, "spectral", schedule=schedule, counts=counts)
        device = next(self._parts.model.parameters()).device
        self._counter.done, self._rate.peak = int(state["step"]), float(state["peak"])
        self._notes, self._shrunk_at = list(state["notes"]), state["shrunk_at"]
        self._cut_at, self._is_done = state["cut_at"], bool(state["is_cut"])
        self._stable.load(state["stable"], device)
        if self._is_done:
            self._factoring.load(state["pairs"])
            rows = self._factoring.done.values()
            self.plan = Ranks(
                chosen={row.layer: (row.rank, as_form(row.form)) for row in rows},
                reasons=dict(state["reasons"]),
                predicted_ms=state["predicted_ms"],
            )
            return
        self._gathering.load(state["moments"], device)
        if self._cut_at is not None:
            self._gathering.begin(self._parts.outer)

    def bind(self, accelerator: Any) -> None:
        """Let an ``accelerate.Accelerator`` save and load the structure with its states.

        Attach to the plain optimizer before ``prepare``, then bind.
        """
        bind(self, accelerator)
