"""One allocation problem: candidates, one price table and budgets; and what a plan costs in it."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

from tersor.core.errors import ConfigError
from tersor.core.formats import PACKED, STORED, STORED_PRICE, priced_as
from tersor.core.levels import Inside, settled
from tersor.core.rank_levels import is_eight_bit, rank_of
from tersor.core.records import Candidate, Level, Precision, PriceTable, Term

Objective = Literal["latency", "error", "size"]
Constraint = Literal["latency", "size", "drop"]
Binding = Literal[
    "latency", "size", "drop", "memory"
]  # memory: judged on builds, no row of a program

# The constraint that bounds what an objective minimises, and the field that holds its budget.
CONSTRAINTS: dict[Constraint, tuple[Objective, str]] = {
    "latency": ("latency", "max_ms"),
    "size": ("size", "max_bytes"),
    "drop": ("error", "max_error"),
}


class Totals(NamedTuple):
    """What a plan costs: milliseconds, bytes, and the sum of its candidates' errors."""

    ms: float
    size_bytes: int
    error: float

    def of(self, objective: Objective) -> float:
        """The quantity that an objective minimises."""
        return {"latency": self.ms, "size": float(self.size_bytes), "error": self.error}[objective]


def native_levels(
    candidates: Mapping[str, Sequence[Candidate]],
    precision: Precision,
    native: Mapping[str, int],
) -> dict[str, Level]:
    """Site -> its level when left alone, by site name.

    A format site has the precision of the build; a width or a branch the count in ``native``,
    else its largest.
    """
    found: dict[str, Level] = {}
    for site in sorted(candidates):
        counts = [c.level for c in candidates[site] if isinstance(c.level, int)]
        found[site] = native.get(site, max(counts)) if counts else precision
    return found


