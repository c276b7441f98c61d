"""From the model to candidates with errors: one statistics pass, every method, real forwards.

Both stages are found again in the store when they were finished before, and shared by all ranks.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from tersor.analyse.calibration import self_check, site_statistics
from tersor.api.proxies import with_proxies
from tersor.api.session import Session
from tersor.api.shrink import (
    Changes,
    activations_statistics,
    additions_statistics,
    branch_errors,
    branch_sites_statistics,
    error_precision,
    fit_samples,
    width_errors,
    width_sites_statistics,
)
from tersor.core.levels import Inside, gone_with
from tersor.core.records import Candidate, Level, SiteKind
from tersor.graph.changes import ChangeRecords, pack, unpack
from tersor.graph.contracts import Graph, SiteChange, WidthStatistics
from tersor.observe import keeping
from tersor.observe.output_moments import Felt, felt_by
from tersor.observe.ranks import Parcel
from tersor.observe.statistics import Observed, observe
from tersor.observe.together import observe_together
from tersor.propose.eight_bits import in_one_format
from tersor.propose.propose import (
    NATIVE,
    Offer,
    best_of_each,
    chunk_size,
    measure_errors,
    offers,
)

_CALIBRATION_SAMPLES = 256  # more change no statistics that matter here (ALGORITHMS 8.2)
_GRADIENT_SAMPLES = 64  # of the output's gradient moments: a backward pass for each class
_KINDS: tuple[SiteKind, ...] = ("format", "width", "branch")  # in the order of their candidates


@dataclass(frozen=True, kw_only=True)
class Offers:
    """Candidates with their measured errors, and their changes by (site, level)."""

    candidates: tuple[Candidate, ...]
    changes: Mapping[tuple[str, Level], SiteChange]
    inside: Inside = field(default_factory=dict)  # branch -> sites that go with it

    def levels(self) -> dict[str, tuple[Level, ...]]:
        """Site -> its levels."""
        found: dict[str, list[Level]] = {}
        for candidate in self.candidates:
            found.setdefault(candidate.site, []).append(candidate.level)
        return {site: tuple(levels) for site, levels in found.items()}

    def by_site(self) -> dict[str, tuple[Candidate, ...]]:
        """Site -> its candidates."""
        found: dict[str, list[Candidate]] = {}
        for candidate in self.candidates:
            found.setdefault(candidate.site, []).append(candidate)
        return {site: tuple(rows) for site, rows in found.items()}

    def only(self, methods: Collection[str]) -> "Offers":
        """What these methods offer, and what leaves a site alone."""
        whole = {
            site: max((v for v in levels if isinstance(v, int)), default=None)
            for site, levels in self.levels().items()
        }
        found = (
            c
            for c in self.candidates
            if c.method in methods or c.level in NATIVE or c.level == whole[c.site]
        )
        return replace(self, candidates=tuple(found))

    def chosen(self, assignment: Mapping[str, Level]) -> Changes:
        """The changes of an assignment that edit the graph.

        A count that is not on offer takes the first units of the next larger one: good for prices.
        """
        free = {site for site, _ in self.changes}  # the others are pinned
        free -= gone_with(assignment, self.inside)
        found = [
            self._change(site, level)
            for site, level in assignment.items()
            if level not in NATIVE and site in free
        ]
        return Changes(
            formats=tuple(c for c in found if c.site.kind == "format"),
            widths=tuple(c for c in found if c.site.kind == "width" and c.level != c.site.units),
            branches=tuple(c for c in found if c.site.kind == "branch" and c.level != c.site.units),
        )

    def _change(self, site: str, level: Level) -> SiteChange:
        known = self.changes.get((site, level))
        if known is not None:
            return known
        if not isinstance(level, int):
            raise KeyError((site, level))
        larger = min(n for s, n in self.changes if s == site and isinstance(n, int) and n > level)
        near = self.changes[site, larger]
        kept = torch.arange(larger) if near.kept is None else near.kept
        return replace(near, level=level, kept=kept[:level])


@dataclass(frozen=True, slots=True, kw_only=True)
class _OfferRecord:
    candidates: tuple[Candidate, ...]
    changes: ChangeRecords


@dataclass(frozen=True, slots=True, kw_only=True)
class _Kept:
    """What the store knows of a stage."""

    statistics: keeping.ObservedRecords | None = None
    offers: _OfferRecord | None = None


def as_tensors(arrays: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Arrays as tensors that share their memory."""
    return {
        name: torch.from_numpy(array if array.flags.writeable else array.copy())
        for name, array in arrays.items()
    }


