"""Residual blocks of few channels as one op: ``kernels.narrow_block`` in place of their convolutions.

A block is relu(conv(relu(conv(x))) + x), 3x3 and 3x3, or with a 1x1 convolution of x in place of x, and
nothing else reads what is between. Blocks of more than 64 channels, those whose ends are no eights, and those
whose weights are not constants, stay convolutions.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from tersor.backends.inductor.filling import writers
from tersor.backends.inductor.work import float_constant, is_call, is_inner
from tersor.kernels.narrow_block import CHANNELS, STRIDES, block_weights, narrow_block

_aten = torch.ops.aten
_PREFIX = "tersor_block_"
_WIDE, _NARROW = (3, 3), (1, 1)  # kernels
_WHOLE = 8  # channels that are read at once
_DEFAULTS: tuple[Any, ...] = (None, (1, 1), (0, 0), (1, 1), 1)  # of a convolution, from its bias on


class _Conv(NamedTuple):
    """A convolution with constants: what it reads, its weight and bias, and one stride."""

    source: Any
    weight: Tensor
    bias: Tensor | None
    stride: int


class _Block(NamedTuple):
    first: _Conv
    second: _Conv
    short: _Conv | None
    last: fx.Node  # its second convolution
    parts: tuple[fx.Node, ...]  # its convolutions and its addition


def fuse_blocks(
    graph: fx.Graph, tensors: dict[str, Tensor], dtype: torch.dtype
) -> tuple[dict[str, str], set[str]]:
    """Let blocks be one op each.

    Args:
        graph: Changed in place.
        tensors: Of the graph; gets the weights of blocks in ``dtype`` and their biases in float32.
        dtype: float16 or bfloat16.

    Returns:
        New node -> the node whose place it took, the block's second convolution; names of new tensors.
    """
    sources: dict[str, str] = {}
    added: set[str] = set()
    for node in list(graph.nodes):
        block = _block(node, tensors)
        if block is None:
            continue
        limit = torch.finfo(dtype).max
        first, second, short = block.first, block.second, block.short
        made = block_weights(
            first.weight.clamp(-limit, limit), first.bias, second.weight.clamp(-limit, limit), second.bias,
            dtype=dtype,
            short=None if short is None else short.weight.clamp(-limit, limit),
            short_bias=None if short is None else short.bias,
        )  # fmt: skip
        names = [
            None if t is None else f"{_PREFIX}{node.name}_{n}"
            for n, t in zip(made._fields, made, strict=True)
        ]
        known = {n: t for n, t in zip(names, made, strict=True) if n is not None and t is not None}
        tensors |= known
        added |= known.keys()
        with graph.inserting_before(node):
            parts = [None if name is None else graph.get_attr(name) for name in names]
            found = graph.call_function(narrow_block, (first.source, *parts, first.stride))
        sources[found.name] = block.last.name
        node.replace_all_uses_with(found)
    graph.eliminate_dead_code()
    return sources, added


def block_ops(module: fx.GraphModule) -> frozenset[str]:
    """The names of the convolutions and additions that blocks take in, and of those that write what they read."""
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    blocks = [_block(node, tensors) for node in module.graph.nodes]
    parts = {part for block in blocks if block is not None for part in block.parts}
    return frozenset({part.name for part in parts} | writers(module.graph, tensors, parts))


def _block(node: fx.Node, tensors: Mapping[str, Tensor]) -> _Block | None:
    total: Any = node.args[0] if is_call(node, _aten.relu.default) else None
    if not is_inner(total, _aten.add.Tensor) or total.kwargs:
        return None
    for last, other in (total.args, total.args[::-1]):
        second = _conv(last, tensors, _WIDE)
        if second is None or second.stride != 1 or not is_inner(second.source, _aten.relu.default):
            continue
        inner = second.source.args[0]
        first = _conv(inner, tensors, _WIDE)
        if first is None or not _fit(first, second):
            continue
        if other is first.source:
            if first.stride == 1 and second.weight.shape[0] == first.weight.shape[1]:
                return _Block(first, second, None, last, (inner, last, total))
            continue
        short = _conv(other, tensors, _NARROW)
        if short is not None and short.source is first.source and short.stride == first.stride:
            return _Block(first, second, short, last, (inner, last, other, total))
    return None


def _fit(first: _Conv, second: _Conv) -> bool:
    between, inp = first.weight.shape[:2]
    out = second.weight.shape[0]
    is_chain = second.weight.shape[1] == between
    whole = inp % _WHOLE == 0 and out % _WHOLE == 0
    return is_chain and whole and max(inp, between, out) <= CHANNELS[-1]


def _conv(value: Any, tensors: Mapping[str, Tensor], kernel: tuple[int, int]) -> _Conv | None:
    """A convolution that one node reads, with a border of half its kernel."""
    if not is_inner(value, _aten.conv2d.default) or value.kwargs:
        return None
    source, weight, *rest = value.args
    options: tuple[Any, ...] = (*rest, *_DEFAULTS[len(rest) :])
    bias, stride, border, dilation, groups = options
    step = stride[0]
    wanted = (tuple(k // 2 for k in kernel), _NARROW, 1)
    if (tuple(border), tuple(dilation), groups) != wanted or tuple(stride) != (step, step):
        return None
    values, shift = (float_constant(v, tensors) for v in (weight, bias))
    if values is None or (bias is not None and shift is None):
        return None
    if tuple(values.shape[2:]) != kernel or step not in STRIDES:
        return None
    return _Conv(source, values, shift, step)
