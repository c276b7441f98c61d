"""Formats that were chosen on the whole model, put on one whose widths were cut.

What was neither cut nor fitted again keeps its codes. Other weights are rounded to nearest on a
step of their own rows; activations keep their grid, without the channels that are gone. A low-rank
layer keeps the directions of its outputs, as far as those are left. It is what
a price or an evaluation needs at once; the final weights come from the transform.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
from torch import Tensor, fx

from tersor.core.errors import ShapeError
from tersor.core.packing import Packing
from tersor.graph.axes.heads import turned_tensor
from tersor.graph.axes.labels import Flags
from tersor.graph.axes.widths import Axes
from tersor.graph.contracts import Graph, Quantizer, SiteChange
from tersor.graph.edit import parameters_by_name
from tersor.graph.operators import WeightedOp, grouped_weight, weighted_ops
from tersor.graph.project import Moved, projected
from tersor.graph.quantizer import column_scale
from tersor.ops.float8 import FLOAT8, float8_codes, float8_steps
from tersor.ops.grids import round_nearest, weight_steps
from tersor.ops.storing import pack_nearest

# Weight -> for each width that runs through its rows: (0, elements [h, d]), and the maps [h, d, d].
Turns = Mapping[str, Sequence[tuple[tuple[int, Tensor], Tensor]]]
NO_TURNS: Turns = MappingProxyType({})


def requantized(
    changes: Sequence[SiteChange],
    original: Graph,
    axes: Axes,
    removed: Flags,
    graph: Graph,
    turns: Turns = NO_TURNS,
) -> list[SiteChange]:
    """Changes of formats for a graph that has lost some units, and perhaps branches before.

    Args:
        changes: Of format sites, as made for the original.
        original: Whose weights the changes have rounded.
        axes: Its widths, or those of what replaced branches left of it.
        removed: The labels that are gone, as ``Axes.removed`` gives them.
        graph: What ``axes`` describes without those, with whatever weights; nodes keep their
            names.
        turns: Weight -> where its rows lie by head and unit, and the map of each head, for those
            whose heads were turned before they were cut.

    Returns:
        Changes whose ops are still there.
    """
    ops = {op.node.name: op for op in weighted_ops(graph.module)}
    work = _Work(
        axes=axes,
        removed=removed,
        old=parameters_by_name(original.module),
        new=parameters_by_name(graph.module),
        before={op.node.name: op for op in weighted_ops(axes.graph.module)},
        quantizers={},
        turns=turns,
    )
    nodes = {n.name for n in graph.module.graph.nodes}
    return [
        work.carried(change, ops[change.site.ops[0]])
        if change.site.has_weight
        else work.weightless(change)
        for change in changes
        if change.site.ops[0] in (ops if change.site.has_weight else nodes)
    ]


@dataclass(frozen=True, slots=True)
class _Work:
    axes: Axes
    removed: Flags
    old: Mapping[str, Tensor]
    new: Mapping[str, Tensor]
    before: Mapping[str, WeightedOp]
    quantizers: dict[int, Quantizer]  # readers of one tensor share the object
    turns: Turns

    def weightless(self, change: SiteChange) -> SiteChange:
        """An addition's operands; an activation without the reader's weight, which was cut or fitted."""
        if change.site.op_kind == "activation":
            return replace(change, weight=None, bias=None)
        data = {n.name: n for n in self.axes.graph.module.graph.nodes}
        here = {t: q for t, q in change.operands.items() if t in data}  # not gone with a branch
        operands = {t: self._quantizer(q, data[t]) for t, q in here.items()}
        return replace(change, operands=operands)

    def carried(self, change: SiteChange, op: WeightedOp) -> SiteChange:
        quantizer = change.quantizer
        if quantizer is not None:
            quantizer = self._quantizer(quantizer, self.before[change.site.ops[0]].data)
        whole = self.old[str(op.weight.target)]
        now = self.new[str(op.weight.target)]
        same_bias = op.bias is None or str(op.bias.target) in self.old
        if same_bias and _equal(whole, now) and quantizer is change.quantizer:
            return change
        if change.packed is not None:
            return self._packed(change, change.packed.packing, op, now)
        if change.factors:
            return self._projected(change, op, quantizer, now)
        if change.codes is None:
            raise ShapeError(
                f"{change.site.name}: a change to {change.level} without codes can't follow a width "
                "that was cut; take the method that made it out of methods="
            )
        return self._rounded(change, op, quantizer, now)

    def _packed(
        self, change: SiteChange, packing: Packing, op: WeightedOp, now: Tensor
    ) -> SiteChange:
        """The same layout; the bias is that of the graph, as nothing is known of the input here."""
        if op.kind == "embedding":
            weight = now.detach().double().unsqueeze(0)
        else:
            weight = grouped_weight(now, 1 if op.window is None else op.window.groups)
        packed = pack_nearest(weight, packing.resized(now.shape))
        return replace(
            change,
            site=replace(change.site, shape=tuple(now.shape)),
            packed=packed,
            bias=None if op.bias is None else self.new[str(op.bias.target)].detach().float(),
        )

    def _rounded(
        self, change: SiteChange, op: WeightedOp, quantizer: Quantizer | None, now: Tensor
    ) -> SiteChange:
        assert change.codes is not None
        if change.codes.dtype == FLOAT8:
            return self._floats(change, op, now)
        limit = max(1, int(change.codes.abs().max()))
        site = replace(change.site, shape=tuple(now.shape))
        if op.kind == "embedding":
            rows = now.detach().double().unsqueeze(0)
            step = weight_steps(rows, limit, fractions=(1.0,)).float().double()
            codes = round_nearest(rows, step, limit).reshape(now.shape)
            return replace(change, site=site, codes=codes, scale=step.reshape(-1).float())
        weight = grouped_weight(now, 1 if op.window is None else op.window.groups)
        columns = column_scale(weight, quantizer)
        weight = weight if columns is None else weight * columns
        step = weight_steps(weight, limit).float().double()
        codes = round_nearest(weight, step, limit)
        bias: Tensor | None = None
        if op.bias is not None:
            bias = self.new[str(op.bias.target)].detach().double()
        if quantizer is not None and quantizer.shift:
            moved = (codes.double() * step.unsqueeze(-1)).sum(2).reshape(-1) * quantizer.shift
            bias = -moved if bias is None else bias - moved
        return replace(
            change,
            site=site,
            codes=codes.reshape(now.shape),
            scale=step.reshape(-1).float(),
            bias=None if bias is None else bias.float(),
            quantizer=quantizer,
        )

    def _floats(self, change: SiteChange, op: WeightedOp, now: Tensor) -> SiteChange:
        """Nearest 8-bit floats of a linear; its tensor keeps its grid."""
        weight = now.detach().double().unsqueeze(0)
        step = float8_steps(weight).float()
        codes = float8_codes((weight / step.double().unsqueeze(-1)).float())
        bias = None if op.bias is None else self.new[str(op.bias.target)].detach().float()
        return replace(
            change,
            site=replace(change.site, shape=tuple(now.shape)),
            codes=codes.reshape(now.shape),
            scale=step.reshape(-1),
            bias=bias,
        )

    def _projected(
        self, change: SiteChange, op: WeightedOp, quantizer: Quantizer | None, now: Tensor
    ) -> SiteChange:
        """The layer's new weight, at the directions of the outputs that the change had chosen."""
        before = self.before[op.node.name]
        dim = self.axes.walk.shapes[before.node][op.channel_dim]
        bias_before = None
        if before.bias is not None:
            bias_before = self.old[str(before.bias.target)].detach().double()
        for place, maps in self.turns.get(str(op.weight.target), ()):
            change = _turned(change, place, maps)
            if bias_before is not None:
                bias_before = turned_tensor(bias_before, place, maps)
        return projected(
            change,
            Moved(
                weight=now.detach().double(),
                bias=None if op.bias is None else self.new[str(op.bias.target)].detach().double(),
                bias_before=bias_before,
                kept=torch.from_numpy(self.axes.kept(dim, self.removed)),
                quantizer=quantizer,
            ),
        )

    def _quantizer(self, own: Quantizer, data: fx.Node) -> Quantizer:
        """The tensor's quantiser without the channels that are gone."""
        if own.inverse_scale is None:
            return own
        if id(own) not in self.quantizers:
            dim = self.axes.walk.shapes[data][own.channel_dim]
            flags = torch.from_numpy(self.axes.kept(dim, self.removed))
            whole = bool(flags.all())
            self.quantizers[id(own)] = (
                own if whole else replace(own, inverse_scale=own.inverse_scale[flags])
            )
        return self.quantizers[id(own)]


def _turned(change: SiteChange, place: tuple[int, Tensor], maps: Tensor) -> SiteChange:
    """A low-rank layer whose outputs were mixed inside of every head: so are the last factor's rows."""
    last = change.factors[-1]
    rows = turned_tensor(last.dense().double(), place, maps)
    if last.codes is None:
        fresh = replace(last, weight=rows.float())
    else:
        flat = rows.reshape(1, len(rows), -1)
        limit = max(1, int(last.codes.abs().max()))
        step = weight_steps(flat, limit).float().double()
        codes = round_nearest(flat, step, limit).reshape(rows.shape)
        fresh = replace(last, codes=codes, scale=step.reshape(-1).float())
    bias = None if change.bias is None else turned_tensor(change.bias, place, maps)
    return replace(change, factors=(*change.factors[:-1], fresh), bias=bias)


def _equal(left: Tensor, right: Tensor) -> bool:
    same = left is right or left.data_ptr() == right.data_ptr()
    return left.shape == right.shape and (same or torch.equal(left, right))
