"""Statistics of a whole width behind its cut: zeros take the place of the units that went.

A mean over n units of which some went is the mean over the rest times n' / n. A variance needs the
mean of the whole as well, so the op runs on its inputs filled up with zeros, and of its result the
units that stay are kept: three ops, and no rounding that the masked model doesn't have. Written out
from the moments of the rest it takes ten.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import fx

from tersor.graph.axes.labels import Dim
from tersor.graph.axes.rulebook import Edit, Shape

aten = torch.ops.aten


def restore(
    edit: Edit,
    operands: Mapping[str, Sequence[int]],
    *,
    results: Sequence[int] = (),
    groups: int = 1,
    each: int = 0,
) -> None:
    """Run a node on whole inputs; the value under its name is what is left of the result.

    Args:
        edit: The node; its first argument has the dimensions of the result.
        operands: Tensor argument -> the dimensions to fill up.
        results: Dimensions of the result that lose their filling again.
        groups: Equal parts of dimension 1 (0 of a vector) that are left and filled up each by
            itself.
        each: Size of such a part when it is full; 0 where there are no parts.
    """
    first = next(iter(edit.args))
    x = edit.dims(first)
    for name, dims in operands.items():
        if isinstance(edit[name], fx.Node):
            edit.set(**{name: _filled(edit, name, dims, groups, each)})
    cut = [d for d in results if edit.shrinks(x[d])]
    if cut:
        _keep(edit, x, cut, groups, each)


def _filled(edit: Edit, name: str, dims: Sequence[int], groups: int, each: int) -> fx.Node:
    shape = edit.dims(name)
    node: fx.Node = edit[name]
    at = min(1, len(shape) - 1) if each else -1
    for d in (d for d in dims if edit.shrinks(shape[d])):
        parts, full = (groups, each) if d == at else (1, shape[d].size)
        node = _in_parts(edit, node, shape[d], d, parts, name)
        border = _border(shape, d, full - edit.count(shape[d]) // parts)
        node = edit.before_node(aten.constant_pad_nd.default, node, border, label=name)
        if parts > 1:
            node = edit.before_node(aten.flatten.using_ints, node, d, d + 1, label=name)
    return node


def _in_parts(edit: Edit, node: fx.Node, dim: Dim, at: int, parts: int, label: str) -> fx.Node:
    if parts == 1:
        return node
    return edit.before_node(
        aten.unflatten.int, node, at, [parts, edit.count(dim) // parts], label=label
    )


def _border(shape: Shape, at: int, gone: int) -> list[int]:
    """As many zeros as units went, behind the last of each part."""
    return [0, 0] * (len(shape) - at - 1) + [0, gone]


def _keep(edit: Edit, x: Shape, dims: Sequence[int], groups: int, each: int) -> None:
    node = edit.node
    value = edit.before_node(node.target, *node.args, label="whole", **node.kwargs)
    steps: list[tuple[object, tuple[object, ...]]] = []
    for d in dims:
        parts = groups if each and d == 1 else 1
        if parts > 1:
            steps.append((aten.unflatten.int, (d, [parts, each])))
        last = d + (parts > 1)
        steps.append((aten.slice.Tensor, (last, 0, edit.count(x[d]) // parts)))
        if parts > 1:
            steps.append((aten.flatten.using_ints, (d, d + 1)))
    for target, args in steps[:-1]:
        value = edit.before_node(target, value, *args, label="kept")
    target, args = steps[-1]
    edit.replace(target, value, *args)