def as_arrays(tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Tensors as arrays that share their memory."""
    return {name: tensor.numpy() for name, tensor in tensors.items()}


def calibration_batches(session: Session) -> list[tuple[torch.Tensor, ...]]:
    """Flat inputs of the calibration part, in batches that fit in memory."""
    count = _CALIBRATION_SAMPLES if session.axes is None else fit_samples(session)
    part = session.parts["calibration"].limited(max(count, _CALIBRATION_SAMPLES))
    return list(part.batches(chunk_size(session.graph)))


def calibrate(session: Session) -> dict[str, Observed]:
    """One statistics pass, with the standing self-check; all ranks hold the same statistics."""
    found = session.ranks.first(_Kept, lambda: _kept_statistics(session), "calibrate")
    if found.record.statistics is not None:
        return keeping.unpack(found.record.statistics, as_arrays(found.tensors))
    batches = calibration_batches(session)
    session.progress.stage("calibrate", len(batches))
    seed, ranks = session.settings.seed, session.ranks
    check = self_check(
        session.graph, [t[:8] for t in batches[0]], seed=seed, note=session.progress.note
    )
    advance = session.progress.advance
    if not ranks.is_shared:
        observed = observe(session.graph, batches, len(batches), seed=seed, advance=advance)
        _keep_statistics(session, observed, check)
        return observed
    observed = observe_together(session.graph, batches, ranks, seed=seed, advance=advance)
    shared = ranks.first(
        keeping.ObservedRecords, lambda: _keep_statistics(session, observed, check), "calibrate"
    )
    return keeping.unpack(shared.record, as_arrays(shared.tensors))


def _kept_statistics(session: Session) -> Parcel[_Kept]:
    kept = session.store.get(keeping.ObservedRecords, "calibration", session.key)
    arrays = {} if kept is None else session.store.arrays("calibration", session.key)
    return Parcel(_Kept(statistics=kept), as_tensors(arrays))


def _keep_statistics(
    session: Session, observed: Mapping[str, Observed], check: float
) -> Parcel[keeping.ObservedRecords]:
    record, arrays = keeping.pack(observed, check)
    session.store.put("calibration", session.key, record, arrays)
    return Parcel(record, as_tensors(arrays))


def gradient_moments(
    session: Session, graph: Graph, batches: Sequence[tuple[torch.Tensor, ...]]
) -> Felt:
    """The output's gradient moments of a graph, worked out if a method asks for them."""
    return felt_by(
        graph, batches, session.kind, seed=session.settings.seed, samples=_GRADIENT_SAMPLES
    )


def propose(session: Session, plan: Mapping[str, Level] | None = None) -> Offers:
    """All candidates with their errors; the statistics are not needed afterwards.

    Each rank makes and measures those of its share of the sites; all of them then hold all. ``plan``: the levels
    of one that is to be carried out, whose formats of 8 bits stay.
    """
    found = _measured(session)
    return replace(found, candidates=in_one_format(found.candidates, plan or {}))


def _measured(session: Session) -> Offers:
    ranks = session.ranks
    found = ranks.first(_Kept, lambda: _kept_offers(session), "propose")
    if found.record.offers is not None:
        return _unpacked(session, Parcel(found.record.offers, found.tensors))
    best = _proposed(session)
    records, arrays = pack([offer.change for offer in best])
    record = _OfferRecord(candidates=tuple(offer.candidate for offer in best), changes=records)
    if not ranks.is_shared:
        _keep_offers(session, record, arrays)
        return _offers(session, record, [offer.change for offer in best])
    parts = ranks.collect(_OfferRecord, Parcel(record, as_tensors(arrays)), "propose")
    shared = ranks.first(_OfferRecord, lambda: _joined_offers(session, parts), "propose")
    return _unpacked(session, shared)


def _kept_offers(session: Session) -> Parcel[_Kept]:
    kept = session.store.get(_OfferRecord, "propose", session.key)
    arrays = {} if kept is None else session.store.arrays("propose", session.key)
    return Parcel(_Kept(offers=kept), as_tensors(arrays))


def _keep_offers(session: Session, record: _OfferRecord, arrays: Mapping[str, Any]) -> None:
    session.store.put("propose", session.key, record, arrays)
    session.store.remove("calibration", session.key)  # large, and recomputed by the transform


def _joined_offers(session: Session, parts: Sequence[Parcel[_OfferRecord]]) -> Parcel[_OfferRecord]:
    """The offers of all ranks in the order that one process gives them, kept in the store."""
    rows = [
        Offer(candidate, change)
        for part in parts
        for candidate, change in zip(part.record.candidates, _changes(session, part), strict=True)
    ]
    place = {site.name: i for i, site in enumerate(session.sites)}
    rows.sort(key=lambda o: (_KINDS.index(o.change.site.kind), place[o.candidate.site]))
    records, arrays = pack([offer.change for offer in rows])
    record = _OfferRecord(candidates=tuple(offer.candidate for offer in rows), changes=records)
    _keep_offers(session, record, arrays)
    return Parcel(record, as_tensors(arrays))


def _proposed(session: Session) -> list[Offer]:
    """The best offer for each level of this rank's sites, with its error."""
    observed = calibrate(session)
    own = replace(session, sites=tuple(session.ranks.share(session.sites)))
    widths = width_sites_statistics(own, observed)
    felt = gradient_moments(session, session.graph, calibration_batches(session))
    statistics = site_statistics(session.graph, session.formats, observed, felt)
    known: dict[str, Any] = {
        **statistics,
        **widths,
        **branch_sites_statistics(own),
        **(additions_statistics(session, statistics) if own.additions else {}),
        **activations_statistics(own),
    }
    session.progress.stage("propose", len(own.sites))
    proposals = offers(
        own.sites,
        known,
        session.methods,
        lambda candidate: any(b.supports(candidate).ok for b in session.backends.values()),
        session.progress.advance,
    )
    proposals = with_proxies(session, proposals, known)
    by_kind = [[o for o in proposals if o.change.site.kind == kind] for kind in _KINDS]
    formats, cuts, branches = by_kind
    candidates = _format_errors(session, formats) + _width_errors(session, cuts, widths, observed)
    candidates += branch_errors(session, [(offer.candidate, offer.change) for offer in branches])
    measured = [
        Offer(candidate, offer.change)
        for candidate, offer in zip(candidates, (*formats, *cuts, *branches), strict=True)
    ]
    return best_of_each(measured, session.settings.made_by)


def _width_errors(
    session: Session,
    proposals: list[Offer],
    statistics: Mapping[str, WidthStatistics],
    observed: Mapping[str, Observed],
) -> list[Candidate]:
    if not proposals and not (session.ranks.is_shared and session.widths):
        return []
    pairs = [(offer.candidate, offer.change) for offer in proposals]
    found = width_errors(session, pairs, statistics, observed)
    # The change holds the units: as numbers in every record they would only take room.
    return [
        replace(c, detail={name: value for name, value in c.detail.items() if name != "kept"})
        for c in found
    ]


def _format_errors(session: Session, proposals: list[Offer]) -> list[Candidate]:
    part = session.parts["search"]
    edits = sum(offer.candidate.level not in NATIVE for offer in proposals)
    session.progress.stage("errors", edits)
    advance, precision = session.progress.advance, error_precision(session)
    return measure_errors(
        session.graph,
        proposals,
        part.tensors,
        session.kind,
        advance,
        part.others,
        precision=precision,
        ranks=session.ranks,
    )


def _changes(session: Session, kept: Parcel[_OfferRecord]) -> list[SiteChange]:
    return unpack(kept.record.changes, as_arrays(kept.tensors), session.site_by_name)


def _unpacked(session: Session, kept: Parcel[_OfferRecord]) -> Offers:
    return _offers(session, kept.record, _changes(session, kept))


def _offers(session: Session, record: _OfferRecord, changes: list[SiteChange]) -> Offers:
    by_level = {
        (c.site, c.level): change for c, change in zip(record.candidates, changes, strict=True)
    }
    return Offers(candidates=record.candidates, changes=by_level, inside=session.inside)
