"""A graph becomes a float graph, whose weights are inputs, and what was taken out of it.

Pricing builds one model many times with other formats: all those graphs share the float graph,
so it is converted once (``skeleton``), and weights, biases and quantisers are put back in
milliseconds (``assembly``).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.ao.quantization.fx._decomposed  # registers quantized_decomposed
from numpy.typing import NDArray
from torch import Tensor, fx

from tersor.graph.edit import attribute, copy_graph, rebuild

_aten = torch.ops.aten
_decomposed = torch.ops.quantized_decomposed

_LINEAR = {_aten.linear.default}
_CONV = {
    _aten.conv1d.default,
    _aten.conv2d.default,
    _aten.conv3d.default,
    _aten.conv1d.padding,
    _aten.conv2d.padding,
    _aten.conv3d.padding,
}
_EMBEDDING = {_aten.embedding.default}


@dataclass(frozen=True, slots=True)
class Weight:
    """A stored weight: float values, or integer codes with one scale a slice of ``axis``."""

    values: NDArray[Any]
    scale: NDArray[Any] | None = None
    axis: int = 0
    key: int = 0  # address of the values: one constant for each storage


@dataclass(frozen=True, slots=True)
class Activation:
    """A quantiser before an op: (x * multiply + add) rounded to step * [low, high]."""

    name: str  # the quantise node
    step: float
    zero_point: int
    low: int
    high: int
    multiply: NDArray[Any] | None = None
    add: float = 0.0


@dataclass(frozen=True, slots=True)
class Operation:
    """One linear, convolution or embedding and what belongs to it."""

    name: str
    kind: str  # linear | conv | embedding
    weight_input: str  # placeholder of the float graph
    weight: Weight
    bias: NDArray[Any] | None = None
    activation: Activation | None = None


@dataclass(frozen=True, slots=True)
class Addition:
    """An addition that reads operands through quantisers, in the tensors' own units.

    Attributes:
        operands: Position of an operand -> its quantiser.
    """

    name: str
    operands: Mapping[int, Activation]


@dataclass(frozen=True, slots=True)
class Split:
    """The float graph and its operations; placeholders of the weights come last, in order."""

    module: fx.GraphModule
    operations: tuple[Operation, ...]
    additions: tuple[Addition, ...] = ()
    weight_shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


def split(module: fx.GraphModule) -> Split:
    """Take weights, biases and quantisers of linears, convolutions, embeddings and additions out.

    Anything that does not look as ``graph.apply`` writes it stays in the float graph.
    """
    graph, tensors = copy_graph(module)
    operations, additions = [], []
    for node in list(graph.nodes):
        node.meta = {}
        operation = _take(graph, node, tensors)
        if operation is not None:
            operations.append(operation)
        addition = _take_addition(node, tensors)
        if addition is not None:
            additions.append(addition)
    shapes = {o.weight_input: tuple(o.weight.values.shape) for o in operations}
    return Split(rebuild(graph, tensors), tuple(operations), tuple(additions), shapes)


def _kind(node: fx.Node) -> str | None:
    for kind, targets in (("linear", _LINEAR), ("conv", _CONV), ("embedding", _EMBEDDING)):
        if node.op == "call_function" and node.target in targets:
            return kind
    return None


def _take(graph: fx.Graph, node: fx.Node, tensors: Mapping[str, Tensor]) -> Operation | None:
    kind = _kind(node)
    if kind is None:
        return None
    position = 0 if kind == "embedding" else 1
    weight = _weight(node.args[position], tensors)
    if weight is None:
        return None
    arguments = list(node.args)
    arguments[position] = _placeholder(graph, f"{node.name}__weight")
    bias = activation = None
    if kind != "embedding":
        bias = _bias(arguments, tensors)
        arguments[0], activation = _activation(arguments[0], tensors)
    node.args = tuple(arguments)
    return Operation(node.name, kind, f"{node.name}__weight", weight, bias, activation)


def _take_addition(node: fx.Node, tensors: Mapping[str, Tensor]) -> Addition | None:
    if not _is_call(node, _aten.add.Tensor):
        return None
    arguments, found = list(node.args), {}
    for position, value in enumerate(arguments):
        source, activation = _restored(value, tensors)
        if activation is not None:
            arguments[position], found[position] = source, activation
    node.args = tuple(arguments)
    return Addition(node.name, found) if found else None


def _restored(value: Any, tensors: Mapping[str, Tensor]) -> tuple[Any, Activation | None]:
    """The float tensor behind a quantiser whose scale and shift are undone, and the quantiser."""
    inner, factor = _factor(value, tensors)
    shift = 0.0
    if _is_private(inner, _aten.sub.Tensor) and isinstance(inner.args[1], float):
        inner, shift = inner.args[0], inner.args[1]
    source, activation = _activation(inner, tensors)
    if activation is None or activation.add != shift:
        return value, None
    undone = activation.multiply is None and factor is None
    if activation.multiply is not None and factor is not None:
        undone = np.allclose(activation.multiply * factor, 1.0, rtol=1e-5)
    return (source, activation) if undone else (value, None)


def _placeholder(graph: fx.Graph, name: str) -> fx.Node:
    last = [n for n in graph.nodes if n.op == "placeholder"]
    first = next(iter(graph.nodes))
    with graph.inserting_after(last[-1]) if last else graph.inserting_before(first):
        return graph.create_node("placeholder", name, name=name)


def _stored(value: Any, tensors: Mapping[str, Tensor]) -> Tensor | None:
    if isinstance(value, fx.Node) and value.op == "get_attr":
        return tensors[str(value.target)].detach()
    return None


def _float(value: Any, tensors: Mapping[str, Tensor]) -> Tensor | None:
    tensor = _stored(value, tensors)
    return tensor if tensor is not None and tensor.dtype == torch.float32 else None


def _array(tensor: Tensor) -> NDArray[Any]:
    array: NDArray[Any] = tensor.cpu().contiguous().numpy()
    return array


def _weight(value: Any, tensors: Mapping[str, Tensor]) -> Weight | None:
    stored = _float(value, tensors)
    if stored is not None:
        return Weight(_array(stored), key=stored.data_ptr())
    if not isinstance(value, fx.Node):
        return None
    if value.target is not _decomposed.dequantize_per_channel.default:
        return None
    codes, scale, zero_points, axis = value.args[:4]
    integers, steps = _stored(codes, tensors), _float(scale, tensors)
    if integers is None or integers.dtype != torch.int8 or steps is None:
        return None
    if zero_points is not None or not isinstance(axis, int):
        return None
    return Weight(_array(integers), _array(steps), axis, integers.data_ptr())


def _bias(arguments: list[Any], tensors: Mapping[str, Tensor]) -> NDArray[Any] | None:
    bias = _float(arguments[2], tensors) if len(arguments) > 2 else None
    if bias is None:
        return None
    arguments[2] = None
    return _array(bias)


def _activation(value: Any, tensors: Mapping[str, Tensor]) -> tuple[Any, Activation | None]:
    """The float tensor behind a quantiser, and the quantiser; or the value itself and None."""
    if not _is_call(value, _decomposed.dequantize_per_tensor.default):
        return value, None
    quantize = value.args[0]
    if not _is_call(quantize, _decomposed.quantize_per_tensor.default):
        return value, None
    if quantize.args[1:] != value.args[1:] or not all(
        isinstance(a, int | float) for a in quantize.args[1:5]
    ):
        return value, None
    source, add = _shift(quantize.args[0])
    source, multiply = _factor(source, tensors)
    step, zero_point, low, high = quantize.args[1:5]
    grid = (float(step), int(zero_point), int(low), int(high))
    return source, Activation(quantize.name, *grid, multiply, add)


def _is_call(value: Any, target: Any) -> bool:
    return isinstance(value, fx.Node) and value.op == "call_function" and value.target is target


def _is_private(value: Any, target: Any) -> bool:
    return _is_call(value, target) and len(value.users) == 1 and not value.kwargs


def _shift(value: Any) -> tuple[Any, float]:
    if _is_private(value, _aten.add.Tensor) and isinstance(value.args[1], float):
        return value.args[0], value.args[1]
    return value, 0.0


def _factor(value: Any, tensors: Mapping[str, Tensor]) -> tuple[Any, NDArray[Any] | None]:
    if _is_private(value, _aten.mul.Tensor):
        factor = _float(value.args[1], tensors)
        if factor is not None:
            return value.args[0], _array(factor)
    return value, None


def stored_tensors(module: fx.GraphModule) -> dict[str, Tensor]:
    """What is left in the float graph, by target."""
    targets = sorted({str(n.target) for n in module.graph.nodes if n.op == "get_attr"})
    return {target: attribute(module, target).detach() for target in targets}
