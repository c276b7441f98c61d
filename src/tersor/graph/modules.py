"""A graph with the original's calling convention, as an ``nn.Module``."""

from typing import Any

from torch import nn

from tersor.core.structure import bind, unflatten
from tersor.graph.contracts import Graph


class GraphModule(nn.Module):
    """Calls like the original model; ``graph_module`` holds the nodes and the tensors."""

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.graph_module = graph.module
        self._signature = graph.signature

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The original's containers around what the graph computes."""
        flat = bind(self._signature, args, kwargs)
        return unflatten(self._signature.result, list(self.graph_module(*flat)))
