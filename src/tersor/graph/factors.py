"""A layer as a chain of thinner ones: their names, their place in the graph, their arithmetic.

The last op of a chain keeps the node of the layer, and so its name: whoever reads the layer reads
the chain, and profiles lead back to the site. The others are named after it.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx

from tersor.core.errors import ShapeError
from tersor.graph.contracts import Factor, SiteChange
from tersor.graph.operators import WeightedOp, Window
from tersor.graph.quantizer import rounded

aten = torch.ops.aten

_CONVS: dict[int, Any] = {1: aten.conv1d.default, 2: aten.conv2d.default, 3: aten.conv3d.default}
LONGEST = 3  # ops of a chain: two, or three where both sides of a convolution are reduced


def chain_names(op: str, length: int) -> tuple[str, ...]:
    """The nodes of a chain of so many ops in the place of one."""
    return (*(f"{op}_factor{i}" for i in range(length - 1)), op)


def insert_chain(
    graph: fx.Graph, tensors: dict[str, Tensor], op: WeightedOp, change: SiteChange
) -> list[tuple[fx.Node, Window | None]]:
    """Put a change's factors in the place of an op; quantisers are still missing.

    Args:
        graph: Is edited.
        tensors: By target; gets the factors, in the type of the weight that they replace.
        op: In ``graph``.
        change: With factors.

    Returns:
        The nodes of the chain in order, with how each moves over its input.

    Raises:
        ShapeError: Factors that do not fit each other or the op, or no bias.
    """
    stored = str(op.weight.target)
    _check(change, tuple(tensors[stored].shape), op)
    dtype, value = tensors[stored].dtype, op.data
    chain: list[tuple[fx.Node, Window | None]] = []
    names = chain_names(op.node.name, len(change.factors))
    for i, (name, factor) in enumerate(zip(names, change.factors, strict=True)):
        is_last = i == len(names) - 1
        bias = change.bias if is_last else factor.bias
        with graph.inserting_before(op.node):
            weight = _stored_weight(graph, tensors, f"{stored}_factor{i}", name, factor, dtype)
            offset = None
            if bias is not None:
                target = f"{stored}_factor{i}_bias"
                tensors[target] = bias.to(dtype)
                offset = graph.create_node("get_attr", target, name=f"{name}_factor_bias")
            target_op, rest = _call_of(factor.window)
            args = (value, weight, offset, *rest)
            if is_last:
                op.node.target, op.node.args, op.node.kwargs = target_op, args, {}
                node = op.node
            else:
                node = graph.create_node("call_function", target_op, args, name=name)
        chain.append((node, factor.window))
        value = node
    return chain


def _check(change: SiteChange, shape: tuple[int, ...], op: WeightedOp) -> None:
    shapes = [tuple(f.dense().shape) for f in change.factors]
    whole = tuple(product(change.factors).shape) if _fit(shapes) else None
    if len(shapes) < 2 or op.kind == "embedding" or whole != shape or change.bias is None:
        raise ShapeError(
            f"{change.site.name}: factors {shapes} for a weight {shape}, bias "
            f"{'absent' if change.bias is None else 'given'}; wanted at least two whose product has "
            "that shape, and the bias of the last one"
        )


def _fit(shapes: Sequence[tuple[int, ...]]) -> bool:
    """Whether each factor reads what the one before it writes, and no kernel axis is covered twice."""
    reads = all(b[1] == a[0] for a, b in pairwise(shapes))
    sizes = [[k for k in axis if k != 1] for axis in zip(*(s[2:] for s in shapes), strict=False)]
    return reads and len({len(s) for s in shapes}) == 1 and all(len(axis) < 2 for axis in sizes)


def _stored_weight(
    graph: fx.Graph,
    tensors: dict[str, Tensor],
    target: str,
    name: str,
    factor: Factor,
    dtype: torch.dtype,
) -> fx.Node:
    if factor.codes is None or factor.scale is None:
        tensors[target] = factor.dense().to(dtype)
        return graph.create_node("get_attr", target, name=f"{name}_factor")
    tensors[f"{target}_codes"] = factor.codes.to(torch.int8)
    tensors[f"{target}_scale"] = factor.scale.to(torch.float32)
    codes = graph.create_node("get_attr", f"{target}_codes", name=f"{name}_factor_codes")
    scale = graph.create_node("get_attr", f"{target}_scale", name=f"{name}_factor_scale")
    return graph.create_node(
        "call_function",
        torch.ops.quantized_decomposed.dequantize_per_channel.default,
        (codes, scale, None, 0, -127, 127, torch.int8),
        name=f"{name}_factor_dequantize",
    )


def _call_of(window: Window | None) -> tuple[Any, tuple[Any, ...]]:
    """The op, and its arguments behind data, weight and bias."""
    if window is None:
        return aten.linear.default, ()
    padding = [before for before, _ in window.padding]
    rest = (list(window.stride), padding, list(window.dilation), window.groups)
    return _CONVS[len(window.kernel)], rest


def run_chain(data: Tensor, change: SiteChange) -> Tensor:
    """What a change's chain gives for the layer's input, in torch: the edited graph's arithmetic.

    Args:
        data: As the layer reads it, before any quantiser.
        change: With factors and a bias.
    """
    value = data
    for i, factor in enumerate(change.factors):
        quantizer = factor.quantizer if i else change.quantizer
        if quantizer is not None:
            value = rounded(value, quantizer) + quantizer.shift
        bias = change.bias if i == len(change.factors) - 1 else factor.bias
        function, rest = _call_of(factor.window)
        weight = factor.dense().to(value.dtype)
        value = function(value, weight, None if bias is None else bias.to(value.dtype), *rest)
    return value


def product(factors: Sequence[Factor]) -> Tensor:
    """The one weight that factors stand for [c_out, c_in, *kernel], float64.

    Each axis of the kernel belongs to one of the factors; in the others it is 1.
    """
    whole = factors[0].dense().double()
    for factor in factors[1:]:
        left = factor.dense().double()
        axes = whole.dim() - 2
        # [o, k.., c, l..]: then k and l side by side, of which one is 1.
        found = torch.tensordot(left, whole, dims=([1], [0]))
        order = [0, 1 + axes]
        for axis in range(axes):
            order += [1 + axis, 2 + axes + axis]
        sizes = [a * b for a, b in zip(left.shape[2:], whole.shape[2:], strict=True)]
        whole = found.permute(order).reshape(left.shape[0], whole.shape[1], *sizes)
    return whole
