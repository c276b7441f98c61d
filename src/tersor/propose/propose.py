"""Every method's candidates at every site, each with the error that it causes alone.

The error is one real forward pass with only that site replaced: what stands before the site is
taken from one pass of the original, so that a change costs only what follows from it.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from tersor.core.records import Candidate, Level, OutputKind, Site
from tersor.graph.apply import apply
from tersor.graph.contracts import (
    Graph,
    Method,
    SiteChange,
    SiteStatistics,
    WidthStatistics,
    works_on,
)
from tersor.observe.ranks import ALONE, RankGroup
from tersor.propose.errors import chunk_size, chunks, sampled_errors, with_errors
from tersor.propose.sampling import Flat, Precision

NATIVE: tuple[Level, ...] = ("f32", "bf16")  # levels that no edit of the graph expresses
AS_GIVEN = "as given"  # in a method's place where none names those


@dataclass(frozen=True, slots=True)
class Offer:
    """A candidate and the change that puts it into effect on the original model."""

    candidate: Candidate
    change: SiteChange


def offers(
    sites: Sequence[Site],
    statistics: Mapping[str, SiteStatistics | WidthStatistics],
    methods: Mapping[str, Method],
    allowed: Callable[[Candidate], bool],
    advance: Callable[[], None] = lambda: None,
) -> list[Offer]:
    """Candidates of all sites that are not pinned, with their changes; no errors yet.

    A level that edits nothing is offered once, whichever methods name it, and wherever a layer has
    another one, whether or not a method names it.
    """
    found: list[Offer] = []
    for site in sites:
        if site.pinned is None:
            named = [
                (method, replace(candidate, method=name))
                for name, method in methods.items()
                if works_on(method, site)
                for candidate in method.propose(site, statistics[site.name])
            ]
            taken: set[Level] = set()
            for method, candidate in named:
                if candidate.level not in taken and allowed(candidate):
                    taken |= {candidate.level} & set(NATIVE)
                    change = method.apply(site, candidate, statistics[site.name])
                    found.append(Offer(candidate, change))
            if named and site.kind == "format" and not taken:
                found += [offer for offer in _as_given(site) if allowed(offer.candidate)]
        advance()
    return found


def _as_given(site: Site) -> list[Offer]:
    """A layer left alone, in either precision of a build."""
    size = site.size_bytes
    return [
        Offer(
            Candidate(site=site.name, level=level, method=AS_GIVEN, size_bytes=size),
            SiteChange(site=site, level=level),
        )
        for level in NATIVE
    ]


def best_of_each(proposals: Sequence[Offer], made_by: Mapping[str, str]) -> list[Offer]:
    """One offer for each level of a site, where several methods have it: what errs least.

    Levels have one price, so that nothing else tells them apart but bytes, which decide between
    equal errors.

    Args:
        proposals: With measured errors.
        made_by: Site -> the method that a plan has taken there, which goes before all others.
    """
    best: dict[tuple[str, Level], Offer] = {}
    for offer in proposals:
        own = offer.candidate
        place = (own.site, own.level)
        if place not in best or _rank(own, made_by) < _rank(best[place].candidate, made_by):
            best[place] = offer
    return list(best.values())


def _rank(candidate: Candidate, made_by: Mapping[str, str]) -> tuple[bool, float, int]:
    error = math.inf if math.isnan(candidate.error) else candidate.error
    return (made_by.get(candidate.site) != candidate.method, error, candidate.size_bytes)


class _Edited(Mapping[int, Graph]):
    """The original with one offer in effect each; made when asked for."""

    def __init__(self, graph: Graph, changes: Mapping[int, SiteChange]) -> None:
        self._graph, self._changes = graph, changes

    def __getitem__(self, position: int) -> Graph:
        return apply(self._graph, [self._changes[position]])

    def __iter__(self) -> Iterator[int]:
        return iter(self._changes)

    def __len__(self) -> int:
        return len(self._changes)


def measure_errors(  # noqa: PLR0913 - the stage's inputs
    graph: Graph,
    proposals: Sequence[Offer],
    flat: Flat,
    kind: OutputKind,
    advance: Callable[[], None] = lambda: None,
    others: Sequence[Flat] = (),
    *,
    precision: Precision | None = None,
    ranks: RankGroup = ALONE,
) -> list[Candidate]:
    """The candidates with mean error, its standard error, and on how many samples.

    Args:
        graph: The original.
        proposals: As ``offers`` gives them.
        flat: Flat inputs of the search samples.
        kind: The output's geometry.
        advance: Called once for each proposal that edits the graph.
        others: Flat inputs of the samples of each other shape.
        precision: When an error is known well enough. Candidates with a note are not worth more
            samples than the least.
        ranks: Who measures candidates of its own at the same time.
    """
    changes = {
        i: offer.change for i, offer in enumerate(proposals) if offer.candidate.level not in NATIVE
    }
    if not changes and not ranks.is_shared:
        return [offer.candidate for offer in proposals]
    errors = sampled_errors(
        graph,
        _Edited(graph, changes),
        (flat, *others),
        kind,
        sites={i: change.site.name for i, change in changes.items()},
        precision=precision or Precision(),
        few=frozenset(i for i in changes if proposals[i].candidate.note),
        advance=advance,
        ranks=ranks,
    )
    return [
        with_errors(offer.candidate, errors[i]) if i in errors else offer.candidate
        for i, offer in enumerate(proposals)
    ]


__all__ = ["NATIVE", "Offer", "best_of_each", "chunk_size", "chunks", "measure_errors", "offers"]
