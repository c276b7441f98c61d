"""Bags of equally many entries: an embedding and a sum, mean or maximum, as every backend has them.

``nn.EmbeddingBag`` flattens indices [batch, entries] and says where each bag begins. A call with
offsets of the caller's own has bags of any size, which nothing here can put into batches: it stays.
"""

import math
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten

_BAGS = {aten.embedding_bag.default, aten.embedding_bag.padding_idx}
_FLAT = {aten.reshape.default, aten.view.default}
_SUM, _MEAN, _MAX = range(3)  # torch's modes


def write_bags(graph: fx.Graph) -> None:
    """Write bags as ops on [batch, entries, features], in place."""
    for node in [n for n in graph.nodes if n.op == "call_function" and n.target in _BAGS]:
        rest = [*node.args[3:], *[None] * 6]
        mode, weights, last, padding = int(rest[1] or 0), rest[3], rest[4], rest[5]
        indices = _rows(node.args[1])
        factors = None if weights is None else _rows(weights)
        is_read = {int(user.args[1]) for user in node.users if user.users}
        if indices is None or last or not _are_even(node.args[2], indices) or is_read - {0}:
            continue
        if weights is not None and factors is None:
            continue
        with graph.inserting_before(node):
            made = _Bag(graph, node.args[0], indices, padding, factors).reduced(mode)
        for user in list(node.users):
            if user.users:
                made.meta = dict(user.meta)
                user.replace_all_uses_with(made)
            graph.erase_node(user)
        graph.erase_node(node)


def _rows(flat: Any) -> fx.Node | None:
    """The matrix that was flattened."""
    if not isinstance(flat, fx.Node) or flat.target not in _FLAT or flat.args[1] != [-1]:
        return None
    source = flat.args[0]
    assert isinstance(source, fx.Node)
    value = source.meta.get("val")
    return source if value is not None and value.dim() == 2 else None


def _are_even(offsets: Any, indices: fx.Node) -> bool:
    """Whether every bag is a row of the indices."""
    if not isinstance(offsets, fx.Node) or offsets.target is not aten.arange.start_step:
        return False
    first, end, step = offsets.args
    size = indices.meta["val"].shape[1]
    if isinstance(step, fx.Node):
        is_row = step.target is aten.sym_size.int and step.args == (indices, 1)
    else:
        is_row = isinstance(size, int) and bool(step == size)
    is_all = (
        isinstance(end, fx.Node) and end.target is aten.sym_numel.default and end.args == (indices,)
    )
    return bool(first == 0) and is_row and is_all


class _Bag:
    """The entries of all bags, [batch, entries, features]."""

    def __init__(
        self, graph: fx.Graph, weight: Any, indices: fx.Node, padding: Any, factors: fx.Node | None
    ) -> None:
        self._graph = graph
        call = graph.call_function
        self._entries = call(aten.embedding.default, (weight, indices))
        if factors is not None:
            column = call(aten.unsqueeze.default, (factors, -1))
            self._entries = call(aten.mul.Tensor, (self._entries, column))
        self._counts: fx.Node | None = None
        if padding is not None and padding >= 0:
            counts = call(aten.ne.Scalar, (indices, padding))
            self._counts = call(aten.unsqueeze.default, (counts, -1))

    def reduced(self, mode: int) -> fx.Node:
        """One row a bag; entries at the padding index do not count, and nothing gives zero."""
        call, counts = self._graph.call_function, self._counts
        if counts is None:
            op = {_SUM: aten.sum.dim_IntList, _MEAN: aten.mean.dim, _MAX: aten.amax.default}[mode]
            return call(op, (self._entries, [1]))
        neutral = -math.inf if mode == _MAX else 0.0
        value = call(aten.where.ScalarOther, (counts, self._entries, neutral))
        if mode == _MAX:
            most = call(aten.amax.default, (value, [1]))
            return call(aten.where.ScalarOther, (call(aten.any.dim, (counts, 1)), most, 0.0))
        total = call(aten.sum.dim_IntList, (value, [1]))
        if mode == _SUM:
            return total
        n = call(aten.sum.dim_IntList, (counts, [1]), {"dtype": torch.float32})
        return call(aten.div.Tensor, (total, call(aten.clamp.default, (n, 1.0))))
