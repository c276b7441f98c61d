"""In-place ops: written as their functional twins, so that a node's value never changes.

Stages keep the values of nodes and compute parts of a graph again; a value that a later node
overwrites would be another one by then. A write to a slice (``x[:, 0] += 1``) becomes a new value
of the whole, and what is read after it is read from that. Writes through other views (a reshape
that another name shows) stay; graphs that hold such a write are always run whole.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten

# A view of a part, and the op that puts a new part into the whole.
_SCATTERS = {
    aten.select.int: aten.select_scatter.default,
    aten.slice.Tensor: aten.slice_scatter.default,
}


def is_mutating(node: fx.Node) -> bool:
    """Whether a node writes to one of its inputs."""
    return _schema_of(node) is not None and bool(_written(node))


def has_mutation(graph: fx.Graph) -> bool:
    """Whether any node writes to one of its inputs."""
    return any(is_mutating(node) for node in graph.nodes)


def remove_mutation(graph: fx.Graph) -> None:
    """Replace every in-place op whose effect shows only in values that can be written again."""
    for node in list(graph.nodes):
        if _schema_of(node) is not None and _written(node):
            _ = _replace_whole(graph, node) or _replace_part(graph, node)


def _replace_whole(graph: fx.Graph, node: fx.Node) -> bool:
    """The op on a value that no other name shows afterwards."""
    twin = _functional_twin(node)
    if twin is None:
        return False
    value = node.args[0]
    assert isinstance(value, fx.Node)
    later = _after(graph, node)
    shared = _sharing(graph, value) - {value, node}
    shared -= {n for n in shared if n in later}
    if any(user in later for other in shared for user in other.users):
        return False
    node.target = twin
    _redirect(value, node, later)
    return True


def _replace_part(graph: fx.Graph, node: fx.Node) -> bool:
    """The op on a slice: the new part, put into a new whole, of which later views are taken."""
    written = _written(node)
    if len(written) != 1 or node.args[:1] != (written[0],):
        return False
    chain = _views(written[0])
    whole = chain[-1]
    later = _after(graph, node)
    names = _sharing(graph, whole) - {node, whole} - later
    shown = [n for n in graph.nodes if n in names and any(user in later for user in n.users)]
    if _base(whole) is not None or any(_views(n)[-1] is not whole for n in shown):
        return False
    with graph.inserting_before(node):
        part = _new_part(graph, node)
        if part is None:
            return False
        fresh = {whole: _put_back(graph, chain, part)}
        for view in [*shown, written[0]]:
            _view_again(graph, view, fresh)
    for old, new in fresh.items():
        _redirect(old, new, later)
    _redirect(node, fresh[written[0]], later)
    graph.erase_node(node)
    return True


def _views(value: fx.Node) -> list[fx.Node]:
    """A value, what it is a slice of, and so on to the whole."""
    chain = [value]
    while chain[-1].target in _SCATTERS:
        source = chain[-1].args[0]
        assert isinstance(source, fx.Node)
        chain.append(source)
    return chain


def _new_part(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    """What an in-place op leaves in the value it writes to; None where that has no plain form."""
    value = node.args[0]
    assert isinstance(value, fx.Node)
    if node.target is aten.copy_.default:
        return _copied(graph, node.args[1], value)
    twin = _functional_twin(node)
    if twin is None:
        return None
    part = _made(graph, twin, node.args, value)
    part.kwargs = dict(node.kwargs)
    return part


def _copied(graph: fx.Graph, source: Any, value: fx.Node) -> fx.Node | None:
    """What ``value`` holds after ``copy_(value, source)``, which does not change its type."""
    known = source.meta.get("val") if isinstance(source, fx.Node) else None
    wanted = value.meta.get("val")
    if not isinstance(known, torch.Tensor) or not isinstance(wanted, torch.Tensor):
        return None
    if known.dtype != wanted.dtype:
        return None
    if known.shape != wanted.shape:
        source = _made(graph, aten.expand_as.default, (source, value), value)
    return _made(graph, aten.clone.default, (source,), value)


def _put_back(graph: fx.Graph, chain: list[fx.Node], part: fx.Node) -> fx.Node:
    """The whole with a new part in place of the first of the chain."""
    for view in chain[:-1]:
        source = view.args[0]
        assert isinstance(source, fx.Node)
        scatter = _SCATTERS[view.target]  # type: ignore[index]
        part = _made(graph, scatter, (source, part, *view.args[1:]), source)
        part.kwargs = dict(view.kwargs)
    return part


def _view_again(graph: fx.Graph, view: fx.Node, fresh: dict[fx.Node, fx.Node]) -> fx.Node:
    """The same slice of the new whole."""
    if view not in fresh:
        source = view.args[0]
        assert isinstance(source, fx.Node)
        args = (_view_again(graph, source, fresh), *view.args[1:])
        fresh[view] = _made(graph, view.target, args, view)
        fresh[view].kwargs = dict(view.kwargs)
    return fresh[view]


def _made(graph: fx.Graph, target: Any, args: tuple[Any, ...], like: fx.Node) -> fx.Node:
    made = graph.call_function(target, args)
    made.meta = dict(like.meta)
    return made


def _redirect(old: fx.Node, new: fx.Node, later: set[fx.Node]) -> None:
    old.replace_all_uses_with(new, delete_user_cb=lambda user: user in later)


def keep_inputs(graph: fx.Graph) -> None:
    """Copy inputs that a remaining in-place op would write to: they are the caller's."""
    for node in written_to(graph):
        if node.op == "placeholder":
            users = set(node.users)
            with graph.inserting_after(node):
                copy = _made(graph, aten.clone.default, (node,), node)
            _redirect(node, copy, users)


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
