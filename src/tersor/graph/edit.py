"""Small tools for graphs: copies, attributes, and running some of the nodes."""

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from tersor.graph.mutation import has_mutation

Environment = dict[str, Any]  # node name -> value


def parameters_by_name(module: fx.GraphModule) -> dict[str, Tensor]:
    """All tensors that get_attr nodes refer to, by target."""
    return {
        str(node.target): attribute(module, str(node.target))
        for node in module.graph.nodes
        if node.op == "get_attr"
    }


def attribute(module: torch.nn.Module, target: str) -> Tensor:
    """The tensor behind a dotted name."""
    value: Any = module
    for part in target.split("."):
        value = getattr(value, part)
    if not isinstance(value, Tensor):
        raise TypeError(f"{target} is {type(value).__name__}, not a tensor")
    return value


def rebuild(
    graph: fx.Graph, tensors: Mapping[str, Tensor], *, remove_dead: bool = True
) -> fx.GraphModule:
    """A graph module of its own from a graph and the tensors that it refers to."""
    if remove_dead:
        graph.eliminate_dead_code()
    used = {str(n.target) for n in graph.nodes if n.op == "get_attr"}
    return fx.GraphModule({name: tensors[name].detach() for name in sorted(used)}, graph).eval()


def copy_graph(module: fx.GraphModule) -> tuple[fx.Graph, dict[str, Tensor]]:
    """A copy of the graph with the same node names, and the tensors it refers to (not copied)."""
    graph = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    for node in module.graph.nodes:
        twin = graph.create_node(
            node.op,
            node.target,
            fx.map_arg(node.args, lambda n: values[n]),
            fx.map_arg(node.kwargs, lambda n: values[n]),
            node.name,
            node.type,
        )
        twin.meta = copy.copy(node.meta)
        values[node] = twin
    return graph, parameters_by_name(module)


def execute(module: fx.GraphModule, node: fx.Node, env: Mapping[str, Any]) -> Any:
    """The value of one call_function or get_attr node, given its inputs' values."""
    if node.op == "get_attr":
        return attribute(module, str(node.target))
    args = fx.map_arg(node.args, lambda n: env[n.name])
    kwargs = fx.map_arg(node.kwargs, lambda n: env[n.name])
    if node.op == "output":
        return args[0]
    if node.op != "call_function" or not callable(node.target):
        raise TypeError(f"node {node.name}: op {node.op} has no place in a normalised graph")
    return node.target(*args, **kwargs)


def run_all(module: fx.GraphModule, inputs: Iterable[Tensor]) -> Environment:
    """One forward pass that keeps the value of every node, by name."""
    env: Environment = {}
    writes = has_mutation(module.graph)
    stream = (t.clone() if writes else t for t in inputs)
    with torch.no_grad():
        for node in module.graph.nodes:
            env[node.name] = (
                next(stream) if node.op == "placeholder" else execute(module, node, env)
            )
    return env


def last_uses(module: fx.GraphModule) -> dict[str, list[str]]:
    """For each node the values that nobody needs after it."""
    last: dict[str, str] = {}
    for node in module.graph.nodes:
        for source in node.all_input_nodes:
            last[source.name] = node.name
    done: dict[str, list[str]] = {}
    for source, node_name in last.items():
        done.setdefault(node_name, []).append(source)
    return done


def literals(node: fx.Node) -> str:
    """What a node computes, its sources by name: differs where two graphs differ in that node."""
    return f"{node.target} {node.args} {node.kwargs}"


def stored_uses(module: fx.GraphModule) -> dict[str, int]:
    """How many operands of ops each stored tensor is: more than 1 where it is shared."""
    counts: dict[str, int] = {}
    for node in module.graph.nodes:
        if node.op == "get_attr":
            counts[str(node.target)] = counts.get(str(node.target), 0) + len(node.users)
    return counts
