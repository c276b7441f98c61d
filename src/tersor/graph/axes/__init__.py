"""What may shrink in a graph: labels of elements, one rule an op, widths, cutting, the law."""

import time

from tersor.graph.axes.analysis import Walk
from tersor.graph.axes.macs import mac_share
from tersor.graph.axes.slicing import keep_units
from tersor.graph.axes.widths import Axes, Coupling, Pinned, Width, find_widths
from tersor.graph.contracts import Graph
from tersor.graph.meta import ensure

__all__ = ["Axes", "Coupling", "Pinned", "Width", "analyse_axes", "keep_units", "mac_share"]


def analyse_axes(graph: Graph) -> Axes:
    """Find every width of a graph: one walk, linear in nodes and elements.

    Args:
        graph: Normalised; its nodes know their shapes, or are run once on fake tensors.
    """
    start = time.perf_counter()
    ensure(graph)
    walk = Walk(graph.module).run()
    return find_widths(graph, walk, time.perf_counter() - start)
