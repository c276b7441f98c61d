"""What a part reads and what it should give, on the samples of the calibration part."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from tersor.core.errors import ConfigError, ShapeError
from tersor.core.records import OutputKind, Structure
from tersor.core.structure import unflatten
from tersor.graph.axes.matching import Counterparts
from tersor.graph.contracts import Graph
from tersor.graph.frontiers import Block
from tersor.graph.geometry import output_error, output_spreads
from tersor.graph.training import has_images
from tersor.observe.statistics import token_mask
from tersor.ops.reconstruction import block_loss, spread
from tersor.recover.runs import Run, Values
from tersor.recover.samples import Drawn, Flat, Pool, sample_rows
from tersor.recover.training import Loss, Part

HELD_OUT = 8  # one batch in so many is never trained on
LABELS = 0.5  # of the loss, where labels have a say


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

    def known(self) -> set[str]:
        """Names of the nodes that can be compared."""
        found = {n.name for n in self.graph.module.graph.nodes if n.op == "call_function"}
        return found if self.counterparts is None else found & set(self.counterparts.kept)

    def part(self, name: str, value: Tensor) -> Tensor:
        """What the compressed graph has left of the original's value."""
        return value if self.counterparts is None else self.counterparts.of(name, value)


@dataclass(frozen=True, slots=True)
class Judged:
    """A caller's own loss, and what it reads of each batch."""

    loss: Callable[[Any, Any], Any]
    items: Sequence[Any]


def one_number(loss: Any) -> Tensor:
    """What a caller's loss has returned, as a scalar.

    Raises:
        ConfigError: It is no tensor.
        ShapeError: It has several numbers.
    """
    if not isinstance(loss, Tensor):
        raise ConfigError(
            f"recover: loss returned a {type(loss).__name__}, wanted a scalar tensor; return the loss itself, "
            "without .item()"
        )
    if loss.numel() != 1:
        raise ShapeError(
            f"recover: loss returned a tensor of shape {list(loss.shape)}, wanted one number; take its mean"
        )
    return loss.reshape(())


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """What all blocks together are trained towards.

    Attributes:
        feature: A node whose values are wanted in place of the outputs.
        temperature: Of logits.
    """

    feature: str | None = None
    temperature: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Ends:
    """The losses of a block that the outputs follow from.

    Attributes:
        places: Position of an output -> its node.
        spreads: Of all outputs.
        result: How the outputs make the model's own result, which a caller's loss reads.
        scale: Of the features, where they are wanted.
    """

    kind: OutputKind
    places: Mapping[int, str]
    spreads: Sequence[float]
    result: Structure
    judged: Judged | None
    goal: Goal
    scale: float

    def check(self, got: Mapping[str, Any], drawn: Drawn) -> Tensor:
        """The error of the outputs."""
        return self._with_labels(self._error(got, drawn, 1.0), got, drawn)

    def loss(self, got: Mapping[str, Any], drawn: Drawn) -> Tensor:
        """The error of the features, or of outputs at the temperature."""
        name = self.goal.feature
        if name is None:
            own = self._error(got, drawn, self.goal.temperature)
        else:
            own = block_loss(got[name], drawn.wanted[name], self.scale, drawn.mask)
        return self._with_labels(own, got, drawn)

    def _new(self, got: Mapping[str, Any]) -> list[Tensor]:
        return [got[name] for name in self.places.values()]

    def _error(self, got: Mapping[str, Any], drawn: Drawn, hot: float) -> Tensor:
        right = [drawn.wanted[str(i)] for i in self.places]
        own, new = [self.spreads[i] for i in self.places], self._new(got)
        if self.kind != "logits":
            return output_error(new, right, self.kind, own).mean()
        new, right = ([t / hot for t in side] for side in (new, right))
        return hot**2 * output_error(new, right, self.kind, own).mean()

    def _with_labels(self, loss: Tensor, got: Mapping[str, Any], drawn: Drawn) -> Tensor:
        if drawn.item is None or self.judged is None:
            return loss
        label = one_number(self.judged.loss(unflatten(self.result, self._new(got)), drawn.item))
        return (1 - LABELS) * loss + LABELS * label


