"""Activations between two linear layers, whose function may be replaced by a cheaper one.

Only those that one linear layer reads, and nothing else: its weight takes up what the other
function does differently.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from tersor.core.records import ACTIVATION_PREFIX, Site
from tersor.graph.axes.rulebook import sizes_of
from tersor.graph.contracts import ActivationStatistics, Graph
from tersor.graph.edit import execute, last_uses
from tersor.graph.operators import WeightedOp
from tersor.observe.activations import (
    activation_readers,
    activation_statistics_of,
    kept_rows,
    rows_of_batch,
)
from tersor.observe.statistics import token_mask


def activation_sites(graph: Graph, sites: Sequence[Site]) -> tuple[Site, ...]:
    """One format site for each smooth activation that a linear layer alone reads, in graph order.

    Args:
        graph: Normalised.
        sites: The format sites of layers; where the reader is pinned, so is the activation.

    Returns:
        Their ``units`` are the values that they compute for one sample of the example.
    """
    by_op = {op: site for site in sites for op in site.ops}
    return tuple(
        Site(
            name=f"{ACTIVATION_PREFIX}{node.name}",
            kind="format",
            ops=(node.name,),
            op_kind="activation",
            units=math.prod(sizes_of(node.meta["val"])[1:]),
            pinned=by_op[op.node.name].pinned,
        )
        for node, op in activation_readers(graph).items()
        if op.node.name in by_op and len(by_op[op.node.name].ops) == 1
    )


def activation_statistics(
    graph: Graph, sites: Sequence[Site], batches: Sequence[Sequence[Tensor]], seed: int
) -> dict[str, ActivationStatistics]:
    """What replacements are fitted to, by site name; a pass up to each of them, when it is asked.

    Args:
        graph: The original.
        sites: As ``activation_sites`` gives them.
        batches: Flat inputs of calibration samples.
        seed: Of the subsampling.
    """
    by_name = {node.name: (node, op) for node, op in activation_readers(graph).items()}
    found = {}
    for site in sites:
        node, op = by_name[site.ops[0]]

        def rows(node: fx.Node = node, op: WeightedOp = op) -> Tensor:
            return _rows_before(graph, node, op, batches, seed)

        found[site.name] = activation_statistics_of(graph, node, op, rows, rows)
    return found


def _rows_before(
    graph: Graph, node: fx.Node, op: WeightedOp, batches: Sequence[Sequence[Tensor]], seed: int
) -> Tensor:
    """A sample of what an activation reads in the original [t, n]."""
    generator = torch.Generator().manual_seed(seed)
    source, most = node.all_input_nodes[0].name, rows_of_batch(graph, op, len(batches))
    found = []
    with torch.no_grad():
        for flat in batches:
            values = _value_of(graph, source, flat)
            found.append(kept_rows(values, op, token_mask(graph.signature, flat), most, generator))
    return torch.cat(found)


def _value_of(graph: Graph, name: str, flat: Sequence[Tensor]) -> Tensor:
    """One tensor of a pass, which ends there."""
    env: dict[str, Any] = {}
    inputs, done = iter(flat), last_uses(graph.module)
    for node in graph.module.graph.nodes:
        is_input = node.op == "placeholder"
        env[node.name] = next(inputs) if is_input else execute(graph.module, node, env)
        if node.name == name:
            break
        for gone in done.get(node.name, ()):
            del env[gone]
    found: Tensor = env[name]
    return found
