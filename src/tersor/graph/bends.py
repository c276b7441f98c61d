"""Whether nothing but a ReLU sees a node's value, and where that ReLU is cut off above."""

import math
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten

_RELUS = (aten.relu.default, aten.relu_.default)
_CLAMPS = (
    aten.hardtanh.default,
    aten.hardtanh_.default,
    aten.clamp.default,
    aten.clamp_min.default,
)
_SIX = (aten.relu6.default, aten.relu6_.default)
# What moves values or takes the largest of some: a ReLU behind it is one before it.
_PASSES = (
    aten.max_pool1d.default,
    aten.max_pool2d.default,
    aten.max_pool3d.default,
    aten.view.default,
    aten.reshape.default,
    aten.flatten.using_ints,
    aten.permute.default,
    aten.transpose.int,
    aten.contiguous.default,
    aten.clone.default,
)


def ceiling_behind(node: fx.Node) -> float | None:
    """The ceiling of the ReLU through which alone a node is seen, infinity for a plain one.

    Several readers count where all are such, with one ceiling.

    Returns:
        None where anything else reads the node, or nothing does.
    """
    found = {_ceiling(reader) for reader in node.users}
    return found.pop() if len(found) == 1 else None


def _ceiling(reader: fx.Node) -> float | None:
    if reader.target in _RELUS:
        return math.inf
    if reader.target in _SIX:
        return 6.0
    if reader.target in _CLAMPS:
        return _clamp(reader)
    return ceiling_behind(reader) if reader.target in _PASSES else None


def _clamp(node: fx.Node) -> float | None:
    """The upper end of a clamp that begins at 0."""
    bounds: list[Any] = [*node.args[1:3], None, None][:2]
    low = node.kwargs.get("min", node.kwargs.get("min_val", bounds[0]))
    high = node.kwargs.get("max", node.kwargs.get("max_val", bounds[1]))
    if low is None or isinstance(low, fx.Node) or float(low) != 0.0:
        return None
    if isinstance(high, fx.Node):
        return None
    return math.inf if high is None else float(high)
