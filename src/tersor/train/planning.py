"""How many units each group keeps: prices of whole builds on the device that will serve the model.

The builds are measured when ``attach`` is called; the counts are chosen when the first units may die, by
what the scores say of each group: the sum of a group's lowest scores is what it costs to lose so many
units, and the program of ``plan`` takes the least sum of those within the target.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tersor.api.proposing import Offers
from tersor.api.session import Session
from tersor.core.records import Candidate, Level, PriceTable
from tersor.core.target import Target
from tersor.graph.contracts import SiteChange
from tersor.plan.solve import Solution
from tersor.train.pricing import Measured, Pricing, Serving
from tersor.train.structure import Structure


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """A plan: the units that each group keeps.

    Attributes:
        keep: Group -> units that stay; groups that stay whole are listed, too.
        predicted_ms: Latency of one call; None where counts were given and not priced.
        note: What stands in the way of the target, where it can't be met.
    """

    keep: Mapping[str, int]
    predicted_ms: float | None = None
    note: str = ""


class Planner:
    """Prices of one model's groups on one device."""

    def __init__(
        self, model: nn.Module, example: Any, structure: Structure, target: Target, serving: Serving
    ) -> None:
        """Build and measure, as ``Pricing`` does."""
        offers = ("prune", lambda session: _offers(session, structure))
        self.pricing = Pricing(model, example, target, serving, offers)

    def unit_costs(self) -> dict[str, float]:
        """Group -> milliseconds that a unit costs, with all others there: from the fewest on offer up."""
        session = self.pricing.session
        table, tensors = self.pricing.prices.tables[0], session.tensors
        whole = table.predict_ms({}, tensors)
        found: dict[str, float] = {}
        for name, row in self.pricing.offers.by_site().items():
            site = session.site_by_name[name]
            least = min(c.level for c in row if isinstance(c.level, int))
            if least < site.units:
                saved = whole - table.predict_ms({name: least}, tensors)
                found[site.width] = max(0.0, saved) / (site.units - least)
        return found

    def counts(self, scores: Mapping[str, Tensor]) -> Counts:
        """The counts that lose the least within the target.

        Args:
            scores: Group -> at least 0 for each unit [units].
        """
        sites = self.pricing.session.site_by_name
        solutions = self.pricing.solved(lambda c: _loss(scores.get(sites[c.site].width), c.level))
        fine = [(t, s) for t, s in solutions if s.is_feasible]
        if not fine:
            return self._nearest(solutions)
        _, best = min(fine, key=lambda pair: pair[1].totals.error)
        return Counts(keep=self._keep(best.assignment), predicted_ms=best.totals.ms)

    def _nearest(self, solutions: list[tuple[PriceTable, Solution]]) -> Counts:
        """The fewest units that are on offer, and what stands in the way."""
        pricing = self.pricing
        table, solution = solutions[0]
        fewest = {
            site: min(c.level for c in row if isinstance(c.level, int))
            for site, row in pricing.offers.by_site().items()
        }
        return Counts(
            keep=self._keep(fewest),
            predicted_ms=table.predict_ms(fewest, pricing.session.tensors),
            note=f"the target {pricing.target.describe()} can't be met by fewer units alone: "
            f"{pricing.missed(solution)}",
        )

    def _keep(self, assignment: Mapping[str, Level]) -> dict[str, int]:
        sites = self.pricing.session.site_by_name
        return {
            sites[name].width: level
            for name, level in assignment.items()
            if isinstance(level, int) and name in sites and sites[name].kind == "width"
        }

    def measure(self, small: nn.Module) -> Measured:
        """The small model's build beside the best uncompressed build, in one run."""
        return self.pricing.measure(small)


def _offers(session: Session, structure: Structure) -> Offers:
    """The counts on the device's tiles of every width that may shrink; the first units, for prices."""
    candidates: list[Candidate] = []
    changes: dict[tuple[str, Level], SiteChange] = {}
    counts_of: Any = getattr(session.methods["prune"], "counts")  # noqa: B009 - no part of the protocol
    for site in session.widths:
        if site.pinned is not None or site.width not in structure.groups:
            continue
        least = structure.groups[site.width].least
        for count in sorted({site.units, *counts_of(site)}, reverse=True):
            if count < least:
                continue
            candidates.append(
                Candidate(
                    site=site.name,
                    level=count,
                    method="prune",
                    size_bytes=site.size_bytes * count // site.units,
                )
            )
            kept = None if count == site.units else torch.arange(count)
            changes[site.name, count] = SiteChange(site=site, level=count, kept=kept)
    return Offers(candidates=tuple(candidates), changes=changes)


def _loss(scores: Tensor | None, level: Level) -> float:
    """What it costs to keep only so many units: the sum of the lowest scores."""
    if scores is None or not isinstance(level, int) or level >= len(scores):
        return 0.0
    ordered = scores.double().cpu().sort().values
    return float(ordered[: len(scores) - level].sum())
