"""Gradient steps on one part of a graph, and the check that they helped."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tersor.graph.frontiers import Block
from tersor.graph.training import forward
from tersor.observe.ranks import ALONE, RankGroup
from tersor.ops.reconstruction import step_share
from tersor.recover.samples import Drawn, Pool
from tersor.recover.tensors import Tensors

_LOOKS = (0.1, 0.25, 0.5, 0.75, 0.9)  # of a part: what is best there or at the end stays
_RISE = 1.1  # of the best loss so far: beyond, steps lead away and not only about
_NOTHING = 1e-12  # of a loss relative to what is wanted: rounding in single precision, squared
_SMALLER = 0.25  # of a step's size, each time that training begins anew
_MOST_RESTARTS = (
    4  # steps are 1/256 as large by then, and gain nothing that would be worth their time
)
_BETAS = (0.9, 0.99)  # a part has hundreds of steps: a longer memory of squares would not fill

Loss = Callable[[Mapping[str, Any], Drawn], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """How long a part may take: until a moment of the clock, or a number of steps."""

    clock: Callable[[], float]
    until: float = math.inf
    steps: int | None = None

    def progress(self) -> Iterator[float]:
        """Share of the budget that is used before each step, from 0 to below 1."""
        start, done = self.clock(), 0
        while True:
            if self.steps is not None:
                share = done / self.steps
            else:
                length = self.until - start
                share = (self.clock() - start) / length if length > 0 else 1.0
            if share >= 1:
                return
            yield share
            done += 1


@dataclass(frozen=True, slots=True)
class Part:
    """What is trained: its nodes, its loss, and the samples.

    Attributes:
        check: What decides on samples that no step reads; None: the same loss.
    """

    block: Block
    loss: Loss
    seen: Pool
    unseen: Sequence[Drawn]
    check: Loss | None = None


@dataclass(frozen=True, slots=True)
class Trained:
    """Losses on the samples that no step read, and how many steps were made.

    Attributes:
        restarts: How often training went back to the best so far, with smaller steps.
        is_mean: What stays is the exponential mean of the tensors.
    """

    before: float
    after: float
    steps: int
    restarts: int = 0
    is_mean: bool = False


def train(  # noqa: PLR0913 - what, how long, and who
    part: Part,
    tensors: Tensors,
    targets: Sequence[str],
    budget: Budget,
    rate: float,
    generator: torch.Generator,
    *,
    ranks: RankGroup = ALONE,
) -> Trained:
    """Train some tensors by Adam; the best of what was looked at stays, at worst what was given.

    The rate rises, and falls along half a cosine until the budget ends. Where a look finds the loss
    above the best so far, or a step's loss is no number, training goes back to the best with steps
    a quarter as large, over what is left of the budget; the fifth time it ends. Each look tries the
    exponential mean of the tensors beside the tensors.

    Of several ranks each draws samples of its own; a step follows the mean of their gradients, and
    rank 0's clock and losses decide for all, so that all hold the same tensors.

    Args:
        part: What is trained, and on which samples.
        tensors: Changed: holds the best tensors afterwards.
        targets: Names of those to train.
        budget: When to stop.
        rate: Size of a full step relative to a tensor's own.
        generator: Of the samples of each step; one of its own on each rank.
        ranks: Who takes part.
    """
    groups = tensors.begin(targets, rate)
    course = _Course(part, tensors, groups, ranks)
    if groups and course.before > _NOTHING:
        for progress in ranks.follow(budget.progress()):
            if not course.step(progress, generator):
                break
        course.look()
    tensors.end(course.kept)
    return Trained(course.before, course.best, course.steps, course.restarts, course.is_mean)


class _Course:
    """The steps of one part: the best that was looked at, and where the rate is on its way."""

    def __init__(
        self, part: Part, tensors: Tensors, groups: list[dict[str, object]], ranks: RankGroup
    ) -> None:
        self._part, self._tensors, self._ranks = part, tensors, ranks
        self.before = self.best = ranks.of_first(_unseen_loss(part, tensors))
        self.kept = tensors.snapshot()
        self.steps = self.restarts = 0
        self.is_mean = False
        self._optimizer = torch.optim.Adam(groups, betas=_BETAS) if groups else None
        self._sizes = [float(str(group["lr"])) for group in groups]
        self._looks = list(_LOOKS)
        self._begun, self._factor = 0.0, 1.0  # of this rise and fall of the rate

    def step(self, progress: float, generator: torch.Generator) -> bool:
        """One step at a share of the budget; False where further ones are in vain."""
        if self._looks and progress >= self._looks[0]:
            self._looks = [look for look in self._looks if look > progress]
            found = self.look()
            if not (found < self.before and found <= _RISE * self.best):
                self._restart(progress)
        assert self._optimizer is not None
        share = step_share((progress - self._begun) / (1.0 - self._begun))
        for group, size in zip(self._optimizer.param_groups, self._sizes, strict=True):
            group["lr"] = self._factor * size * share
        drawn = self._part.seen.draw(generator)
        if _step(self._part, self._tensors, self._optimizer, drawn, self._ranks):
            self.steps += 1
            self._tensors.average_()
        else:
            self._restart(progress)
        return self.restarts <= _MOST_RESTARTS

    def look(self) -> float:
        """The better loss of the tensors and of their mean; what is best so far is kept."""
        found = self._ranks.of_first(_unseen_loss(self._part, self._tensors))
        self._take(found, is_mean=False)
        with self._tensors.averaged():
            mean = self._ranks.of_first(_unseen_loss(self._part, self._tensors))
            self._take(mean, is_mean=True)
        return min(found, mean)  # of no number and a number the first

    def _take(self, loss: float, *, is_mean: bool) -> None:
        if loss < self.best:
            self.best, self.kept, self.is_mean = loss, self._tensors.snapshot(), is_mean

    def _restart(self, progress: float) -> None:
        """Back to the best so far; the rate rises again, to a lower peak, and falls over what is left."""
        assert self._optimizer is not None
        self._tensors.restore_(self.kept)
        self._optimizer.state.clear()
        self._factor *= _SMALLER
        self._begun = progress
        self.restarts += 1


def _step(
    part: Part, tensors: Tensors, optimizer: torch.optim.Adam, drawn: Drawn, ranks: RankGroup
) -> bool:
    """One step; not made where the loss is no number, as all that follows would be none."""
    optimizer.zero_grad()
    with torch.enable_grad():
        loss = part.loss(outputs(part.block, tensors, drawn), drawn)
    if not ranks.is_shared and not bool(torch.isfinite(loss)):
        return False
    loss.backward()
    if ranks.is_shared and not _averaged(optimizer, loss, ranks):
        return False
    optimizer.step()
    return True


def _averaged(optimizer: torch.optim.Adam, loss: Tensor, ranks: RankGroup) -> bool:
    """Give all ranks the mean of their gradients; whether the mean of their losses is a number."""
    free = [p for group in optimizer.param_groups for p in group["params"]]
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in free]
    mean = loss.detach().reshape(1).to(grads[0].dtype)
    ranks.mean_([*grads, mean])
    for p, grad in zip(free, grads, strict=True):
        p.grad = grad
    return bool(torch.isfinite(mean))


def outputs(block: Block, tensors: Tensors, drawn: Drawn) -> dict[str, Any]:
    """What a block gives, by node."""
    env: dict[str, Any] = dict(drawn.values)
    for node in block.nodes:
        is_stored = node.op == "get_attr"
        env[node.name] = tensors.value(str(node.target)) if is_stored else forward(node, env)
    return {name: env[name] for name in block.gives}


def _unseen_loss(part: Part, tensors: Tensors) -> float:
    """Mean over the held-out samples, by what decides."""
    total = count = 0.0
    check = part.check or part.loss
    with torch.no_grad():
        for drawn in part.unseen:
            rows = len(next(iter(drawn.wanted.values())))
            total += rows * float(check(outputs(part.block, tensors, drawn), drawn))
            count += rows
    return total / count
