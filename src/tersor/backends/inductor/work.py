"""A graph that is being lowered, and what the steps of it share: constants, quantisers, their codes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.ao.quantization.fx._decomposed  # registers quantized_decomposed
from torch import Tensor, fx

from tersor.kernels.linear8 import quantize_codes

_decomposed = torch.ops.quantized_decomposed
QUANTIZE = _decomposed.quantize_per_tensor.default
DEQUANTIZE = _decomposed.dequantize_per_tensor.default
WEIGHT = _decomposed.dequantize_per_channel.default
# Ops that kernels compute behind their products, by what ``kernels.epilogue`` calls them.
ACTIVATIONS: Mapping[Callable[..., Any], Callable[[fx.Node], str]] = {
    torch.ops.aten.relu.default: lambda _: "relu",
    torch.ops.aten.gelu.default: lambda n: (
        "gelu_tanh" if n.kwargs.get("approximate") == "tanh" else "gelu"
    ),
    torch.ops.aten.silu.default: lambda _: "silu",
}
_MOST = 127  # of an int8 code
_SHIFT = 128  # from unsigned to signed codes


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """What a graph is lowered to.

    Attributes:
        dtype: Of floats: float32, bfloat16 or float16.
        device: Where its tensors live.
        channels_last: Images and the weights of their convolutions have their channels last.
        integers: Linears and convolutions multiply codes; false: the floats that those stand for.
        joins: Linears that read one tensor become one product.
        codes: Weights that are stored as codes stay codes where a kernel reads them.
        blocks: Residual blocks of few channels, where channels are last, and linears and attentions of narrow
            transformers, become one op each; for 16-bit floats.
        eights: Channels of images in floats, and sizes of heads, are filled up to eights.
    """

    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    channels_last: bool = False
    integers: bool = True
    joins: bool = False
    codes: bool = False
    blocks: bool = False
    eights: bool = False


@dataclass(frozen=True, slots=True)
class Grid:
    """A quantiser whose codes are int8."""

    node: fx.Node
    source: Any
    step: float
    zero: int
    low: int
    high: int


@dataclass(slots=True)
class Work:
    """A graph in the making.

    Attributes:
        graph: Changed in place.
        tensors: What it refers to; steps add theirs.
        form: What it becomes.
        sources: New node -> the node whose place it took.
        exact: Tensors that are float32 whatever the build's type is.
    """

    graph: fx.Graph
    tensors: dict[str, Tensor]
    form: Form
    sources: dict[str, str] = field(default_factory=dict)
    exact: set[str] = field(default_factory=set)
    _codes: dict[fx.Node, fx.Node] = field(default_factory=dict)

    def is_coded(self, weight: Any) -> bool:
        """Whether a weight has int8 codes with one scale an output."""
        if not is_call(weight, WEIGHT) or weight.args[2] is not None or weight.args[3] != 0:
            return False
        codes = weight.args[0]
        return codes.op == "get_attr" and self.tensors[str(codes.target)].dtype == torch.int8

    def value(self, node: Any) -> Tensor | None:
        """The tensor of a constant; None: it is none."""
        return value_of(self.tensors, node)

    def read(self, grid: Grid) -> fx.Node:
        """The codes that a quantiser's readers share."""
        if grid.node not in self._codes:
            with self.graph.inserting_after(grid.node):
                arguments = (grid.source, grid.step, grid.zero, grid.low, grid.high)
                found = self.graph.call_function(quantize_codes, arguments)
            self._codes[grid.node] = found
            self.sources[found.name] = grid.node.name
        return self._codes[grid.node]

    def constant(self, name: str, value: Tensor) -> fx.Node:
        """A new tensor, which keeps its type; its reader comes next."""
        name = f"tersor_{name}"
        self.tensors[name] = value
        self.exact.add(name)
        return self.graph.get_attr(name)


def value_of(tensors: Mapping[str, Tensor], node: Any) -> Tensor | None:
    """The tensor of a constant; None: it is none."""
    is_constant = isinstance(node, fx.Node) and node.op == "get_attr"
    return tensors[str(node.target)] if is_constant else None


def float_constant(value: Any, tensors: Mapping[str, Tensor]) -> Tensor | None:
    """The tensor of a constant in float32, without gradients; None: it is none."""
    found = value_of(tensors, value)
    return found.detach() if found is not None and found.dtype == torch.float32 else None


def quantizer(value: Any) -> Grid | None:
    """The quantiser behind a value, its codes moved to int8; None: there is none."""
    if not is_call(value, DEQUANTIZE) or not is_call(value.args[0], QUANTIZE):
        return None
    node = value.args[0]
    if node.args[1:] != value.args[1:]:
        return None
    step, zero, low, high = node.args[1:5]
    shift = _SHIFT if high > _MOST else 0
    return Grid(node, node.args[0], float(step), int(zero) - shift, low - shift, high - shift)


def is_inner(value: Any, target: Callable[..., Any]) -> bool:
    """Whether a value is a call of one function that one node reads."""
    return is_call(value, target) and len(value.users) == 1


def is_call(value: Any, target: Callable[..., Any]) -> bool:
    """Whether a value is a call of one function."""
    return isinstance(value, fx.Node) and value.op == "call_function" and value.target is target
