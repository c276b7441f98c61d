"""In-place ops: written as their functional twins, so that a node's value never changes.

Stages keep the values of nodes and compute parts of a graph again; a value that a later node
overwrites would be another one by then. Writes that only a view shows (``x[:, 0] += 1``) stay;
graphs that hold such a write are always run whole.
"""

from collections.abc import Iterable

import torch
from torch import fx


def is_mutating(node: fx.Node) -> bool:
    """Whether a node writes to one of its inputs."""
    return _schema_of(node) is not None and bool(_written(node))


def has_mutation(graph: fx.Graph) -> bool:
    """Whether any node writes to one of its inputs."""
    return any(is_mutating(node) for node in graph.nodes)


def remove_mutation(graph: fx.Graph) -> None:
    """Replace every in-place op whose effect shows only in the value it writes to."""
    for node in list(graph.nodes):
        twin = _functional_twin(node)
        if twin is None:
            continue
        value = node.args[0]
        assert isinstance(value, fx.Node)
        later = _after(graph, node)
        shared = _sharing(graph, value) - {value, node}
        shared -= {n for n in shared if n in later}
        if any(user in later for other in shared for user in other.users):
            continue
        node.target = twin
        value.replace_all_uses_with(node, delete_user_cb=lambda user, late=later: user in late)  # type: ignore[misc]


def written_to(graph: fx.Graph) -> frozenset[fx.Node]:
    """All nodes that share memory with something that a node writes to."""
    targets = [v for node in graph.nodes for v in _written(node)]
    return frozenset(shared for target in targets for shared in _sharing(graph, target))


def _schema_of(node: fx.Node) -> torch.FunctionSchema | None:
    target = node.target
    return target._schema if isinstance(target, torch._ops.OpOverload) else None  # noqa: SLF001


def _written(node: fx.Node) -> list[fx.Node]:
    schema = _schema_of(node)
    if schema is None:
        return []
    named = {a.name: node.kwargs.get(a.name) for a in schema.arguments}
    named |= {a.name: value for a, value in zip(schema.arguments, node.args, strict=False)}
    written = (
        named[a.name]
        for a in schema.arguments
        if a.alias_info is not None and a.alias_info.is_write
    )
    return [value for value in written if isinstance(value, fx.Node)]


def _functional_twin(node: fx.Node) -> torch._ops.OpOverload | None:
    written = _written(node)
    target = node.target
    if len(written) != 1 or node.args[:1] != (written[0],):
        return None
    assert isinstance(target, torch._ops.OpOverload)  # noqa: SLF001
    name = target._schema.name.split("::")[1]  # noqa: SLF001
    if not name.endswith("_") or len(target._schema.returns) != 1:  # noqa: SLF001
        return None
    packet = getattr(getattr(torch.ops, target.namespace), name[:-1], None)
    twin = getattr(packet, target._overloadname, None)  # noqa: SLF001
    is_plain = isinstance(twin, torch._ops.OpOverload) and not twin._schema.is_mutable  # noqa: SLF001
    return twin if is_plain and not _would_promote(node) else None


def _would_promote(node: fx.Node) -> bool:
    """In-place arithmetic keeps the type of what it writes to; the functional form may not."""
    types = [
        n.meta["val"].dtype for n in node.all_input_nodes if hasattr(n.meta.get("val"), "dtype")
    ]
    return any(torch.promote_types(types[0], other) != types[0] for other in types[1:])


def _after(graph: fx.Graph, node: fx.Node) -> set[fx.Node]:
    nodes = list(graph.nodes)
    return set(nodes[nodes.index(node) + 1 :])


def _sharing(graph: fx.Graph, value: fx.Node) -> set[fx.Node]:
    """Everything that may share memory with a value: its bases, and the views of those."""
    root, base = value, _base(value)
    while base is not None:
        root, base = base, _base(base)
    found = {root}
    for node in graph.nodes:
        if _base(node) in found:
            found.add(node)
    return found


def _base(node: fx.Node) -> fx.Node | None:
    """What a node's value may be a view of."""
    if node.op != "call_function":
        return None
    schema = _schema_of(node)
    if schema is None:  # getitem of a list of views
        return _first(node.args)
    if any(r.alias_info is not None for r in schema.returns):
        return _first(node.args)
    return None


def _first(values: Iterable[object]) -> fx.Node | None:
    first = next(iter(values), None)
    return first if isinstance(first, fx.Node) else None
