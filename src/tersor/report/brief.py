"""A report of what was chosen alone, for files that are to be small.

A whole report holds every level that was on offer with its error, and prices of all their combinations: of
a small model that is more than its compressed weights, and the more methods take part the more it is. In
brief it keeps, of each site, the level that it has and that of being left alone. All that is said of the
plan, and of undoing one of its choices, stays exact.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from itertools import product

from tersor.core.formats import priced_as
from tersor.core.records import BuildChoice, Candidate, Level, Prices, PriceTable, Term
from tersor.report.record import Report

LEFT_OUT = (
    "the report in the file is in brief, as the file is to be small: what else was on offer is in the run's "
    "own (result.report)"
)
Levels = Mapping[str, Collection[Level]]  # site -> the levels that stay
Has = Callable[[str, object], bool]


def brief(report: Report) -> Report:
    """The same report without levels that the plan does not have, other tables, and other points."""
    now = report.assignment()
    levels = {site.name: (now[site.name], report.native(site)) for site in report.sites}
    candidates, prices = chosen_alone(report.candidates, report.prices, report.plan.choice, levels)
    return replace(report, candidates=candidates, prices=prices, pareto=(), left_out=LEFT_OUT)


def chosen_alone(
    candidates: Sequence[Candidate], prices: Prices, choice: BuildChoice, levels: Levels
) -> tuple[tuple[Candidate, ...], Prices]:
    """Candidates and prices of some levels of each site, on the table of one choice."""

    def has(site: str, level: object) -> bool:
        return site not in levels or level in levels[site]

    def is_priced(site: str, level: object) -> bool:
        return site not in levels or level in [priced_as(own) for own in levels[site]]

    kept = replace(
        prices,
        tables=tuple(_cut_table(t, is_priced) for t in prices.tables if t.choice == choice),
        size_terms=tuple(_cut_term(term, has) for term in prices.size_terms),
        refused=(),
    )
    return tuple(c for c in candidates if has(c.site, c.level)), kept


def _cut_table(table: PriceTable, has: Has) -> PriceTable:
    """Its entries for these levels, and the builds that tested it."""

    def stays(site: str, level: object) -> bool:
        return has(site, level) or level == table.native_level(site)

    return replace(
        table,
        ops={
            site: {level: ms for level, ms in row.items() if stays(site, level)}
            for site, row in table.ops.items()
        },
        terms=tuple(_cut_term(term, stays) for term in table.terms),
        builds=tuple(replace(b, assignment={}) for b in table.builds if b.held_out),
    )


def _cut_term(term: Term, has: Has) -> Term:
    """A term over the levels that are left; all of a site's where none is."""
    kept = [
        [level for level in levels if has(site, level)] or list(levels)
        for site, levels in zip(term.sites, term.levels, strict=True)
    ]
    values = _values(term, kept)
    return replace(term, levels=tuple(tuple(row) for row in kept), values=values)


def _values(term: Term, kept: Sequence[Sequence[Level]]) -> tuple[float, ...]:
    return tuple(
        term.at(dict(zip(term.sites, combination, strict=True))) for combination in product(*kept)
    )
