"""What follows from a report by arithmetic: its rows, its sites, the quality of its prices."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tersor.core.formats import priced_as
from tersor.core.records import (
    BuildChoice,
    Level,
    PriceTable,
    Site,
    SiteKind,
    Term,
    Timing,
    Verdict,
)
from tersor.report.record import Report


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One build in the table of results; speed-up is against the best uncompressed build."""

    name: str
    latency: Timing | None
    speedup: float | None
    speedup_low: float | None = None
    speedup_high: float | None = None
    size_bytes: int
    drop_points: float | None = None
    agreement: float | None = None
    agreement_p5: float | None = None
    test_samples: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteLine:
    """One site in the plan: what became of it, what it costs and why.

    Times and bytes of a width are those of all that it meets, the other sites as in the plan.
    """

    site: str
    kind: SiteKind
    shape: tuple[int, ...]
    before: Level
    after: Level
    size_before: int
    size_after: int
    predicted_ms_before: float | None
    predicted_ms: float | None
    error: float
    reason: str
    error_se: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PriceQuality:
    """How far a price table was off on builds that no fit saw, in per cent of the measured time."""

    choice: BuildChoice
    builds: int
    median_percent: float | None  # None: no held-out build
    p90_percent: float | None


def result_rows(report: Report) -> tuple[Row, ...]:
    """As given (where it was timed), the best uncompressed build, the result."""
    verdict = report.verdict
    baseline = report.prices.baseline
    base_ms = verdict.baseline_latency.median_ms
    rows = []
    if verdict.original_latency is not None:
        rows.append(
            Row(
                name="as given (eager)",
                latency=verdict.original_latency,
                speedup=_ratio(base_ms, verdict.original_latency.median_ms),
                size_bytes=verdict.original_bytes,
            )
        )
    rows.append(
        Row(
            name=f"best uncompressed ({baseline.name})",
            latency=verdict.baseline_latency,
            speedup=1.0,
            size_bytes=baseline.size_bytes,
            agreement=baseline.agreement,
        )
    )
    rows.append(_result_row(verdict))
    return tuple(rows)


def _result_row(verdict: Verdict) -> Row:
    name = "result (the best uncompressed build)" if verdict.returned_baseline else "result"
    return Row(
        name=name,
        latency=verdict.latency,
        speedup=verdict.speedup,
        speedup_low=verdict.speedup_low,
        speedup_high=verdict.speedup_high,
        size_bytes=verdict.size_bytes,
        drop_points=verdict.drop_points,
        agreement=verdict.agreement,
        agreement_p5=verdict.agreement_p5,
        test_samples=verdict.test_samples,
    )


def site_lines(report: Report) -> tuple[SiteLine, ...]:
    """One line a site, in the order of the sites."""
    return tuple(_site_line(report, site) for site in report.sites)


def _site_line(report: Report, site: Site) -> SiteLine:
    before, after = report.native(site), report.level(site)
    candidate = report.candidate(site.name, after)
    is_format = site.kind == "format"  # what its weight took as given
    return SiteLine(
        site=site.name,
        kind=site.kind,
        shape=site.shape,
        before=before,
        after=after,
        size_before=site.size_bytes if is_format else site_bytes(report, site, before),
        size_after=site_bytes(report, site, after),
        predicted_ms_before=site_ms(report, site, before),
        predicted_ms=site_ms(report, site, after),
        error=0.0 if candidate is None else candidate.error,
        error_se=0.0 if candidate is None else candidate.error_se,
        reason=reason(report, site),
    )


def describe(line: SiteLine) -> str:
    """One site in one line of text: what it is, what became of it, why."""
    name = line.site.removeprefix(f"{line.kind}:")
    if line.kind == "branch":
        change = _of_branch(line)
    elif line.before == line.after:
        change = str(line.after)
    else:
        change = f"{line.before} -> {line.after}"
    kind = "" if line.kind == "format" else f"{line.kind} "
    return f"{kind}{name}: {change}, {line.reason}"


def _of_branch(line: SiteLine) -> str:
    if line.after == line.before:
        return "kept"
    return "replaced by its best linear map" if line.after else "removed"


def site_bytes(report: Report, site: Site, level: Level) -> int:
    """Bytes at a level of one site, the other sites as in the plan.

    Where weights depend on several sites, those of all weights that this one decides; a site
    that no candidate and no size term knows at that level has the bytes that were given.
    """
    terms = _terms_of(report.prices.size_terms, site.name)
    if terms:
        levels = report.assignment() | {site.name: level}
        if all(_is_known(term, levels) for term in terms):
            return round(sum(term.at(levels) for term in terms))
    candidate = report.candidate(site.name, level)
    return site.size_bytes if candidate is None else candidate.size_bytes


