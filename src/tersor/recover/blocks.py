"""Label-free block reconstruction: each block is trained until it gives what the original gives.

Means and deviations of channels come first, without gradient steps (``moments``). Then blocks, front
to back: a block reads what the compressed blocks before it make of the samples, and should give what
the original gives there, so that later blocks take up the errors of earlier ones. Then all blocks
together, on the error of the model's own outputs or features. The structure, integer codes and
packed weights stay; samples that are never trained on decide what is kept.

Source: Li et al. 2021, arXiv:2102.05426 (blocks as units); ALGORITHMS 3.2b.
"""

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from tersor.core.errors import ConfigError
from tersor.core.recovery import Part as PartName
from tersor.core.recovery import PartRecovery, Recover, Recovery
from tersor.graph.axes.macs import node_macs
from tersor.graph.contracts import Graph
from tersor.graph.edit import copy_graph, rebuild
from tersor.graph.frontiers import Block, BlockSize, find_blocks, penultimate, whole
from tersor.graph.geometry import output_error, output_spreads
from tersor.graph.meta import ensure, refresh
from tersor.graph.mutation import has_mutation
from tersor.graph.training import Leaf, is_rounded, leaves, map_names
from tersor.observe.ranks import ALONE, RankGroup
from tersor.recover.goals import Goal, Goals, Judged, Teacher
from tersor.recover.moments import Moved
from tersor.recover.runs import Run
from tersor.recover.samples import Flat
from tersor.recover.tensors import Tensors
from tersor.recover.training import Budget, Part, train

