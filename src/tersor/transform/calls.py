"""Weights that several calls read, as those of twins are: one fit on the rows of all of them.

Where no call depends on another, all can run before anything goes on with their results, so that one fit
sees what each of them reads and what each should give. Where one depends on another (a layer that is
run again on its own result), there is no such order, and the weight stays as it was cut.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush

import torch
from torch import fx

from tersor.graph.operators import WeightedOp

aten = torch.ops.aten
_ADDS = (aten.add.Tensor, aten.add_.Tensor)
Calls = tuple[str, ...]  # names of the nodes that read one weight, in the order in which they run


def shared_calls(
    ops: Mapping[str, WeightedOp], uses: Mapping[str, int], nodes: Sequence[fx.Node]
) -> tuple[list[fx.Node], dict[str, Calls]]:
    """An order of a graph in which the calls of each shared weight come before what follows them.

    Args:
        ops: Ops with a stored weight, by node.
        uses: How many nodes read each stored tensor.
        nodes: The graph, in its own order.

    Returns:
        The order, and node -> all calls of its weight, the last of them last. Weights whose calls depend
        on each other, or that something else reads, have none, and the order is then the graph's own.
    """
    by_weight: dict[str, list[WeightedOp]] = {}
    for op in ops.values():
        by_weight.setdefault(str(op.weight.target), []).append(op)
    groups = [
        found
        for weight, found in by_weight.items()
        if len(found) > 1 and len(found) == uses[weight] and _are_alike(found, uses)
    ]
    while groups:
        order = _sorted(nodes, [[op.node for op in group] for group in groups])
        if order is not None:
            places = {node.name: i for i, node in enumerate(order)}
            names = [
                tuple(sorted((o.node.name for o in g), key=places.__getitem__)) for g in groups
            ]
            return order, {name: calls for calls in names for name in calls}
        # At least one of them is in a circle: those alone that are in none by themselves.
        free = [g for g in groups if _sorted(nodes, [[op.node for op in g]]) is not None]
        groups = free if len(free) < len(groups) else []
    return list(nodes), {}


def in_step(nodes: Sequence[fx.Node], calls: Mapping[str, Calls]) -> list[fx.Node]:
    """Another graph with nodes of those names in such an order; its own where that can't be."""
    found = {n.name: n for n in nodes}
    groups = [[found[c] for c in names if c in found] for names in set(calls.values())]
    return _sorted(nodes, groups) or list(nodes)


def _are_alike(group: Sequence[WeightedOp], uses: Mapping[str, int]) -> bool:
    """Whether one weight and one bias serve all calls, and nothing else."""
    biases = {None if op.bias is None else str(op.bias.target) for op in group}
    kinds = {op.kind for op in group}
    bias = next(iter(biases))
    own = bias is None or uses[bias] == len(group)
    return len(biases) == 1 and len(kinds) == 1 and "embedding" not in kinds and own


def _sorted(nodes: Iterable[fx.Node], groups: Sequence[Sequence[fx.Node]]) -> list[fx.Node] | None:
    """Topological, stable, all of a group before what reads one of it; None: a circle."""
    nodes = list(nodes)
    place = {node: i for i, node in enumerate(nodes)}
    partners = {node: group for group in groups for node in group}
    waits: dict[fx.Node, set[fx.Node]] = {}
    for node in nodes:
        needed = {s for s in node.all_input_nodes if s in place}
        waits[node] = needed | {p for s in needed for p in partners.get(s, ())}
    readers: dict[fx.Node, list[fx.Node]] = {node: [] for node in nodes}
    for node, needed in waits.items():
        for source in needed:
            readers[source].append(node)
    left = {node: len(needed) for node, needed in waits.items()}
    ready = [i for i, node in enumerate(nodes) if not left[node]]
    order: list[fx.Node] = []
    while ready:
        node = nodes[heappop(ready)]
        order.append(node)
        for reader in readers[node]:
            left[reader] -= 1
            if not left[reader]:
                heappush(ready, place[reader])
    return order if len(order) == len(nodes) else None


@dataclass(frozen=True, slots=True)
class Step:
    """One node of one of the two graphs; ``place``: of an input, which one."""

    node: fx.Node
    is_new: bool
    place: int = -1


def merged(
    original: Sequence[fx.Node], new: Sequence[fx.Node], calls: Mapping[str, Calls]
) -> list[Step]:
    """Both graphs in the orders given, each node of the new one after the original's of that name.

    The last of several calls of one weight comes after the original's of all of them.

    A branch's nodes may be in the original alone, and a map in its place stands later.
    """
    places = {node.name: i for i, node in enumerate(original)}
    nodes = [node for node in original if node.op != "output"]
    inputs = [node.name for node in nodes if node.op == "placeholder"]
    steps: list[Step] = []
    done = 0
    for node in new:
        wanted = max(places.get(name, -1) for name in calls.get(node.name, (node.name,)))
        upto = max(done, min(wanted + 1, len(nodes)))
        steps += [
            Step(n, is_new=False, place=inputs.index(n.name) if n.name in inputs else -1)
            for n in nodes[done:upto]
        ]
        done = upto
        if node.op != "output":
            steps.append(Step(node, is_new=True))
    return steps


def others_of(node: fx.Node) -> list[fx.Node]:
    """What the only reader of a node, an addition, adds to it."""
    users = list(node.users)
    if len(users) != 1 or users[0].target not in _ADDS or users[0].kwargs:
        return []
    args = [a for a in users[0].args if isinstance(a, fx.Node) and a is not node]
    return [a for a in args if a.op != "get_attr"]
