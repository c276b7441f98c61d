"""Cheap predictions of errors, which thin the list of candidates before it is measured."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from tersor.api.session import Session
from tersor.graph.contracts import SiteStatistics
from tersor.graph.low_bits import ASSUMED
from tersor.propose.errors import chunk_size
from tersor.propose.propose import NATIVE, Offer
from tersor.propose.proxy import (
    Gradients,
    format_proxy,
    output_gradients,
    thinned,
    width_proxy,
)

_SAMPLES = 32  # of the backward pass: enough for a prediction that is a factor off anyway


def with_proxies(
    session: Session, proposals: Sequence[Offer], statistics: Mapping[str, Any]
) -> list[Offer]:
    """The offers with what the output should feel of them, and a note where that is hopeless.

    None is dropped: one that is hopeless, or that another of its site dominates, is measured on as
    few samples as a standard error needs, and says why.
    """
    part = session.parts["calibration"].limited(_SAMPLES)
    batches = list(part.batches(chunk_size(session.graph)))
    gradients = output_gradients(session.graph, batches, session.kind, seed=session.settings.seed)
    if gradients.reason:
        session.progress.note(f"no list of candidates is thinned: {gradients.reason}")
    found = [_predicted(offer, statistics, gradients) for offer in proposals]
    reasons = thinned([offer.candidate for offer in found], gradients.useless)
    if reasons:
        session.progress.note(f"{len(reasons)} candidates are measured on few samples only")
    return [
        replace(offer, candidate=replace(offer.candidate, note=reasons.get(i, "")))
        for i, offer in enumerate(found)
    ]


def _predicted(offer: Offer, statistics: Mapping[str, Any], gradients: Gradients) -> Offer:
    candidate, change = offer.candidate, offer.change
    known, proxy = statistics[candidate.site], None
    # An addition has no weight; its operands' rounding is mostly that of their other readers.
    # What was rounded to the few rows there are would seem better on them than what was not.
    is_fair = not candidate.detail.get(ASSUMED)
    if isinstance(known, SiteStatistics) and candidate.level not in NATIVE and is_fair:
        proxy = format_proxy(change, known, gradients)
    if change.site.kind == "width" and candidate.level != change.site.units:
        proxy = width_proxy(candidate, change, known, gradients)
    return replace(offer, candidate=replace(candidate, proxy=proxy))
