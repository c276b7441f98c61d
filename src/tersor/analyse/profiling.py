"""Where a pass through the graph spends its time, node by node."""

import time
from typing import Any

import torch
from torch import Tensor, fx

from tersor.graph.contracts import Graph

WARMUPS = 3  # the first pass allocates and picks kernels, the next ones fill the caches


def profile_nodes(graph: Graph) -> dict[str, float]:
    """Milliseconds of each function call in one eager pass of one sample, after warm-ups.

    The ops run one by one in torch: shares say where the work is, not what a build will take.
    """
    inputs = [t[:1] if t.dim() else t for t in graph.example]
    with torch.no_grad():
        timed = _Timed(graph.module)
        for _ in range(WARMUPS + 1):
            timed.milliseconds.clear()
            timed.run(*[t.clone() for t in inputs])  # a model may write to its inputs
    return timed.milliseconds


class _Timed(fx.Interpreter):
    """Reads the clock around every call."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.milliseconds: dict[str, float] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Run one node and note how long it took."""
        start = time.perf_counter_ns()
        value: Tensor | Any = super().run_node(n)
        if n.op == "call_function":
            self.milliseconds[n.name] = (time.perf_counter_ns() - start) / 1e6
        return value
