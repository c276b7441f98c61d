"""Graphs that have lost units: sketched for prices, fitted for evaluations and for the result.

Three qualities of one thing. A sketch has the shapes and whatever weights: a build of it shows
times. A light fit reads few samples: an evaluation of it shows what a plan costs in quality. The
final one reads as many as the fit can use.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from tersor.analyse.activations import activation_statistics
from tersor.analyse.additions import addition_statistics
from tersor.analyse.branches import branch_statistics
from tersor.analyse.tree import sample_macs
from tersor.analyse.widths import width_statistics
from tersor.api.session import Session
from tersor.core.records import Candidate
from tersor.graph.apply import apply
from tersor.graph.axes import Axes, analyse_axes, keep_units
from tersor.graph.axes.gate import require
from tersor.graph.axes.heads import Heads, Turn, heads_of, turned
from tersor.graph.axes.matching import Counterparts, counterparts
from tersor.graph.axes.rulebook import sizes_of
from tersor.graph.axes.slicing import gone_from
from tersor.graph.branches import REMOVED, BranchStatistics, replace_branches, widths_after
from tersor.graph.contracts import (
    ActivationStatistics,
    AddStatistics,
    Graph,
    SiteChange,
    SiteStatistics,
    WidthStatistics,
)
from tersor.graph.edit import attribute
from tersor.graph.facts import NodeFacts, node_facts
from tersor.graph.meta import ensure
from tersor.graph.operators import WeightedOp, weighted_ops
from tersor.graph.requantize import requantized
from tersor.observe.statistics import Observed
from tersor.propose.branches import measure_branches
from tersor.propose.errors import chunk_size
from tersor.propose.sampling import Precision
from tersor.propose.widths import measure_widths, unit_costs
from tersor.transform.narrow import NarrowConfig, narrow

# Samples on which the error of one candidate is measured at most, the more the cheaper the model.
_ERROR_SAMPLES, _MOST_ERROR_SAMPLES, _ERROR_MACS = 64, 256, 2e10
# Where a size is asked for: samples that every candidate reads, and the error at which such plans begin to lose anything.
_SIZE_LEAST, _SIZE_FLOOR = 32, 1e-3
_UNIT_SAMPLES = 32  # on which each unit of a width is removed, where no second moment tells
_ACTIVATION_SAMPLES = 128  # that its reader is fitted on, as many rows as it needs
_ADDITION_SAMPLES = 64  # whose ranges its operands' quantisers are chosen from
# Rows of a fit for each input of the widest op: fewer fit the calibration part itself.
_ROWS_PER_INPUT = 8
_LEAST_SAMPLES, _FINAL_SAMPLES = 64, 256
_LIGHT_MACS, _FINAL_MACS = 2e11, 4e12  # of one run of the samples: seconds and minutes on two cores
_LIGHT = NarrowConfig(rows=4096, iterations=1)
_KEPT_FITS = 6  # graphs at hand, so that plans with the same widths are fitted once


@dataclass(frozen=True, slots=True)
class Changes:
    """What an assignment changes, by kind of site; sites that it leaves alone are absent."""

    formats: tuple[SiteChange, ...] = ()
    widths: tuple[SiteChange, ...] = ()
    branches: tuple[SiteChange, ...] = ()

    @property
    def keeps_all(self) -> bool:
        """Whether no unit and no branch goes."""
        return not self.widths and not self.branches

    @property
    def key(self) -> str:
        """Of the widths and branches."""
        return _key((*self.widths, *self.branches))


def _key(changes: Sequence[SiteChange]) -> str:
    return repr(sorted((c.site.name, c.level) for c in changes))


def fit_samples(session: Session, *, light: bool = False) -> int:
    """Calibration samples of a fit: as many as its widest op needs, as far as time allows."""
    graph = session.graph
    batch = len(graph.example[0])
    rows = [
        attribute(graph.module, str(op.weight.target))[0].numel() / _positions(op, batch)
        for op in weighted_ops(graph.module)
        if op.kind != "embedding"
    ]
    needed = math.ceil(_ROWS_PER_INPUT * max(rows, default=1.0))
    least = _LEAST_SAMPLES if light else _FINAL_SAMPLES
    macs = max(1, sum(sample_macs(graph).values()))
    affordable = int((_LIGHT_MACS if light else _FINAL_MACS) / macs)
    wanted = max(_LEAST_SAMPLES, min(max(least, needed), affordable))
    return min(len(session.parts["calibration"]), wanted)


def _positions(op: WeightedOp, batch: int) -> float:
    """Rows that one sample gives an op."""
    sizes = sizes_of(op.node.meta["val"])
    channels = sizes[1 if op.window is not None else -1]
    return max(1.0, math.prod(sizes) / max(1, channels) / batch)


def fit_batches(session: Session, *, light: bool = False) -> list[tuple[Tensor, ...]]:
    """Flat inputs of a fit, in batches that fit in memory."""
    part = session.parts["calibration"].limited(fit_samples(session, light=light))
    return list(part.batches(chunk_size(session.graph)))


def width_sites_statistics(
    session: Session, observed: Mapping[str, Observed]
) -> dict[str, WidthStatistics]:
    """What is known about the readers of every width that may shrink, by site."""
    if session.axes is None:
        return {}
    free = [site for site in session.widths if site.pinned is None]
    found = {site.name: width_statistics(session.axes, site, observed) for site in free}
    alone = [
        site for site in free if not found[site.name].consumers and found[site.name].heads is None
    ]
    part = session.parts["search"].limited(_affordable(session, _UNIT_SAMPLES))
    for site in alone:
        session.progress.note(f"{site.name}: {site.units} runs without one unit each")
        costs = unit_costs(session.axes, session.axes[site.width], part.groups, session.kind)
        found[site.name] = WidthStatistics(costs=costs)
    return found


def additions_statistics(
    session: Session, layers: Mapping[str, SiteStatistics]
) -> dict[str, AddStatistics]:
    """What is known about the operands of every addition, by site."""
    if not session.additions:
        return {}
    part = session.parts["calibration"].limited(_ADDITION_SAMPLES)
    return addition_statistics(
        session.graph,
        session.additions,
        {site.name: site for site in session.formats},
        layers,
        list(part.batches(chunk_size(session.graph))),
    )


def activations_statistics(session: Session) -> dict[str, ActivationStatistics]:
    """What replacements of activations are fitted to, by site."""
    part = session.parts["calibration"].limited(_ACTIVATION_SAMPLES)
    batches = list(part.batches(chunk_size(session.graph)))
    free = [site for site in session.activations if site.pinned is None]
    return activation_statistics(session.graph, free, batches, session.settings.seed)


def width_errors(
    session: Session,
    proposals: Sequence[tuple[Candidate, SiteChange]],
    statistics: Mapping[str, WidthStatistics],
    observed: Mapping[str, Observed],
) -> list[Candidate]:
    """The candidates of widths with the error that each causes alone."""
    assert session.axes is not None
    session.progress.stage("widths", len(proposals))
    return measure_widths(
        session.axes,
        proposals,
        statistics,
        {name: seen.moments for name, seen in observed.items()},
        session.parts["search"].groups,
        kind=session.kind,
        precision=error_precision(session),
        advance=session.progress.advance,
        ranks=session.ranks,
    )


def error_precision(session: Session) -> Precision:
    """How well errors have to be known, on as many search samples as the model's cost allows.

    Plans for a size choose among dozens of levels a site that all err little: what few samples say of those picks the luckiest.
    """
    most = _affordable(session, _ERROR_SAMPLES)
    if session.settings.for_size:
        return Precision(most=most, least=min(most, _SIZE_LEAST), floor=_SIZE_FLOOR)
    return Precision(most=most)


def _affordable(session: Session, least: int) -> int:
    affordable = int(_ERROR_MACS / max(1, sum(sample_macs(session.graph).values())))
    return max(least, min(_MOST_ERROR_SAMPLES, affordable))


def branch_sites_statistics(session: Session) -> Mapping[str, BranchStatistics]:
    """Means of all branches, and the moments of their maps, by site; a pass of its own."""
    if not session.branches:
        return {}
    batches = fit_batches(session, light=True)
    session.progress.stage("branches", len(batches))
    return branch_statistics(
        session.graph,
        session.branches,
        batches,
        seed=session.settings.seed,
        advance=session.progress.advance,
    )


def branch_errors(
    session: Session, proposals: Sequence[tuple[Candidate, SiteChange]]
) -> list[Candidate]:
    """The candidates of branches with the error that each causes alone."""
    if not proposals and not (session.ranks.is_shared and session.branches):
        return []
    session.progress.stage("branch errors", len(proposals))
    return measure_branches(
        session.graph,
        proposals,
        session.parts["search"].groups,
        kind=session.kind,
        precision=error_precision(session),
        advance=session.progress.advance,
        ranks=session.ranks,
    )


def sketched(session: Session, changes: Changes) -> Graph:
    """The graph of some changes with shapes and formats as they will be; for prices."""
    if changes.keeps_all:
        return apply(session.graph, changes.formats)
    base, axes = without_branches(session, changes.branches)
    return _formatted(session, changes, keep_units(base, axes, kept(session, changes)))


def facts_of(session: Session, changes: Changes, batch: int) -> dict[str, NodeFacts]:
    """Sizes of every node of the graph of some widths, branches and ranks."""
    graph = session.graph
    if not changes.keeps_all:
        base, axes = without_branches(session, changes.branches)
        graph = keep_units(base, axes, kept(session, changes))
    chains = [c for c in changes.formats if c.factors]
    if chains:
        graph = apply(graph, chains)
        ensure(graph)
    return node_facts(graph, batch)


def without_branches(session: Session, changes: Sequence[SiteChange]) -> tuple[Graph, Axes]:
    """The graph whose branches were replaced, and its widths; the latest few are at hand."""
    axes = _axes(session)
    if not changes:
        return session.graph, axes
    key = _key(changes)
    if key not in session.bases:
        while len(session.bases) >= _KEPT_FITS:
            del session.bases[next(iter(session.bases))]
        graph = replace_branches(session.graph, changes)
        session.bases[key] = graph, analyse_axes(graph)
    return session.bases[key]


def kept(session: Session, changes: Changes) -> dict[str, list[int]]:
    """Width of the graph without the branches -> units that stay.

    A width that the replaced branches have joined with others, or taken away, stays whole.
    """
    own = {c.site.width: c.kept.tolist() for c in changes.widths if c.kept is not None}
    if not changes.branches:
        return own
    _, axes = without_branches(session, changes.branches)
    names = widths_after(_axes(session), axes, changes.branches)
    return {names[width]: units for width, units in own.items() if width in names}


def evaluated(session: Session, changes: Changes) -> Graph:
    """The graph of some changes, its widths fitted on few samples; for evaluations."""
    if changes.keeps_all:
        return apply(session.graph, changes.formats)
    if changes.key not in session.fits:
        while len(session.fits) >= _KEPT_FITS:
            del session.fits[next(iter(session.fits))]
        _, axes = without_branches(session, changes.branches)
        batches = fit_batches(session, light=True)
        keep, config = kept(session, changes), _config(session, _LIGHT)
        fitted = narrow(
            _turned(session, session.graph, changes),
            axes,
            keep,
            batches,
            config,
            base=_turned(session, axes.graph, changes),
            prefixes=session.prefixes,
        )
        session.fits[changes.key] = fitted.graph
    return _formatted(session, changes, session.fits[changes.key])


def narrowed(session: Session, changes: Changes) -> Graph:
    """The graph of the final widths, proven by the law and fitted on all samples.

    Raises:
        ParityError: Cutting the units differs from zeroing them.
    """
    base, axes = without_branches(session, changes.branches)
    for change in changes.branches:
        how = "its mean" if change.level == REMOVED else "a linear map"
        session.progress.note(f"{change.site.name}: {how} in its place")
    keep = kept(session, changes)
    base = _turned(session, base, changes)
    if keep:
        _prove(session, base, axes, keep)
    batches = fit_batches(session)
    ops = sum(op.kind != "embedding" for op in weighted_ops(session.graph.module))
    session.progress.stage("fit", ops)
    config = _config(session, NarrowConfig())
    advance = session.progress.advance
    original = _turned(session, session.graph, changes)
    return narrow(original, axes, keep, batches, config, advance, base=base).graph


def _turned(session: Session, graph: Graph, changes: Changes) -> Graph:
    """A graph with the heads turned whose dimensions go; its outputs are the same."""
    for heads, turn in _turns(session, changes):
        graph = turned(graph, heads.places, turn)
    return graph


def _turns(session: Session, changes: Changes) -> Iterator[tuple[Heads, Turn]]:
    axes = session.axes
    for change in changes.widths:
        if axes is None or not change.turn:
            continue
        name = change.site.width
        if name not in session.heads:
            session.heads[name] = heads_of(axes, axes[name])
        heads = session.heads[name]
        if heads is not None:
            yield heads, change.turn


def _prove(session: Session, base: Graph, axes: Axes, keep: Mapping[str, list[int]]) -> None:
    gone = gone_from(axes, keep)
    report = require(base, axes, gone)
    session.progress.note(
        f"{sum(map(len, gone.values()))} units of {len(gone)} widths: cutting equals zeroing "
        f"to {report.difference:.1e} at batch {report.batch}, which moves the output by "
        f"{report.effect:.1e}"
        + (f"; nothing depends on {', '.join(report.silent)}" if report.silent else "")
    )


def _config(session: Session, config: NarrowConfig) -> NarrowConfig:
    """How to fit, without the layers that are to be left alone."""
    fixed = frozenset(op for s in session.formats if s.pinned is not None for op in s.ops)
    return replace(config, fixed=fixed, kind=session.kind)


def counterparts_of(session: Session, changes: Changes) -> Counterparts | None:
    """What the graph of some changes has left of the original's values; None: all of them."""
    if changes.keeps_all:
        return None
    _, axes = without_branches(session, changes.branches)
    return counterparts(axes, axes.removed(gone_from(axes, kept(session, changes))))


def formats_on(session: Session, changes: Changes, graph: Graph) -> list[SiteChange]:
    """The formats of some changes for a graph with their widths: as cached, or rounded anew."""
    if changes.keeps_all:
        return list(changes.formats)
    _, axes = without_branches(session, changes.branches)
    removed = axes.removed(gone_from(axes, kept(session, changes)))
    turns: dict[str, list[tuple[tuple[int, Tensor], Tensor]]] = {}
    for heads, turn in _turns(session, changes):
        for name, maps in turn.items():
            if heads.places[name][0] == 0:
                turns.setdefault(name, []).append((heads.places[name], maps))
    return requantized(changes.formats, session.graph, axes, removed, graph, turns)


def _formatted(session: Session, changes: Changes, graph: Graph) -> Graph:
    return apply(graph, formats_on(session, changes, graph))


def _axes(session: Session) -> Axes:
    assert session.axes is not None  # a width in a plan comes from them
    return session.axes
