"""Additions of two activations, such as residual ones, whose operands may be read as integers.

An integer layer that is followed by a float addition writes floats, and what joins it has to be
there in floats as well: with the operands rounded, the addition becomes part of the convolution
in front of it, and a residual stream is stored in integers only. An operand that some layer reads
too is rounded by that layer's quantiser; the result of a convolution, which nothing else reads, by
one of its own; any other operand stays as it is.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, fx

from tersor.core.records import ADD_PREFIX, Site
from tersor.graph.axes.rulebook import sizes_of
from tersor.graph.contracts import AddStatistics, Graph, SiteStatistics
from tersor.graph.edit import run_all
from tersor.graph.operators import weighted_ops
from tersor.observe.streams import Histogram

aten = torch.ops.aten


def addition_sites(graph: Graph, sites: Sequence[Site]) -> tuple[Site, ...]:
    """One format site for each addition that may read integers, in graph order.

    Args:
        graph: Normalised.
        sites: The format sites of layers; pinned ones read no integers.
    """
    shared = _shared(sites)
    convs = _convolutions(graph)
    found = []
    for node in graph.module.graph.nodes:
        operands = _operands(node)
        tensors = [a.name for a in operands if a.name in shared]
        own = [a.name for a in operands if _is_own(a, shared, convs)]
        if tensors or (operands and len(own) == len(operands)):
            found.append(
                Site(
                    name=f"{ADD_PREFIX}{node.name}",
                    kind="format",
                    ops=(node.name,),
                    op_kind="add",
                    tensor=tensors[0] if tensors else None,
                )
            )
    return tuple(found)


def addition_statistics(
    graph: Graph,
    additions: Sequence[Site],
    layers: Mapping[str, Site],
    statistics: Mapping[str, SiteStatistics],
    batches: Sequence[Sequence[Tensor]],
) -> dict[str, AddStatistics]:
    """What quantisers of the operands are chosen from, by site name; one pass where one is needed.

    Args:
        graph: The original.
        additions: As ``addition_sites`` gives them.
        layers: Format sites by name.
        statistics: Of the layers, by site name.
        batches: Flat inputs of calibration samples.
    """
    shared = _shared(layers.values())
    own = own_operands(graph, additions, layers.values())
    seen = _histograms(graph, {t for tensors in own.values() for t in tensors}, batches)
    nodes = {n.name: n for n in graph.module.graph.nodes}
    found = {}
    for site in additions:
        names = [a.name for a in _operands(nodes[site.ops[0]])]
        found[site.name] = AddStatistics(
            shared={t: statistics[shared[t]] for t in names if t in shared},
            own={t: (seen[t].counts, seen[t].edges()) for t in own[site.name]},
        )
    return found


def own_operands(
    graph: Graph, additions: Sequence[Site], layers: Iterable[Site]
) -> dict[str, tuple[str, ...]]:
    """Addition -> its operands that are the result of a convolution and read by nothing else."""
    shared, convs = _shared(layers), _convolutions(graph)
    nodes = {n.name: n for n in graph.module.graph.nodes}
    return {
        site.name: tuple(a.name for a in _operands(nodes[site.ops[0]]) if _is_own(a, shared, convs))
        for site in additions
        if site.ops[0] in nodes
    }


def _shared(sites: Iterable[Site]) -> dict[str, str]:
    """Tensor -> the first layer that may read it as integers."""
    found: dict[str, str] = {}
    for site in sites:
        if site.tensor is not None and site.pinned is None and site.op_kind in ("linear", "conv"):
            found.setdefault(site.tensor, site.name)
    return found


def _convolutions(graph: Graph) -> set[str]:
    return {op.node.name for op in weighted_ops(graph.module) if op.kind == "conv"}


def _is_own(node: fx.Node, shared: Mapping[str, str], convs: set[str]) -> bool:
    return node.name in convs and node.name not in shared and len(node.users) == 1


def _operands(node: fx.Node) -> tuple[fx.Node, ...]:
    """Both operands of an addition of two computed tensors of one shape; () of anything else."""
    if node.target is not aten.add.Tensor or node.kwargs or len(node.args) != 2:
        return ()
    pair = [a for a in node.args if isinstance(a, fx.Node) and a.op == "call_function"]
    shapes = {tuple(sizes_of(a.meta["val"])) for a in pair}
    return tuple(pair) if len(pair) == 2 and pair[0] is not pair[1] and len(shapes) == 1 else ()


def _histograms(
    graph: Graph, names: set[str], batches: Sequence[Sequence[Tensor]]
) -> dict[str, Histogram]:
    found = {name: Histogram() for name in names}
    for flat in batches if names else ():
        values = run_all(graph.module, flat)
        for name, histogram in found.items():
            histogram.add_(values[name])
    return found
