"""Units are cut out of a graph, or set to zero in it: both must compute the same.

Experts are no zeros: their logits become minus infinity, so that no top-k takes them. Stored
tensors lose the elements of removed units; literals that were a width (shapes of views, groups,
sizes of splits) become the count that is left; means are rescaled. Nodes keep their names.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, fx

from tersor.core.errors import ShapeError
from tersor.graph.axes.labels import Dim, Flags
from tersor.graph.axes.rulebook import REWRITES, Edit, arguments, op_name
from tersor.graph.axes.widths import Axes
from tersor.graph.contracts import Graph
from tersor.graph.edit import copy_graph, rebuild
from tersor.graph.meta import refresh

Units = Mapping[str, Sequence[int]]  # width -> indices of units


def gone_from(axes: Axes, keep: Units) -> dict[str, list[int]]:
    """The removed units for the kept ones of some widths; widths not named stay whole.

    Raises:
        ShapeError: A width that would keep too few units, or an index out of range.
    """
    gone: dict[str, list[int]] = {}
    for name, units in keep.items():
        width = axes[name]
        stay = set(units)
        if len(stay) < width.least or not stay <= set(range(width.units)):
            why = f"; a top-k takes {width.least} of them" if width.least > 1 else ""
            raise ShapeError(
                f"width {name}: found {len(stay)} kept units up to {max(stay, default=-1)}, wanted "
                f"{width.least} to {width.units} indices below {width.units}{why}"
            )
        gone[name] = [i for i in range(width.units) if i not in stay]
    return gone


def keep_units(
    graph: Graph, axes: Axes, keep: Units, *, exact_norms: bool = False, meta: bool = True
) -> Graph:
    """A new graph in which only some units of some widths are left.

    Args:
        graph: The graph that was analysed, or one with the same nodes and tensor shapes.
        axes: Its widths.
        keep: Width -> indices of the units that stay; widths not named stay whole.
        exact_norms: As for ``cut``.
        meta: As for ``cut``.
    """
    removed = axes.removed(gone_from(axes, keep))
    return cut(graph, axes, removed, exact_norms=exact_norms, meta=meta)


def cut(
    graph: Graph, axes: Axes, removed: Flags, *, exact_norms: bool = False, meta: bool = True
) -> Graph:
    """A new graph without the elements of some labels.

    Args:
        graph: The graph that was analysed, or one with the same nodes and tensor shapes.
        axes: Its widths.
        removed: Flags of the labels that go.
        exact_norms: Layer and group norms over a width keep the statistics of the whole width,
            removed units as zeros: the cut equals the mask on approximate widths, too, for two more
            passes over the tensor a norm. Otherwise they normalise what is left.
        meta: Whether nodes get the shapes that they have now. A graph that is only run needs none,
            and they take longer than a run.
    """
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
    _rewrite_literals(fresh, axes, before, kept, exact_norms=exact_norms)
    fresh.lint()
    module = rebuild(fresh, tensors)
    if meta:
        refresh(module)
    return replace(graph, module=module)


def _rewrite_literals(
    fresh: fx.Graph,
    axes: Axes,
    before: Mapping[str, fx.Node],
    kept: Callable[[Dim], Flags],
    *,
    exact_norms: bool,
) -> None:
    for node in list(fresh.nodes):
        rewrite = REWRITES.get(op_name(node)) if node.op == "call_function" else None
        if rewrite is not None and node.name in before:
            old = before[node.name]
            if old in axes.walk.shapes and _touches(axes, old, kept):
                rewrite(Edit(fresh, node, old, axes.walk.shapes, kept, exact_norms))


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
    """The same graph with the stored elements of removed units at zero, and no expert chosen."""
    fresh, tensors = copy_graph(graph.module)
    nodes = {node.name: node for node in fresh.nodes}
    for node, at in axes.walk.barred.items():
        shape = axes.walk.shapes[arguments(node)["self"]]
        flags = axes.kept(shape[at], removed)
        if not flags.all():
            gone = torch.from_numpy(~flags).reshape([-1] + [1] * (len(shape) - at - 1))
            _bar(nodes[node.name], gone, tensors)
    for name, shape in axes.walk.stored.items():
        for dim, labels in enumerate(shape):
            if name not in tensors or labels.is_free:
                continue
            flags = axes.kept(labels, removed)
            if not flags.all():
                gone = torch.from_numpy(np.flatnonzero(~flags))
                tensors[name] = tensors[name].index_fill(dim, gone, 0)
    return replace(graph, module=rebuild(fresh, tensors))


def _bar(node: fx.Node, gone: Tensor, tensors: dict[str, Tensor]) -> None:
    """Minus infinity at what is gone, for one reader."""
    graph, name, source = node.graph, f"{node.name}_gone", arguments(node)["self"]
    tensors[name] = gone
    fill = torch.ops.aten.masked_fill.Scalar
    with graph.inserting_before(node):
        places = graph.create_node("get_attr", name, name=name)
        barred = graph.create_node("call_function", fill, (source, places, float("-inf")))
    node.replace_input_with(source, barred)
