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

_LOOKS = (0.1, 0.25, 0.5, 0.75)  # of a part: what is best there or at the end stays
_SMALLER = 0.25  # of a step's size, each time that a look finds a part worse than it was given
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
    """What is trained: its nodes, its loss, and the samples."""

    block: Block
    loss: Loss
    seen: Pool
    unseen: Sequence[Drawn]


@dataclass(frozen=True, slots=True)
class Trained:
    """Losses on the samples that no step read, and how many steps were made."""

    before: float
    after: float
    steps: int


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
    before = ranks.of_first(_unseen_loss(part, tensors))
    best, kept, steps = before, tensors.snapshot(), 0
    if groups and before > 0:
        optimizer = torch.optim.Adam(groups, betas=_BETAS)
        sizes = [float(group["lr"]) for group in optimizer.param_groups]
        looks, factor = list(_LOOKS), 1.0
        for progress in ranks.follow(budget.progress()):
            if looks and progress >= looks[0]:
                looks = [look for look in looks if look > progress]
                found = ranks.of_first(_unseen_loss(part, tensors))
                if found < best:
                    best, kept = found, tensors.snapshot()
                elif not found < before:
                    tensors.restore_(kept)
                    factor *= _SMALLER
                    optimizer.state.clear()
            for group, size in zip(optimizer.param_groups, sizes, strict=True):
                group["lr"] = factor * size * step_share(progress)
            if not _step(part, tensors, optimizer, part.seen.draw(generator), ranks):
                break
            steps += 1
        found = ranks.of_first(_unseen_loss(part, tensors))
        best, kept = (found, tensors.snapshot()) if found < best else (best, kept)
    tensors.end(kept)
    return Trained(before, best, steps)


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
    """Mean over the held-out samples."""
    total = count = 0.0
    with torch.no_grad():
        for drawn in part.unseen:
            rows = len(next(iter(drawn.wanted.values())))
            total += rows * float(part.loss(outputs(part.block, tensors, drawn), drawn))
            count += rows
    return total / count