def undominated(candidates: Sequence[Candidate]) -> tuple[Candidate, ...]:
    """The candidates of one site without packed levels that another stored one beats.

    All stored levels take the same time, so that one which is no smaller and errs no less than another is
    in no best plan; with widths every level multiplies the combinations of a program. The order stays.
    """
    stored = [c for c in candidates if c.level in STORED]

    def is_beaten(candidate: Candidate) -> bool:
        mine = (candidate.size_bytes, candidate.error)
        return any(
            (c.size_bytes, c.error) != mine
            and c.size_bytes <= candidate.size_bytes
            and c.error <= candidate.error
            for c in stored
        )

    return tuple(c for c in candidates if c.level not in PACKED or not is_beaten(c))


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Pick one level for each site: minimise one quantity under budgets on the others.

    Sites without candidates (pinned ones) are left alone: their time comes from the table, their
    bytes are part of ``fixed_bytes`` or of a size term. A site that a size term names has its
    bytes there, and its candidates' bytes do not count.

    Raises:
        ConfigError: A site has no candidate at its native level or mixes formats and counts, a
            quantiser has a negative price, or a term has no value for its sites left alone.
    """

    candidates: Mapping[str, Sequence[Candidate]]
    table: PriceTable
    tensors: Mapping[str, str]  # site -> the tensor that it reads
    fixed_bytes: int = 0  # of everything that is no site
    size_terms: tuple[Term, ...] = ()  # bytes that depend on the levels of several sites
    inside: Inside = field(default_factory=dict)  # branch -> sites that go with it
    objective: Objective = "latency"
    max_ms: float | None = None
    max_bytes: float | None = None
    max_error: float | None = None
    _native: Mapping[str, Level] = field(init=False, repr=False, compare=False)
    _levels: Mapping[str, Mapping[Level, Candidate]] = field(init=False, repr=False, compare=False)
    _sized: frozenset[str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for tensor, ms in self.table.quantizers.items():
            if not ms >= 0:
                raise ConfigError(f"quantizer of {tensor}: found a price of {ms} ms, wanted >= 0")
        native = native_levels(self.candidates, self.table.choice.precision, self.table.native)
        object.__setattr__(self, "_native", native)
        for site, row in self.candidates.items():
            self._check_levels(site, {c.level for c in row})
        object.__setattr__(self, "_sized", frozenset(s for t in self.size_terms for s in t.sites))
        for term in (*self.table.terms, *self.size_terms):
            for site, levels in zip(term.sites, term.levels, strict=True):
                if self.native_of(site) not in levels:
                    raise ConfigError(
                        f"{term.name}: site {site} left alone is at {self.native_of(site)!r}, "
                        f"wanted one of {list(levels)}; give the term that level, or list the "
                        "site's full count in the table's native"
                    )
        object.__setattr__(self, "_levels", self._usable_levels())

    def _check_levels(self, site: str, levels: set[Level]) -> None:
        found, native = sorted(levels, key=str), self._native[site]
        n_counts = sum(isinstance(level, int) for level in found)
        if 0 < n_counts < len(found):
            raise ConfigError(
                f"site {site}: found candidates {found}, wanted either formats or numbers of kept "
                "units; a width and the format of an op are two sites"
            )
        if native not in levels:
            what = f"the precision of {self.table.choice.describe()}"
            raise ConfigError(
                f"site {site}: found candidates {found}, wanted one in {native}, "
                f"{'its full count' if n_counts else what}; a site that has no choice is left out "
                "and its bytes are counted in fixed_bytes"
            )

    @property
    def native(self) -> Mapping[str, Level]:
        """Site -> its level when left alone."""
        return self._native

    def native_of(self, site: str) -> Level:
        """The level of any site that is left alone, also of one without candidates."""
        return self._native.get(site, self.table.native_level(site))

    def native_assignment(self) -> dict[str, Level]:
        """Every site left alone."""
        return dict(self._native)

    def settled(self, assignment: Mapping[str, Level]) -> dict[str, Level]:
        """The same plan without choices for what is gone with a branch."""
        return settled(assignment, self.inside, self._native)

    def levels(self) -> Mapping[str, Mapping[Level, Candidate]]:
        """What each site may choose, in a fixed order: the native level first, counts falling.

        A level needs a measured price: one that the table never saw, or that a term of the site
        lacks, is left out. Of several candidates at one level the one with the least error
        counts, then the smallest.
        """
        return self._levels

    def bytes_of(self, candidate: Candidate) -> int:
        """The bytes that a candidate takes by itself; 0 where size terms have them."""
        return 0 if candidate.site in self._sized else candidate.size_bytes

    def _usable_levels(self) -> dict[str, dict[Level, Candidate]]:
        priced = _common_levels(self.table.terms)
        sized = _common_levels(self.size_terms)
        found: dict[str, dict[Level, Candidate]] = {}
        for site, native in self._native.items():
            usable = [
                c
                for c in self.candidates[site]
                if c.level == native
                or (
                    self._is_priced(site, c.level, priced) and c.level in sized.get(site, {c.level})
                )
            ]
            usable.sort(key=lambda c: (c.level != native, _order(c.level), c.error, c.size_bytes))
            row: dict[Level, Candidate] = {}
            for candidate in usable:
                row.setdefault(candidate.level, candidate)
            found[site] = row
        return found

    def _is_priced(self, site: str, level: Level, priced: Mapping[str, set[Level]]) -> bool:
        level = priced_as(level)
        if isinstance(level, int):
            return level in priced.get(site, ())
        in_ops = level in self.table.ops[site] if site in self.table.ops else site in priced
        is_edit = level == STORED_PRICE or is_eight_bit(level) or rank_of(level) > 0
        return is_edit and in_ops and level in priced.get(site, {level})

    def budget(self, name: Constraint) -> float | None:
        """The budget of a constraint, or None where there is none."""
        value: float | None = getattr(self, CONSTRAINTS[name][1])
        return value

    def budgets(self) -> dict[Constraint, float]:
        """The budgets that are set, by name."""
        found = {name: self.budget(name) for name in CONSTRAINTS}
        return {name: value for name, value in found.items() if value is not None}

    def without(self, *names: Constraint, objective: Objective | None = None) -> "Problem":
        """The same problem without some budgets, and perhaps for another objective."""
        return replace(
            self,
            objective=objective or self.objective,
            max_ms=None if "latency" in names else self.max_ms,
            max_bytes=None if "size" in names else self.max_bytes,
            max_error=None if "drop" in names else self.max_error,
        )

    def simpler(self) -> "Iterator[Problem]":
        """The same problem with fewer products of levels: without ranks where widths shrink, and with all widths whole."""
        cut = {
            s
            for s, own in self._native.items()
            if isinstance(own, int) and len(self._levels[s]) > 1
        }
        if not cut:
            return
        has_ranks = any(rank_of(level) for row in self._levels.values() for level in row)
        if has_ranks:
            yield self._only(lambda c: not rank_of(c.level))
        yield self._only(lambda c: c.site not in cut or c.level == self._native[c.site])

    def _only(self, stays: Callable[[Candidate], bool]) -> "Problem":
        rows = {site: [c for c in row if stays(c)] for site, row in self.candidates.items()}
        return replace(self, candidates=rows)

    def totals(self, assignment: Mapping[str, Level]) -> Totals:
        """What an assignment costs; sites that it does not list stay native.

        Raises:
            ConfigError: The assignment asks a site for a level that it can't have.
        """
        whole = {**self._native, **assignment}
        size, error = float(self.fixed_bytes), 0.0
        for site, row in self._levels.items():
            level = whole[site]
            if level not in row:
                raise ConfigError(f"site {site}: found level {level}, wanted one of {list(row)}")
            size += self.bytes_of(row[level])
            error += row[level].error
        if self.size_terms:
            named = {**{site: self.native_of(site) for site in self._sized}, **whole}
            size += math.fsum(term.at(named) for term in self.size_terms)
        return Totals(self.table.predict_ms(whole, self.tensors), round(size), error)


def _order(level: Level) -> tuple[int, str]:
    return (-level, "") if isinstance(level, int) else (0, level)


def _common_levels(terms: Sequence[Term]) -> dict[str, set[Level]]:
    """Site -> the levels that every term of it knows."""
    found: dict[str, set[Level]] = {}
    for site, levels in _site_levels(terms):
        found[site] = found[site] & set(levels) if site in found else set(levels)
    return found


def _site_levels(terms: Sequence[Term]) -> Iterator[tuple[str, tuple[Level, ...]]]:
    for term in terms:
        yield from zip(term.sites, term.levels, strict=True)
