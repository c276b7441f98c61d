"""A graph run by torch itself, behind the same interface as a build."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tersor.graph.contracts import Graph


class GraphExecutable:
    """Runs a graph with torch on the CPU; what search evaluations and parity checks use."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """One forward pass."""
        signature = self.graph.signature
        flat = [torch.from_numpy(np.ascontiguousarray(inputs[s.name])) for s in signature.inputs]
        outputs = self.graph.run(flat)
        return {s.name: t.numpy() for s, t in zip(signature.outputs, outputs, strict=True)}
