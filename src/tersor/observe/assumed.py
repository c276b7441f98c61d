"""What a layer's input is taken to be without looking at any: by the op that made it.

Ops that only move values are looked through. Norms are read as they are stored, activations by what
they make of normal values; of everything else nothing is known (``ops.assumed``).
"""

from typing import Any

import torch
from torch import Tensor, fx

from tersor.graph.contracts import Graph
from tersor.graph.edit import attribute
from tersor.graph.operators import WeightedOp, grouped_weight
from tersor.ops.assumed import function_moments, norm_moments, plain_moments
from tersor.ops.moments import Moments

aten = torch.ops.aten

_NORMS: dict[Any, tuple[int, int | None]] = {
    aten.layer_norm.default: (2, 3),
    aten.rms_norm.default: (2, None),
}
_FUNCTIONS = {
    aten.relu.default, aten.relu_.default, aten.hardtanh.default, aten.hardtanh_.default,
    aten.relu6.default, aten.leaky_relu.default, aten.elu.default, aten.gelu.default,
    aten.silu.default, aten.silu_.default, aten.hardswish.default, aten.hardswish_.default,
    aten.sigmoid.default, aten.hardsigmoid.default, aten.tanh.default, aten.softplus.default,
    aten.mish.default, aten.square.default, aten.abs.default,
}  # fmt: skip
# Each channel keeps its values, in the same dimension.
_SAME = {aten.clone.default, aten.contiguous.default, aten.dropout.default}
# Values move, or the largest or the mean of some is taken: all channels still have a mean of that sign.
_MOVES = {
    *_SAME, aten.view.default, aten.reshape.default, aten.flatten.using_ints, aten.permute.default,
    aten.transpose.int, aten.squeeze.dim, aten.unsqueeze.default, aten.select.int, aten.slice.Tensor,
    aten.max_pool1d.default, aten.max_pool2d.default, aten.avg_pool1d.default,
    aten.avg_pool2d.default, aten.adaptive_avg_pool1d.default, aten.adaptive_avg_pool2d.default,
    aten.mean.dim,
}  # fmt: skip


def assumed_moments(graph: Graph, op: WeightedOp) -> Moments:
    """Moments of a layer's unfolded input, of one row that was never seen.

    Args:
        graph: Whose stored tensors a norm reads.
        op: Linear or convolution.
    """
    weight = attribute(graph.module, str(op.weight.target))
    groups, _, inputs = grouped_weight(weight, 1 if op.window is None else op.window.groups).shape
    found = _through(op.data, _SAME)
    if op.window is None and found.target in _NORMS:
        scale, shift = _affine(graph, found)
        if scale is not None and scale.shape == (inputs,):
            return norm_moments(scale, shift)
    found = _through(op.data, _MOVES)
    if found.target in _FUNCTIONS:
        return function_moments(lambda z: _call(found, z), groups, inputs)
    return plain_moments(groups, inputs)


def _through(node: fx.Node, targets: set[Any]) -> fx.Node:
    while node.op == "call_function" and node.target in targets:
        node = node.all_input_nodes[0]
    return node


def _affine(graph: Graph, norm: fx.Node) -> tuple[Tensor | None, Tensor | None]:
    """The stored scale and shift of a norm; None where it has none."""
    first, second = _NORMS[norm.target]
    return _stored(graph, norm, first), None if second is None else _stored(graph, norm, second)


def _stored(graph: Graph, norm: fx.Node, place: int) -> Tensor | None:
    value = norm.args[place] if len(norm.args) > place else None
    if not isinstance(value, fx.Node) or value.op != "get_attr":
        return None
    return attribute(graph.module, str(value.target)).detach()


def _call(node: fx.Node, z: Tensor) -> Tensor:
    """An elementwise op on other values; in-place ones get a copy."""
    assert callable(node.target)
    value: Tensor = node.target(z.clone(), *node.args[1:], **node.kwargs)
    return value
