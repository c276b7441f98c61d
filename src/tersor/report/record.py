"""What one compression decided and measured, as one record: an artifact carries it whole."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from tersor.core.machine import Machine
from tersor.core.records import (
    Candidate,
    Level,
    ParetoPoint,
    Plan,
    Prices,
    PriceTable,
    Site,
    Verdict,
)
from tersor.core.recovery import Recovery


@dataclass(frozen=True, slots=True, kw_only=True)
class Undone:
    """One choice of a plan undone, all others as they are, measured beside the plan.

    Attributes:
        site: The site.
        level: What it had then: its own level if left alone.
        latency_ms_change, loss_change, error_change: Without the choice less with it; the loss in
            points or in 1 - agreement, as the target has it.
    """

    site: str
    level: Level
    latency_ms_change: float
    loss_change: float
    error_change: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Everything that the JSON, the terminal and ``explain`` say, and nothing derived.

    Attributes:
        version: Of Tersor.
        machine: Where it was measured.
        versions: Installed packages that took part, by name.
        plan: The plan that the result carries out.
        verdict: What was measured on the test part.
        prices: Uncompressed builds and price tables.
        sites: Every site, pinned ones too.
        candidates: Every level that was offered, with its measured error.
        pareto: Points on the curve, the result's own among them or not.
        notes: What the reader must know beside the numbers.
        undone: Choices that were undone and measured.
        recoveries: What training towards the original did, before and after formats were rounded.
        left_out: What a report in brief does not say, and where that is; "" of a whole one.
    """

    version: str
    machine: Machine
    plan: Plan
    verdict: Verdict
    prices: Prices
    sites: tuple[Site, ...]
    candidates: tuple[Candidate, ...]
    pareto: tuple[ParetoPoint, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    undone: tuple[Undone, ...] = ()
    recoveries: tuple[Recovery, ...] = ()
    left_out: str = ""

    def table(self) -> PriceTable | None:
        """The price table of the plan's build choice; None where it was not priced."""
        return next((t for t in self.prices.tables if t.choice == self.plan.choice), None)

    def candidate(self, site: str, level: Level) -> Candidate | None:
        """The candidate of a site at a level; None where no method offered one."""
        return next((c for c in self.candidates if (c.site, c.level) == (site, level)), None)

    def native(self, site: Site) -> Level:
        """The level of a site that is left alone: the build's precision, or all that there is."""
        return self.plan.choice.precision if site.kind == "format" else site.units

    def level(self, site: Site) -> Level:
        """What the plan does at a site."""
        return self.plan.assignment.get(site.name, self.native(site))

    def assignment(self) -> dict[str, Level]:
        """The plan's level of every site, also of those that it leaves alone."""
        return {**{s.name: self.native(s) for s in self.sites}, **self.plan.assignment}
