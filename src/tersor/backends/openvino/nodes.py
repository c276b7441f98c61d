"""Names of layers in a compiled model lead back to nodes of the graph."""

import re

_LAYER = re.compile(r"([^/,]+)/([A-Za-z_]\w*\.[\w.]+)(?:/|$)")
# What a fused node is called after, in this order: the op that does its work.
_RANKS = (
    re.compile(r"aten\.(linear|conv\w*|embedding)\."),
    re.compile(r"aten\.(scaled_dot_product|matmul|bmm|mm|baddbmm|addmm)"),
    re.compile(r"aten\.(?!view|reshape|permute|transpose|unsqueeze|squeeze|expand|slice|clone)"),
)


def source_name(layers: str) -> str | None:
    """The graph node that a runtime node stands for, or None.

    Args:
        layers: Comma-separated names of the layers that were fused into it; those that come from
            the graph read ``node/namespace.op.overload/Kind``.

    Returns:
        The first node that owns a weight, else the first that multiplies matrices, else the
        first that computes anything, else the first.
    """
    found = [m.groups() for m in (_LAYER.match(name) for name in layers.split(",")) if m]
    for rank in _RANKS:
        for node, target in found:
            if rank.match(target):
                return node
    return found[0][0] if found else None
