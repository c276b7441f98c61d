"""From an entry of the zoo to its graph."""

import operator

from tersor.capture.module import Captured, capture
from tersor.capture.samples import Samples, flatten_item
from tersor.graph.contracts import Graph
from tests.conformance.zoo.entry import ZooModel


def captured(entry: ZooModel) -> Captured:
    """Build and capture one model."""
    call, tensors = flatten_item(entry.inputs(), entry.name)
    return capture(entry.build(), Samples(call, tensors))


def ops_of(graph: Graph) -> frozenset[str]:
    """Names of all functions that a graph calls."""
    found = {n.target for n in graph.module.graph.nodes if n.op == "call_function"}
    return frozenset(
        f"operator.{f.__name__}" if f in vars(operator).values() else str(f) for f in found
    )
