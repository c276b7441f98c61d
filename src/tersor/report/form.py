"""The report as JSON: the record, which reads back, and beside it what follows from it."""

from typing import Any

from tersor.core.jsonable import to_json
from tersor.report.facts import all_notes, price_quality, result_rows, site_lines
from tersor.report.record import Report


def report_json(report: Report) -> dict[str, Any]:
    """The whole report as JSON values; ``record`` is what ``from_json(Report, ...)`` reads."""
    return {
        "status": report.verdict.status,
        "rows": to_json(result_rows(report)),
        "sites": to_json(site_lines(report)),
        "price_quality": to_json(price_quality(report)),
        "notes": list(all_notes(report)),
        "record": to_json(report),
    }
