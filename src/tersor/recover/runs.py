"""A graph that runs on all batches at once, from one position to the next.

Between two positions only the values that are still needed are in memory.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from tersor.graph.edit import attribute, execute
from tersor.recover.samples import Flat

Values = dict[str, Any]  # of one batch, by node


class Run:
    """All batches in one graph.

    ``tensor_of`` gives the stored tensors, which may have been trained since.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        batches: Sequence[Flat],
        tensor_of: Callable[[str], Tensor] | None = None,
    ) -> None:
        self.module = module
        self.nodes: list[fx.Node] = list(module.graph.nodes)
        self.place = {node.name: i for i, node in enumerate(self.nodes)}
        self.values: list[Values] = [{} for _ in batches]
        self._batches = batches
        self._tensor_of = tensor_of
        self._done: set[str] = set()
        holders = [n.name for n in self.nodes if n.op == "placeholder"]
        self._inputs = {name: i for i, name in enumerate(holders)}

    def run(self, nodes: Collection[fx.Node], keep: Collection[str] = ()) -> list[Values]:
        """Run some nodes, in graph order; those that were run before are left out.

        Args:
            nodes: What is run; all that they read has been run.
            keep: Values that are wanted beside those that later nodes read.

        Returns:
            The wanted values, one entry a batch.
        """
        wanted: list[Values] = [{} for _ in self.values]
        fresh = {n.name for n in nodes} - self._done
        with torch.no_grad():
            for node in self.nodes:
                if node.name not in fresh or node.op in ("get_attr", "output"):
                    continue
                for values, flat, found in zip(self.values, self._batches, wanted, strict=True):
                    value = values[node.name] = self._value(node, flat, values)
                    if node.name in keep:
                        found[node.name] = value
                self._done.add(node.name)
                self._forget(node)
        return wanted

    def _value(self, node: fx.Node, flat: Flat, values: Mapping[str, Any]) -> Any:
        if node.op == "placeholder":
            return flat[self._inputs[node.name]]
        stored = {s.name: self._stored(s) for s in node.all_input_nodes if s.op == "get_attr"}
        return execute(self.module, node, {**values, **stored})

    def _stored(self, node: fx.Node) -> Tensor:
        """As it is now: it may stand far in front of its reader, and be trained in between."""
        target = str(node.target)
        if self._tensor_of is None:
            return attribute(self.module, target)
        return self._tensor_of(target).detach()

    def _forget(self, node: fx.Node) -> None:
        """Drop what no node that is still to come reads."""
        for source in node.all_input_nodes:
            if source.op != "get_attr" and all(user.name in self._done for user in source.users):
                for values in self.values:
                    values.pop(source.name, None)

    def upto(self, names: Collection[str], keep: Collection[str]) -> list[Values]:
        """Run everything up to the last of some nodes."""
        stop = max(self.place[name] for name in names)
        return self.run(self.nodes[: stop + 1], keep)