def site_ms(report: Report, site: Site, level: Level) -> float | None:
    """Predicted time of what a site decides at a level, the others as in the plan.

    None without a table, or without a price for that level.
    """
    table = report.table()
    if table is None:
        return None
    terms = _terms_of(table.terms, site.name)
    levels = table.complete(report.assignment() | {site.name: level})
    own = table.ops.get(site.name, {}).get(str(priced_as(level)))
    if not all(_is_known(term, levels) for term in terms) or (own is None and not terms):
        return None
    return ((own or 0.0) + sum(term.at(levels) for term in terms)) * table.scale


def site_ms_se(report: Report, site: Site, level: Level) -> float | None:
    """Standard error of ``site_ms``: its entries vary around their prices, each by itself.

    None where that is not known of one of them.
    """
    table = report.table()
    if table is None or table.uncertainty is None or site_ms(report, site, level) is None:
        return None
    levels = table.complete(report.assignment() | {site.name: level})
    costs = {term.name: term.at(levels) for term in _terms_of(table.terms, site.name)}
    if site.name in table.ops:
        costs[site.name] = table.ops[site.name].get(str(priced_as(level)), 0.0)
    shares = [table.uncertainty.entries.get(name) for name, ms in costs.items() if ms]
    if any(share is None for share in shares):
        return None
    values = zip([ms for ms in costs.values() if ms], shares, strict=True)
    return table.scale * math.sqrt(sum((ms * (share or 0.0)) ** 2 for ms, share in values))


def _terms_of(terms: Sequence[Term], site: str) -> list[Term]:
    return [term for term in terms if site in term.sites]


def _is_known(term: Term, assignment: Mapping[str, Level]) -> bool:
    pairs = zip(term.sites, term.levels, strict=True)
    return all(assignment.get(site) in levels for site, levels in pairs)


def reason(report: Report, site: Site) -> str:
    """Why a site is at its level, in one line."""
    native, level = report.native(site), report.level(site)
    if site.pinned is not None:
        return f"pinned: {site.pinned}"
    what = "format" if site.kind == "format" else "level"
    if level == native and report.left_out:
        return f"left alone; which other {what}s were offered is not in this report"
    if level == native:
        others = [c for c in report.candidates if c.site == site.name and c.level != native]
        if not others:
            return f"no other {what} was offered"
        return f"none of {len(others)} other {what}(s) was chosen under the target"
    saved = change_ms(report, site.name, native)
    candidate = report.candidate(site.name, level)
    error = "" if candidate is None else f", +{candidate.error:.2g} error"
    if saved is None:
        return f"chosen without a price{error}"
    return f"{-saved:+.3g} ms{error}"


def change_ms(report: Report, site: str, level: Level) -> float | None:
    """Predicted change of the latency if this one site went to ``level``.

    None without a table, or where the table has no price for the plan or for that level.
    """
    table = report.table()
    if table is None:
        return None
    tensors = {s.name: s.tensor for s in report.sites if s.tensor is not None}
    now = table.complete(report.assignment())
    then = {**now, site: priced_as(level)}
    if not all(_is_known(term, levels) for term in table.terms for levels in (now, then)):
        return None
    return table.predict_ms(then, tensors) - table.predict_ms(now, tensors)


def price_quality(report: Report) -> tuple[PriceQuality, ...]:
    """Error of every price table on its held-out builds."""
    return tuple(_quality(table) for table in report.prices.tables)


def _quality(table: PriceTable) -> PriceQuality:
    errors = [
        100 * abs(build.predicted_ms / build.measured_ms - 1)
        for build in table.builds
        if build.held_out and build.measured_ms > 0
    ]
    return PriceQuality(
        choice=table.choice,
        builds=len(errors),
        median_percent=quantile(errors, 0.5) if errors else None,
        p90_percent=quantile(errors, 0.9) if errors else None,
    )


def quantile(values: Sequence[float], fraction: float) -> float:
    """Linear interpolation between order statistics (Hyndman and Fan's type 7); needs a value."""
    ordered = sorted(values)
    place = fraction * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def all_notes(report: Report) -> tuple[str, ...]:
    """What must stand beside the numbers: returned baseline, held out or not, bounds that bind."""
    verdict = report.verdict
    notes = []
    if verdict.returned_baseline:
        why = verdict.reason or "no plan was better"
        notes.append(f"the best uncompressed build is returned: {why}")
    if verdict.binding and verdict.status != "pass":
        notes.append(f"the constraint that binds: {verdict.binding}")
    if report.left_out:
        notes.append(report.left_out)
    notes.append(_held_out(verdict))
    if verdict.largest_difference:
        notes.append(
            f"built against graph: largest difference {verdict.largest_difference:.2g} of the "
            "output's scale"
        )
    recovered = [recovery.describe() for recovery in report.recoveries]
    return (*notes, *verdict.notes, *recovered, *report.notes)


def _held_out(verdict: Verdict) -> str:
    if verdict.held_out:
        return f"quality is held out: {verdict.test_samples} test sample(s), used once"
    times = f"{verdict.test_uses} time(s)"
    return f"quality is not held out: {verdict.test_samples} test sample(s), used {times}"


def _ratio(over: float, under: float) -> float | None:
    return over / under if under > 0 else None
