"""Where configurations of one step meet: same model, same optimizer, same start, in turn.

A configuration is a tuple of switches. Entering one takes back what only the one before had, puts the
snapshot back, and applies what is new: what two of them share at their beginning is not touched, so
that recorded work keeps its addresses.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tersor.train.switches import Switch
from tersor.train.tune_batches import Endless
from tersor.train.tune_state import Snapshot, seed_all
from tersor.train.tune_steps import Job, Recipe, Runner, plain

Configuration = tuple[Switch, ...]


@dataclass(frozen=True, slots=True)
class Block:
    """Steps of one configuration as a call that reads its own time.

    For devices that work behind the caller's back: they are waited for before and after, never
    between two steps.
    """

    arena: "Arena"
    configuration: Configuration
    steps: int
    warm_up: int = 2

    def __call__(self) -> None:
        """A few steps, until they are done."""
        self.arena.enter(self.configuration)
        self.arena.run(self.warm_up)

    def timed_ms(self) -> float:
        """Milliseconds of one step, of all the block's steps."""
        self.arena.enter(self.configuration)
        return 1e3 * self.arena.seconds(self.steps)


@dataclass(frozen=True, slots=True)
class Single:
    """One step of a configuration as a call, for devices that are done when it returns."""

    arena: "Arena"
    configuration: Configuration

    def __call__(self) -> None:
        """One step."""
        self.arena.enter(self.configuration)
        self.arena.step()


class Arena:
    """Runs steps of configurations; counts them; can put everything back."""

    def __init__(self, job: Job, snapshot: Snapshot, clock: Any) -> None:
        """``clock`` reads seconds."""
        self.job = job
        self.steps_made = 0
        self.current: Configuration = ()
        self._snapshot = snapshot
        self._clock = clock
        self._recipes: list[Recipe] = [plain(job)]
        self._runner = Runner(job, self._recipes[-1])
        self._streams: dict[int, tuple[Iterable[Any], Endless]] = {}

    @property
    def recipe(self) -> Recipe:
        """Of the current configuration."""
        return self._recipes[-1]

    def enter(self, configuration: Configuration) -> None:
        """Make it current, from the start of training; nothing happens where it is."""
        if configuration == self.current:
            return
        shared = _shared(self.current, configuration)
        while len(self.current) > shared:
            self.current[-1].undo(self.job)
            self.current = self.current[:-1]
            self._recipes.pop()
        self._runner = Runner(self.job, self.recipe)
        self.reset()
        for switch in configuration[shared:]:
            try:
                recipe = switch.apply(self.job, self.recipe)
            except BaseException:
                switch.undo(self.job)
                self._runner = Runner(self.job, self.recipe)
                self.reset()
                raise
            self.current = (*self.current, switch)
            self._recipes.append(recipe)
        self._runner = Runner(self.job, self.recipe)
        self.reset()

    def reset(self) -> None:
        """The start of training, in the form that the current configuration needs."""
        self._snapshot.restore()
        for switch in self.current:
            switch.settle(self.job)

    def step(self) -> Tensor:
        """One step on the next batch."""
        return self.on(next(self._stream()))

    def on(self, batch: Any) -> Tensor:
        """One step on a batch."""
        self.steps_made += 1
        return self._runner(batch)

    def run_safely(self, check: Callable[[Job], None]) -> None:
        """Something that makes steps by itself; undone whatever it does."""
        try:
            check(self.job)
        finally:
            self.reset()

    def run(self, steps: int) -> None:
        """Some steps, until the device has done them."""
        for _ in range(steps):
            self.step()
        self.job.platform.synchronize()

    def seconds(self, steps: int) -> float:
        """Seconds of one step, of that many in a row."""
        self.job.platform.synchronize()
        start = self._clock()
        self.run(steps)
        return float(self._clock() - start) / steps

    def losses(
        self, configuration: Configuration, seed: int, first: int, steps: int
    ) -> list[float]:
        """Losses of a run from the start of training, on the pool's batches.

        Args:
            configuration: What is on.
            seed: Of the order and the random numbers.
            first: The seed whose order is the loader's own.
            steps: Of the run.
        """
        self.enter(configuration)
        self.reset()
        seed_all(seed)
        batches = self.job.pool.batches
        found = [
            self.on(batches[i]) for i in order(len(batches), steps, None if seed == first else seed)
        ]
        values = torch.stack([loss.float().reshape(()) for loss in found])
        return [float(v) for v in values.cpu()]

    def leave(self) -> None:
        """As if nothing had been."""
        self._streams.clear()
        while self.current:
            self.current[-1].undo(self.job)
            self.current = self.current[:-1]
            self._recipes.pop()
        self.reset()

    def stay(self, configuration: Configuration) -> Recipe:
        """Leave with a configuration on, at the start of training."""
        self._streams.clear()
        self.enter(configuration)
        self.reset()
        return self.recipe

    def _stream(self) -> Endless:
        source = self.recipe.batches
        if id(source) not in self._streams:
            self._streams[id(source)] = source, Endless(source)
        return self._streams[id(source)][1]


def _shared(one: Configuration, other: Configuration) -> int:
    """How many switches two configurations share at their beginning."""
    count = 0
    for a, b in zip(one, other, strict=False):
        if a is not b:
            break
        count += 1
    return count


def order(count: int, steps: int, seed: int | None) -> list[int]:
    """Which batch each step takes: passes over all, each in another order; None: as they lie."""
    generator = None if seed is None else np.random.default_rng(seed)
    found: list[int] = []
    while len(found) < steps:
        one = range(count) if generator is None else generator.permutation(count).tolist()
        found += one
    return found[:steps]