_SIZE = BlockSize()
_LEAST_COST = 0.05
_WHOLE_RATE = 0.25  # of the rate of blocks: changes of all layers add up
_SEEDS = 2**40  # between those of two ranks: more than the parts and seeds of a run
What = Literal["weights", "rounded"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Progressed:
    """What is done so far: a run that was interrupted goes on from here."""

    tensors: Mapping[str, Tensor]
    parts: tuple[PartRecovery, ...] = ()
    seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Hooks:
    """How the caller follows a run.

    Attributes:
        clock: Seconds from any moment on.
        advance: Called once for each part that is done.
        keep: Takes what is done, after each part.
    """

    clock: Callable[[], float] = time.monotonic
    advance: Callable[[], None] = lambda: None
    keep: Callable[[Progressed], None] = lambda _: None


@dataclass(frozen=True, slots=True)
class More:
    """Batches beside the calibration part, and what a caller's loss reads of them."""

    batches: Sequence[Flat]
    judged: Judged | None = None


@dataclass(frozen=True, slots=True)
class Reconstructed:
    """The graph with the tensors that were kept, and what was done."""

    graph: Graph
    recovery: Recovery


def reconstruct(  # noqa: PLR0913 - the stage's inputs, each a record or a callable
    teacher: Teacher,
    compressed: Graph,
    batches: Sequence[Flat],
    config: Recover,
    *,
    seed: int,
    fixed: Collection[str] = (),
    size: BlockSize = _SIZE,
    done: Progressed | None = None,
    hooks: Hooks = Hooks(),
    more: More | None = None,
    apart: Sequence[Flat] = (),
    ranks: RankGroup = ALONE,
) -> Reconstructed:
    """Train the tensors of a compressed graph block by block, then together.

    Args:
        teacher: The original.
        compressed: What compression made of it; not changed. Nodes that stayed have their names.
        batches: Flat inputs of the calibration part, without labels, ``config.batch`` samples each
            but for the last of a shape; at least two.
        config: The budget.
        seed: Of the samples of each step.
        fixed: Names of ops whose tensors stay as they are.
        size: Of blocks.
        done: Of a run of the same inputs that was interrupted.
        hooks: How the caller follows it.
        apart: Batches that decide what is kept, in place of an eighth of the others: where weights were
            fitted to those in closed form, all steps seem to lead away from them.
        more: Other batches for training all blocks together.
        ranks: Who makes the same call at the same time, to take a share of each step's samples.

    Returns:
        The trained graph; where its outputs on the held-out samples are no closer to the
        original's than before, the graph as it was given.
    """
    ensure(compressed)
    what: What = "rounded" if is_rounded(compressed) else "weights"
    found = leaves(compressed, fixed)
    reason = _obstacle(teacher.graph, compressed, found, batches)
    if reason:
        return Reconstructed(compressed, Recovery(what=what, reason=reason))
    blocks = _blocks(teacher, compressed, [leaf.target for leaf in found], size)
    goals = Goals(teacher, compressed, batches, apart=apart)
    tensors = Tensors(compressed.module, found)
    work = _Work(compressed, goals, tensors, _shared(config, ranks), (seed, hooks, ranks))
    if more is not None and len(more.batches) > 1:
        work.last = Goals(teacher, compressed, more.batches, more.judged)
    before = work.error(compressed)
    work.resume(done)
    work.moments(before)
    work.one_by_one(blocks)
    work.together()
    return work.finished(what, before)


def _shared(config: Recover, ranks: RankGroup) -> Recover:
    """The budget with this rank's share of the samples of a step."""
    return replace(config, batch=-(-config.batch // ranks.world)) if ranks.is_shared else config


def part_count(compressed: Graph, teacher: Teacher, size: BlockSize = _SIZE) -> int:
    """How many parts a run has, for progress."""
    ensure(compressed)
    targets = [leaf.target for leaf in leaves(compressed)]
    return 2 + len(_blocks(teacher, compressed, targets, size))


def _obstacle(
    original: Graph, compressed: Graph, found: Sequence[Leaf], batches: Sequence[Flat]
) -> str:
    if any(has_mutation(g.module.graph) for g in (original, compressed)):
        return "the graph writes in place, so that its parts can't be run by themselves"
    if not found:
        return "nothing in it can be trained"
    if len(batches) < 2:
        return "there is one batch of samples only; wanted one to train on and one to check on"
    return ""


def _blocks(
    teacher: Teacher, compressed: Graph, targets: Sequence[str], size: BlockSize
) -> tuple[Block, ...]:
    mine = {n.name for n in compressed.module.graph.nodes}
    names = map_names(compressed.module)
    return find_blocks(compressed.module, targets, names, teacher.known() & mine, size)


class _Work:
    """One run: what has been trained, and how long it took."""

    def __init__(
        self,
        graph: Graph,
        goals: Goals,
        tensors: Tensors,
        config: Recover,
        how: tuple[int, Hooks, RankGroup],
    ) -> None:
        self.graph, self.goals, self.tensors, self.config = graph, goals, tensors, config
        self.last = goals  # of all blocks together
        self.goal = _goal(graph, goals.teacher, tensors, config)
        self.seed, hooks, self.ranks = how
        self.hooks = hooks
        self.parts: list[PartRecovery] = []
        self._resumed: tuple[PartRecovery, ...] = ()
        self._begun = hooks.clock()
        self._wanted = [goals.teacher.graph.run(flat) for flat in goals.unseen_batches()]

    def resume(self, done: Progressed | None) -> None:
        """Take over what an interrupted run has done, and the time that it took."""
        if done is not None:
            self.tensors.end(done.tensors)
            self._resumed = done.parts
            self._begun -= done.seconds

    @property
    def seconds(self) -> float:
        return self.hooks.clock() - self._begun

    def error(self, graph: Graph) -> float:
        """Mean error of a graph's outputs on the held-out samples."""
        kind, wanted = self.goals.teacher.kind, self._wanted
        spreads = output_spreads(wanted)
        pairs = zip(self.goals.unseen_batches(), wanted, strict=True)
        found = [output_error(graph.run(flat), right, kind, spreads) for flat, right in pairs]
        return float(torch.cat(found).mean())

    def moments(self, before: float) -> None:
        """Means, or means and deviations, of channels set right, where the outputs come closer."""
        if self._is_done():
            return
        moved = Moved(self.goals, self.graph.module, self.tensors)
        name, best, own = "", before, {}
        ways = {"means": False, "means and deviations": True} if before > 0 else {}
        for way, has_factors in ways.items():
            found = moved.tensors(has_factors=has_factors)
            for tensor in found.values():
                self.ranks.mean_([tensor])  # machines may differ in the last bit
            error = self.ranks.of_first(self.error(self._rebuilt(found)))
            if error < best:
                name, best, own = way, error, found
        self.tensors.end(own)
        self._done(
            PartRecovery(
                part="moments", name=name, ops=moved.names, steps=0, before=before, after=best
            )
        )

    def one_by_one(self, blocks: Sequence[Block]) -> None:
        """Each block by itself, front to back."""
        if self.config.whole >= 1 or len(blocks) < 2:
            return
        new = Run(self.graph.module, self.goals.batches, self.tensors.value)
        old = Run(self.goals.teacher.graph.module, self.goals.batches)
        moving = {n.name for block in blocks for n in block.nodes}
        shares = _shares([self._cost(b) for b in blocks], self.config.whole)
        for block, share in zip(blocks, shares, strict=True):
            values = self.goals.read(block, new, moving)
            wanted = None if block.is_last else old.upto(block.gives, block.gives)
            if wanted is None:
                self.goals.take(old)
            if not self._is_done():
                part = (
                    self.goals.outputs_of(
                        block, values, self.config.batch, replace(self.goal, feature=None)
                    )
                    if wanted is None
                    else self.goals.values_of(block, values, wanted, self.config.batch)
                )
                self._train(part, self._own(block), share, "block")
            if not block.is_last:
                new.upto(block.gives, ())

    def together(self) -> None:
        """All blocks as one."""
        block = whole(self.graph.module, list(self.tensors.leaves), map_names(self.graph.module))
        is_wanted = self.config.whole > 0 or not any(p.part == "block" for p in self.parts)
        if block is None or not is_wanted or self._is_done():
            return
        run = Run(self.graph.module, self.last.batches, self.tensors.value)
        values = self.last.read(block, run, {n.name for n in block.nodes})
        part = self.last.outputs_of(block, values, self.config.batch, self.goal)
        self._train(part, list(self.tensors.leaves), 1.0, "whole")

    def _is_done(self) -> bool:
        """Whether the next part was done before an interruption; then it counts as done now."""
        number = len(self.parts)
        if number >= len(self._resumed):
            return False
        self.parts.append(self._resumed[number])
        return True

    def _cost(self, block: Block) -> float:
        """Time of one step, relative to those of other blocks."""
        return float(sum(node_macs(self.graph, n) for n in block.nodes))

    def _own(self, block: Block) -> list[str]:
        """Tensors that nothing outside of a block reads."""
        inside = {n.name for n in block.nodes}
        return [t for t, leaf in self.tensors.leaves.items() if leaf.readers <= inside]

    def _train(self, part: Part, targets: Sequence[str], share: float, kind: PartName) -> None:
        """Train one part for a share of the time that is left."""
        own = self.ranks.rank * _SEEDS if self.ranks.is_shared else 0
        generator = torch.Generator().manual_seed(self.seed + len(self.parts) + own)
        left = max(0.0, self.config.seconds - self.seconds)
        budget = Budget(
            clock=self.hooks.clock,
            until=self.hooks.clock() + share * left,
            steps=self.config.steps,
        )
        rate = self.config.rate * (_WHOLE_RATE if kind == "whole" else 1.0)
        found = train(part, self.tensors, targets, budget, rate, generator, ranks=self.ranks)
        done = PartRecovery(
            part=kind,
            name=", ".join(part.block.gives),
            ops=part.block.ops,
            steps=found.steps,
            before=found.before,
            after=found.after,
            restarts=found.restarts,
            is_mean=found.is_mean,
        )
        self._done(done)

    def _done(self, part: PartRecovery) -> None:
        self.parts.append(part)
        tensors = dict(self.tensors.now)
        self.hooks.keep(Progressed(tensors=tensors, parts=tuple(self.parts), seconds=self.seconds))
        self.hooks.advance()

    def finished(self, what: What, before: float) -> Reconstructed:
        """The better of what was given and what was found."""
        graph = self._rebuilt(self.tensors.now)
        after = self.error(graph)
        is_better = after < before
        samples, held_out = self.goals.counts()
        recovery = Recovery(
            what=what,
            parts=tuple(self.parts),
            seconds=self.seconds,
            samples=samples,
            held_out=held_out,
            before=before,
            after=after if is_better else before,
            is_kept=is_better,
            reason="" if is_better else "no closer to the original on samples that no step read",
        )
        return Reconstructed(graph if is_better else self.graph, recovery)

    def _rebuilt(self, own: Mapping[str, Tensor]) -> Graph:
        fresh, tensors = copy_graph(self.graph.module)
        module = rebuild(fresh, {**tensors, **self.tensors.now, **own})
        refresh(module)
        return replace(self.graph, module=module)


def _goal(graph: Graph, teacher: Teacher, tensors: Tensors, config: Recover) -> Goal:
    """What all blocks together are trained towards.

    Raises:
        ConfigError: Features are wanted, and there is no value that all behind it follows from.
    """
    if config.towards == "outputs":
        return Goal(temperature=config.temperature)
    module = graph.module
    feature = penultimate(module, list(tensors.leaves), map_names(module), teacher.known())
    if feature is None:
        raise ConfigError(
            "recover: found no single value in front of the last layer that the original has, too, so "
            "that there are no features to train towards; use towards='outputs'"
        )
    return Goal(feature=feature, temperature=config.temperature)


def _shares(costs: Sequence[float], rest: float) -> list[float]:
    """Of the time that is left when each block begins, the share that makes steps alike in number.

    Args:
        costs: Of one step of each block.
        rest: Share of all the time that is kept for what follows the blocks.
    """
    # However little a block computes, a step runs its nodes one by one.
    least = _LEAST_COST * max(1.0, *costs)
    costs = [max(cost, least) for cost in costs]
    total = sum(costs)
    parts = [(1.0 - rest) * cost / total for cost in costs]
    return [part / (sum(parts[i:]) + rest) for i, part in enumerate(parts)]
