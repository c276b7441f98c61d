"""What follows from a report by arithmetic: its rows, its sites, the quality of its prices."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tersor.core.records import BuildChoice, Format, PriceTable, Site, Timing, Verdict
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
    """One site in the plan: what became of it, what it costs and why."""

    site: str
    shape: tuple[int, ...]
    before: Format
    after: Format
    size_before: int
    size_after: int
    predicted_ms_before: float | None
    predicted_ms: float | None
    error: float
    reason: str


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
    native = report.plan.choice.precision
    after = report.plan.assignment.get(site.name, native)
    candidate = report.candidate(site.name, after)
    row = _op_prices(report.table(), site.name)
    return SiteLine(
        site=site.name,
        shape=site.shape,
        before=native,
        after=after,
        size_before=site.size_bytes,
        size_after=site.size_bytes if candidate is None else candidate.size_bytes,
        predicted_ms_before=row.get(native),
        predicted_ms=row.get(after),
        error=0.0 if candidate is None else candidate.error,
        reason=reason(report, site),
    )


def _op_prices(table: PriceTable | None, site: str) -> dict[str, float]:
    if table is None:
        return {}
    return {level: ms * table.scale for level, ms in table.ops.get(site, {}).items()}


def reason(report: Report, site: Site) -> str:
    """Why a site is at its level, in one line."""
    native = report.plan.choice.precision
    level = report.plan.assignment.get(site.name, native)
    if site.pinned is not None:
        return f"pinned: {site.pinned}"
    if level == native:
        others = [c for c in report.candidates if c.site == site.name and c.level != native]
        if not others:
            return "no other format was offered"
        return f"none of {len(others)} other format(s) was chosen under the target"
    saved = change_ms(report, site.name, native)
    candidate = report.candidate(site.name, level)
    error = "" if candidate is None else f", +{candidate.error:.2g} error"
    if saved is None:
        return f"chosen without a price{error}"
    return f"{-saved:+.3g} ms{error}"


def change_ms(report: Report, site: str, level: Format) -> float | None:
    """Predicted change of the latency if this one site went to ``level``; None without a table."""
    table = report.table()
    if table is None:
        return None
    tensors = {s.name: s.tensor for s in report.sites if s.tensor is not None}
    now = dict(report.plan.assignment)
    return table.predict_ms({**now, site: level}, tensors) - table.predict_ms(now, tensors)


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
    notes.append(_held_out(verdict))
    if verdict.largest_difference:
        notes.append(
            f"built against graph: largest difference {verdict.largest_difference:.2g} of the "
            "output's scale"
        )
    return (*notes, *verdict.notes, *report.notes)


def _held_out(verdict: Verdict) -> str:
    if verdict.held_out:
        return f"quality is held out: {verdict.test_samples} test sample(s), used once"
    times = f"{verdict.test_uses} time(s)"
    return f"quality is not held out: {verdict.test_samples} test sample(s), used {times}"


def _ratio(over: float, under: float) -> float | None:
    return over / under if under > 0 else None
