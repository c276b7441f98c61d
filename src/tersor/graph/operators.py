"""Ops that own a weight: where their operands stand, and their input as rows."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from tersor.ops.moments import unfold

aten = torch.ops.aten

_CONVS: dict[Any, int] = {
    aten.conv1d.default: 1,
    aten.conv2d.default: 2,
    aten.conv3d.default: 3,
    aten.conv1d.padding: 1,
    aten.conv2d.padding: 2,
    aten.conv3d.padding: 3,
}
TRANSPOSED = {
    aten.conv_transpose1d.default,
    aten.conv_transpose2d.input,
    aten.conv_transpose3d.input,
}


@dataclass(frozen=True, slots=True)
class Window:
    """How a convolution walks over its input."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int

    @property
    def is_padded(self) -> bool:
        """Whether zeros are added at any border."""
        return any(before or after for before, after in self.padding)


@dataclass(frozen=True, slots=True)
class WeightedOp:
    """One node that reads a stored weight."""

    node: fx.Node
    kind: str  # linear | conv | embedding
    data: fx.Node  # what it reads
    weight: fx.Node  # get_attr
    bias: fx.Node | None
    window: Window | None = None

    @property
    def channel_dim(self) -> int:
        """The dimension of ``data`` that holds the input channels."""
        return -1 if self.window is None else 1


def weighted_op(node: fx.Node, weights: dict[str, Tensor]) -> WeightedOp | None:
    """Read a node as an op with a stored weight, or None."""
    if node.op != "call_function":
        return None
    if node.target is aten.embedding.default:
        return _with_operands(node, "embedding", data=1, weight=0, bias=None)
    if node.target is aten.linear.default:
        return _with_operands(node, "linear", data=0, weight=1, bias=2)
    if node.target in _CONVS:
        return _convolution(node, _CONVS[node.target], weights)
    return None


def _with_operands(
    node: fx.Node, kind: str, *, data: int, weight: int, bias: int | None
) -> WeightedOp | None:
    operands = node.args
    source, matrix = operands[data], operands[weight]
    offset = operands[bias] if bias is not None and len(operands) > bias else None
    if not _is_stored(matrix) or not isinstance(source, fx.Node) or _is_stored(source):
        return None
    if offset is not None and not _is_stored(offset):
        return None
    return WeightedOp(node, kind, source, matrix, offset)  # type: ignore[arg-type]


def _is_stored(value: Any) -> bool:
    return isinstance(value, fx.Node) and value.op == "get_attr"


def _convolution(node: fx.Node, rank: int, weights: dict[str, Tensor]) -> WeightedOp | None:
    op = _with_operands(node, "conv", data=0, weight=1, bias=2)
    if op is None:
        return None
    kernel = tuple(weights[str(op.weight.target)].shape[2:])
    rest = [*node.args[3:], *[None] * 4]
    stride = _repeat(rest[0], rank, 1)
    dilation = _repeat(rest[2], rank, 1)
    groups = rest[3] if isinstance(rest[3], int) else 1
    padding = _padding(rest[1], kernel, dilation, rank)
    window = Window(kernel, stride, padding, dilation, groups)
    return WeightedOp(op.node, op.kind, op.data, op.weight, op.bias, window)


def _repeat(value: Any, rank: int, default: int) -> tuple[int, ...]:
    if value is None:
        return (default,) * rank
    if isinstance(value, int):
        return (value,) * rank
    values = tuple(int(v) for v in value)
    return values * rank if len(values) == 1 else values


