"""Widths as sites, and what one statistics pass knows about the ops that read them."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, fx

from tersor.analyse.sites import matches
from tersor.core.records import WIDTH_PREFIX, Site
from tersor.graph.axes import Axes, Width
from tersor.graph.axes.gate import turns_freely
from tersor.graph.axes.heads import Heads, heads_of
from tersor.graph.axes.macs import node_macs
from tersor.graph.axes.rulebook import op_name, sizes_of
from tersor.graph.contracts import HeadStatistics, WidthStatistics
from tersor.graph.edit import attribute
from tersor.graph.operators import WeightedOp, grouped_weight, weighted_ops
from tersor.observe.statistics import Observed
from tersor.ops.heads import output_moments
from tersor.ops.kept import damped
from tersor.ops.moments import centred
from tersor.ops.obs import Consumer

_TAKES = ("index", "index_select", "embedding")


def width_sites(
    axes: Axes, *, keep: Sequence[str] = (), approximate: bool = False
) -> tuple[Site, ...]:
    """One site for each width, in the order of the graph.

    Args:
        axes: The graph's widths.
        keep: Patterns of layers to leave alone: a width that runs through one is pinned.
        approximate: Also widths that a statistic runs over (layer norm): removing units changes it.
    """
    return tuple(
        _site(axes, width, kept_by(width, keep))
        for width in axes.widths
        if (approximate or width.exactness == "exact") and _ops(axes, width)
    )


def kept_by(width: Width, keep: Sequence[str]) -> str | None:
    """Why a width stays whole: a pattern of layers to leave alone that it runs through."""
    for coupling in width.couplings:
        pattern = next((p for p in keep if matches(coupling.tensor, p)), None)
        if pattern is not None:
            return f"kept: runs through {coupling.tensor}, which matches {pattern!r}"
    return None


def width_of(axes: Axes, site: Site) -> Width:
    """The width behind a site."""
    return axes[site.width]


def _site(axes: Axes, width: Width, pinned: str | None) -> Site:
    tensors = axes.graph.module
    size = sum(
        _bytes(attribute(tensors, c.tensor))
        * c.per_unit
        // attribute(tensors, c.tensor).shape[c.dim]
        for c in width.couplings
    )
    return Site(
        name=f"{WIDTH_PREFIX}{width.name}",
        kind="width",
        ops=tuple(node.name for node in _ops(axes, width)),
        units=width.units,
        unit_kind=width.kind,
        exactness=width.exactness,
        members=tuple(dict.fromkeys(c.tensor for c in width.couplings)),
        macs=_macs(axes, width),
        size_bytes=size * width.units,
        pinned=pinned,
    )


def unit_size(axes: Axes, site: Site) -> int:
    """Elements that a unit takes of what makes it: 1 of a channel, a head's dimension of a head."""
    width = width_of(axes, site)
    made = [c.per_unit for c in width.couplings if c.role == "producer"]
    return min(made or [c.per_unit for c in width.couplings])


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _ops(axes: Axes, width: Width) -> list[fx.Node]:
    """What a width is for: linear maps that sum over it; else what takes experts, or makes scores."""
    readers = [op.node for op in _readers(axes, width)]
    return readers or _takers(axes, width) or _scorers(axes, width)


def _macs(axes: Axes, width: Width) -> int:
    """Of the linear maps that sum over a width; of experts one for each element of a chosen map.

    Of scores those of both projections, of which as much goes.
    """
    readers = _readers(axes, width)
    if readers:
        return sum(node_macs(axes.graph, op.node) for op in readers)
    if _scorers(axes, width):
        made = {c.tensor for c in width.couplings if c.role == "producer"}
        ops = [op for op in weighted_ops(axes.graph.module) if str(op.weight.target) in made]
        return sum(node_macs(axes.graph, op.node) for op in ops)
    return sum(math.prod(sizes_of(node.meta["val"])) for node in _takers(axes, width))


def _takers(axes: Axes, width: Width) -> list[fx.Node]:
    """Nodes that take the maps of the chosen experts out of stored tensors."""
    if width.kind != "experts":
        return []
    stored = {c.tensor for c in width.couplings if c.role == "follower"}
    return [
        node
        for node in axes.graph.module.graph.nodes
        if node.op == "call_function"
        and op_name(node) in _TAKES
        and any(s.op == "get_attr" and str(s.target) in stored for s in node.all_input_nodes)
    ]


