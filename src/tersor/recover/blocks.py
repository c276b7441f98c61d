"""Label-free block reconstruction: each block is trained until it gives what the original gives.

Front to back: a block reads what the compressed blocks before it make of the samples, and should
give what the original gives there, so that later blocks take up the errors of earlier ones. Then
all blocks together, on the error of the model's own outputs. The structure, integer codes and
packed weights stay; an eighth of the samples is never trained on and decides what is kept.

Source: Li et al. 2021, arXiv:2102.05426 (blocks as units); ALGORITHMS 3.2b.
"""

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from tersor.core.records import OutputKind
from tersor.core.recovery import PartRecovery, Recover, Recovery
from tersor.graph.axes.matching import Counterparts
from tersor.graph.contracts import Graph
from tersor.graph.edit import copy_graph, rebuild
from tersor.graph.frontiers import Block, BlockSize, find_blocks, whole
from tersor.graph.geometry import output_error, output_spreads
from tersor.graph.meta import ensure, refresh
from tersor.graph.mutation import has_mutation
from tersor.graph.training import Leaf, leaves, map_names
from tersor.observe.statistics import token_mask
from tersor.ops.reconstruction import block_loss, spread
from tersor.recover.runs import Run
from tersor.recover.samples import Drawn, Flat, Pool, sample_rows
from tersor.recover.tensors import Tensors
from tersor.recover.training import Budget, Part, Trained, train

HELD_OUT = 8  # one batch in so many is never trained on
_EQUAL = 1e-10  # a block's loss, of its outputs' variance: rounding of the same numbers


