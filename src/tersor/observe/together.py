"""One statistics pass over all ranks: each reads a block of the batches, sums and samples are joined.

Moments and histograms are sums; ranges are extremes; sampled rows follow each other in the order of
the batches. Histograms have edges at powers of two, so that those of all ranks grow to the largest by
merging bins. A value that float32 can't tell from a bin's border may be counted on its other side, as
the bins were narrower or wider when its batch came: in one process that depends on the order as well.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tersor.graph.contracts import Graph, Rows
from tersor.observe.ranks import Parcel, RankGroup
from tersor.observe.statistics import (
    Observed,
    Streams,
    observe_part,
    observed_ops,
    op_weight,
)
from tersor.ops.moments import Moments

_STEP = "calibrate"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Range:
    """What is known at one op beside sums: extremes, the histogram's edge, and how many rows."""

    count: int
    low: float
    high: float
    edge: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Ranges:
    by_op: Mapping[str, _Range]


def observe_together(
    graph: Graph,
    batches: Sequence[tuple[Tensor, ...]],
    ranks: RankGroup,
    *,
    seed: int,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, Observed]:
    """Statistics by op name, as ``observe`` gives them of all batches, on rank 0; elsewhere nothing.

    Args:
        graph: The original graph; only read.
        batches: Flat inputs, the same on all ranks.
        ranks: Who takes part.
        seed: Of the subsampling.
        advance: Called after each of this rank's batches.

    Raises:
        RankError: A rank is gone or silent.
    """
    own = [(place, batches[place]) for place in ranks.block(len(batches))]
    streams = observe_part(graph, own, len(batches), seed=seed, advance=advance)
    ranges = _joined_ranges(streams, ranks)
    sums = {name: _sums(graph, name, part, ranges[name].edge) for name, part in streams.items()}
    ranks.sum_([t for row in sums.values() for t in row], _STEP)
    parts = ranks.collect(_Ranges, Parcel(_Ranges(by_op={}), _samples(streams)), _STEP)
    if not ranks.is_first:
        return {}
    return {
        name: _observed(ranges[name], sums[name], [_of_op(p.tensors, name) for p in parts])
        for name in streams
    }


def _joined_ranges(streams: Mapping[str, Streams], ranks: RankGroup) -> Mapping[str, _Range]:
    """The ranges of all ranks' batches, on all ranks."""
    own = {
        name: _Range(
            count=0 if part.moments.total is None else part.moments.total.count,
            low=part.histogram.low,
            high=part.histogram.high,
            edge=part.histogram.edge,
        )
        for name, part in streams.items()
    }
    found = ranks.collect(_Ranges, Parcel(_Ranges(by_op=own)), _STEP)

    def join() -> Parcel[_Ranges]:
        rows = {name: [part.record.by_op[name] for part in found] for name in own}
        return Parcel(_Ranges(by_op={name: _join(row) for name, row in rows.items()}))

    return ranks.first(_Ranges, join, _STEP).record.by_op


def _join(ranges: Sequence[_Range]) -> _Range:
    return _Range(
        count=sum(r.count for r in ranges),
        low=min(r.low for r in ranges),
        high=max(r.high for r in ranges),
        edge=max(r.edge for r in ranges),
    )


def _sums(graph: Graph, name: str, streams: Streams, edge: float) -> tuple[Tensor, Tensor, Tensor]:
    """This rank's sums of products, of inputs, and counts; zeros where it has read no batch."""
    streams.histogram.grow_(edge)
    total = streams.moments.total
    if total is not None:
        return total.xx, total.x, streams.histogram.counts
    groups, _, inputs = op_weight(graph, observed_ops(graph)[name]).shape
    xx = torch.zeros(groups, inputs, inputs, dtype=torch.float64)
    return xx, torch.zeros(groups, inputs, dtype=torch.float64), streams.histogram.counts


def _samples(streams: Mapping[str, Streams]) -> dict[str, Tensor]:
    """The rows that this rank has kept, by op and kind."""
    found: dict[str, Tensor] = {}
    for name, part in streams.items():
        kinds = {"rows": part.rows, "outputs": part.outputs, "channels": part.channels}
        found |= {f"{name}/{kind}": own.value() for kind, own in kinds.items() if own.rows}
    return found


def _of_op(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    return {
        kind: tensors[f"{name}/{kind}"]
        for kind in ("rows", "outputs", "channels")
        if f"{name}/{kind}" in tensors
    }


def _observed(
    known: _Range, sums: tuple[Tensor, Tensor, Tensor], parts: Sequence[Mapping[str, Tensor]]
) -> Observed:
    xx, x, counts = sums
    rows, outputs, channels = (
        torch.cat([part[kind] for part in parts if kind in part])
        for kind in ("rows", "outputs", "channels")
    )
    return Observed(
        moments=Moments(count=known.count, xx=xx, x=x),
        channels=channels,
        counts=counts,
        edges=torch.linspace(-known.edge, known.edge, len(counts) + 1, dtype=torch.float64),
        low=known.low,
        high=known.high,
        rows=Rows(original=rows, compressed=rows, output=outputs),
    )
