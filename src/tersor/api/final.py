"""From a plan to the final graph: widths cut and fitted, formats rounded, and its build."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from tersor.analyse.additions import own_operands
from tersor.analyse.calibration import embedding_statistics, tensor_readers
from tersor.analyse.sites import find_sites
from tersor.api.latency import measure_calls
from tersor.api.proposing import Offers, calibration_batches, gradient_moments
from tersor.api.quality import Quality
from tersor.api.recovering import recovered, recovery_key
from tersor.api.session import Session
from tersor.api.shrink import Changes, formats_on, narrowed
from tersor.api.stages import build_for
from tersor.build.build import Built
from tersor.core.errors import BackendError, ParityError
from tersor.core.levels import gone_with
from tersor.core.records import (
    BuildChoice,
    Candidate,
    Level,
    Plan,
    Prices,
)
from tersor.core.recovery import Recovery
from tersor.core.target import Target
from tersor.graph.apply import apply
from tersor.graph.changes import ChangeRecords, pack, unpack
from tersor.graph.contracts import Graph, Packaging, SiteChange
from tersor.graph.edit import attribute
from tersor.graph.meta import read_back
from tersor.graph.serial import graph_from_json, graph_tensors, graph_to_json
from tersor.propose.propose import NATIVE
from tersor.timing.protocol import Protocol, ratio
from tersor.transform.sequential import transform
from tersor.verify.verify import is_slower

_PACKAGED = Protocol(rounds=7, runs=11, max_seconds=20.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class FinalRecord:
    """How the final graph was made."""

    changes: ChangeRecords
    is_sequential: bool
    loss: float


@dataclass(frozen=True, slots=True, kw_only=True)
class NarrowRecord:
    """A graph whose widths were cut and fitted; its tensors are the arrays."""

    graph: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Made:
    """The final graph, the changes that made it, and its loss on the search part."""

    graph: Graph
    changes: tuple[SiteChange, ...] = ()
    note: str = ""
    loss: float = 0.0
    recoveries: tuple[Recovery, ...] = ()


@dataclass
class Final:
    """The compressed graph and its build."""

    graph: Graph
    changes: tuple[SiteChange, ...]
    built: Built
    notes: tuple[str, ...] = ()


def chosen_candidates(offered: Offers, plan: Plan) -> dict[str, Candidate]:
    """The plan's formats that edit the graph, with settings that the user may have edited."""
    by_level = {(c.site, c.level): c for c in offered.candidates}
    gone = gone_with(plan.assignment, offered.inside)
    found = {}
    for site, level in plan.assignment.items():
        if level in NATIVE or isinstance(level, int) or site in gone:
            continue
        candidate = by_level[site, level]
        settings = plan.settings.get(site)
        found[site] = replace(candidate, detail=dict(settings)) if settings else candidate
    return found


def make_final(session: Session, offered: Offers, plan: Plan, quality: Quality, key: str) -> Made:
    """Widths and formats of a plan in effect, recovered before and after rounding if asked for."""
    changed = offered.chosen(plan.assignment)
    chosen = chosen_candidates(offered, plan)
    base = session.graph if changed.keeps_all else _narrowed(session, changed, key)
    if not chosen and changed.keeps_all:
        return Made(base)
    first: Recovery | None = None
    if not changed.keeps_all:
        base, first = recovered(session, changed, base, quality, (key, False))
    cuts = (*changed.branches, *changed.widths)
    if not chosen:
        loss = quality.loss(base)
        what = "widths" if changed.widths else "branches"
        note = f"{what} fitted, loss on the search part {loss:.4g}"
        return Made(base, cuts, note, loss, _done(first))
    after = key if first is None else recovery_key(session, key)
    made = _formatted(session, changed, base, quality, chosen, after)
    graph, second = recovered(session, changed, made.graph, quality, (key, True))
    loss = made.loss if second is None or not second.is_kept else quality.loss(graph)
    return replace(
        made,
        graph=graph,
        changes=(*cuts, *made.changes),
        loss=loss,
        recoveries=_done(first, second),
    )


def _done(*recoveries: Recovery | None) -> tuple[Recovery, ...]:
    return tuple(r for r in recoveries if r is not None)


def _formatted(
    session: Session,
    changed: Changes,
    base: Graph,
    quality: Quality,
    chosen: Mapping[str, Candidate],
    key: str,
) -> Made:
    """The sequential transform; where the stitched changes lose less, those."""
    kept = session.store.get(FinalRecord, "transform", key)
    if kept is not None:
        arrays = session.store.arrays("transform", key)
        changes = tuple(unpack(kept.changes, arrays, session.site_by_name))
    else:
        kept, changes = _transform(session, changed, base, quality, chosen)
        records, arrays = pack(changes)
        session.store.put("transform", key, replace(kept, changes=records), arrays)
    graph = apply(base, changes)
    way = "front to back" if kept.is_sequential else "stitched"
    note = f"weights {way}, loss on the search part {kept.loss:.4g}"
    return Made(graph, changes, note, kept.loss)


