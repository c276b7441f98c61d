"""The report in the terminal: one Rich table for each question a reader has.

Cells are ``Text``, never markup: names of sites and notes come from outside.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tersor.core.records import BaselineRow, ParetoPoint, Site, Timing, Verdict
from tersor.core.units import format_bytes
from tersor.report.facts import (
    PriceQuality,
    Row,
    SiteLine,
    all_notes,
    describe,
    price_quality,
    result_rows,
    site_lines,
)
from tersor.report.record import Report

_STYLES = {"pass": "bold green", "fail": "bold red", "unknown": "bold yellow"}
_WORDS = {"pass": "target met", "fail": "target not met", "unknown": "unknown"}
_NONE = "-"


def render_report(report: Report) -> RenderableType:
    """All of it, the verdict first."""
    return Group(
        verdict_table(report.verdict),
        rows_table(result_rows(report)),
        sites_view(site_lines(report)),
        quality_table(price_quality(report)),
        pareto_table(report.pareto),
        notes_list(all_notes(report)),
        Text(machine_line(report), style="dim"),
    )


def render_summary(report: Report) -> RenderableType:
    """Verdict, rows and notes: what ``compress`` prints at its end."""
    return Group(
        verdict_table(report.verdict),
        rows_table(result_rows(report)),
        notes_list(all_notes(report)),
    )


def verdict_table(verdict: Verdict) -> RenderableType:
    """The status in words, then each check with what was wanted and what was found."""
    title = Text.assemble("verdict: ", status_text(verdict.status))
    if not verdict.checks:
        return title
    rows = [
        (check.name, f"{check.wanted:.4g}", f"{check.found:.4g}", check.status, check.note)
        for check in verdict.checks
    ]
    table = _table(title, ("check", "wanted", "found", "status", "note"), numeric={1, 2})
    for name, wanted, found, status, note in rows:
        table.add_row(Text(name), Text(wanted), Text(found), short_status(status), Text(note))
    return table


def status_text(status: str) -> Text:
    """A status in words and colour."""
    return Text(f"{status} ({_WORDS[status]})" if status != "unknown" else status, _STYLES[status])


def short_status(status: str) -> Text:
    """The bare word, in colour."""
    return Text(status, _STYLES[status])


def rows_table(rows: Sequence[Row]) -> Table:
    """As given, best uncompressed, result."""
    columns = ("build", "latency ms, median [95 %]", "speed-up [95 %]", "size", "quality")
    table = _table(Text("result"), columns, numeric={1, 2, 3})
    for row in rows:
        _add(
            table,
            row.name,
            timing(row.latency),
            _speedup(row),
            _megabytes(row.size_bytes),
            _quality(row),
        )
    return table


def timing(value: Timing | None) -> str:
    """Median and its 95 % interval, milliseconds."""
    if value is None:
        return _NONE
    return f"{value.median_ms:.3f} [{value.low_ms:.3f}, {value.high_ms:.3f}]"


def _speedup(row: Row) -> str:
    if row.speedup is None:
        return _NONE
    if row.speedup_low is None or row.speedup_high is None:
        return f"{row.speedup:.2f}x"
    return f"{row.speedup:.2f}x [{row.speedup_low:.2f}, {row.speedup_high:.2f}]"


def _quality(row: Row) -> str:
    parts = []
    if row.drop_points is not None:
        parts.append(f"drop {row.drop_points:.2f} pt")
    if row.agreement is not None:
        parts.append(f"agreement {row.agreement:.4f}")
    if row.agreement_p5 is not None:
        parts.append(f"5th percentile {row.agreement_p5:.4f}")
    if row.test_samples is not None:
        parts.append(f"{row.test_samples} test samples")
    return ", ".join(parts) or _NONE


def sites_view(lines: Sequence[SiteLine]) -> RenderableType:
    """The plan: a table of the format sites, then the widths and branches in words."""
    widths = [line for line in lines if line.kind != "format"]
    table = sites_table([line for line in lines if line.kind == "format"])
    return Group(table, widths_list(widths)) if widths else table


def sites_table(lines: Sequence[SiteLine]) -> Table:
    """The plan by format site."""
    columns = ("site", "format", "size", "predicted ms", "error", "reason")
    table = _table(Text("plan"), columns, numeric={3, 4})
    for line in lines:
        _add(
            table,
            line.site,
            _arrow(str(line.before), str(line.after)),
            _arrow(_megabytes(line.size_before), _megabytes(line.size_after)),
            _NONE if line.predicted_ms is None else f"{line.predicted_ms:.3f}",
            f"{line.error:.2g}" + (f" +- {line.error_se:.1g}" if line.error_se else ""),
            line.reason,
        )
    return table


def widths_list(lines: Sequence[SiteLine]) -> Text:
    """Widths and branches, one line each."""
    return Text("\n".join(describe(line) for line in lines))


def _arrow(before: str, after: str) -> str:
    return after if before == after else f"{before} -> {after}"


def quality_table(rows: Sequence[PriceQuality]) -> Table:
    """How good the price tables are, on builds that no fit saw."""
    columns = ("price table", "held-out builds", "median error", "p90 error")
    table = _table(Text("prices"), columns, numeric={1, 2, 3})
    for row in rows:
        _add(
            table,
            row.choice.describe(),
            str(row.builds),
            _percent(row.median_percent),
            _percent(row.p90_percent),
        )
    return table


def _percent(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.1f} %"


def pareto_table(points: Sequence[ParetoPoint]) -> Table:
    """Other points that were found."""
    columns = ("latency ms", "size", "drop", "predicted error", "basis")
    table = _table(Text("other points"), columns, numeric={0, 1, 2, 3})
    for point in points:
        _add(
            table,
            f"{point.latency_ms:.3f}",
            f"{point.size_mb:.2f} MB",
            f"{point.drop:.2f} pt",
            f"{point.error:.2g}",
            "measured" if point.measured else "predicted",
        )
    return table


def baselines_table(rows: Sequence[BaselineRow]) -> Table:
    """Every uncompressed build, as ``bench`` measures them."""
    columns = ("build", "latency ms, median [95 %]", "size", "agreement")
    table = _table(Text("uncompressed builds"), columns, numeric={1, 2, 3})
    for row in rows:
        _add(
            table,
            _build(row),
            timing(row.timing),
            _megabytes(row.size_bytes),
            _NONE if row.agreement is None else f"{row.agreement:.6f}",
        )
    return table


def _build(row: BaselineRow) -> str:
    choice = "as given" if row.choice is None else row.choice.describe()
    return row.name if choice == row.name else f"{row.name} ({choice})"


def inspected_table(sites: Sequence[Site]) -> Table:
    """The sites of a model before any plan."""
    columns = ("site", "op", "weight", "MACs per sample", "size", "pinned")
    table = _table(Text("sites"), columns, numeric={3, 4})
    for site in sites:
        _add(
            table,
            site.name,
            site.op_kind or site.unit_kind or site.kind,
            f"{site.units} units" if site.units else "x".join(str(n) for n in site.shape),
            f"{site.macs:,}",
            _megabytes(site.size_bytes),
            site.pinned or "",
        )
    return table


def explained(facts: Mapping[str, Any]) -> RenderableType:
    """One site as ``explain`` gives it: what it is, its alternatives, and the way back."""
    head = Text(
        f"{facts['site']}: {facts['level']}, {_megabytes(facts['size_bytes'])}, "
        f"predicted {_with_error(facts['predicted_ms'], facts['predicted_ms_se'])}, "
        f"error {_uncertain(facts)}\n{facts['reason']}"
    )
    columns = ("alternative", "method", "latency change", "error change", "size change")
    table = _table(Text("instead, all else unchanged"), columns, numeric={2, 3, 4})
    for other in facts["alternatives"]:
        _add(table, str(other["level"]), other["method"], *_changes(other))
    undo = facts["undo"]
    if undo is None:
        return Group(head, table)
    latency, error, size = _changes(undo)
    back = Text(f"undo this (back to {undo['level']}): {latency}, {error} error, {size}")
    return Group(head, table, back)


def _uncertain(facts: Mapping[str, Any]) -> str:
    """An error, its standard error, and on how many samples they were measured."""
    measured = f" ({facts['samples']} samples)" if facts["samples"] else ""
    return f"{facts['error']:.2g} +- {facts['error_se']:.2g}{measured}"


def _changes(change: Mapping[str, Any]) -> tuple[str, str, str]:
    size = change["size_bytes_change"]
    return (
        _number(change["latency_ms_change"], " ms", "+"),
        f"{change['error_change']:+.2g}",
        f"{'+' if size >= 0 else '-'}{_megabytes(abs(size))}",
    )


def _number(value: float | None, unit: str, sign: str = "") -> str:
    return "unknown" if value is None else f"{value:{sign}.3f}{unit}"


def _with_error(ms: float | None, se: float | None) -> str:
    return _number(ms, " ms") if se is None else f"{_number(ms, '')} +- {_number(se, ' ms')}"


def notes_list(notes: Iterable[str]) -> Text:
    """One line a note."""
    return Text("\n".join(f"* {note}" for note in notes))


def machine_line(report: Report) -> str:
    """Machine, versions and seed: they travel with every figure."""
    machine = report.machine
    versions = ", ".join(f"{name} {text}" for name, text in sorted(report.versions.items()))
    return (
        f"tersor {report.version}; {machine.processor}, {machine.cores} core(s); "
        f"{versions}; seed {report.plan.seed}"
    )


def _table(title: Text, columns: Sequence[str], numeric: set[int]) -> Table:
    table = Table(title=title, title_justify="left", header_style="bold")
    for index, name in enumerate(columns):
        table.add_column(
            Text(name), justify="right" if index in numeric else "left", overflow="fold"
        )
    return table


def _add(table: Table, *cells: str) -> None:
    table.add_row(*(Text(cell) for cell in cells))


def _megabytes(size: int) -> str:
    return format_bytes(float(size))