def _padding(
    value: Any, kernel: tuple[int, ...], dilation: tuple[int, ...], rank: int
) -> tuple[tuple[int, int], ...]:
    if value == "same":
        totals = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        return tuple((t // 2, t - t // 2) for t in totals)
    if value == "valid":
        return ((0, 0),) * rank
    return tuple((p, p) for p in _repeat(value, rank, 0))


def as_rows(
    data: Tensor, op: WeightedOp, mask: Tensor | None = None, keep: Tensor | None = None
) -> Tensor:
    """The op's input as rows [t, g, n].

    Args:
        data: What the op reads.
        op: Linear or convolution.
        mask: Real tokens [batch, tokens]; only those become rows.
        keep: Indices of the rows that are wanted; a convolution gathers only those.
    """
    if op.window is None:
        rows = _token_rows(data, mask)
        return rows if keep is None else rows[keep]
    window = op.window
    pads = [side for pair in reversed(window.padding) for side in pair]
    padded = torch.nn.functional.pad(data, pads) if any(pads) else data
    if keep is not None:
        return _rows_at(padded, window, keep)
    return unfold(
        padded,
        window.kernel,
        window.stride,
        (0,) * len(window.kernel),
        window.dilation,
        window.groups,
    )


def _token_rows(data: Tensor, mask: Tensor | None) -> Tensor:
    if mask is not None and data.dim() == 3 and data.shape[:2] == mask.shape:
        return data[mask].unsqueeze(1)
    return data.reshape(-1, 1, data.shape[-1])


def _rows_at(padded: Tensor, window: Window, keep: Tensor) -> Tensor:
    """Some rows of the unfolded input, without unfolding the others."""
    rank = len(window.kernel)
    view = padded
    for dim in range(rank):
        kernel, dilation = window.kernel[dim], window.dilation[dim]
        view = view.unfold(2 + dim, dilation * (kernel - 1) + 1, window.stride[dim])
        view = view[..., ::dilation]
    sizes = (view.shape[0], *view.shape[2 : 2 + rank])
    batch, *places = torch.unravel_index(keep, sizes)
    where: tuple[Tensor | slice, ...] = (batch, slice(None), *places)
    picked = view[where]  # [t, c, *kernel]
    return picked.reshape(len(keep), window.groups, -1)


def row_count(data: Tensor, op: WeightedOp, mask: Tensor | None = None) -> int:
    """How many rows ``as_rows`` gives."""
    if op.window is None:
        if mask is not None and data.dim() == 3 and data.shape[:2] == mask.shape:
            return int(mask.sum())
        return data.numel() // data.shape[-1]
    window = op.window
    count = int(data.shape[0])
    for dim, size in enumerate(data.shape[2:]):
        reach = window.dilation[dim] * (window.kernel[dim] - 1) + 1
        count *= (int(size) + sum(window.padding[dim]) - reach) // window.stride[dim] + 1
    return count


def output_rows(output: Tensor, op: WeightedOp, mask: Tensor | None = None) -> Tensor:
    """The op's output as rows [t, g, m], in the order of ``as_rows``."""
    if op.window is None:
        if mask is not None and output.dim() == 3 and output.shape[:2] == mask.shape:
            return output[mask].unsqueeze(1)
        return output.reshape(-1, 1, output.shape[-1])
    groups = op.window.groups
    return output.movedim(1, -1).reshape(-1, groups, output.shape[1] // groups)


def grouped_weight(weight: Tensor, groups: int) -> Tensor:
    """A weight [out, ...] as [g, m, n], float64."""
    return weight.detach().double().reshape(groups, weight.shape[0] // groups, -1)


def input_channels(op: WeightedOp, weight: Tensor) -> int:
    """Channels of what the op reads."""
    groups = 1 if op.window is None else op.window.groups
    return int(weight.shape[1]) * groups


def weighted_ops(module: fx.GraphModule) -> list[WeightedOp]:
    """All ops with a stored weight, in graph order."""
    weights = {
        str(n.target): _tensor(module, str(n.target))
        for n in module.graph.nodes
        if n.op == "get_attr"
    }
    found = (weighted_op(node, weights) for node in module.graph.nodes)
    return [op for op in found if op is not None]


def _tensor(module: fx.GraphModule, target: str) -> Tensor:
    from tersor.graph.edit import attribute

    return attribute(module, target)