def _narrowed(session: Session, changed: Changes, key: str) -> Graph:
    """The graph of the plan's widths, found again in the store."""
    kept = session.store.get(NarrowRecord, "narrow", key)
    if kept is not None:
        arrays = session.store.arrays("narrow", key)
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        return read_back(graph_from_json(kept.graph, tensors), session.graph)
    graph = narrowed(session, changed)
    arrays = {name: t.contiguous().numpy() for name, t in graph_tensors(graph).items()}
    session.store.put("narrow", key, NarrowRecord(graph=graph_to_json(graph)), arrays)
    return graph


def _transform(
    session: Session,
    changed: Changes,
    base: Graph,
    quality: Quality,
    chosen: Mapping[str, Candidate],
) -> tuple[FinalRecord, tuple[SiteChange, ...]]:
    """Formats on the graph of the plan's widths: front to back, and from what is at hand."""
    session.progress.stage("transform", len(chosen))
    batches = calibration_batches(session)
    sites = find_sites(base)
    additions = [s for s in session.additions if s.name in chosen]
    activations = [s for s in session.activations if s.name in chosen]
    done = transform(
        base,
        (*sites, *additions, *activations),
        chosen,
        session.methods,
        batches,
        readers=tensor_readers(base, sites),
        embedding=lambda site: embedding_statistics(attribute(base.module, site.weight)),
        seed=session.settings.seed,
        own=own_operands(base, additions, sites),
        felt=gradient_moments(session, base, batches),
        advance=session.progress.advance,
    )
    at_hand = tuple(formats_on(session, changed, base))
    ways = [(done.graph, tuple(done.changes), True), (apply(base, at_hand), at_hand, False)]
    limit = quality.limit()
    losses = [quality.loss(graph) for graph, _, _ in ways]
    errors = [quality.error(graph) for graph, _, _ in ways]
    session.progress.note(
        "on the search part, front to back / stitched: "
        f"loss {losses[0]:.4g} / {losses[1]:.4g}, error {errors[0]:.3g} / {errors[1]:.3g}"
    )
    # Within the limit first; among those the smaller error, which is finer than the loss.
    best = min((0, 1), key=lambda i: (limit is not None and losses[i] > limit, errors[i]))
    record = FinalRecord(
        changes=ChangeRecords(changes=()), is_sequential=ways[best][2], loss=losses[best]
    )
    return record, ways[best][1]


def built_final(session: Session, made: Made, choice: BuildChoice) -> Final:
    """The final graph's build."""
    session.progress.stage("build")
    built = build_for(session, made.graph, choice)
    return Final(made.graph, made.changes, built, (made.note,) if made.note else ())


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRecord:
    """How the final graph is built for its file."""

    choice: BuildChoice


def kept_choice(session: Session, key: str) -> BuildChoice | None:
    """What ``packaged`` chose before."""
    kept = session.store.get(FileRecord, "file", key)
    return None if kept is None else kept.choice


def packaged(session: Session, final: Final, best: BuildChoice, key: str) -> Final:
    """The same build as native code, where its backend makes such and it is not slower.

    It answers at once wherever the file is loaded; what was compiled while it ran is compiled again there.

    ``best`` is how the best uncompressed build was made; ``key`` is the plan's: what was chosen once for it
    is chosen again.
    """
    choice, backend = final.built.choice, session.backends[final.built.choice.backend]
    ahead = backend.for_file(choice, best) if isinstance(backend, Packaging) else ()
    kept = kept_choice(session, key)
    if not ahead or kept == choice:
        return final
    others: list[Final] = []
    for other in ahead if kept is None else (kept,):
        try:
            others.append(replace(final, built=build_for(session, final.graph, other)))
        except (BackendError, ParityError) as error:
            session.progress.note(f"{other.describe()}: no native code for the file: {error}")
    if not others:
        return final
    found = others[0] if kept is not None else _fastest(session, final, others)
    session.store.put("file", key, FileRecord(choice=found.built.choice))
    return found


def _fastest(session: Session, final: Final, others: Sequence[Final]) -> Final:
    """The fastest of some builds, of one interleaved run; the planned one where all are surely slower."""
    named = {"planned": final, **{str(i): other for i, other in enumerate(others)}}
    calls = {
        name: session.caller(f.built.executable, f.built.choice.batch) for name, f in named.items()
    }
    timings = measure_calls(session, calls, _PACKAGED)
    least = min((n for n in named if n != "planned"), key=lambda n: timings[n].median_ms)
    if is_slower(ratio(timings["planned"], timings[least], session.settings.seed)):
        session.progress.note("native code for the file is slower than the build of the plan: left")
        return final
    return named[least]


def as_baseline(session: Session, prices: Prices, target: Target, plan: Plan) -> Plan:
    """The plan that leaves everything as it is, on the best uncompressed build."""
    base = prices.baseline
    assert base.choice is not None
    native: Level = base.choice.precision
    return replace(
        plan,
        assignment={
            s.name: native if s.kind == "format" else s.units
            for s in session.sites
            if s.pinned is None
        },
        choice=base.choice,
        settings={},
        methods={},
        predicted_ms=base.timing.median_ms,
        measured_ms=base.timing.median_ms,
        predicted_error=0.0,
        target=target.budgets(),
    )
