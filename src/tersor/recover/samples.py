"""Values of many samples, and how a step draws some of them.

Where every value has one row a sample, any samples can be put together; else a step takes one of
the batches as it is (several shapes, windows folded into the first dimension).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor

Flat = tuple[Tensor, ...]
Values = Mapping[str, Any]


def sample_rows(module: fx.GraphModule) -> frozenset[str]:
    """Names of the nodes whose values have one row a sample, by the symbol of the batch."""
    holders = [n for n in module.graph.nodes if n.op == "placeholder"]
    first = holders[0].meta.get("val") if holders else None
    if not isinstance(first, FakeTensor) or str(first.shape[0]).isdigit():
        return frozenset()  # traced at one size, which other dimensions may have by chance
    symbol = str(first.shape[0])
    return frozenset(
        n.name
        for n in module.graph.nodes
        if isinstance(value := n.meta.get("val"), Tensor)
        and value.dim()
        and str(value.shape[0]) == symbol
    )


@dataclass(frozen=True, slots=True)
class Drawn:
    """What one step reads.

    Attributes:
        values: What the block reads, by node.
        wanted: What it should give, by node or output.
        mask: Real tokens, or None.
        item: What the caller's loss reads, of a batch that stays as it is; or None.
    """

    values: Values
    wanted: Values
    mask: Tensor | None
    item: Any = None


class Pool:
    """Batches to draw from."""

    def __init__(
        self,
        batches: Sequence[Drawn],
        rows: frozenset[str],
        size: int,
        *,
        channels_last: bool = False,
    ) -> None:
        """``channels_last``: images lie with their channels innermost, as convolutions like it."""
        self.batches = list(batches)
        self.size = size
        self._merged = _merge(self.batches, rows)
        if channels_last and self._merged is not None:
            values, wanted, mask, count, constant = self._merged
            self._merged = _innermost(values), _innermost(wanted), mask, count, constant

    def draw(self, generator: torch.Generator) -> Drawn:
        """Some samples by chance; without a merged pool one of the batches."""
        if self._merged is None:
            index = int(torch.randint(len(self.batches), (1,), generator=generator))
            return self.batches[index]
        values, wanted, mask, count, constant = self._merged
        pick = torch.randint(count, (min(self.size, count),), generator=generator)
        return Drawn(
            {n: v if n in constant else _picked(v, pick) for n, v in values.items()},
            {n: _picked(v, pick) for n, v in wanted.items()},
            None if mask is None else mask[pick],
        )


def _innermost(values: Values) -> Values:
    return {
        n: v.contiguous(memory_format=torch.channels_last) if _is_image(v) else v
        for n, v in values.items()
    }


def _is_image(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 4 and value.is_floating_point()


def _picked(value: Tensor, pick: Tensor) -> Tensor:
    """Some samples, as they lie: indexing would walk through an image channel by channel."""
    if _is_image(value) and value.is_contiguous(memory_format=torch.channels_last):
        return value.permute(0, 2, 3, 1)[pick].permute(0, 3, 1, 2)
    return value[pick]


_Merged = tuple[Values, Values, Tensor | None, int, frozenset[str]]


def _merge(batches: Sequence[Drawn], rows: frozenset[str]) -> _Merged | None:
    """All batches as one, and which values are the same in each; None where they can't be joined."""
    first = batches[0]
    if any(b.item is not None for b in batches):
        return None
    constant = frozenset(n for n in first.values if n not in rows and _is_same(batches, n))
    joined = [n for n in first.values if n not in constant]
    if not all(n in rows for n in joined) or not all(_fits(batches, n) for n in joined):
        return None
    if len({tuple(tuple(w.shape[1:]) for w in b.wanted.values()) for b in batches}) > 1:
        return None
    count = sum(_length(b) for b in batches)
    wanted = {n: torch.cat([b.wanted[n] for b in batches]) for n in first.wanted}
    if any(len(w) != count for w in wanted.values()):
        return None
    values = {
        n: first.values[n] if n in constant else torch.cat([b.values[n] for b in batches])
        for n in first.values
    }
    masks = [b.mask for b in batches if b.mask is not None]
    mask = torch.cat(masks) if len(masks) == len(batches) else None
    if len(masks) not in (0, len(batches)):
        return None
    return values, wanted, mask, count, constant


def _length(batch: Drawn) -> int:
    return len(next(iter(batch.wanted.values())))


def _is_same(batches: Sequence[Drawn], name: str) -> bool:
    first = batches[0].values[name]
    others = (b.values[name] for b in batches[1:])
    if not isinstance(first, Tensor):
        return all(type(other) is type(first) and other == first for other in others)
    return all(
        isinstance(o, Tensor) and o.shape == first.shape and torch.equal(o, first) for o in others
    )


def _fits(batches: Sequence[Drawn], name: str) -> bool:
    """Whether all values of a node are tensors that differ in their rows alone."""
    values = [b.values[name] for b in batches]
    return all(isinstance(v, Tensor) for v in values) and len({v.shape[1:] for v in values}) == 1
