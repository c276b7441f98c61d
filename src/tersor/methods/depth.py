"""Branches: kept, replaced by the linear map that comes closest to them, or by their mean.

A network with residual connections computes with few of its branches left, and a branch that is
gone saves all of its time, which fewer units never do. The map is a ridge regression on the
moments that one pass of the original gives; where the shortcut is a projection the map goes into
it and costs nothing (``graph.branches``).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from tersor.core.levels import KEPT
from tersor.core.records import Candidate, Site, SiteKind
from tersor.graph.branches import MAPPED, REMOVED, BranchStatistics
from tersor.graph.contracts import SiteChange
from tersor.ops.linear_map import DAMPING, linear_map

_NAMES = {KEPT: "native", MAPPED: "linear map", REMOVED: "mean"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Depth:
    """Levels of one branch: 2 kept, 1 a linear map where one is cheaper, 0 its mean.

    Args:
        damping: Of the map's fit, relative to the mean diagonal of its inputs' covariance.
    """

    kinds: ClassVar[tuple[SiteKind, ...]] = ("branch",)
    by_name: ClassVar[bool] = True  # not part of "all": it makes prices and plans take longer
    damping: float = DAMPING

    def propose(self, site: Site, statistics: BranchStatistics) -> Sequence[Candidate]:
        """One candidate a level; sizes are the site's own until the graphs are made."""
        has_map = statistics.moments is not None
        levels = (KEPT, MAPPED, REMOVED) if has_map else (KEPT, REMOVED)
        return [
            Candidate(site=site.name, level=level, method=_NAMES[level], size_bytes=site.size_bytes)
            for level in levels
        ]

    def apply(self, site: Site, candidate: Candidate, statistics: BranchStatistics) -> SiteChange:
        """The map or the mean.

        Raises:
            NumericalError: The statistics are not finite.
        """
        if candidate.level == KEPT:
            return SiteChange(site=site, level=KEPT)
        if candidate.level == REMOVED:
            return SiteChange(site=site, level=REMOVED, bias=statistics.mean)
        assert statistics.moments is not None  # propose offers no map without
        found = linear_map(statistics.moments, self.damping)
        return SiteChange(
            site=site,
            level=MAPPED,
            weight=found.weight.flatten(0, 1),
            bias=found.bias.flatten(),
            report={"loss": found.loss, "damping": found.damping},
        )
