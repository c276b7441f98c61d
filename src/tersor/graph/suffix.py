"""What an edit changes in a graph, and all that follows from it: found once, run on many batches.

Everything before it is taken from a run of the original. A node has changed if its target or its
arguments have, or if the tensor that it stands for is another one.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from tersor.graph.contracts import Graph
from tersor.graph.edit import (
    Environment,
    attribute,
    execute,
    last_uses,
    literals,
    parameters_by_name,
)
from tersor.graph.mutation import has_mutation


@dataclass(frozen=True, slots=True)
class Suffix:
    """The nodes of an edited graph that compute something else than the original's.

    Attributes:
        module: The edited graph.
        nodes: Those nodes, in order.
        reads: Names of the values that they take from a run of the original.
        own_bytes: Of the tensors that the original does not have.
        is_whole: The graph writes in place, and is run from its inputs.
    """

    module: fx.GraphModule
    nodes: tuple[fx.Node, ...]
    reads: frozenset[str]
    own_bytes: int
    is_whole: bool = False
    _done: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def run(self, flat: Sequence[Tensor], before: Mapping[str, Any]) -> Any:
        """The outputs of the edited graph.

        Args:
            flat: Flat inputs.
            before: Values of the original on them, by node: at least those that ``reads`` names.
        """
        with torch.no_grad():
            if self.is_whole:
                return self.module(*(t.clone() for t in flat))
            env: Environment = {name: before[name] for name in self.reads}
            for node in self.nodes:
                env[node.name] = execute(self.module, node, env)
                for name in self._done.get(node.name, ()):
                    env.pop(name, None)
        output = _output(self.module)
        return env[output] if output in env else before[output]


class Original:
    """A graph that edits are compared with; what can be known about it once."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self._literals = {node.name: literals(node) for node in graph.module.graph.nodes}
        self._stored = parameters_by_name(graph.module)
        self._done = last_uses(graph.module)
        self._writes = has_mutation(graph.module.graph)
        self.output = _output(graph.module)

    def suffix(self, edited: Graph) -> Suffix:
        """What an edit of the graph changes; nodes that stay keep their names."""
        module, own = edited.module, self._own_bytes(edited.module)
        if has_mutation(module.graph):
            return Suffix(module, (), frozenset(), own, is_whole=True)
        dirty: dict[str, fx.Node] = {}
        reads: set[str] = set()
        for node in module.graph.nodes:
            sources = {source.name for source in node.all_input_nodes}
            if self._is_changed(module, node) or not sources.isdisjoint(dirty):
                dirty[node.name] = node
                reads |= sources - dirty.keys()
        reads = reads or {self.output}
        return Suffix(module, tuple(dirty.values()), frozenset(reads), own, _done=last_uses(module))

    def values(self, flat: Sequence[Tensor], wanted: Collection[str]) -> Environment:
        """Values of some nodes, and of the output, in one forward pass; others are dropped."""
        keep = {*wanted, self.output}
        module, env = self.graph.module, Environment()
        stream = (t.clone() if self._writes else t for t in flat)
        with torch.no_grad():
            for node in module.graph.nodes:
                is_input = node.op == "placeholder"
                env[node.name] = next(stream) if is_input else execute(module, node, env)
                for name in self._done.get(node.name, ()):
                    if name not in keep:
                        del env[name]
        return env

    def _is_changed(self, module: fx.GraphModule, node: fx.Node) -> bool:
        if node.op == "get_attr":
            return self._is_new(module, str(node.target))
        return literals(node) != self._literals.get(node.name)

    def _is_new(self, module: fx.GraphModule, name: str) -> bool:
        if name not in self._stored:
            return True
        left, right = attribute(module, name), self._stored[name]
        return left.shape != right.shape or left.data_ptr() != right.data_ptr()

    def _own_bytes(self, module: fx.GraphModule) -> int:
        found = parameters_by_name(module)
        return sum(
            t.numel() * t.element_size() for n, t in found.items() if self._is_new(module, n)
        )


def _output(module: fx.GraphModule) -> str:
    return str(next(node.name for node in module.graph.nodes if node.op == "output"))
