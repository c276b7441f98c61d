"""Ranks that are neither measured faster nor smaller than a whole layer: none of them enters a plan.

A rank has fewer bytes and operations than its layer by construction, and may still be slower. Where a
whole level of the same layer (int8, say) is no larger, no slower and loses no more, in every table,
the rank is refused.
"""

from collections.abc import Mapping, Sequence

from tersor.core.formats import ACTIVATIONS
from tersor.core.rank_levels import rank_of
from tersor.core.records import Candidate, PriceTable, Refusal


def refused(
    candidates: Mapping[str, Sequence[Candidate]],
    tables: Sequence[PriceTable],
    tensors: Mapping[str, str],
) -> tuple[Refusal, ...]:
    """The ranks that no plan may take, with the reason.

    Args:
        candidates: Site -> its candidates, with measured errors.
        tables: Price tables; what one of them prices well is not refused.
        tensors: Site -> the tensor that it reads.

    Returns:
        In the order of the candidates. Widths are taken at their full counts.
    """
    found: list[Refusal] = []
    for site, row in candidates.items():
        whole = [c for c in row if not rank_of(c.level)]
        for candidate in row:
            if candidate.level in ACTIVATIONS:
                reason = _slower(candidate, tables)
                if reason:
                    found.append(Refusal(site=site, level=candidate.level, reason=reason))
            if not rank_of(candidate.level):
                continue
            times = [_times(table, site, row, tensors) for table in tables]
            if all(str(candidate.level) not in own for own in times):
                reason = "no build showed what it costs"
            else:
                reason = _dominated(candidate, whole, times)
            if reason:
                found.append(Refusal(site=site, level=candidate.level, reason=reason))
    return tuple(found)


def _slower(candidate: Candidate, tables: Sequence[PriceTable]) -> str:
    """Why a function does not take an activation's place: no table has measured it to be faster."""
    level = str(candidate.level)
    rows = [(table, table.ops.get(candidate.site, {})) for table in tables]
    gains = [
        table.scale * (row.get(table.choice.precision, 0.0) - row[level])
        for table, row in rows
        if level in row
    ]
    if not gains:
        return "no build showed what it costs"
    return (
        ""
        if max(gains) > 0
        else "whole builds with it are not faster than without, beyond their noise"
    )


def _times(
    table: PriceTable, site: str, row: Sequence[Candidate], tensors: Mapping[str, str]
) -> dict[str, float]:
    """Level -> milliseconds of a call with only this site changed, where the table knows."""
    native = table.choice.precision
    terms = [term for term in table.terms if site in term.sites]
    found: dict[str, float] = {}
    for candidate in row:
        level = candidate.level
        in_terms = all(level in t.levels[t.sites.index(site)] for t in terms)
        if in_terms and (str(level) in table.ops.get(site, {}) or (terms and level != native)):
            found[str(level)] = table.predict_ms({site: level}, tensors)
    found[native] = table.predict_ms({}, tensors)
    return found


def _dominated(
    candidate: Candidate, whole: Sequence[Candidate], times: Sequence[Mapping[str, float]]
) -> str:
    """The whole level that is at least as good in everything, in words; "" where there is none."""
    for other in whole:
        if other.size_bytes > candidate.size_bytes or other.error > candidate.error:
            continue
        pairs = [
            (own[str(candidate.level)], own[str(other.level)])
            for own in times
            if str(candidate.level) in own and str(other.level) in own
        ]
        if pairs and all(mine >= theirs for mine, theirs in pairs):
            mine, theirs = pairs[0]
            return (
                f"{other.level} is no larger ({other.size_bytes} against {candidate.size_bytes} bytes), "
                f"errs no more ({other.error:.2g} against {candidate.error:.2g}) and is no slower "
                f"({mine - theirs:+.3g} ms a call for {candidate.level})"
            )
    return ""
