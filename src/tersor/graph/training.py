"""Which stored tensors of a graph can be trained, and its nodes as functions with gradients.

Integer codes, packed weights and tables of embeddings stay; what multiplies codes may change. The
rounding of a quantiser passes gradients on as if it were none, within its range (straight-through).
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.ao.quantization.fx._decomposed
from torch import Tensor, fx

from tersor.graph.contracts import Graph
from tersor.graph.edit import attribute
from tersor.graph.operators import TRANSPOSED

aten = torch.ops.aten
_decomposed = torch.ops.quantized_decomposed

_MAPS = {
    aten.linear.default,
    aten.conv1d.default,
    aten.conv2d.default,
    aten.conv3d.default,
    aten.conv1d.padding,
    aten.conv2d.padding,
    aten.conv3d.padding,
    *TRANSPOSED,
}
_NORMS = {  # where a norm's weight and bias stand
    aten.layer_norm.default: (2, 3),
    aten.group_norm.default: (2, 3),
    aten.batch_norm.default: (1, 2),
    aten.rms_norm.default: (2,),
}


@dataclass(frozen=True, slots=True)
class Leaf:
    """A stored tensor that can be trained.

    Attributes:
        target: Its name in the module.
        like: The tensor whose size says how large its steps are.
        is_scale: It multiplies integer codes, and is trained by a factor that stays positive.
        readers: Names of the nodes that read it.
    """

    target: str
    like: str
    is_scale: bool
    readers: frozenset[str]


def has_images(nodes: Collection[fx.Node]) -> bool:
    """Whether there is a convolution of images among some nodes."""
    return any(n.target in (aten.conv2d.default, aten.conv2d.padding) for n in nodes)


def map_names(module: fx.GraphModule) -> tuple[str, ...]:
    """Linear maps and convolutions, by name, whatever form their weights have."""
    return tuple(n.name for n in module.graph.nodes if n.target in _MAPS)


def is_rounded(graph: Graph) -> bool:
    """Whether a graph has codes, packed weights or quantisers."""
    return bool(graph.packed) or any(n.target in _TWINS for n in graph.module.graph.nodes)


def leaves(graph: Graph, fixed: Collection[str] = ()) -> tuple[Leaf, ...]:
    """Weights, biases, norms' affine tensors, and the scales of rounded weights.

    Args:
        graph: Any graph of the pipeline.
        fixed: Names of ops whose tensors stay as they are.
    """
    found: dict[str, Leaf] = {}
    for node in graph.module.graph.nodes:
        if node.name in fixed or node.op != "call_function":
            continue
        for target, like, is_scale in _trained_of(graph, node):
            found.setdefault(target, Leaf(target, like, is_scale, _readers(graph.module, target)))
    return tuple(leaf for leaf in found.values() if not leaf.readers & set(fixed))


def _trained_of(graph: Graph, node: fx.Node) -> list[tuple[str, str, bool]]:
    if node.target in _NORMS:
        places = _NORMS[node.target]
        stored = [_stored(graph, node.args[p]) for p in places if p < len(node.args)]
        first = next((s for s in stored if s is not None), None)
        return [(s, first, False) for s in stored if s is not None and first is not None]
    if node.target not in _MAPS:
        return []
    weight, bias = node.args[1], node.args[2] if len(node.args) > 2 else None
    found: list[tuple[str, str, bool]] = []
    like = own = _stored(graph, weight)
    if own is not None and own not in graph.packed:
        found.append((own, own, False))
    if isinstance(weight, fx.Node) and weight.target is _decomposed.dequantize_per_channel.default:
        like = scale = _stored(graph, weight.args[1])
        if scale is not None:
            found.append((scale, scale, True))
    shift = _stored(graph, bias)
    if shift is not None:
        found.append((shift, like or shift, False))
    return found


def _stored(graph: Graph, value: Any) -> str | None:
    if not isinstance(value, fx.Node) or value.op != "get_attr":
        return None
    target = str(value.target)
    return target if attribute(graph.module, target).is_floating_point() else None


def _readers(module: fx.GraphModule, target: str) -> frozenset[str]:
    nodes = [n for n in module.graph.nodes if n.op == "get_attr" and str(n.target) == target]
    return frozenset(user.name for node in nodes for user in node.users)


def forward(node: fx.Node, env: Mapping[str, Any]) -> Any:
    """The value of one call, with gradients; rounding is straight-through."""
    args = fx.map_arg(node.args, lambda n: env[n.name])
    kwargs = fx.map_arg(node.kwargs, lambda n: env[n.name])
    assert callable(node.target)
    twin = _TWINS.get(node.target, node.target)
    return twin(*args, **kwargs)


def _rounded(
    x: Tensor, step: float, zero_point: int, low: int, high: int, dtype: torch.dtype
) -> Tensor:
    """Quantised and restored at once, as integers have no gradients."""
    del dtype
    return torch.fake_quantize_per_tensor_affine(x, step, zero_point, low, high)


def _restored(x: Tensor, *grid: Any, **named: Any) -> Tensor:
    del grid, named  # done by ``_rounded``
    return x


def _expanded(codes: Tensor, scale: Tensor, zero_points: Any, axis: int, *grid: Any) -> Tensor:
    del grid
    assert zero_points is None  # ``graph.apply`` writes symmetric weights
    shape = [1] * codes.dim()
    shape[axis] = -1
    return codes.to(scale.dtype) * scale.reshape(shape)


_TWINS: dict[Any, Callable[..., Any]] = {
    _decomposed.quantize_per_tensor.default: _rounded,
    _decomposed.dequantize_per_tensor.default: _restored,
    _decomposed.dequantize_per_channel.default: _expanded,
}
