"""Builds that were measured before on this machine, and what their times are worth today.

What a build takes depends on the structure of its graph, not on the values of its weights, so that
the same model with other data, weights, targets or layers to keep finds its builds again. A build
is kept with the time that the native build of the same choice took beside it. That reference is built
and measured at every use, and what was kept is scaled by how it has changed. Where it has changed
much, or one other build has changed otherwise, the machine is not what it was: nothing is used.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from tersor.core.errors import ConfigError
from tersor.core.jsonable import digest
from tersor.core.rank_levels import is_eight_bit, rank_of
from tersor.core.records import BuildChoice, Level, PriceTable, Site, Term
from tersor.core.store import Store

Assignment = Mapping[str, Level]

MOST_DRIFT = 0.25  # of the reference: beyond, what was kept is of another machine, in effect
# Of one build against the reference: the same two differ by 2 to 4 % between sessions.
MOST_DISAGREEMENT = 0.1
_BUILDS, _TABLES = "builds", "tables"  # stages of the store


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptBuild:
    """One whole build as it was measured; all times are of one session.

    Attributes:
        reference: Key of the native build of the same choice.
        reference_ms: What that took.

    Raises:
        ConfigError: A time that is not positive and finite, or no node times.
    """

    node_ms: Mapping[str, float]
    measured_ms: float
    reference: str
    reference_ms: float

    def __post_init__(self) -> None:
        times = (self.measured_ms, self.reference_ms)
        if not all(math.isfinite(ms) and ms > 0 for ms in times) or not self.node_ms:
            raise ConfigError(
                f"a kept build: found {times} ms and {len(self.node_ms)} node times, wanted times "
                "above 0 and at least one node"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptTable:
    """A table and the problem that it was fitted for."""

    table: PriceTable
    levels: Mapping[str, tuple[Level, ...]]  # of the sites that were free
    reference: str
    reference_ms: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.reference_ms) and self.reference_ms > 0):
            raise ConfigError(f"a kept table: found a reference of {self.reference_ms} ms")


@dataclass(frozen=True, slots=True, kw_only=True)
class PriceMemory:
    """What a store keeps of builds and tables. Damaged entries are removed and count as none.

    Args:
        store: Where.
        scope: Digest of all that a build's time depends on beside choice and levels: the graph's
            structure, the sizes of the data, the machine.
        versions: Backend -> its version.
        detail: Assignment -> what else decides the structure of its graph, as JSON values.
    """

    store: Store
    scope: str
    versions: Mapping[str, str]
    detail: Callable[[Assignment], Any] = lambda _assignment: None

    def key(self, choice: BuildChoice, assignment: Assignment) -> str:
        """Of one build."""
        levels = sorted((site, str(level)) for site, level in assignment.items())
        return digest(self._place(choice), levels, self.detail(assignment))

    def build(self, key: str) -> KeptBuild | None:
        """What was measured of a build."""
        return self.store.get(KeptBuild, _BUILDS, key)

    def keep_build(self, key: str, kept: KeptBuild) -> None:
        """Put a build in place of what is there."""
        self.store.put(_BUILDS, key, kept)

    def table(self, choice: BuildChoice) -> KeptTable | None:
        """The latest table of a choice that was fitted on new builds."""
        return self.store.get(KeptTable, _TABLES, self._place(choice))

    def keep_table(self, choice: BuildChoice, kept: KeptTable) -> None:
        """Put a table in place of what is there."""
        self.store.put(_TABLES, self._place(choice), kept)

    def _place(self, choice: BuildChoice) -> str:
        return digest(self.scope, choice, self.versions[choice.backend])


def drift(now_ms: float, then_ms: float) -> float | None:
    """What times of then are to be multiplied by; None where the reference has changed too much."""
    ratio = now_ms / then_ms
    return ratio if abs(math.log(ratio)) <= math.log1p(MOST_DRIFT) else None


def agrees(kept: KeptBuild, measured_ms: float, reference_ms: float) -> bool:
    """Whether a build that was measured again has changed as the reference did."""
    own, common = measured_ms / kept.measured_ms, reference_ms / kept.reference_ms
    return abs(math.log(own / common)) <= math.log1p(MOST_DISAGREEMENT)


def covers(kept: KeptTable, levels: Mapping[str, Sequence[Level]]) -> bool:
    """Whether a table has a price for all that is on offer now."""
    return all(set(own) <= set(kept.levels.get(site, ())) for site, own in levels.items())


def narrowed(
    table: PriceTable, sites: Sequence[Site], levels: Mapping[str, Sequence[Level]]
) -> PriceTable:
    """A table of a problem with more levels, for one in which only some are on offer.

    Args:
        table: Fitted where every level of ``levels`` was on offer.
        sites: All sites now.
        levels: Site that is free now -> its levels; the others stay native.
    """
    formats = {s.name for s in sites if s.kind == "format"}
    glue, terms = table.glue_ms, []
    for term in table.terms:
        rest = _narrowed_term(term, table, formats, levels)
        if isinstance(rest, Term):
            terms.append(rest)
        else:
            glue += rest
    return replace(
        table,
        ops={
            site: row if site in levels else {f: ms for f, ms in row.items() if not _is_edit(f)}
            for site, row in table.ops.items()
        },
        glue_ms=glue,
        terms=tuple(terms),
        native={w: n for w, n in table.native.items() if w in levels},
    )


def _is_edit(level: str) -> bool:
    """Whether a level is more than another type of the same weight."""
    return is_eight_bit(level) or rank_of(level) > 0


def _narrowed_term(
    term: Term, table: PriceTable, formats: set[str], levels: Mapping[str, Sequence[Level]]
) -> Term | float:
    """The term over the sites that are free; what it costs where none is.

    Where an op's own format is fixed, that of what reads it may be no matter any more.
    """
    fixed = {s: table.native_level(s) for s in term.sites if s not in levels}
    fixed |= {
        s: table.native_level(s)
        for s in term.sites
        if fixed and s in levels and s in formats and not _matters(term, s, fixed)
    }
    free = tuple(s for s in term.sites if s not in fixed)
    rows = tuple(
        tuple(n for n in own if s in formats or n in levels[s])
        for s, own in zip(term.sites, term.levels, strict=True)
        if s in free
    )
    values = tuple(term.at({**fixed, **dict(zip(free, at, strict=True))}) for at in product(*rows))
    return replace(term, sites=free, levels=rows, values=values) if free else values[0]


def _matters(term: Term, site: str, fixed: Mapping[str, Level]) -> bool:
    """Whether a term tells the levels of a site apart, with other sites fixed."""
    rest = [s for s in term.sites if s != site]
    rows = [
        (fixed[s],) if s in fixed else own
        for s, own in zip(term.sites, term.levels, strict=True)
        if s != site
    ]
    own = term.levels[term.sites.index(site)]
    return any(
        len({term.at({**dict(zip(rest, at, strict=True)), site: level}) for level in own}) > 1
        for at in product(*rows)
    )
