"""What is left of the original's values in a cut graph: the same nodes, fewer elements."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tersor.graph.axes.labels import Dim, Flags
from tersor.graph.axes.widths import Axes


@dataclass(frozen=True, slots=True)
class Counterparts:
    """Nodes whose values can be compared with the original's.

    Attributes:
        kept: Node -> (dimension, indices that stay) of what shrinks; nothing where it is whole.
    """

    kept: Mapping[str, tuple[tuple[int, Tensor], ...]]

    def of(self, name: str, value: Tensor) -> Tensor:
        """The part of the original's value that the cut graph has, too.

        Raises:
            KeyError: A node without a counterpart.
        """
        for dim, index in self.kept[name]:
            value = value.index_select(dim, index)
        return value


def counterparts(axes: Axes, removed: Flags) -> Counterparts:
    """Nodes with one tensor as their value, and what is left of it.

    Args:
        axes: Widths of the original, or of what replaced branches left of it.
        removed: Flags of the labels that go.
    """
    memory: dict[int, Flags] = {}

    def flags(dim: Dim) -> Flags:
        if id(dim.rows) not in memory:
            memory[id(dim.rows)] = axes.kept(dim, removed)
        return memory[id(dim.rows)]

    found: dict[str, tuple[tuple[int, Tensor], ...]] = {}
    for node, shape in axes.walk.shapes.items():
        if any(isinstance(dim, list) for dim in shape):
            continue  # several results
        cuts = [(i, flags(dim)) for i, dim in enumerate(shape) if not dim.is_free]
        found[node.name] = tuple(
            (i, torch.from_numpy(np.flatnonzero(kept))) for i, kept in cuts if not kept.all()
        )
    return Counterparts(found)
