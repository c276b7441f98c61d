"""Numbers in the code that follow a cut: groups of convolutions and of norms, as the graph rewrites them.

A module knows how many groups it has, and not which channels belong to them; the graph does.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from tersor.graph.axes import Axes, keep_units
from tersor.graph.axes.macs import node_macs
from tersor.graph.axes.rulebook import arguments, op_name

_NAMES = {  # op -> the argument that says how many groups it has, as modules name it
    "conv1d": "groups",
    "conv2d": "groups",
    "conv3d": "groups",
    "conv_transpose1d": "groups",
    "conv_transpose2d": "groups",
    "conv_transpose3d": "groups",
    "group_norm": "num_groups",
}


def macs_share(axes: Axes, kept: Mapping[str, Tensor]) -> float:
    """Multiply-accumulates after a cut, of those before.

    Args:
        axes: Of the model with all of its units.
        kept: Group -> indices of the units that stay.
    """
    whole = {w.name: w.units for w in axes.widths}
    keep = {n: k.tolist() for n, k in kept.items() if len(k) < whole[n]}
    totals = [
        sum(node_macs(graph, node) for node in graph.module.graph.nodes)
        for graph in (axes.graph, keep_units(axes.graph, axes, keep))
    ]
    return totals[1] / totals[0] if totals[0] else 1.0


def literals_after(axes: Axes, kept: Mapping[str, Tensor]) -> dict[str, dict[str, int]]:
    """What becomes of the groups: name of the weight -> attribute of its module -> value.

    Args:
        axes: Of the model with all of its units.
        kept: Group -> indices of the units that stay.
    """
    whole = {w.name: w.units for w in axes.widths}
    keep = {n: k.tolist() for n, k in kept.items() if len(k) < whole[n]}
    graph = keep_units(axes.graph, axes, keep, meta=False) if keep else axes.graph
    found: dict[str, dict[str, int]] = {}
    for node in graph.module.graph.nodes:
        if node.op != "call_function" or op_name(node) not in _NAMES:
            continue
        given = arguments(node)
        weight, name = given.get("weight"), _NAMES[op_name(node)]
        if isinstance(weight, torch.fx.Node) and weight.op == "get_attr":
            found[str(weight.target)] = {name: int(given[name])}
    return found
