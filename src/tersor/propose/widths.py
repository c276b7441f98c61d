"""What a width costs in quality: one real forward with only that width cut, its readers refitted."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tersor.core.records import Candidate, OutputKind
from tersor.graph.axes import Axes, Width, keep_units
from tersor.graph.axes.heads import heads_of, turned
from tersor.graph.contracts import Graph, HeadStatistics, SiteChange, WidthStatistics
from tersor.graph.edit import copy_graph, rebuild, stored_uses
from tersor.graph.operators import WeightedOp, weighted_ops
from tersor.observe.ranks import ALONE, RankGroup
from tersor.ops.head_turns import turned_consumer
from tersor.ops.kept import kept_columns, refit_columns
from tersor.ops.moments import Moments, means
from tersor.ops.obs import Consumer
from tersor.propose.errors import sampled_errors, with_errors
from tersor.propose.sampling import Precision


def replaced(
    axes: Axes,
    change: SiteChange,
    statistics: WidthStatistics,
    moments: Mapping[str, Moments],
) -> Graph:
    """The original with one width cut and the linear maps that read it refitted.

    Maps that share their weight with another op (a tied embedding, a module called twice) keep it,
    as they do when the final weights are fitted: one of them can't be fitted without the other.

    Args:
        axes: The original's widths.
        change: Units that stay.
        statistics: Of the width's readers, in the order of the site's ops.
        moments: Of each reader's input, by op: their means move the biases.
    """
    assert change.kept is not None
    base = _turned(axes, change)
    fresh, tensors = copy_graph(base.module)
    ops = {op.node.name: op for op in weighted_ops(axes.graph.module)}
    uses = stored_uses(axes.graph.module)
    readers = [name for name in change.site.ops if name in ops]  # none of experts and scores
    for name, given in zip(readers, statistics.consumers, strict=True):
        op, consumer, mean = ops[name], given, means(moments[name])[0]
        if uses[str(op.weight.target)] > 1:
            continue
        if change.turn and statistics.heads is not None:
            consumer, mean = _on_turned(consumer, mean, change, statistics.heads)
        kept = kept_columns(consumer.columns, consumer.weight.shape[2], change.kept)
        fitted, _ = refit_columns(consumer.weight, consumer.second_moment, kept)
        index = kept.unsqueeze(1).expand_as(fitted)
        weight = torch.zeros_like(consumer.weight).scatter(2, index, fitted)
        old = tensors[str(op.weight.target)]
        tensors[str(op.weight.target)] = weight.reshape(old.shape).to(old.dtype)
        _move_bias(tensors, op, consumer.weight - weight, mean)
    graph = replace(base, module=rebuild(fresh, tensors))
    return keep_units(graph, axes, {change.site.width: change.kept.tolist()}, meta=False)


def _turned(axes: Axes, change: SiteChange) -> Graph:
    """The original, with the heads turned that a width is about to narrow."""
    heads = heads_of(axes, axes[change.site.width]) if change.turn else None
    return axes.graph if heads is None else turned(axes.graph, heads.places, change.turn)


def _on_turned(
    consumer: Consumer, mean: Tensor, change: SiteChange, heads: HeadStatistics
) -> tuple[Consumer, Tensor]:
    """A reader and the mean of its input [1, n] on turned heads."""
    assert heads.columns is not None
    maps = change.turn[heads.second[0]]
    moved = mean.double().clone()
    values = moved[0, heads.columns].unsqueeze(2)
    moved[0, heads.columns.flatten()] = (maps.double() @ values).flatten()
    return turned_consumer(consumer, heads.columns, maps), moved


def _move_bias(tensors: dict[str, Tensor], op: WeightedOp, delta: Tensor, mean: Tensor) -> None:
    """The mean of what is lost goes to the bias; a map without one loses it."""
    if op.bias is None:
        return
    name = str(op.bias.target)
    shift = (delta @ mean.unsqueeze(2)).reshape(-1)
    tensors[name] = (tensors[name].double() + shift).to(tensors[name].dtype)


class _Cut(Mapping[int, Graph]):
    """The original with one width cut each; made when asked for, as each holds its weights."""

    def __init__(
        self,
        axes: Axes,
        changes: Mapping[int, SiteChange],
        statistics: Mapping[str, WidthStatistics],
        moments: Mapping[str, Moments],
    ) -> None:
        self._axes, self._changes = axes, changes
        self._statistics, self._moments = statistics, moments

    def __getitem__(self, position: int) -> Graph:
        change = self._changes[position]
        return replaced(self._axes, change, self._statistics[change.site.name], self._moments)

    def __iter__(self) -> Iterator[int]:
        return iter(self._changes)

    def __len__(self) -> int:
        return len(self._changes)


def measure_widths(  # noqa: PLR0913 - the stage's inputs
    axes: Axes,
    proposals: Sequence[tuple[Candidate, SiteChange]],
    statistics: Mapping[str, WidthStatistics],
    moments: Mapping[str, Moments],
    batches: Sequence[tuple[Tensor, ...]],
    *,
    kind: OutputKind,
    precision: Precision | None = None,
    advance: Callable[[], None] = lambda: None,
    ranks: RankGroup = ALONE,
) -> list[Candidate]:
    """The candidates with the error that each causes alone, and its standard error.

    Args:
        axes: The original's widths.
        proposals: Candidates of widths with their changes.
        statistics: By site name.
        moments: By op name.
        batches: Flat inputs of the search part.
        kind: The output's geometry.
        precision: When an error is known well enough. Candidates with a note are not worth more
            samples than the least.
        advance: Called once for each candidate.
        ranks: Who measures candidates of its own at the same time.
    """
    cuts = {i: c for i, (_, c) in enumerate(proposals) if c.level != c.site.units}
    errors: Mapping[int, Tensor] = {}
    if cuts or ranks.is_shared:
        errors = sampled_errors(
            axes.graph,
            _Cut(axes, cuts, statistics, moments),
            batches,
            kind,
            sites={i: change.site.name for i, change in cuts.items()},
            precision=precision or Precision(),
            few=frozenset(i for i in cuts if proposals[i][0].note),
            advance=advance,
            ranks=ranks,
        )
    for _ in range(len(proposals) - len(cuts)):
        advance()
    return [
        with_errors(candidate, errors[i]) if i in errors else candidate
        for i, (candidate, _) in enumerate(proposals)
    ]


class _Without(Mapping[int, Graph]):
    """The original without each unit of a width; made when asked for, as each holds its weights."""

    def __init__(self, axes: Axes, width: Width) -> None:
        self._axes, self._width = axes, width

    def __getitem__(self, unit: int) -> Graph:
        rest = [u for u in range(len(self)) if u != unit]
        return keep_units(self._axes.graph, self._axes, {self._width.name: rest}, meta=False)

    def __iter__(self) -> Iterator[int]:
        return iter(range(len(self)))

    def __len__(self) -> int:
        return self._width.units


def unit_costs(
    axes: Axes, width: Width, batches: Sequence[tuple[Tensor, ...]], kind: OutputKind
) -> Tensor:
    """The output's mean error with only that unit removed, one a unit [units].

    For widths that no linear map sums over, such as experts: a token whose expert is gone goes to
    its next best, which no second moment tells.

    Args:
        axes: The original's widths.
        width: One of them.
        batches: Flat inputs.
        kind: The output's geometry.
    """
    sites = dict.fromkeys(range(width.units), width.name)
    errors = sampled_errors(axes.graph, _Without(axes, width), batches, kind, sites=sites)
    return torch.stack([errors[unit].double().mean() for unit in range(width.units)])
