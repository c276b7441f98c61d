"""A graph run by torch itself, behind the same interface as a build."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tersor.core.errors import DataError
from tersor.graph.contracts import Graph, Shapes
from tersor.graph.shapes import built_sizes, sizes_of


class GraphExecutable:
    """Runs a graph with torch on the CPU; what search evaluations and parity checks use."""

    is_dynamic = True  # any size that the graph takes

    def __init__(self, graph: Graph) -> None:
        self.graph = graph

    def at(self, shapes: Shapes) -> "GraphExecutable":
        """Itself: torch compiles nothing."""
        del shapes
        return self

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """One forward pass.

        Raises:
            DataError: Sizes that the graph leaves open, but can't compute.
        """
        signature = self.graph.signature
        flat = [torch.from_numpy(np.ascontiguousarray(inputs[s.name])) for s in signature.inputs]
        try:
            outputs = self.graph.run(flat)
        except (RuntimeError, IndexError) as error:
            sizes = sizes_of(signature, {name: a.shape for name, a in inputs.items()})
            if not sizes:
                raise
            raise DataError(
                f"the model can't run at {sizes} ({str(error).splitlines()[0]}); it was captured "
                f"at {built_sizes(signature)}: pad or crop to sizes that it knows"
            ) from error
        return {s.name: t.numpy() for s, t in zip(signature.outputs, outputs, strict=True)}