class Goals:
    """The samples, which of them are held out, and the outputs that are wanted.

    Held out is what lies apart; where nothing does, an eighth of the batches.
    """

    def __init__(
        self,
        teacher: Teacher,
        compressed: Graph,
        batches: Sequence[Flat],
        judged: Judged | None = None,
        apart: Sequence[Flat] = (),
    ) -> None:
        self.teacher, self.batches, self._judged = teacher, [*batches, *apart], judged
        self._result = compressed.signature.result
        self.unseen = [i >= len(batches) for i in range(len(self.batches))]
        if not apart:
            self.unseen = [i % HELD_OUT == HELD_OUT - 1 for i in range(len(batches))]
        if not any(self.unseen):
            self.unseen[-1] = True
        self._outputs: list[tuple[Tensor, ...]] = []
        self.masks = [token_mask(compressed.signature, flat) for flat in self.batches]
        self._rows = sample_rows(compressed.module)
        output = next(n for n in compressed.module.graph.nodes if n.op == "output")
        self._results: Any = output.args[0]

    def outputs(self) -> list[tuple[Tensor, ...]]:
        """What the original gives, by batch: one pass, unless ``take`` has seen it."""
        if not self._outputs:
            self._outputs = [self.teacher.graph.run(flat) for flat in self.batches]
        return self._outputs

    def take(self, run: Run) -> None:
        """The outputs from a run of the original that has come as far as the last block."""
        output = next(n for n in run.nodes if n.op == "output")
        results: Any = output.args[0]
        if self._outputs or not all(isinstance(r, fx.Node) for r in results):
            return
        run.run(run.nodes)
        self._outputs = [tuple(values[r.name] for r in results) for values in run.values]

    def unseen_batches(self) -> list[Flat]:
        """Those that no step reads."""
        pairs = zip(self.batches, self.unseen, strict=True)
        return [flat for flat, is_unseen in pairs if is_unseen]

    def counts(self) -> tuple[int, int]:
        """Samples that steps are made on, and that they are checked on."""
        sizes = [int(flat[0].shape[0]) for flat in self.batches]
        unseen = sum(n for n, is_unseen in zip(sizes, self.unseen, strict=True) if is_unseen)
        return sum(sizes) - unseen, unseen

    def read(self, block: Block, run: Run, moving: Collection[str]) -> list[Values]:
        """What a block reads, after all that depends on nothing trained has been run up to it.

        Args:
            block: The block; all before it have been run.
            run: The compressed graph's.
            moving: Names of the nodes that depend on anything trained.
        """
        stop = max(run.place[n.name] for n in block.nodes)
        run.run([n for n in run.nodes[:stop] if n.name not in moving])
        names = (*block.reads, *block.context)
        return [{n: values[n] for n in names} for values in run.values]

    def values_of(
        self, block: Block, values: Sequence[Values], found: Sequence[Values], size: int
    ) -> Part:
        """A block that should give what the original gives there; ``size``: samples of a step."""
        wanted = [{n: self.teacher.part(n, f[n]) for n in block.gives} for f in found]
        scales = {n: _spread([w[n] for w in wanted]) for n in block.gives}

        def loss(got: Mapping[str, Any], drawn: Drawn) -> Tensor:
            terms = [
                block_loss(got[n], drawn.wanted[n], scales[n], drawn.mask) for n in block.gives
            ]
            return torch.stack(terms).mean()

        return self._part(block, loss, (values, wanted), size)

    def outputs_of(
        self, block: Block, values: Sequence[Values], size: int, goal: Goal = Goal()
    ) -> Part:
        """The last block, or all as one: the error of the model's own outputs, or of its features.

        What the samples decide that no step reads is always the error of the outputs.
        """
        places = {
            i: r.name
            for i, r in enumerate(self._results)
            if isinstance(r, fx.Node) and r.name in block.gives
        }
        wanted = [{str(i): outputs[i] for i in places} for outputs in self.outputs()]
        scale = 1.0
        if goal.feature is not None:
            found = self._features(goal.feature)
            scale = _spread(found)
            wanted = [{**w, goal.feature: f} for w, f in zip(wanted, found, strict=True)]
            block = replace(block, gives=(*block.gives, goal.feature))
        ends = _Ends(
            kind=self.teacher.kind,
            places=places,
            spreads=output_spreads(self.outputs()),
            result=self._result,
            judged=self._judged,
            goal=goal,
            scale=scale,
        )
        return replace(self._part(block, ends.loss, (values, wanted), size), check=ends.check)

    def _features(self, name: str) -> list[Tensor]:
        """What the original gives at a node, of the channels that are left."""
        found = Run(self.teacher.graph.module, self.batches).upto([name], [name])
        return [self.teacher.part(name, values[name]) for values in found]

    def _part(
        self,
        block: Block,
        loss: Loss,
        pairs: tuple[Sequence[Values], Sequence[Values]],
        size: int,
    ) -> Part:
        items = [None] * len(self.batches) if self._judged is None else self._judged.items
        drawn = [Drawn(*each) for each in zip(*pairs, self.masks, items, strict=True)]
        seen = [d for d, is_unseen in zip(drawn, self.unseen, strict=True) if not is_unseen]
        unseen = [d for d, is_unseen in zip(drawn, self.unseen, strict=True) if is_unseen]
        pool = Pool(seen, self._rows, size, channels_last=has_images(block.nodes))
        return Part(block, loss, pool, unseen)


def _spread(values: Sequence[Tensor]) -> float:
    """Of a few hundred samples: of one shape where there are several."""
    shape = values[0].shape[1:]
    alike = [v for v in values if v.shape[1:] == shape]
    return spread(torch.cat(alike[:8]))
