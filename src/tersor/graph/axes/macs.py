"""Multiply-accumulates by node, and the share of them that widths reach."""

import math
from typing import Any

from torch import Tensor, fx

from tersor.graph.axes.rulebook import arguments, op_name, sizes_of
from tersor.graph.axes.widths import Axes
from tersor.graph.contracts import Graph
from tersor.graph.edit import attribute

_CONVS = ("conv1d", "conv2d", "conv3d")
_TRANSPOSED = ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
_PRODUCTS = ("matmul", "bmm", "mm")
_RECURRENT = ("lstm", "gru", "rnn_tanh", "rnn_relu")


def node_macs(graph: Graph, node: fx.Node) -> int:
    """Multiply-accumulates of one node at the example's sizes."""
    if node.op != "call_function":
        return 0
    if op_name(node) in _RECURRENT:
        return _recurrent_macs(graph, arguments(node))
    return _product_macs(graph, node) if isinstance(node.meta.get("val"), Tensor) else 0


def _recurrent_macs(graph: Graph, args: dict[str, Any]) -> int:
    """Every step of every sample meets every matrix once."""
    steps = math.prod(_sizes(graph, args["input"])[:-1])
    matrices = [s for s in (_sizes(graph, p) for p in args["params"]) if len(s) == 2]
    return steps * sum(math.prod(s) for s in matrices)


def _product_macs(graph: Graph, node: fx.Node) -> int:
    name, args = op_name(node), arguments(node)
    out = math.prod(sizes_of(node.meta["val"]))
    if name == "linear":
        return out * _sizes(graph, args["weight"])[-1]
    if name in _CONVS:
        return out * math.prod(_sizes(graph, args["weight"])[1:])
    if name in _TRANSPOSED:
        return math.prod(_sizes(graph, args["input"])) * math.prod(
            _sizes(graph, args["weight"])[1:]
        )
    if name == "scaled_dot_product_attention":
        q, k = _sizes(graph, args["query"]), _sizes(graph, args["key"])
        return math.prod(q[:-1]) * k[-2] * q[-1] + out * k[-2]
    if name in _PRODUCTS:
        return out * _sizes(graph, args["self"])[-1]
    return 0


def _sizes(graph: Graph, node: Any) -> list[int]:
    if node.op == "get_attr":
        return list(attribute(graph.module, str(node.target)).shape)
    return sizes_of(node.meta["val"])


def mac_share(graph: Graph, axes: Axes) -> float:
    """Share of multiply-accumulates at ops that an exact width runs into or out of."""
    exact = {label for w in axes.widths if w.exactness == "exact" for label in w.labels}
    total = reached = 0
    for node in graph.module.graph.nodes:
        macs = node_macs(graph, node)
        total += macs
        if macs and _meets(axes, node, exact):
            reached += macs
    return reached / total if total else 0.0


def _meets(axes: Axes, node: fx.Node, labels: set[int]) -> bool:
    for source in (node, *node.all_input_nodes):
        shape = axes.walk.shapes.get(source) or []
        for dim in shape:
            if isinstance(dim, list) or dim.is_free:
                continue
            roots = set(axes.labels.find(dim.rows[:: max(1, len(dim.rows) // 64)]).ravel().tolist())
            leaves = {leaf for r in roots for leaf in axes.labels.leaves(r)}
            if leaves & labels:
                return True
    return False
