"""One pass over a graph: for each tensor that a site reads its moments, histogram and rows.

Only real tokens count where an attention mask is among the inputs. Rows beyond what a covariance
needs are subsampled, without bias.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from tersor.core.records import Signature
from tersor.graph.contracts import Graph, Rows
from tersor.graph.edit import attribute, execute, last_uses
from tersor.graph.operators import (
    WeightedOp,
    as_rows,
    grouped_weight,
    output_rows,
    row_count,
    weighted_ops,
)
from tersor.observe.streams import Histogram, MomentStream, RowSample
from tersor.ops.moments import Moments

# Rows that a covariance of n inputs needs: 16 n determine it (ALGORITHMS 8.2 asks for 4 to 8 n),
# and no fewer than 8,192 for narrow layers.
ROWS_PER_INPUT = 16
MIN_ROWS = 8192
ROWS = 1024  # rows kept of each op
CHANNEL_ROWS = 2048  # raw values kept of each channel
_SEEDS = 2**20  # more than there are batches: each draws by a seed of its own


@dataclass(frozen=True, slots=True)
class Observed:
    """What the pass knows about one op's input."""

    moments: Moments
    channels: Tensor  # [t, c_in]: a sample of the raw input by channel
    counts: Tensor
    edges: Tensor
    low: float
    high: float
    rows: Rows

    def channel_amax(self) -> Tensor:
        """99.9th percentile of |x| by channel."""
        return torch.quantile(self.channels.abs().float(), 0.999, dim=0)


@dataclass
class Streams:
    """What is gathered at one op while batches pass."""

    moments: MomentStream
    histogram: Histogram
    rows: RowSample
    outputs: RowSample
    channels: RowSample


def token_mask(signature: Signature, flat: Sequence[Tensor]) -> Tensor | None:
    """The attention mask among the inputs as booleans [batch, tokens], or None."""
    for spec, tensor in zip(signature.inputs, flat, strict=True):
        if "attention_mask" in spec.name and tensor.dim() == 2 and not tensor.is_floating_point():
            mask = tensor.bool()
            if bool((tensor == mask).all()) and bool(mask.any()):
                return mask
    return None


def observe(
    graph: Graph,
    batches: Iterable[tuple[Tensor, ...]],
    n_batches: int,
    *,
    seed: int,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, Observed]:
    """Statistics by op name (linear and convolution), in one pass.

    Args:
        graph: The original graph; only read.
        batches: Flat inputs.
        n_batches: How many batches there are, to spread the row samples.
        seed: Of the subsampling.
        advance: Called after each batch.
    """
    streams = observe_part(graph, enumerate(batches), n_batches, seed=seed, advance=advance)
    return {name: finish(own) for name, own in streams.items()}


def observed_ops(graph: Graph) -> dict[str, WeightedOp]:
    """The linear layers and convolutions of a graph, by node."""
    return {op.node.name: op for op in weighted_ops(graph.module) if op.kind != "embedding"}


def observe_part(
    graph: Graph,
    batches: Iterable[tuple[int, tuple[Tensor, ...]]],
    n_batches: int,
    *,
    seed: int,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, Streams]:
    """As ``observe`` of some of the batches, each with its place among all.

    What is sampled of a batch depends on the seed and its place alone, so that parts in the order of
    their batches make up the whole.
    """
    wanted = observed_ops(graph)
    streams = {name: _new_streams(n_batches) for name in wanted}
    done = last_uses(graph.module)
    for place, flat in batches:
        generator = torch.Generator().manual_seed((seed * _SEEDS + place) % 2**63)
        mask = token_mask(graph.signature, flat)
        env: dict[str, object] = {}
        stream = iter(flat)
        with torch.no_grad():
            for node in graph.module.graph.nodes:
                is_input = node.op == "placeholder"
                env[node.name] = next(stream) if is_input else execute(graph.module, node, env)
                if node.name in wanted:
                    op = wanted[node.name]
                    _record(streams[node.name], op, env, mask, (generator, place))
                for name in done.get(node.name, ()):
                    del env[name]
        advance()
    return streams


def _new_streams(n_batches: int) -> Streams:
    return Streams(
        MomentStream(),
        Histogram(),
        RowSample(ROWS, n_batches),
        RowSample(ROWS, n_batches),
        RowSample(CHANNEL_ROWS, n_batches),
    )


def _record(
    streams: Streams,
    op: WeightedOp,
    env: Mapping[str, object],
    mask: Tensor | None,
    chance: tuple[torch.Generator, int],
) -> None:
    """Add one batch; ``chance``: what the batch's samples are drawn with, and its place."""
    data, output = env[op.data.name], env[op.node.name]
    assert isinstance(data, Tensor)
    assert isinstance(output, Tensor)
    generator, place = chance
    keep = some_rows(data, op, mask, streams.rows.batches, generator)
    rows, results = as_rows(data, op, mask, keep), output_rows(output, op, mask)
    results = results if keep is None else results[keep]
    streams.moments.add_(rows)
    values = channel_rows(data, op, mask)
    streams.histogram.add_(values)
    streams.channels.add_(values[streams.channels.pick(len(values), generator, place)])
    picked = streams.rows.pick(len(rows), generator, place)
    streams.rows.add_(rows[picked])
    streams.outputs.add_(results[picked])


def some_rows(
    data: Tensor, op: WeightedOp, mask: Tensor | None, batches: int, generator: torch.Generator
) -> Tensor | None:
    """Indices of a batch's rows where all of them are more than the statistics need, or None."""
    count = row_count(data, op, mask)
    window = op.window
    width = data.shape[-1]
    if window is not None:
        width = int(data.shape[1]) // window.groups
        for size in window.kernel:
            width *= size
    limit = -(-enough_rows(width) // batches)
    if count <= limit:
        return None
    return torch.randperm(count, generator=generator)[:limit].sort().values


def enough_rows(inputs: int) -> int:
    """How many rows determine a covariance of so many inputs."""
    return max(MIN_ROWS, ROWS_PER_INPUT * inputs)


def channel_rows(data: Tensor, op: WeightedOp, mask: Tensor | None) -> Tensor:
    """Raw values by channel [t, c]."""
    if op.window is None:
        return as_rows(data, op, mask)[:, 0]
    return data.movedim(1, -1).reshape(-1, data.shape[1])


def finish(streams: Streams) -> Observed:
    """What is known when all batches have passed."""
    histogram, rows = streams.histogram, streams.rows.value()
    return Observed(
        moments=streams.moments.value(),
        channels=streams.channels.value(),
        counts=histogram.counts,
        edges=histogram.edges(),
        low=histogram.low,
        high=histogram.high,
        rows=Rows(original=rows, compressed=rows, output=streams.outputs.value()),
    )


def op_weight(graph: Graph, op: WeightedOp) -> Tensor:
    """The op's weight as [g, m, n], float64."""
    groups = 1 if op.window is None else op.window.groups
    return grouped_weight(attribute(graph.module, str(op.weight.target)), groups)


def op_bias(graph: Graph, op: WeightedOp) -> Tensor | None:
    """The op's bias as [g, m], float64, or None."""
    if op.bias is None:
        return None
    groups = 1 if op.window is None else op.window.groups
    return attribute(graph.module, str(op.bias.target)).double().reshape(groups, -1)


def node_by_name(graph: Graph) -> dict[str, fx.Node]:
    """The graph's nodes by name."""
    return {node.name: node for node in graph.module.graph.nodes}
