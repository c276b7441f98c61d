"""A graph that ends early: one of its values is the output."""

from dataclasses import replace

from torch import fx

from tersor.core.errors import ConfigError
from tersor.core.records import Structure, TensorSpec
from tersor.graph.axes.rulebook import sizes_of
from tersor.graph.contracts import Graph
from tersor.graph.edit import copy_graph, rebuild


def ending_at(graph: Graph, name: str) -> Graph:
    """The part of a graph that one value needs, with that value as its only output.

    All inputs stay, read or not, so that it is called like the whole.

    Raises:
        ConfigError: No node of that name gives a tensor of known size.
    """
    fresh, tensors = copy_graph(graph.module)
    nodes = {node.name: node for node in fresh.nodes}
    value = nodes[name].meta.get("val") if name in nodes else None
    if value is None or not hasattr(value, "shape"):
        raise ConfigError(f"{name}: no node of the graph gives a tensor of that name")
    (last,) = (n for n in fresh.nodes if n.op == "output")
    last.args = ((nodes[name],),)
    _remove_unread(fresh)
    sizes = sizes_of(value)
    spec = TensorSpec(
        name=name, dtype=str(value.dtype).removeprefix("torch."), shape=(None, *sizes[1:])
    )
    signature = replace(
        graph.signature,
        outputs=(spec,),
        result=Structure(kind="tuple", children=(Structure(kind="tensor"),)),
    )
    module = rebuild(fresh, tensors, remove_dead=False)
    held = {str(n.target) for n in fresh.nodes if n.op == "get_attr"}
    packed = {n: p for n, p in graph.packed.items() if n in held}
    return replace(graph, module=module, signature=signature, packed=packed)


def _remove_unread(graph: fx.Graph) -> None:
    for node in reversed(list(graph.nodes)):
        if node.op not in ("placeholder", "output") and not node.users:
            graph.erase_node(node)
