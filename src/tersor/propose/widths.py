"""What a width costs in quality: one real forward with only that width cut, its readers refitted."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tersor.core.records import Candidate, OutputKind
from tersor.graph.axes import Axes, keep_units
from tersor.graph.contracts import Graph, SiteChange, WidthStatistics
from tersor.graph.edit import (
    copy_graph,
    rebuild,
)
from tersor.graph.operators import WeightedOp, weighted_ops
from tersor.ops.kept import kept_columns, refit_columns
from tersor.ops.moments import Moments, means
from tersor.propose.propose import with_error
from tersor.propose.suffixes import errors_of


def replaced(
    axes: Axes,
    change: SiteChange,
    statistics: WidthStatistics,
    moments: Mapping[str, Moments],
) -> Graph:
    """The original with one width cut and the linear maps that read it refitted.

    Args:
        axes: The original's widths.
        change: Units that stay.
        statistics: Of the width's readers, in the order of the site's ops.
        moments: Of each reader's input, by op: their means move the biases.
    """
    assert change.kept is not None
    fresh, tensors = copy_graph(axes.graph.module)
    ops = {op.node.name: op for op in weighted_ops(axes.graph.module)}
    for name, consumer in zip(change.site.ops, statistics.consumers, strict=True):
        op = ops[name]
        kept = kept_columns(consumer.columns, consumer.weight.shape[2], change.kept)
        fitted, _ = refit_columns(consumer.weight, consumer.second_moment, kept)
        index = kept.unsqueeze(1).expand_as(fitted)
        weight = torch.zeros_like(consumer.weight).scatter(2, index, fitted)
        old = tensors[str(op.weight.target)]
        tensors[str(op.weight.target)] = weight.reshape(old.shape).to(old.dtype)
        _move_bias(tensors, op, consumer.weight - weight, means(moments[name])[0])
    graph = replace(axes.graph, module=rebuild(fresh, tensors))
    return keep_units(graph, axes, {change.site.width: change.kept.tolist()})


def _move_bias(tensors: dict[str, Tensor], op: WeightedOp, delta: Tensor, mean: Tensor) -> None:
    """The mean of what is lost goes to the bias; a map without one loses it."""
    if op.bias is None:
        return
    name = str(op.bias.target)
    shift = (delta @ mean.unsqueeze(2)).reshape(-1)
    tensors[name] = (tensors[name].double() + shift).to(tensors[name].dtype)


def measure_widths(  # noqa: PLR0913 - the stage's inputs
    axes: Axes,
    proposals: Sequence[tuple[Candidate, SiteChange]],
    statistics: Mapping[str, WidthStatistics],
    moments: Mapping[str, Moments],
    batches: Sequence[tuple[Tensor, ...]],
    *,
    kind: OutputKind,
    advance: Callable[[], None] = lambda: None,
) -> list[Candidate]:
    """The candidates with the error that each causes alone, and its standard error.

    What stands before a width is taken from a pass of the original, one for each width and batch.

    Args:
        axes: The original's widths.
        proposals: Candidates of widths with their changes.
        statistics: By site name.
        moments: By op name.
        batches: Flat inputs of the search part.
        kind: The output's geometry.
        advance: Called once for each candidate.
    """
    found: list[Candidate] = []
    for rows in _by_site(proposals):
        cut = {
            i: replaced(axes, change, statistics[candidate.site], moments)
            for i, (candidate, change) in enumerate(rows)
            if candidate.level != change.site.units
        }
        errors = errors_of(axes.graph, cut, batches, kind) if cut else {}
        for i, (candidate, _) in enumerate(rows):
            advance()
            found.append(with_error(candidate, errors[i]) if i in errors else candidate)
    return found


def _by_site(
    proposals: Sequence[tuple[Candidate, SiteChange]],
) -> Iterator[list[tuple[Candidate, SiteChange]]]:
    rows: dict[str, list[tuple[Candidate, SiteChange]]] = {}
    for candidate, change in proposals:
        rows.setdefault(candidate.site, []).append((candidate, change))
    yield from rows.values()
