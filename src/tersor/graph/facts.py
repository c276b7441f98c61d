"""What each node of a graph computes, as sizes: what its time may depend on."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, fx

from tersor.graph.axes.macs import node_macs
from tersor.graph.axes.rulebook import arguments, op_name, sizes_of
from tersor.graph.contracts import Graph
from tersor.graph.edit import attribute
from tersor.graph.operators import WeightedOp, weighted_ops

NodeKind = Literal[
    "conv", "depthwise", "linear", "attention", "matmul", "norm", "activation", "elementwise",
    "pool", "move", "embedding", "other",
]  # fmt: skip

_KINDS: Mapping[NodeKind, tuple[str, ...]] = {
    "attention": ("scaled_dot_product_attention",),
    "matmul": ("matmul", "bmm", "mm", "einsum", "baddbmm", "addmm"),
    "conv": ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
    "norm": ("layer_norm", "rms_norm", "group_norm", "instance_norm", "batch_norm", "softmax"),
    "activation": (
        "relu", "gelu", "silu", "sigmoid", "tanh", "hardswish", "hardsigmoid", "hardtanh", "mish",
        "leaky_relu", "elu", "softplus", "erf", "exp", "clamp", "relu6",
    ),
    "elementwise": ("add", "sub", "mul", "div", "pow", "rsqrt", "sqrt", "neg", "where", "maximum"),
    "pool": (
        "mean", "sum", "amax", "max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d",
        "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d",
        "adaptive_avg_pool3d", "upsample_nearest2d", "upsample_bilinear2d",
    ),
    "move": (
        "view", "reshape", "permute", "transpose", "cat", "split", "chunk", "slice", "select",
        "expand", "unsqueeze", "squeeze", "flatten", "contiguous", "clone", "stack", "pad",
        "constant_pad_nd", "unflatten", "index_select", "roll", "unbind", "t", "repeat",
        "split_with_sizes", "pixel_shuffle", "channel_shuffle",
    ),
}  # fmt: skip
_KIND_OF: dict[str, NodeKind] = {name: kind for kind, names in _KINDS.items() for name in names}


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeFacts:
    """Sizes of one graph node at the built shapes.

    Attributes:
        in_elements: Of the activations that it reads.
        inputs: Length of the sum behind one output: input channels of a group x window. Of what only
            moves elements, how many of them lie side by side.
        outputs: Rows of the weight, or of the second operand transposed.
        window: Elements of a convolution's window; 1 elsewhere.
    """

    kind: NodeKind
    macs: int = 0
    weight_elements: int = 0
    in_elements: int = 0
    out_elements: int = 0
    inputs: int = 0
    outputs: int = 0
    window: int = 1

    def sizes(self) -> tuple[int, ...]:
        """The numbers that a width may change, in the order of ``SIZES``."""
        return (
            self.macs,
            self.weight_elements,
            self.in_elements,
            self.out_elements,
            self.inputs,
            self.outputs,
        )


def node_facts(graph: Graph, batch: int) -> dict[str, NodeFacts]:
    """Facts of every op that gives a tensor, in graph order, by node name.

    Args:
        graph: With the shape of every node.
        batch: Samples of a call; sizes follow from the example's in proportion.
    """
    ops = {op.node.name: op for op in weighted_ops(graph.module)}
    ratio = batch / max(1, len(graph.example[0]))
    found = {}
    for node in graph.module.graph.nodes:
        if node.op == "call_function" and _tensors(node):
            found[node.name] = _facts(graph, node, ops.get(node.name), ratio)
    return found


def stored_elsewhere(graph: Graph) -> dict[str, int]:
    """Bytes of stored tensors that are no weight or bias of a weighted op, by their first reader.

    Experts, scales of norms, tables of positions: what no format site counts.
    """
    ops = weighted_ops(graph.module)
    counted = {str(n.target) for op in ops for n in (op.weight, op.bias) if n is not None}
    found: dict[str, int] = {}
    for node in graph.module.graph.nodes:
        names = [str(s.target) for s in node.all_input_nodes if s.op == "get_attr"]
        for name in names if node.op == "call_function" else ():
            if name not in counted:
                counted.add(name)
                tensor = attribute(graph.module, name)
                size = tensor.numel() * tensor.element_size()
                found[node.name] = found.get(node.name, 0) + size
    return found


def _tensors(node: fx.Node) -> list[Tensor]:
    value = node.meta.get("val")
    values = value if isinstance(value, (tuple, list)) else [value]
    return [v for v in values if isinstance(v, Tensor)]


def _facts(graph: Graph, node: fx.Node, op: WeightedOp | None, ratio: float) -> NodeFacts:
    stored = [s for s in node.all_input_nodes if s.op == "get_attr"]
    read = sum(_count(t) for s in node.all_input_nodes if s not in stored for t in _tensors(s))
    written = sum(_count(t) for t in _tensors(node))
    inputs, outputs, window = _sums(graph, node, op)
    return NodeFacts(
        kind=_kind(node, op, graph),
        macs=round(node_macs(graph, node) * ratio),
        weight_elements=sum(attribute(graph.module, str(s.target)).numel() for s in stored),
        in_elements=round(read * ratio),
        out_elements=round(written * ratio),
        inputs=inputs,
        outputs=outputs,
        window=window,
    )


def _count(tensor: Tensor) -> int:
    return math.prod(sizes_of(tensor))


def _kind(node: fx.Node, op: WeightedOp | None, graph: Graph) -> NodeKind:
    if op is not None and op.window is not None:
        weight = attribute(graph.module, str(op.weight.target))
        return "depthwise" if weight.shape[1] == 1 and op.window.groups > 1 else "conv"
    if op is not None:
        return "embedding" if op.kind == "embedding" else "linear"
    name = op_name(node)
    return "linear" if name == "linear" else _KIND_OF.get(name, "other")


def _sums(graph: Graph, node: fx.Node, op: WeightedOp | None) -> tuple[int, int, int]:
    """Length of the sum behind an output, outputs, elements of a window."""
    if op is not None and op.kind != "embedding":
        weight = attribute(graph.module, str(op.weight.target))
        return weight[0].numel(), len(weight), math.prod(weight.shape[2:])
    out = sizes_of(_tensors(node)[0])
    kind = _KIND_OF.get(op_name(node), "other")
    if kind in ("matmul", "attention"):
        first = next((v for v in arguments(node).values() if isinstance(v, fx.Node)), node)
        read = sizes_of(_tensors(first)[0]) if _tensors(first) else out
        return (read or [1])[-1], (out or [1])[-1], 1
    channels = out[1] if len(out) >= 4 else out[-1] if out else 1
    return (out or [1])[-1] if kind == "move" else channels, channels, 1
