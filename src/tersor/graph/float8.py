"""8-bit floats in a graph: how ``apply`` writes them, and how backends find them again.

A tensor is read as ``(clamp(x / step) as float8) as float32 * step``, a weight as ``float8 as float32 *
scale``, all of it in torch's own ops, so that any of its executors computes what the format means.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from tersor.core.errors import BackendError, ShapeError
from tersor.graph.contracts import Quantizer
from tersor.ops.float8 import FLOAT8, FLOAT8_LIMIT

_aten = torch.ops.aten
SUFFIX = "_fp8"  # of nodes, behind a tensor's name


@dataclass(frozen=True, slots=True)
class Float8Read:
    """A tensor that is read as 8-bit floats: the node of the codes, what they are of, their step."""

    node: fx.Node
    source: fx.Node
    step: float


@dataclass(frozen=True, slots=True)
class Float8Weight:
    """A stored weight of 8-bit floats [out, inp] and its scales [out, 1]: names of the tensors."""

    codes: str
    scale: str


def write_read(graph: fx.Graph, data: fx.Node, quantizer: Quantizer) -> fx.Node:
    """Nodes that read a tensor as 8-bit floats, at the graph's insertion point.

    Raises:
        ShapeError: A quantiser with a channel scale or a shift, which floats have no use for.
    """
    if quantizer.inverse_scale is not None or quantizer.shift:
        raise ShapeError(
            f"{data.name}: an fp8 quantiser with a channel scale or the shift {quantizer.shift}; wanted "
            "neither, as the error of 8-bit floats is relative to each value"
        )
    base = f"{data.name}{SUFFIX}"

    def call(target: Any, arguments: tuple[Any, ...], name: str) -> fx.Node:
        return graph.create_node("call_function", target, arguments, name=f"{base}_{name}")

    units = call(_aten.mul.Tensor, (data, 1.0 / quantizer.step), "units")
    inside = call(_aten.clamp.default, (units, -FLOAT8_LIMIT, FLOAT8_LIMIT), "inside")
    codes = call(_aten.to.dtype, (inside, FLOAT8), "quantize")
    floats = call(_aten.to.dtype, (codes, torch.float32), "floats")
    return call(_aten.mul.Tensor, (floats, quantizer.step), "dequantize")


def write_weight(
    graph: fx.Graph, tensors: dict[str, Tensor], weight: fx.Node, codes: Tensor, scale: Tensor
) -> fx.Node:
    """Nodes of a weight that is stored as 8-bit floats, at the graph's insertion point.

    Args:
        graph: Changed in place.
        tensors: Of the graph; gets codes and scales.
        weight: The weight that they take the place of.
        codes: [out, inp], float8_e4m3fn.
        scale: [out].
    """
    base = str(weight.target)
    tensors[f"{base}_codes"] = codes
    tensors[f"{base}_scale"] = scale.to(torch.float32).reshape(-1, *[1] * (codes.dim() - 1))
    stored, steps = (
        graph.create_node("get_attr", f"{base}_{part}", name=f"{weight.name}_{part}")
        for part in ("codes", "scale")
    )
    floats = graph.create_node(
        "call_function", _aten.to.dtype, (stored, torch.float32), name=f"{weight.name}_floats"
    )
    return graph.create_node(
        "call_function", _aten.mul.Tensor, (floats, steps), name=f"{weight.name}_dequantize"
    )


def float8_read(value: Any) -> Float8Read | None:
    """The 8-bit floats behind a value, as ``write_read`` writes them; None: there are none."""
    step = _constant(value, _aten.mul.Tensor)
    codes = _inner(_inner(value, _aten.mul.Tensor), _aten.to.dtype, torch.float32)
    inside = _inner(codes, _aten.to.dtype, FLOAT8)
    units = _inner(inside, _aten.clamp.default, -FLOAT8_LIMIT, FLOAT8_LIMIT)
    source = _inner(units, _aten.mul.Tensor)
    if step is None or codes is None or source is None:
        return None
    return (
        Float8Read(codes, source, step)
        if _constant(units, _aten.mul.Tensor) == 1.0 / step
        else None
    )


def float8_weight(value: Any, tensors: Mapping[str, Tensor]) -> Float8Weight | None:
    """The stored weight behind a value, as ``write_weight`` writes it; None: it is none."""
    codes = _inner(_inner(value, _aten.mul.Tensor), _aten.to.dtype, torch.float32)
    if codes is None or codes.op != "get_attr" or tensors[str(codes.target)].dtype != FLOAT8:
        return None
    scale = value.args[1]
    if not isinstance(scale, fx.Node) or scale.op != "get_attr":
        return None
    return Float8Weight(str(codes.target), str(scale.target))


def refuse_float8(module: fx.GraphModule, backend: str) -> None:
    """Refuse a graph with 8-bit floats for a backend that does not compute in them.

    Raises:
        BackendError: The graph gives some; names the backend and the first op.
    """
    for node in module.graph.nodes:
        if node.op == "call_function" and node.target is _aten.to.dtype and node.args[1] == FLOAT8:
            raise BackendError(
                f"{backend} has no fp8, which {node.name} is in; build the graph with inductor on a CUDA "
                "device of compute capability 8.9 or more, or leave fp8 out of the plan"
            )


def _inner(value: Any, target: Any, *rest: Any) -> fx.Node | None:
    """The first argument of a call, whose others are as given where any are; None: it is another one."""
    is_call = isinstance(value, fx.Node) and value.op == "call_function" and value.target is target
    if not is_call or value.kwargs or (rest and value.args[1:] != rest):
        return None
    return value.args[0] if isinstance(value.args[0], fx.Node) else None


def _constant(value: Any, target: Any) -> float | None:
    found = value.args[1] if _inner(value, target) is not None else None
    return found if isinstance(found, float) else None
