"""Widths: which units go, in one nested order that is exact for all that read the width.

The cheapest unit goes first, measured by what its removal costs once all other units have made up
for it (group OBS over the readers' second moments); removing it changes what the others cost. One
run gives every kept count. Weights are fitted again by the transform.

Where no linear map sums over a width (experts), units go in the order of what each costs alone.

Dimensions of attention heads are mixed before any goes: each head keeps its best directions
(``ops.heads``), folded into the projections around it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from tersor.core.errors import ConfigError
from tersor.core.records import Candidate, Site, SiteKind
from tersor.graph.contracts import HeadStatistics, SiteChange, WidthStatistics
from tersor.ops.head_turns import HeadTurn, score_turn, value_turn
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

        The loss is the readers' relative one, or the sum of the costs of the units. Of heads it says
        which directions are kept instead.

        Raises:
            ConfigError: A count beyond 1 to the width's units.
        """
        heads = statistics.heads
        found = _order(statistics) if heads is None else None
        candidates = [_whole(site)]
        for count in sorted({*self.counts(site)} - {site.units}, reverse=True):
            if not 1 <= count < site.units:
                raise ConfigError(f"{site.name}: found a count of {count}, wanted 1..{site.units}")
            gone = site.units - count
            if found is None:
                detail: dict[str, Any] = {"directions": _directions(heads)}
            else:
                kept = sorted(found.order[gone:].tolist())
                detail = {"kept": kept, "loss": float(found.loss[gone - 1])}
            candidates.append(
                Candidate(
                    site=site.name,
                    level=count,
                    method="prune",
                    size_bytes=site.size_bytes * count // site.units,
                    detail=detail,
                )
            )
        return candidates

    def apply(self, site: Site, candidate: Candidate, statistics: WidthStatistics) -> SiteChange:
        """The units that stay, or the first ones of heads that are turned."""
        assert isinstance(candidate.level, int)
        if statistics.heads is not None and candidate.level < site.units:
            return _turned(site, candidate.level, statistics)
        # The order was fixed when it was proposed.
        kept = candidate.detail.get("kept", range(site.units))
        return SiteChange(
            site=site,
            level=candidate.level,
            kept=torch.tensor(list(kept), dtype=torch.int64),
            report={"loss": candidate.detail.get("loss", 0.0)},
        )


def _directions(heads: HeadStatistics | None) -> str:
    return "values" if heads is not None and heads.columns is not None else "scores"


def _turned(site: Site, count: int, statistics: WidthStatistics) -> SiteChange:
    heads = statistics.heads
    assert heads is not None
    found: HeadTurn
    if heads.columns is not None:
        (reader,) = statistics.consumers
        found = value_turn(reader, heads.columns, count, sharing=heads.sharing)
    else:
        assert heads.queries is not None
        assert heads.keys is not None
        found = score_turn(heads.queries, heads.keys, count, sharing=heads.sharing)
    maps = {**dict.fromkeys(heads.first, found.first), **dict.fromkeys(heads.second, found.second)}
    return SiteChange(
        site=site,
        level=count,
        kept=torch.arange(count),
        turn=maps,
        report={"loss": found.loss, "damping": found.damping, "directions": _directions(heads)},
    )


def _order(statistics: WidthStatistics) -> Order:
    if statistics.costs is None:
        return removal_order(statistics.consumers)
    costs, order = statistics.costs.double().sort(stable=True)
    return Order(order=order, loss=costs.cumsum(0))


def _whole(site: Site) -> Candidate:
    return Candidate(site=site.name, level=site.units, method="prune", size_bytes=site.size_bytes)