@dataclass(frozen=True, slots=True, kw_only=True)
class Teacher:
    """What is wanted.

    Attributes:
        graph: The original.
        kind: What its outputs mean.
        counterparts: Nodes that can be compared; None: all of the same name, which are whole.
    """

    graph: Graph
    kind: OutputKind
    counterparts: Counterparts | None = None


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
    size: BlockSize = BlockSize(),
    done: Progressed | None = None,
    hooks: Hooks = Hooks(),
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

    Returns:
        The trained graph; where its outputs on the held-out samples are no closer to the
        original's than before, the graph as it was given.
    """
    ensure(compressed)
    what = "scales" if any(leaf.is_scale for leaf in leaves(compressed)) else "weights"
    found = leaves(compressed, fixed)
    reason = _obstacle(teacher.graph, compressed, found, batches)
    if reason:
        return Reconstructed(compressed, Recovery(what=what, reason=reason))
    work = _Work(teacher, compressed, found, batches, config, seed, size, hooks)
    work.start(done)
    work.blocks()
    work.together()
    return work.finished(what)


def part_count(compressed: Graph, teacher: Teacher, size: BlockSize = BlockSize()) -> int:
    """How many parts a run has, for progress."""
    ensure(compressed)
    targets = [leaf.target for leaf in leaves(compressed)]
    return 1 + len(_blocks(teacher, compressed, targets, size))


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
    if teacher.counterparts is None:
        known = {n.name for n in teacher.graph.module.graph.nodes if n.op == "call_function"}
    else:
        known = set(teacher.counterparts.kept)
        known &= {n.name for n in teacher.graph.module.graph.nodes}
    names = map_names(compressed.module)
    return find_blocks(compressed.module, targets, names, known & mine, size)


class _Work:
    """One run."""

    def __init__(  # noqa: PLR0913 - as ``reconstruct``
        self,
        teacher: Teacher,
        compressed: Graph,
        found: Sequence[Leaf],
        batches: Sequence[Flat],
        config: Recover,
        seed: int,
        size: BlockSize,
        hooks: Hooks,
    ) -> None:
        self.teacher, self.graph, self.batches = teacher, compressed, list(batches)
        self.config, self.seed, self.hooks = config, seed, hooks
        self.tensors = Tensors(compressed.module, found)
        self.targets = list(self.tensors.leaves)
        self.split = _blocks(teacher, compressed, self.targets, size)
        self.rows = sample_rows(compressed.module)
        self.unseen = [i % HELD_OUT == HELD_OUT - 1 for i in range(len(self.batches))]
        if not any(self.unseen):
            self.unseen[-1] = True
        self.masks = [token_mask(compressed.signature, flat) for flat in self.batches]
        self.parts: list[PartRecovery] = []
        self.outputs: list[tuple[Tensor, ...]] = []
        self.before = 0.0
        self.begun = hooks.clock()
        self.resumed: tuple[PartRecovery, ...] = ()

    def start(self, done: Progressed | None) -> None:
        """The wanted outputs, the error before, and what an interrupted run has done."""
        self.outputs = [self.teacher.graph.run(flat) for flat in self.batches]
        self.before = self.error(self.graph)
        if done is not None:
            self.tensors.end(done.tensors)
            self.resumed = done.parts
            self.begun -= done.seconds

    @property
    def seconds(self) -> float:
        return self.hooks.clock() - self.begun

    def budget(self, share: float) -> Budget:
        """A share of the time that is left."""
        now = self.hooks.clock()
        left = max(0.0, self.config.seconds - self.seconds)
        return Budget(clock=self.hooks.clock, until=now + share * left, steps=self.config.steps)

    def error(self, graph: Graph) -> float:
        """Mean error of a graph's outputs on the held-out samples."""
        spreads = output_spreads(self.outputs)
        chosen = [i for i, is_unseen in enumerate(self.unseen) if is_unseen]
        found = [
            output_error(graph.run(self.batches[i]), self.outputs[i], self.teacher.kind, spreads)
            for i in chosen
        ]
        return float(torch.cat(found).mean())

    def blocks(self) -> None:
        """Each block by itself, front to back."""
        if self.config.whole >= 1 or len(self.split) < 2:
            return
        new = Run(self.graph.module, self.batches, self.tensors.value)
        old = Run(self.teacher.graph.module, self.batches)
        weights = self._costs()
        for number, block in enumerate(self.split):
            if number >= len(self.resumed):
                left = sum(weights[number:])
                share = weights[number] / left * (1.0 - self.config.whole)
                share /= 1.0 - self.config.whole * (1.0 - weights[number] / left)
                part = self._part(block, new, old)
                self._train(part, self._own(block), share, "block")
            else:
                self.parts.append(self.resumed[number])
            if block.is_last:
                break
            new.upto(block.gives, ())
            if number < len(self.resumed):
                old.upto(block.gives, ())

    def _costs(self) -> list[float]:
        """Time of one step of each block, relative to the others."""
        from tersor.graph.axes.macs import node_macs

        return [1.0 + sum(node_macs(self.graph, n) for n in b.nodes) for b in self.split]

    def _own(self, block: Block) -> list[str]:
        """Tensors that nothing outside of a block reads."""
        inside = {n.name for n in block.nodes}
        return [t for t, leaf in self.tensors.leaves.items() if leaf.readers <= inside]

    def _part(self, block: Block, new: Run, old: Run) -> Part:
        inside = set(block.nodes)
        before = max((new.place[n.name] for n in block.nodes), default=0)
        context = [n for n in new.nodes[: before + 1] if n not in inside]
        moving = {n.name for b in self.split for n in b.nodes}
        new.run([n for n in context if n.name not in moving])
        names = (*block.reads, *block.context)
        values = [{n: v[n] for n in names} for v in new.values]
        if block.is_last:
            return self._output_part(block, values)
        found = old.upto(block.gives, block.gives)
        wanted = [{n: self._counterpart(n, f[n]) for n in block.gives} for f in found]
        scales = {n: spread(torch.cat([w[n] for w in wanted[:8]])) for n in block.gives} if all(
            len({w[n].shape[1:] for w in wanted}) == 1 for n in block.gives
        ) else {n: spread(wanted[0][n]) for n in block.gives}

        def loss(got: dict[str, Any], drawn: Drawn) -> Tensor:
            terms = [
                block_loss(got[n], drawn.wanted[n], scales[n], drawn.mask) for n in block.gives
            ]
            return torch.stack(terms).mean()

        return self._pooled(block, loss, values, wanted)

    def _counterpart(self, name: str, value: Tensor) -> Tensor:
        known = self.teacher.counterparts
        return value if known is None else known.of(name, value)

    def _output_part(self, block: Block, values: Sequence[Mapping[str, Any]]) -> Part:
        """The last block, or all of them: the error of the model's outputs."""
        output = next(n for n in self.graph.module.graph.nodes if n.op == "output")
        results: tuple[Any, ...] = output.args[0]  # type: ignore[assignment]
        places = [
            (i, r.name)
            for i, r in enumerate(results)
            if isinstance(r, fx.Node) and r.name in block.gives
        ]
        spreads = output_spreads(self.outputs)
        wanted = [{str(i): outs[i] for i, _ in places} for outs in self.outputs]

        def loss(got: dict[str, Any], drawn: Drawn) -> Tensor:
            found = [got[name] for _, name in places]
            right = [drawn.wanted[str(i)] for i, _ in places]
            own = [spreads[i] for i, _ in places]
            return output_error(found, right, self.teacher.kind, own).mean()

        return self._pooled(block, loss, values, wanted)

    def _pooled(
        self,
        block: Block,
        loss: Callable[[dict[str, Any], Drawn], Tensor],
        values: Sequence[Mapping[str, Any]],
        wanted: Sequence[Mapping[str, Any]],
    ) -> Part:
        drawn = [Drawn(v, w, m) for v, w, m in zip(values, wanted, self.masks, strict=True)]
        seen = [d for d, is_unseen in zip(drawn, self.unseen, strict=True) if not is_unseen]
        unseen = [d for d, is_unseen in zip(drawn, self.unseen, strict=True) if is_unseen]
        return Part(block, loss, Pool(seen, self.rows, self.config.batch), unseen)

    def _train(self, part: Part, targets: Sequence[str], share: float, kind: Any) -> None:
        generator = torch.Generator().manual_seed(self.seed + len(self.parts))
        budget = self.budget(share)
        found = train(part, self.tensors, targets, budget, self.config.rate, generator)
        self._record(part.block, found, kind)

    def _record(self, block: Block, found: Trained, kind: Any) -> None:
        done = PartRecovery(
            part=kind,
            name=", ".join(block.gives),
            ops=block.ops,
            steps=found.steps,
            before=found.before,
            after=found.after,
        )
        self.parts.append(done)
        progressed = Progressed(
            tensors=dict(self.tensors.now), parts=tuple(self.parts), seconds=self.seconds
        )
        self.hooks.keep(progressed)
        self.hooks.advance()

    def together(self) -> None:
        """All blocks as one."""
        if self.config.whole <= 0 and len(self.split) > 1:
            return
        if len(self.resumed) > len(self.parts):  # it was done, too
            self.parts.append(self.resumed[len(self.parts)])
            return
        block = whole(self.graph.module, self.targets, map_names(self.graph.module))
        if block is None:
            return
        new = Run(self.graph.module, self.batches, self.tensors.value)
        moving = {n.name for n in block.nodes}
        new.run([n for n in new.nodes if n.name not in moving and n.op != "output"])
        values = [{n: v[n] for n in block.context} for v in new.values]
        self._train(self._output_part(block, values), self.targets, 1.0, "whole")

    def finished(self, what: Any) -> Reconstructed:
        """The better of what was given and what was found."""
        graph = self._rebuilt()
        after = self.error(graph)
        is_better = after < self.before
        recovery = Recovery(
            what=what,
            parts=tuple(self.parts),
            seconds=self.seconds,
            samples=sum(len(b[0]) for b, u in zip(self.batches, self.unseen, strict=True) if not u),
            held_out=sum(len(b[0]) for b, u in zip(self.batches, self.unseen, strict=True) if u),
            before=self.before,
            after=after if is_better else self.before,
            is_kept=is_better,
            reason="" if is_better else "no closer to the original on samples that no step read",
        )
        return Reconstructed(graph if is_better else self.graph, recovery)

    def _rebuilt(self) -> Graph:
        fresh, tensors = copy_graph(self.graph.module)
        module = rebuild(fresh, {**tensors, **self.tensors.now})
        refresh(module)
        return replace(self.graph, module=module)