def _scorers(axes: Axes, width: Width) -> list[fx.Node]:
    """Where queries and keys meet whose dimensions this width is."""
    if any(c.role == "consumer" for c in width.couplings) or width.kind == "experts":
        return []
    heads = heads_of(axes, width)
    return [n for n in axes.graph.module.graph.nodes if heads is not None and n.name == heads.sink]


def _readers(axes: Axes, width: Width) -> list[WeightedOp]:
    """Linear maps that sum over the width; an embedding with the weight of one only makes it."""
    reads = {c.tensor for c in width.couplings if c.role == "consumer"}
    return [
        op
        for op in weighted_ops(axes.graph.module)
        if op.kind != "embedding" and str(op.weight.target) in reads
    ]


def width_statistics(
    axes: Axes, site: Site, observed: Mapping[str, Observed], *, damping: float = 1e-4
) -> WidthStatistics:
    """The second moments of all readers, in units of the variance of their outputs.

    Of experts, which no linear map reads, there are none.

    Args:
        axes: The graph's widths.
        site: A width.
        observed: By op name, of the original model.
        damping: Relative to the mean diagonal of each second moment.
    """
    width = width_of(axes, site)
    consumers = []
    for op in _readers(axes, width):
        groups = 1 if op.window is None else op.window.groups
        weight = attribute(axes.graph.module, str(op.weight.target))
        W = grouped_weight(weight, groups)
        H, _ = damped(centred(observed[op.node.name].moments)[0], damping)
        variance = float(((W @ H) * W).sum())
        consumers.append(
            Consumer(
                weight=W,
                second_moment=H,
                columns=_columns(axes, width, op, groups, W.shape[2]),
                scale=max(variance, 1e-30),
            )
        )
    heads = heads_of(axes, width)
    if heads is None or not turns_freely(axes.graph, heads):
        return WidthStatistics(consumers=tuple(consumers))
    return WidthStatistics(
        consumers=tuple(consumers), heads=_head_statistics(axes, heads, observed)
    )


def _head_statistics(axes: Axes, heads: Heads, observed: Mapping[str, Observed]) -> HeadStatistics:
    first, second = (heads.tensors_of(axes.graph, side) for side in ("first", "second"))
    if heads.kind == "values":
        return HeadStatistics(
            first=first, second=second, sharing=heads.sharing, columns=heads.places[second[0]][1]
        )
    queries, _ = _made(axes, heads, (heads.first, first), observed)
    _, keys = _made(axes, heads, (heads.second, second), observed)
    return HeadStatistics(
        first=first,
        second=second,
        sharing=heads.sharing,
        queries=queries.reshape(len(keys), heads.sharing, *queries.shape[1:]).sum(1),
        keys=keys,
    )


def _made(
    axes: Axes,
    heads: Heads,
    projection: tuple[str, tuple[str, ...]],
    observed: Mapping[str, Observed],
) -> tuple[Tensor, Tensor]:
    """Second moment and covariance of what a projection gives to each head [h, d, d]."""
    node, tensors = projection
    rows = heads.places[tensors[0]][1]
    values = [attribute(axes.graph.module, name)[rows.flatten()].double() for name in tensors]
    weight = values[0]
    bias = values[1] if len(values) > 1 else weight.new_zeros(len(weight))
    H, mean = centred(observed[node].moments)
    return output_moments(weight, bias, H[0], mean[0], len(rows))


def _columns(axes: Axes, width: Width, op: WeightedOp, groups: int, inputs: int) -> Tensor:
    """Columns of each unit in every group [g, c, s]; -1 where a group has fewer."""
    dim = axes.walk.shapes[op.data][op.channel_dim]
    units = torch.from_numpy(axes.units_of(width, dim)).reshape(groups, -1)
    per = inputs // units.shape[1]
    spread = units.repeat_interleave(per, dim=1)
    lists = [[(row == u).nonzero()[:, 0] for u in range(width.units)] for row in spread]
    longest = max(len(found) for row in lists for found in row)
    table = torch.full((groups, width.units, longest), -1, dtype=torch.int64)
    for g, row in enumerate(lists):
        for u, found in enumerate(row):
            table[g, u, : len(found)] = found
    return table
