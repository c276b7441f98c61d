"""Channels of images filled up to eights: what a card's convolutions of 16-bit floats read at once.

A convolution of 12 channels takes half again as long as one of 16, since libraries have no fast kernel for it or
copy the tensor into one that has. So the tensors that share a number of channels get more of them, which come out
of weights of zeros, and whose readers have zeros for them; whatever is done to them in between is finite and read
by nobody.
"""

from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn.functional import pad

EIGHT = 8
_aten = torch.ops.aten
_CONV = _aten.conv2d.default
_LINEAR = _aten.linear.default
_OF_ONE = {  # what is computed of each element, or of each channel's plane, alone
    _aten.relu.default, _aten.relu6.default, _aten.hardtanh.default, _aten.clamp.default, _aten.silu.default,
    _aten.gelu.default, _aten.hardswish.default, _aten.hardsigmoid.default, _aten.sigmoid.default,
    _aten.tanh.default, _aten.leaky_relu.default, _aten.elu.default, _aten.max_pool2d.default,
    _aten.avg_pool2d.default, _aten.adaptive_avg_pool2d.default,
}  # fmt: skip
_OF_TWO = {_aten.add.Tensor, _aten.sub.Tensor, _aten.mul.Tensor}
_MEAN = _aten.mean.dim
_PLANE = ({2, 3}, {-2, -1})


@dataclass(slots=True)
class _Group:
    """Tensors with the same channels.

    Attributes:
        convs: The convolutions that write them.
        readers: The convolutions and linears that read them.
        is_closed: Something else writes or reads one of them.
    """

    convs: list[fx.Node] = field(default_factory=list)
    readers: list[fx.Node] = field(default_factory=list)
    is_closed: bool = False


def fill_channels(graph: fx.Graph, tensors: dict[str, Tensor]) -> None:
    """Fill the channels of images up to eights where all that meets them is known.

    Args:
        graph: Changed in place.
        tensors: Of the graph; gets the filled weights.
    """
    for group in _groups(graph, tensors):
        counts = {_weight(n, tensors).shape[0] for n in group.convs}
        if group.is_closed or len(counts) != 1:
            continue
        (channels,) = counts
        more = -channels % EIGHT
        if more and all(_weight(n, tensors).shape[1] == channels for n in group.readers):
            _fill(graph, tensors, group, more)
    graph.eliminate_dead_code()


def writers(graph: fx.Graph, tensors: Mapping[str, Tensor], nodes: Container[fx.Node]) -> set[str]:
    """The names of the convolutions that write what shares channels with what some nodes read or write.

    Filled are the channels of floats alone: where one of these is computed in codes, none of them are.
    """
    return {
        conv.name
        for group in _groups(graph, tensors)
        if any(n in nodes for n in (*group.convs, *group.readers))
        for conv in group.convs
    }


def _groups(graph: fx.Graph, tensors: Mapping[str, Tensor]) -> Iterator[_Group]:
    """Every convolution in one of them."""
    seen: set[fx.Node] = set()
    for node in graph.nodes:
        if node in seen or not _is_filled(node, tensors):
            continue
        group, waiting = _Group(), [node]
        while waiting:
            now = waiting.pop()
            if now in seen:
                continue
            seen.add(now)
            waiting += _met(now, group, tensors)
        yield group


def _met(node: fx.Node, group: _Group, tensors: Mapping[str, Tensor]) -> list[fx.Node]:
    """Note what a tensor's writer and readers are; the tensors that have its channels, too."""
    found: list[fx.Node] = []
    if _is_filled(node, tensors):
        group.convs.append(node)
    else:
        sources = [a for a in node.args if isinstance(a, fx.Node)]
        group.is_closed |= not _keeps(node) or (node.target in _OF_TWO and len(sources) != 2)
        found += sources
    for user in node.users:
        if _reads(user, node, tensors):
            group.readers.append(user)
        elif _keeps(user):
            found.append(user)
        else:
            group.is_closed = True
    return found


def _keeps(node: fx.Node) -> bool:
    """Whether the result has the channels of what is read, each for itself."""
    if node.op != "call_function" or any(isinstance(v, fx.Node) for v in node.kwargs.values()):
        return False
    if node.target in _OF_TWO or node.target in _OF_ONE:
        return True
    return node.target is _MEAN and set(node.args[1]) in _PLANE  # type: ignore[arg-type]


def _reads(node: fx.Node, source: fx.Node, tensors: Mapping[str, Tensor]) -> bool:
    """Whether a layer with constant weights reads the channels, each with its own of them."""
    if not _is_layer(node, tensors) or node.args[0] is not source or source in node.args[1:]:
        return False
    is_flat = source.target is _MEAN and not _keeps_plane(source)
    return bool(node.target is not _LINEAR or is_flat)


def _keeps_plane(node: fx.Node) -> bool:
    """Whether a mean leaves sizes of one: its channels are then not the last dimension."""
    return bool(node.args[2]) if len(node.args) > 2 else bool(node.kwargs.get("keepdim"))


def _is_filled(node: fx.Node, tensors: Mapping[str, Tensor]) -> bool:
    """Whether it is a convolution whose result may get channels."""
    return node.target is _CONV and _is_layer(node, tensors)


def _is_layer(node: fx.Node, tensors: Mapping[str, Tensor]) -> bool:
    if node.op != "call_function" or node.target not in (_CONV, _LINEAR) or node.kwargs:
        return False
    constants = [a for a in node.args[1:3] if a is not None]
    known = [_constant(a, tensors) for a in constants]
    if any(t is None or t.dtype != torch.float32 for t in known):
        return False
    return bool(node.target is _LINEAR or len(node.args) < 7 or node.args[6] == 1)


def _constant(value: Any, tensors: Mapping[str, Tensor]) -> Tensor | None:
    is_constant = isinstance(value, fx.Node) and value.op == "get_attr"
    return tensors.get(str(value.target)) if is_constant else None


def _weight(node: fx.Node, tensors: Mapping[str, Tensor]) -> Tensor:
    found = _constant(node.args[1], tensors)
    assert found is not None
    return found


def _fill(graph: fx.Graph, tensors: dict[str, Tensor], group: _Group, more: int) -> None:
    def put(node: fx.Node, place: int, sides: tuple[int, ...]) -> None:
        old = _constant(node.args[place], tensors)
        if old is None:  # no bias
            return
        name = f"tersor_filled_{node.name}_{place}"
        tensors[name] = pad(old.detach(), sides)
        with graph.inserting_before(node):
            node.update_arg(place, graph.get_attr(name))

    for node in group.convs:
        put(node, 1, (0, 0, 0, 0, 0, 0, 0, more))
        if len(node.args) > 2:
            put(node, 2, (0, more))
    for node in group.readers:
        put(node, 1, (0, more) if node.target is _LINEAR else (0, 0, 0, 0, 0, more))
