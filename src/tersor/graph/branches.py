"""Puts means and linear maps in the place of residual branches: a new graph without the branches.

A mean goes to the bias of what makes the stream, where that has one of its own and nothing else
sees it; else the branch's addition adds a stored vector. A linear map goes into a projection
shortcut at no cost; else it is one linear or 1x1 convolution that keeps the name and the tensors'
names of the branch's last weighted op, so that its price, its profile and its number format go by
the names of before.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from tersor.core.errors import ShapeError, SiteNotFoundError
from tersor.core.levels import KEPT
from tersor.graph.axes.widths import Axes
from tersor.graph.contracts import Graph, SiteChange
from tersor.graph.edit import copy_graph, rebuild
from tersor.graph.meta import refresh
from tersor.graph.operators import weighted_op
from tersor.graph.residuals import Branch, find_branches
from tersor.ops.moments import Moments

aten = torch.ops.aten

MAPPED, REMOVED = 1, 0  # the levels of a branch site, besides KEPT
_CONVS = {3: aten.conv1d.default, 4: aten.conv2d.default, 5: aten.conv3d.default}
_NORM_BIAS: dict[Any, int] = {  # where a norm's bias stands
    aten.layer_norm.default: 3,
    aten.group_norm.default: 3,
    aten.batch_norm.default: 2,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class BranchStatistics:
    """What one pass knows about a branch.

    Attributes:
        mean: Of f by channel [c], float64, over all rows.
        moments: Of what a map reads, unfolded for a projection, with f as the residual; None
            where no map can take the branch's place.
    """

    mean: Tensor
    moments: Moments | None = None


def replace_branches(graph: Graph, changes: Sequence[SiteChange]) -> Graph:
    """A new graph without the branches of the changes; tensors that stay are shared.

    Args:
        graph: The original; not changed.
        changes: Of branch sites. Level 2 changes nothing; level 1 carries the map [out, in] (of a
            projection all that its kernel reads) and its bias, level 0 the mean as the bias. A
            branch inside another one that goes has no say.

    Raises:
        SiteNotFoundError: A branch that the graph does not have.
        ShapeError: A map or mean that does not fit its branch.
    """
    edit = _Edit(graph)
    for branch, change in _outermost(find_branches(graph), changes):
        _check(branch, change)
        edit.replace(branch, change)
    module = edit.finished()
    refresh(module)
    return replace(graph, module=module)


def widths_after(before: Axes, after: Axes, changes: Sequence[SiteChange]) -> dict[str, str]:
    """Widths of the original -> their names once branches are replaced, where they are still there.

    A width goes by its first producer, which may have been in a branch; its units stay in order.

    Args:
        before: Widths of the original.
        after: Widths of what ``replace_branches`` made of it.
        changes: Those that it made.
    """
    replaced = {name for change in changes for name in change.site.members}
    owners: dict[tuple[str, int], set[str]] = {}
    for width in before.widths:
        for c in width.couplings:
            if c.tensor not in replaced:  # a map under its name has other inputs
                owners.setdefault((c.tensor, c.dim), set()).add(width.name)
    found: dict[str, str] = {}
    for width in after.widths:
        named = [owners.get((c.tensor, c.dim), set()) for c in width.couplings]
        names = {next(iter(own)) for own in named if len(own) == 1}
        if len(names) == 1 and before[name := names.pop()].units == width.units:
            found[name] = width.name
    return found


def _outermost(
    branches: Sequence[Branch], changes: Sequence[SiteChange]
) -> list[tuple[Branch, SiteChange]]:
    known = {branch.name: branch for branch in branches}
    wanted: dict[str, SiteChange] = {}
    for change in changes:
        if change.site.kind != "branch" or change.level == KEPT:
            continue
        if change.site.name not in known:
            raise SiteNotFoundError(
                f"{change.site.name!r} is no branch of this graph; there are "
                f"{', '.join(list(known)[:8]) or 'none'}: replace branches first, on the graph "
                "whose sites they are"
            )
        wanted[change.site.name] = change
    chosen = [known[name] for name in known if name in wanted]
    return [
        (branch, wanted[branch.name])
        for branch in chosen
        if not any(branch.body < other.body for other in chosen)
    ]


def _check(branch: Branch, change: SiteChange) -> None:
    c = branch.channels
    wanted: dict[str, tuple[int, ...]] = {"bias": (c,)}
    if change.level == MAPPED:
        wanted["weight"] = (c, branch.inputs)
        if not branch.has_map:
            raise ShapeError(f"{branch.name}: no linear map is cheaper; take level 0 or 2")
    for name, shape in wanted.items():
        value: Tensor | None = getattr(change, name)
        if value is None or tuple(value.shape) != shape:
            found = "none" if value is None else str(tuple(value.shape))
            raise ShapeError(
                f"{branch.name} at level {change.level}: found {name} {found}, wanted {shape}; "
                "measure the branch on this graph"
            )


class _Edit:
    def __init__(self, graph: Graph) -> None:
        self.fresh, self.tensors = copy_graph(graph.module)
        self.nodes: dict[str, fx.Node] = {node.name: node for node in self.fresh.nodes}

    def finished(self) -> fx.GraphModule:
        self.fresh.lint()
        return rebuild(self.fresh, self.tensors)

    def replace(self, branch: Branch, change: SiteChange) -> None:
        """Cut a branch and put a mean or a map in its place."""
        add, skip = self.nodes[branch.add.name], self.nodes[branch.skip.name]
        bias, weight = change.bias, change.weight
        assert bias is not None
        if change.level == MAPPED and branch.projection is None:
            assert weight is not None
            add.args = (skip, self._map(branch, skip, weight, bias))
            self._erase(branch)
            return
        add.args = (skip, skip)  # nothing reads the branch any more
        self._erase(branch)
        if change.level == MAPPED:
            assert weight is not None
            assert branch.projection is not None
            self._add_to(str(branch.projection.weight.target), weight)
        if self._shift(skip, add, branch, bias):
            add.replace_all_uses_with(skip)
            self.fresh.erase_node(add)
            self.nodes[branch.add.name] = skip
        else:
            add.args = (skip, self._stored(f"{add.name}_mean", _along(branch, bias), add))

    def _map(self, branch: Branch, x: fx.Node, weight: Tensor, bias: Tensor) -> fx.Node:
        """The branch's last weighted op, moved behind x as a linear or a 1x1 convolution."""
        add = self.nodes[branch.add.name]
        node = self.nodes[branch.ops[-1].node.name]
        op = weighted_op(node, self.tensors)
        assert op is not None
        spaces = 0 if branch.dim > 1 else len(branch.add.meta["val"].shape) - 2
        matrix = self._named(op.weight, weight.reshape(*weight.shape, *[1] * spaces), add)
        if op.bias is None:
            target = f"{str(op.weight.target).removesuffix('.weight')}.bias"
            offset = self._stored(target, bias.to(self.tensors[str(op.weight.target)].dtype), add)
        else:
            offset = self._named(op.bias, bias, add)
        add.prepend(node)
        node.kwargs = {}
        if spaces:
            node.target = _CONVS[spaces + 2]
            node.args = (x, matrix, offset, [1] * spaces, [0] * spaces)
        else:
            node.target = aten.linear.default
            node.args = (x, matrix, offset)
        return node

    def _named(self, stored: fx.Node, value: Tensor, before: fx.Node) -> fx.Node:
        """A value under the name of a tensor that goes; under a new one if others read that."""
        target = str(stored.target)
        value = value.to(self.tensors[target].dtype)
        if self._uses(target) > 1:
            return self._stored(f"{target}_map", value, before)
        self.tensors[target] = value
        return stored

    def _stored(self, target: str, value: Tensor, before: fx.Node) -> fx.Node:
        while target in self.tensors:
            target += "_"
        self.tensors[target] = value
        with self.fresh.inserting_before(before):
            node: fx.Node = self.fresh.create_node("get_attr", target, name=_node_name(target))
        return node

    def _uses(self, target: str) -> int:
        readers = (n for n in self.fresh.nodes if n.op == "get_attr" and n.target == target)
        return sum(len(node.users) for node in readers)

    def _erase(self, branch: Branch) -> None:
        for node in reversed(list(self.fresh.nodes)):
            if node.name in branch.body and not node.users:
                self.fresh.erase_node(node)

    def _shift(self, node: fx.Node, reader: fx.Node, branch: Branch, bias: Tensor) -> bool:
        """Add a constant to what a node computes, by its bias; False where others would see it."""
        if set(node.users) != {reader}:
            return False
        if node.target is aten.add.Tensor and not node.kwargs:
            parts = [a for a in node.args if isinstance(a, fx.Node) and _alike(a, node)]
            return any(self._shift(part, node, branch, bias) for part in parts)
        op = weighted_op(node, self.tensors)
        if op is None or op.kind == "embedding":
            return self._shift_norm(node, branch, bias)
        if branch.dim != (_last(branch) if op.window is None else 1):
            return False
        if op.bias is None:
            target = f"{str(op.weight.target).removesuffix('.weight')}.bias"
            value = bias.to(self.tensors[str(op.weight.target)].dtype)
            args = [*node.args, None] if len(node.args) == 2 else list(node.args)
            args[2] = self._stored(target, value, node)
            node.args = tuple(args)
            return True
        return self._add_to(str(op.bias.target), bias)

    def _shift_norm(self, node: fx.Node, branch: Branch, bias: Tensor) -> bool:
        place = _NORM_BIAS.get(node.target)
        stored = node.args[place] if place is not None and len(node.args) > place else None
        if not isinstance(stored, fx.Node) or stored.op != "get_attr":
            return False
        is_layer = node.target is aten.layer_norm.default
        if branch.dim != (_last(branch) if is_layer else 1):
            return False
        return self._add_to(str(stored.target), bias)

    def _add_to(self, target: str, value: Tensor) -> bool:
        """Add to a tensor that one op reads."""
        old = self.tensors[target]
        if self._uses(target) > 1 or old.numel() != value.numel():
            return False
        self.tensors[target] = (old.double() + value.reshape(old.shape)).to(old.dtype)
        return True


def _node_name(target: str) -> str:
    return target.replace(".", "_")


def _last(branch: Branch) -> int:
    return len(branch.add.meta["val"].shape) - 1


def _alike(part: fx.Node, whole: fx.Node) -> bool:
    """Whether an operand has the sum's own shape, so that a constant in it reaches all of that."""
    values = part.meta.get("val"), whole.meta.get("val")
    shapes = [tuple(v.shape) for v in values if isinstance(v, Tensor)]
    return len(shapes) == 2 and shapes[0] == shapes[1]


def _along(branch: Branch, bias: Tensor) -> Tensor:
    """A vector along the channels of y, in its type."""
    y = branch.add.meta["val"]
    return bias.reshape(-1, *[1] * (_last(branch) - branch.dim)).to(y.dtype)
