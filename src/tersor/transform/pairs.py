"""Behind a cut, the maps that make a width and those that read it are fitted once more, together.

For a linear map, functions of one value at a time, and a linear map that alone reads them (the
neurons of a classifier or of a transformer's layer). It follows ``narrow``, which fits op by op.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from tersor.graph.axes import Axes
from tersor.graph.axes.slicing import gone_from
from tersor.graph.contracts import Graph
from tersor.graph.edit import copy_graph, execute, rebuild, run_all
from tersor.graph.meta import refresh
from tersor.graph.operators import WeightedOp, output_rows, weighted_ops
from tersor.observe.statistics import token_mask
from tersor.ops.pairs import LinearPair, fit_pair

aten = torch.ops.aten
_BENDS = (
    aten.relu.default,
    aten.gelu.default,
    aten.silu.default,
    aten.tanh.default,
    aten.sigmoid.default,
    aten.hardswish.default,
)


@dataclass(frozen=True, slots=True)
class Pair:
    """Two linear maps of a graph and what stands between them."""

    first: WeightedOp
    bend: fx.Node
    second: WeightedOp


def find_pairs(graph: Graph) -> Iterator[Pair]:
    """All pairs whose four tensors no other op reads and whose units nothing else sees."""
    uses: dict[str, int] = {}
    for node in graph.module.graph.nodes:
        if node.op == "get_attr":
            uses[str(node.target)] = uses.get(str(node.target), 0) + len(node.users)
    ops = {op.node: op for op in weighted_ops(graph.module)}

    def is_alone(op: WeightedOp) -> bool:
        stored = [op.weight, op.bias]
        return all(t is not None and uses[str(t.target)] == 1 for t in stored)

    for second in ops.values():
        bend = second.data
        if bend.target not in _BENDS or len(bend.users) != 1 or second.kind != "linear":
            continue
        first = ops.get(bend.all_input_nodes[0])
        if first is None or first.kind != "linear" or len(first.node.users) != 1:
            continue
        if first.window is None and second.window is None and is_alone(first) and is_alone(second):
            yield Pair(first, bend, second)


def fit_pairs(
    graph: Graph,
    small: Graph,
    axes: Axes,
    keep: Mapping[str, Sequence[int]],
    batches: Sequence[tuple[Tensor, ...]],
    *,
    iterations: int = 100,
) -> Graph:
    """A cut and fitted graph whose pairs with lost units are fitted together, front to back.

    Args:
        graph: The original, whose outputs are wanted.
        small: What ``narrow`` made of it; not changed.
        axes: The original's widths.
        keep: Width -> indices of the units that stay.
        batches: Flat inputs of the calibration part, without labels.
        iterations: Of one fit at most.
    """
    removed = axes.removed(gone_from(axes, keep))
    whole = {op.node.name: op for op in weighted_ops(graph.module)}
    fresh, tensors = copy_graph(small.module)
    module = rebuild(fresh, {name: t.clone() for name, t in tensors.items()})
    current = replace(small, module=module)
    for pair in list(find_pairs(current)):
        first, second = (whole[op.node.name] for op in (pair.first, pair.second))
        units = axes.kept(axes.walk.shapes[first.node][-1], removed)
        if units.all():
            continue
        outputs = torch.from_numpy(axes.kept(axes.walk.shapes[second.node][-1], removed))
        inputs, wanted = _rows(graph, current, pair, outputs, batches)
        start = LinearPair(*_stored(pair, module))
        found = fit_pair(inputs, wanted, start, _bend(module, pair.bend), iterations=iterations)
        with torch.no_grad():
            values = zip(_stored(pair, module), found.pair.tensors(), strict=True)
            for tensor, value in values:
                tensor.copy_(value)
    refresh(module)
    return current


def _rows(
    graph: Graph,
    current: Graph,
    pair: Pair,
    outputs: Tensor,
    batches: Sequence[tuple[Tensor, ...]],
) -> tuple[Tensor, Tensor]:
    """What the first map reads now, and what the original's second one gave, of real tokens."""
    inputs: list[Tensor] = []
    wanted: list[Tensor] = []
    for flat in batches:
        mask = token_mask(graph.signature, flat)
        now = run_all(current.module, flat)[pair.first.data.name]
        then = run_all(graph.module, flat)[pair.second.node.name]
        for rows, value in ((inputs, now), (wanted, then)):
            flat_rows = output_rows(value, pair.second, mask)
            rows.append(flat_rows.reshape(len(flat_rows), -1))
    return torch.cat(inputs), torch.cat(wanted)[:, outputs]


def _stored(pair: Pair, module: fx.GraphModule) -> list[Tensor]:
    nodes = (pair.first.weight, pair.first.bias, pair.second.weight, pair.second.bias)
    return [execute(module, node, {}) for node in nodes if node is not None]


def _bend(module: fx.GraphModule, node: fx.Node) -> Any:
    source = node.all_input_nodes[0].name
    return lambda x: execute(module, node, {source: x})
