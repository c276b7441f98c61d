"""A factor for each channel of a tensor, moved into the op that makes it, where that is exact.

Behind y = W x + b, or a norm with a stored scale and shift, and ops that commute with positive factors
(ReLU, max and mean pools), c * f(W x + b) is f((c W) x + c b): no op is left at run time. Integer codes
stay; their steps are multiplied. With powers of two every float is the same as before, which is what
is asked for here: a rounding that differs in the last place would flip codes. A tensor that anything
else reads as well keeps its own op.

Source: Nagel et al. 2019, arXiv:1906.04721, section 4.1 (positive scaling equivariance).
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
import torch.ao.quantization.fx._decomposed
from torch import Tensor, fx

from tersor.ops.smoothing import is_power_of_two

aten = torch.ops.aten

_ELEMENTWISE = {
    aten.relu.default, aten.relu_.default, aten.leaky_relu.default, aten.leaky_relu_.default,
    aten.clone.default, aten.contiguous.default,
}  # fmt: skip
# Of dimensions behind the channels.
_POOLS = {
    aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default,
    aten.avg_pool1d.default, aten.avg_pool2d.default, aten.avg_pool3d.default,
    aten.adaptive_avg_pool1d.default, aten.adaptive_avg_pool2d.default,
    aten.adaptive_avg_pool3d.default,
}  # fmt: skip
# Where the operands stand that have a row or a value for each channel, by where the channels are.
_CHANNELS_LAST: dict[Any, tuple[int, int]] = {
    aten.linear.default: (1, 2),
    aten.layer_norm.default: (2, 3),
    aten.rms_norm.default: (
        2,
        3,
    ),  # which has no shift: 3 is the number that it adds below the root
}
_CHANNELS_FIRST: dict[Any, tuple[int, int]] = {
    aten.conv1d.default: (1, 2), aten.conv2d.default: (1, 2), aten.conv3d.default: (1, 2),
    aten.conv1d.padding: (1, 2), aten.conv2d.padding: (1, 2), aten.conv3d.padding: (1, 2),
    aten.batch_norm.default: (1, 2),
}  # fmt: skip
_NORMS = {aten.layer_norm.default, aten.rms_norm.default, aten.batch_norm.default}
_EXPANDED = torch.ops.quantized_decomposed.dequantize_per_channel.default


@dataclass(frozen=True, slots=True)
class Source:
    """Who makes a tensor, and its stored operands that a factor a channel goes into.

    Attributes:
        node: The op.
        operands: A row or a value for each channel: weights or the steps of their codes, norms' scales,
            and what is added.
    """

    node: fx.Node
    operands: tuple[fx.Node, ...]


def source_of(
    data: fx.Node, channel_dim: int, tensors: dict[str, Tensor], fixed: Collection[str] = ()
) -> Source | None:
    """Where a factor of each channel of a node's value can go exactly; None where it can't.

    Args:
        data: The node; only who is to read it scaled may read it.
        channel_dim: That of its channels: -1, or 1 in front of others.
        tensors: Stored tensors by target.
        fixed: Targets that must stay as they are, such as packed weights.
    """
    is_last = channel_dim == -1
    commute = _ELEMENTWISE if is_last else _ELEMENTWISE | _POOLS
    node = data
    while len(node.users) == 1 and node.target in commute:
        node = node.all_input_nodes[0]
    places = (_CHANNELS_LAST if is_last else _CHANNELS_FIRST).get(node.target)
    if len(node.users) != 1 or places is None:
        return None
    found = [_stored(node.args[p]) for p in places if len(node.args) > p]
    operands = tuple(operand for operand in found if operand is not None)
    if not found or found[0] is None or not all(_is_own(o, fixed) for o in operands):
        return None
    # A norm over several dimensions has a value for each element, not for each channel.
    is_wide = node.target in _NORMS and tensors[str(operands[0].target)].dim() != 1
    return None if is_wide else Source(node, operands)


def fold_(
    graph: fx.Graph,
    tensors: dict[str, Tensor],
    scalings: Collection[tuple[fx.Node, int]],
    fixed: Collection[str],
) -> None:
    """Take away multiplications by a power of two a channel that go into what they read.

    Args:
        graph: Changed in place.
        tensors: Of the graph; gets the new ones.
        scalings: Multiplications of a node by a stored factor of each channel, and the channels' dimension.
        fixed: Targets that must stay as they are.
    """
    for scaling, channel_dim in scalings:
        data, factor = scaling.all_input_nodes
        by_channel = tensors[str(factor.target)].reshape(-1)
        source = source_of(data, channel_dim, tensors, fixed)
        if source is None or not is_power_of_two(by_channel):
            continue
        for operand in source.operands:
            _multiply(graph, tensors, operand, by_channel)
        scaling.replace_all_uses_with(data)
        graph.erase_node(scaling)


def _multiply(
    graph: fx.Graph, tensors: dict[str, Tensor], operand: fx.Node, factor: Tensor
) -> None:
    """A stored operand under a new name, as values of nodes are known by the names of their tensors."""
    old = tensors[str(operand.target)]
    name = f"{operand.target}_folded"
    tensors[name] = old * factor.to(old.dtype).reshape(-1, *[1] * (old.dim() - 1))
    (reader,) = operand.users
    with graph.inserting_before(reader):
        new = graph.create_node("get_attr", name, name=f"{operand.name}_folded")
    reader.replace_input_with(operand, new)


def _stored(operand: object) -> fx.Node | None:
    """The stored tensor behind a weight or its steps."""
    if not isinstance(operand, fx.Node):
        return None
    if operand.target is _EXPANDED and len(operand.users) == 1:
        steps = operand.args[1]
        return steps if isinstance(steps, fx.Node) and steps.op == "get_attr" else None
    return operand if operand.op == "get_attr" else None


def _is_own(operand: fx.Node, fixed: Collection[str]) -> bool:
    """Whether nothing else reads a stored tensor, under whatever node."""
    twins = [n for n in operand.graph.nodes if n.op == "get_attr" and n.target == operand.target]
    return twins == [operand] and len(operand.users) == 1 and str(operand.target) not in fixed
