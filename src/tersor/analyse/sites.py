"""What may be chosen: one format site for each stored weight."""

import fnmatch
from collections.abc import Sequence

from torch import Tensor, fx

from tersor.core.errors import SiteNotFoundError
from tersor.core.records import Site
from tersor.graph.contracts import Graph
from tersor.graph.edit import attribute
from tersor.graph.operators import TRANSPOSED, WeightedOp, weighted_ops


def find_sites(graph: Graph, keep: Sequence[str] = ()) -> tuple[Site, ...]:
    """All format sites, in graph order.

    Args:
        graph: Normalised.
        keep: Patterns (``fnmatch``) of site names or module paths that stay as they are; a
            pattern also covers everything below a module of that name.

    Raises:
        SiteNotFoundError: A pattern that matches nothing.
    """
    by_weight: dict[str, list[WeightedOp]] = {}
    for op in weighted_ops(graph.module):
        by_weight.setdefault(str(op.weight.target), []).append(op)
    sites = [_site(graph, ops) for ops in by_weight.values()]
    for pattern in keep:
        if not any(matches(site.name, pattern) for site in sites):
            raise SiteNotFoundError(
                f"keep={pattern!r} matches no layer; there are "
                f"{', '.join(s.name for s in sites[:8])}{' ...' if len(sites) > 8 else ''}"
            )
    return tuple(_pin(site, keep) for site in sites)


def matches(name: str, pattern: str) -> bool:
    """Whether a pattern names a site or a module around it."""
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f"{pattern}.*")


def unsupported(graph: Graph) -> dict[str, str]:
    """Nodes with a stored weight that no site covers, with the reason."""
    covered = {op.node.name for op in weighted_ops(graph.module)}
    reasons = {}
    for node in graph.module.graph.nodes:
        if node.op != "call_function" or node.name in covered:
            continue
        if node.target in TRANSPOSED:
            reasons[node.name] = "transposed convolutions have no integer form yet"
        elif _reads_large_parameter(graph, node):
            reasons[node.name] = f"{node.target} reads a stored tensor and has no integer form"
    return reasons


def _reads_large_parameter(graph: Graph, node: fx.Node) -> bool:
    return any(
        source.op == "get_attr" and attribute(graph.module, str(source.target)).dim() >= 2
        for source in node.all_input_nodes
    )


def _site(graph: Graph, ops: list[WeightedOp]) -> Site:
    first = ops[0]
    weight = attribute(graph.module, str(first.weight.target))
    bias = sum(
        _bytes(attribute(graph.module, str(op.bias.target))) for op in ops if op.bias is not None
    )
    tensors = {op.data.name for op in ops}
    return Site(
        name=str(first.weight.target).removesuffix(".weight"),
        kind="format",
        ops=tuple(op.node.name for op in ops),
        op_kind=first.kind,  # type: ignore[arg-type]
        weight=str(first.weight.target),
        shape=tuple(weight.shape),
        groups=1 if first.window is None else first.window.groups,
        tensor=first.data.name if len(tensors) == 1 and first.kind != "embedding" else None,
        macs=sum(_macs(op, weight) for op in ops),
        size_bytes=_bytes(weight) + bias,
        pinned=_reason(ops, weight),
    )


def _reason(ops: list[WeightedOp], weight: Tensor) -> str | None:
    if len({op.kind for op in ops}) > 1:
        return "the weight is shared by ops of different kinds"
    if len({op.bias for op in ops}) > 1:
        return "the weight is shared by ops with different biases"
    if not weight.is_floating_point():
        return f"the weight is {weight.dtype}"
    if weight.numel() == 0:
        return "the weight is empty"
    return None


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _macs(op: WeightedOp, weight: Tensor) -> int:
    if op.kind == "embedding":
        return 0
    value = op.node.meta.get("val")
    if value is None:
        return weight.numel()
    positions = 1
    sizes = value.shape[1:-1] if op.window is None else value.shape[2:]
    for size in sizes:
        positions *= int(size)
    return positions * weight.numel()


def _pin(site: Site, keep: Sequence[str]) -> Site:
    from dataclasses import replace

    pattern = next((p for p in keep if matches(site.name, p)), None)
    return site if pattern is None else replace(site, pinned=f"kept: matches {pattern!r}")
