"""Why one site is as it is: price, error, alternatives, and what undoing it would change."""

import difflib
from typing import Any

from tersor.core.errors import SiteNotFoundError
from tersor.core.jsonable import to_json
from tersor.core.records import Candidate, Level, Site
from tersor.report.facts import change_ms, reason, site_bytes, site_ms, site_ms_se
from tersor.report.record import Report

COSTLIEST = 10  # choices that are worth a measurement without them


def costliest(report: Report) -> tuple[str, ...]:
    """The sites that a plan changed and that take most of its predicted time."""
    changed = [s for s in report.sites if report.level(s) != report.native(s)]
    times = {s.name: site_ms(report, s, report.level(s)) or 0.0 for s in changed}
    return tuple(sorted(times, key=lambda name: (-times[name], name))[:COSTLIEST])


def explain(report: Report, site: str) -> dict[str, Any]:
    """What the plan does at a site and what else it could do there, as JSON values.

    Returns:
        Keys: site, kind, op_kind, shape, units, members, macs, pinned, level, native, method,
        error, error_se, samples, size_bytes, predicted_ms, predicted_ms_se, reason, settings,
        alternatives, undo and recovered (a loss before and after for each block that was trained
        with the site's ops). Bytes and times of a width are those of all that it meets. Changes
        (``*_change``) are against the plan as it is, all other sites unchanged. They are
        predictions, but for undo where it says ``measured``; ``predicted`` then holds what was
        predicted.

    Raises:
        SiteNotFoundError: No site of that name; the message names the nearest.
    """
    found = _find(report, site)
    native, level = report.native(found), report.level(found)
    chosen = report.candidate(found.name, level)
    options = [c for c in report.candidates if c.site == found.name and c.level != level]
    return {
        "site": found.name,
        "kind": found.kind,
        "op_kind": found.op_kind,
        "shape": list(found.shape),
        "units": found.units,
        "members": list(found.members),
        "macs": found.macs,
        "pinned": found.pinned,
        "level": level,
        "native": native,
        "method": None if chosen is None else chosen.method,
        "error": 0.0 if chosen is None else chosen.error,
        "error_se": 0.0 if chosen is None else chosen.error_se,
        "samples": 0 if chosen is None else chosen.samples,
        "size_bytes": site_bytes(report, found, level),
        "predicted_ms": site_ms(report, found, level),
        "predicted_ms_se": site_ms_se(report, found, level),
        "reason": reason(report, found),
        "settings": to_json(report.plan.settings.get(found.name, {})),
        "alternatives": [_alternative(report, found, chosen, c) for c in options],
        "undo": _undo(report, found, chosen) if level != native else None,
        "recovered": _recovered(report, found),
    }


def _recovered(report: Report, site: Site) -> list[dict[str, Any]]:
    """What recovery did to the blocks that have the site's ops."""
    return [
        {"what": recovery.what, "is_kept": recovery.is_kept, **to_json(part)}
        for recovery in report.recoveries
        for part in recovery.parts
        if set(part.ops) & set(site.ops)
    ]


def _find(report: Report, name: str) -> Site:
    for site in report.sites:
        if site.name == name:
            return site
    known = [s.name for s in report.sites]
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4) or known[:3]
    raise SiteNotFoundError(
        f"no site is called {name!r}; nearest of {len(known)}: {', '.join(near) or 'none'}"
    )


def _alternative(
    report: Report, site: Site, chosen: Candidate | None, other: Candidate
) -> dict[str, Any]:
    error = 0.0 if chosen is None else chosen.error
    return {
        "level": other.level,
        "method": other.method,
        "error": other.error,
        "error_se": other.error_se,
        "samples": other.samples,
        "note": _refusal(report, site, other.level) or other.note,
        "size_bytes": site_bytes(report, site, other.level),
        "latency_ms_change": change_ms(report, site.name, other.level),
        "error_change": other.error - error,
        "size_bytes_change": _change_bytes(report, site, other.level),
    }


def _refusal(report: Report, site: Site, level: Level) -> str:
    """Why no plan may take a level; "" where one may."""
    own = [r for r in report.prices.refused if (r.site, r.level) == (site.name, level)]
    return f"refused: {own[0].reason}" if own else ""


def _undo(report: Report, site: Site, chosen: Candidate | None) -> dict[str, Any]:
    native = report.native(site)
    before = report.candidate(site.name, native)
    error = 0.0 if before is None else before.error
    predicted = {
        "latency_ms_change": change_ms(report, site.name, native),
        "error_change": error - (0.0 if chosen is None else chosen.error),
    }
    found: dict[str, Any] = {
        "level": native,
        **predicted,
        "size_bytes_change": _change_bytes(report, site, native),
        "measured": False,
    }
    for undone in report.undone:
        if (undone.site, undone.level) == (site.name, native):
            found |= {
                "latency_ms_change": undone.latency_ms_change,
                "error_change": undone.error_change,
                "loss_change": undone.loss_change,
                "measured": True,
                "predicted": predicted,
            }
    return found


def _change_bytes(report: Report, site: Site, level: Level) -> int:
    return site_bytes(report, site, level) - site_bytes(report, site, report.level(site))
