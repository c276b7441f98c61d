"""Activations that one linear layer reads: where they stand, and rows of what they read."""

from collections.abc import Callable

import torch
from torch import Tensor, fx

from tersor.graph.contracts import ActivationStatistics, Graph, TensorMap
from tersor.graph.edit import attribute
from tersor.graph.operators import WeightedOp, as_rows, weighted_ops
from tersor.observe.statistics import enough_rows, op_bias, op_weight

aten = torch.ops.aten

SMOOTH = (aten.gelu.default, aten.silu.default)  # not in place: others may read what those write


def activation_readers(graph: Graph) -> dict[fx.Node, WeightedOp]:
    """Smooth activation -> the linear layer that alone reads it, in graph order."""
    ops = {op.node: op for op in weighted_ops(graph.module) if op.kind == "linear"}
    found = {}
    for node in graph.module.graph.nodes:
        users = list(node.users)
        if node.target in SMOOTH and len(users) == 1 and users[0] in ops:
            found[node] = ops[users[0]]
    return found


def rows_of_batch(graph: Graph, op: WeightedOp, batches: int) -> int:
    """Rows of each batch that together determine a fit of the layer behind."""
    inputs = attribute(graph.module, str(op.weight.target)).shape[1]
    return -(-enough_rows(inputs) // max(1, batches))


def kept_rows(
    values: Tensor, op: WeightedOp, mask: Tensor | None, most: int, generator: torch.Generator
) -> Tensor:
    """At most so many rows of what an activation reads [t, n]; of real tokens only."""
    rows = as_rows(values, op, mask)[:, 0]
    if len(rows) <= most:
        return rows
    return rows[torch.randperm(len(rows), generator=generator)[:most].sort().values]


def activation_statistics_of(
    graph: Graph,
    node: fx.Node,
    op: WeightedOp,
    original: Callable[[], Tensor],
    compressed: Callable[[], Tensor],
) -> ActivationStatistics:
    """Of an activation and its reader, with what calls up the rows of both runs."""
    bias = op_bias(graph, op)
    return ActivationStatistics(
        function=_function_of(node),
        original=original,
        compressed=compressed,
        weight=op_weight(graph, op)[0],
        bias=None if bias is None else bias[0],
    )


def _function_of(node: fx.Node) -> TensorMap:
    rest, options = node.args[1:], dict(node.kwargs)

    def run(x: Tensor) -> Tensor:
        found: Tensor = node.target(x, *rest, **options)  # type: ignore[operator]
        return found

    return run
