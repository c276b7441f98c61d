"""Widths: which units go, in one nested order that is exact for all that read the width.

The cheapest unit goes first, measured by what its removal costs once all other units have made up
for it (group OBS over the readers' second moments); removing it changes what the others cost. One
run gives every kept count. Weights are fitted again by the transform.

Where no linear map sums over a width (experts), units go in the order of what each costs alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from tersor.core.errors import ConfigError
from tersor.core.records import Candidate, Site, SiteKind
from tersor.graph.contracts import SiteChange, WidthStatistics
from tersor.ops.obs import Order, removal_order

Counts = Callable[[Site], Sequence[int]]


def eighths(site: Site) -> Sequence[int]:
    """Counts where no device says which ones it likes."""
    return [max(1, site.units * i // 8) for i in range(1, 8)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prune:
    """Kept counts of one width.

    Args:
        counts: Site -> the kept counts that are worth a price; the full count is always offered.
    """

    kinds: ClassVar[tuple[SiteKind, ...]] = ("width",)
    counts: Counts = eighths

    def propose(self, site: Site, statistics: WidthStatistics) -> Sequence[Candidate]:
        """One candidate a count; ``detail`` holds the kept units and the loss of those that go.

        The loss is the readers' relative one, or the sum of the costs of the units.

        Raises:
            ConfigError: A count beyond 1 to the width's units.
        """
        found = _order(statistics)
        candidates = [_whole(site)]
        for count in sorted({*self.counts(site)} - {site.units}, reverse=True):
            if not 1 <= count < site.units:
                raise ConfigError(f"{site.name}: found a count of {count}, wanted 1..{site.units}")
            gone = site.units - count
            kept = sorted(found.order[gone:].tolist())
            candidates.append(
                Candidate(
                    site=site.name,
                    level=count,
                    method="prune",
                    size_bytes=site.size_bytes * count // site.units,
                    detail={"kept": kept, "loss": float(found.loss[gone - 1])},
                )
            )
        return candidates

    def apply(self, site: Site, candidate: Candidate, statistics: WidthStatistics) -> SiteChange:
        """The units that stay."""
        del statistics  # the order was fixed when it was proposed
        assert isinstance(candidate.level, int)
        kept = candidate.detail.get("kept", range(site.units))
        return SiteChange(
            site=site,
            level=candidate.level,
            kept=torch.tensor(list(kept), dtype=torch.int64),
            report={"loss": candidate.detail.get("loss", 0.0)},
        )


def _order(statistics: WidthStatistics) -> Order:
    if statistics.costs is None:
        return removal_order(statistics.consumers)
    costs, order = statistics.costs.double().sort(stable=True)
    return Order(order=order, loss=costs.cumsum(0))


def _whole(site: Site) -> Candidate:
    return Candidate(site=site.name, level=site.units, method="prune", size_bytes=site.size_bytes)
