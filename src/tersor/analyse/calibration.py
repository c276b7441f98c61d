"""Statistics of every site, and the standing check that they predict what layers really do."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tersor.core.errors import NumericalError
from tersor.core.records import Site
from tersor.graph.contracts import Graph, Readers, Rows, SiteStatistics
from tersor.graph.edit import attribute, execute
from tersor.graph.operators import WeightedOp, as_rows, weighted_ops
from tersor.observe.assumed import assumed_moments
from tersor.observe.output_moments import Felt, moment_at
from tersor.observe.statistics import Observed, op_bias, op_weight, token_mask
from tersor.ops.moments import Moments, moments_of, second_moment
from tersor.ops.refit import layer_loss

# Both sides run in float32 at least once; squared differences of outputs of similar size.
SELF_CHECK = 1e-3
_PERTURBATION = 0.05


def site_statistics(
    graph: Graph, sites: Sequence[Site], observed: Mapping[str, Observed], felt: Felt = dict
) -> dict[str, SiteStatistics]:
    """What methods need to know, by site name; embeddings have none of it but their table.

    Args:
        graph: The original.
        sites: Of its layers.
        observed: Statistics by op.
        felt: Calls up the output's gradient moments by op.
    """
    ops = {op.node.name: op for op in weighted_ops(graph.module)}
    readers = tensor_readers(graph, sites)
    # The readers of one tensor share its quantiser, so they share what it is chosen from.
    first: dict[str, Observed] = {}
    for site in sites:
        if site.tensor is not None:
            first.setdefault(site.tensor, observed[site.ops[0]])
    return {
        site.name: _statistics(graph, site, ops[site.ops[0]], _Seen(observed, first, readers, felt))
        for site in sites
    }


@dataclass(frozen=True, slots=True)
class _Seen:
    by_op: Mapping[str, Observed]
    by_tensor: Mapping[str, Observed]
    readers: Mapping[str, Readers]
    felt: Felt


def tensor_readers(graph: Graph, sites: Sequence[Site]) -> dict[str, Readers]:
    """What is true of all the sites that read a tensor, by tensor."""
    ops = {op.node.name: op for op in weighted_ops(graph.module)}
    result: dict[str, Readers] = {}
    for site in sites:
        if site.tensor is None or site.op_kind == "embedding":
            continue
        op = ops[site.ops[0]]
        amax = input_amax(attribute(graph.module, site.weight), op)
        is_padded = op.window is not None and op.window.is_padded
        rows = None
        if site.op_kind == "linear":
            rows = attribute(graph.module, site.weight).detach().float()
        old = result.get(site.tensor)
        if old is not None:
            amax, is_padded = torch.maximum(old.amax, amax), is_padded or old.is_padded
            both = rows is not None and old.weight is not None
            rows = torch.cat([old.weight, rows]) if both else None  # type: ignore[list-item]
        result[site.tensor] = Readers(amax=amax, is_padded=is_padded, weight=rows)
    return result


def input_amax(weight: Tensor, op: WeightedOp) -> Tensor:
    """Largest |w| for each input channel [c_in]."""
    groups = 1 if op.window is None else op.window.groups
    grouped = weight.detach().abs().reshape(groups, -1, weight.shape[1], *weight.shape[2:])
    spare = tuple(range(3, grouped.dim()))
    return grouped.amax((1, *spare)).reshape(-1)


def _statistics(graph: Graph, site: Site, op: WeightedOp, seen: _Seen) -> SiteStatistics:
    if site.op_kind == "embedding":
        return embedding_statistics(attribute(graph.module, site.weight))
    own = seen.by_op[op.node.name]
    shared = own if site.tensor is None else seen.by_tensor[site.tensor]
    readers = seen.readers.get(site.tensor or "")
    return SiteStatistics(
        weight=op_weight(graph, op),
        bias=op_bias(graph, op),
        moments=lambda: own.moments,
        channels=shared.channels,
        counts=shared.counts,
        edges=shared.edges,
        low=shared.low,
        high=shared.high,
        rows=lambda: own.rows,
        readers=readers,
        is_padded=readers is not None and readers.is_padded,
        channel_dim=op.channel_dim,
        window=op.window,
        assumed=lambda: assumed_moments(graph, op),
        output_moment=lambda: moment_at(site.ops, seen.felt),
    )


def embedding_statistics(table: Tensor) -> SiteStatistics:
    """An embedding's input is an index: nothing to know but the table."""
    return SiteStatistics(
        weight=table.detach().double().unsqueeze(0),
        bias=None,
        moments=_no_moments,
        channels=torch.zeros(1, 1),
        counts=torch.zeros(1, dtype=torch.float64),
        edges=torch.zeros(2, dtype=torch.float64),
        low=0.0,
        high=0.0,
        rows=_no_rows,
    )


def _no_moments() -> Moments:
    raise NumericalError("an embedding has no input moments")


def _no_rows() -> Rows:
    raise NumericalError("an embedding has no input rows")


def self_check(
    graph: Graph, flat: Sequence[Tensor], *, seed: int, note: Callable[[str], None]
) -> float:
    """Predicted layer loss tr(D H D^T) against both layers really run, on one batch.

    The layers run as the graph's own nodes, the prediction through rows and moments: the two ways
    share no code. Returns the largest relative difference.

    Raises:
        NumericalError: A layer's loss differs by more than 1e-3: its statistics can't be trusted.
    """
    generator = torch.Generator().manual_seed(seed)
    mask = token_mask(graph.signature, flat)
    ops = {op.node.name: op for op in weighted_ops(graph.module) if op.kind != "embedding"}
    env: dict[str, object] = {}
    stream = iter(flat)
    worst = 0.0
    with torch.no_grad():
        for node in graph.module.graph.nodes:
            is_input = node.op == "placeholder"
            env[node.name] = next(stream) if is_input else execute(graph.module, node, env)
            if node.name in ops:
                worst = max(worst, _check_one(graph, ops[node.name], env, mask, generator))
    note(f"self-check: predicted and run layer losses agree to {worst:.1e}")
    return worst


def _check_one(
    graph: Graph,
    op: WeightedOp,
    env: dict[str, object],
    mask: Tensor | None,
    generator: torch.Generator,
) -> float:
    data, output = env[op.data.name], env[op.node.name]
    assert isinstance(data, Tensor)
    assert isinstance(output, Tensor)
    weight = attribute(graph.module, str(op.weight.target))
    noise = torch.randn(weight.shape, generator=generator) * weight.std(correction=0)
    other = dict(env)
    changed = {op.weight.name: weight + _PERTURBATION * noise}
    other.update(changed)
    moved = execute(graph.module, op.node, other)
    difference = (moved - output).double()
    if mask is not None and op.window is None and output.dim() == 3:
        difference = difference[mask] if output.shape[:2] == mask.shape else difference
    measured = float(difference.square().sum())
    moments = moments_of(as_rows(data, op, mask))
    if not moments.count:  # nothing reaches the layer
        return 0.0
    groups = 1 if op.window is None else op.window.groups
    delta = (changed[op.weight.name] - weight).double().reshape(groups, -1, moments.x.shape[1])
    predicted = float(layer_loss(delta, second_moment(moments)).sum()) * moments.count
    scale = max(abs(measured), 1e-12 * float(output.double().square().sum()), 1e-30)
    relative = abs(predicted - measured) / scale
    if relative > SELF_CHECK and measured > 1e-20:
        raise NumericalError(
            f"{op.node.name}: predicted layer loss {predicted:.6g}, both layers run give "
            f"{measured:.6g}; wanted agreement to {SELF_CHECK:g}: please report this model"
        )
    return relative
