"""Units are cut out of a graph, or set to zero in it: both must compute the same.

Stored tensors lose the elements of removed units; literals that were a width (shapes of views,
groups, sizes of splits) become the count that is left; means are rescaled. Nodes keep their names.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, fx

from tersor.core.errors import ShapeError
from tersor.graph.axes.labels import Dim, Flags
from tersor.graph.axes.rulebook import REWRITES, Edit, op_name
from tersor.graph.axes.widths import Axes
from tersor.graph.contracts import Graph
from tersor.graph.edit import copy_graph, rebuild
from tersor.graph.meta import refresh

Units = Mapping[str, Sequence[int]]  # width -> indices of units


def gone_from(axes: Axes, keep: Units) -> dict[str, list[int]]:
    """The removed units for the kept ones of some widths; widths not named stay whole.

    Raises:
        ShapeError: A width that would lose all its units, or an index out of range.
    """
    gone: dict[str, list[int]] = {}
    for name, units in keep.items():
        width = axes[name]
        stay = set(units)
        if not stay or not stay <= set(range(width.units)):
            raise ShapeError(
                f"width {name}: found {len(stay)} kept units up to {max(stay, default=-1)}, wanted "
                f"1 to {width.units} indices below {width.units}"
            )
        gone[name] = [i for i in range(width.units) if i not in stay]
    return gone


def keep_units(graph: Graph, axes: Axes, keep: Units) -> Graph:
    """A new graph in which only some units of some widths are left.

    Args:
        graph: The graph that was analysed, or one with the same nodes and tensor shapes.
        axes: Its widths.
        keep: Width -> indices of the units that stay; widths not named stay whole.
    """
    return cut(graph, axes, axes.removed(gone_from(axes, keep)))


def cut(graph: Graph, axes: Axes, removed: Flags) -> Graph:
    """A new graph without the elements of some labels."""
    memory: dict[int, Flags] = {}

    def kept(dim: Dim) -> Flags:
        if id(dim.rows) not in memory:
            memory[id(dim.rows)] = axes.kept(dim, removed)
        return memory[id(dim.rows)]

    fresh, tensors = copy_graph(graph.module)
    before = {node.name: node for node in axes.graph.module.graph.nodes}
    for name, shape in axes.walk.stored.items():
        if name in tensors:
            tensors[name] = _selected(tensors[name], [kept(d) for d in shape])
    for node in list(fresh.nodes):
        rewrite = REWRITES.get(op_name(node)) if node.op == "call_function" else None
        if rewrite is not None and node.name in before:
            old = before[node.name]
            if old in axes.walk.shapes and _touches(axes, old, kept):
                rewrite(Edit(fresh, node, old, axes.walk.shapes, kept))
    fresh.lint()
    module = rebuild(fresh, tensors)
    refresh(module)
    return replace(graph, module=module)


def _selected(tensor: Tensor, kept: Sequence[Flags]) -> Tensor:
    for dim, flags in enumerate(kept):
        if not flags.all():
            tensor = tensor.index_select(dim, torch.from_numpy(np.flatnonzero(flags)))
    return tensor


def _touches(axes: Axes, node: fx.Node, kept: object) -> bool:
    """Whether any dimension of a node's inputs or results shrinks."""
    assert callable(kept)
    for source in (node, *node.all_input_nodes):
        found = axes.walk.shapes.get(source)
        shapes = found if found and isinstance(found[0], list) else [found or []]
        for shape in shapes:
            if any(not d.is_free and not kept(d).all() for d in shape):
                return True
    return False


def mask(graph: Graph, axes: Axes, removed: Flags) -> Graph:
    """The same graph with the stored elements of removed units at zero."""
    fresh, tensors = copy_graph(graph.module)
    for name, shape in axes.walk.stored.items():
        for dim, labels in enumerate(shape):
            if name not in tensors or labels.is_free:
                continue
            flags = axes.kept(labels, removed)
            if not flags.all():
                gone = torch.from_numpy(np.flatnonzero(~flags))
                tensors[name] = tensors[name].index_fill(dim, gone, 0)
    return replace(graph, module=rebuild(fresh, tensors))
