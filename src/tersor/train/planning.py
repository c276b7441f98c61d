"""How many units each group keeps: prices of whole builds on the device that will serve the model.

The builds are measured when ``attach`` is called; the counts are chosen when the first units may die, by
what the scores say of each group: the sum of a group's lowest scores is what it costs to lose so many
units, and the program of ``plan`` takes the least sum of those within the target.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tersor.api.latency import measure_calls
from tersor.api.proposing import Offers
from tersor.api.session import Session, Settings, open_session
from tersor.api.stages import build_for, price
from tersor.build.build import build
from tersor.capture.module import capture
from tersor.core.data import Data
from tersor.core.errors import TargetError
from tersor.core.records import Candidate, Level, Prices, PriceTable, Timing
from tersor.core.target import Target
from tersor.graph.contracts import SiteChange
from tersor.plan.problem import Problem
from tersor.plan.solve import Solution, solve
from tersor.timing.protocol import Protocol, Ratio, ratio
from tersor.train.structure import Structure

_PROMISED = ("speedup", "latency_ms", "size_mb", "size_ratio")  # what counts alone can reach
_FINAL = Protocol(rounds=9, runs=15, max_seconds=60.0, turn_ms=500.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """Where the model will serve; it may train elsewhere.

    Args:
        device, backend, batch: As for ``tersor.compress``.
        cache_dir: Of prices and builds.
    """

    device: str = "cpu"
    backend: str = "auto"
    batch: int = 1
    cache_dir: str | Path | None = None
    progress: Any = True


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """The small model and the dense one as builds, interleaved.

    Attributes:
        speedup: Of the small one over the best uncompressed build of the dense one.
    """

    build: str
    dense: Timing
    small: Timing
    speedup: Ratio
    dense_bytes: int
    small_bytes: int


class Planner:
    """Prices of one model's groups on one device."""

    def __init__(
        self, model: nn.Module, example: Any, structure: Structure, target: Target, serving: Serving
    ) -> None:
        """Build and measure; a minute or so the first time on a machine.

        Raises:
            TargetError: A target that training can't promise.
            BackendError: No backend runs on the device here.
        """
        _check_target(target)
        self.target = target
        settings = Settings(
            device=serving.device,
            backend=serving.backend,
            batch=serving.batch,
            methods=("prune",),
            cache_dir=serving.cache_dir,
            progress=serving.progress,
        )
        data = Data(calibration=[example], search=[example], test=[example], output="values")
        self.session: Session = open_session(model, data, settings)
        self.offers = _offers(self.session, structure)
        self.prices: Prices = price(self.session, self.offers)

    @property
    def baseline_ms(self) -> float:
        """Latency of the best uncompressed build."""
        return self.prices.baseline.timing.median_ms

    def unit_costs(self) -> dict[str, float]:
        """Group -> milliseconds that a unit costs, with all others there: from the fewest on offer up."""
        table, tensors = self.prices.tables[0], self.session.tensors
        whole = table.predict_ms({}, tensors)
        found: dict[str, float] = {}
        for name, row in self.offers.by_site().items():
            site = self.session.site_by_name[name]
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
        solutions = [(t, self._solved(t, scores)) for t in self.prices.tables]
        fine = [(t, s) for t, s in solutions if s.is_feasible]
        if not fine:
            return self._nearest(solutions)
        _, best = min(fine, key=lambda pair: pair[1].totals.error)
        return Counts(keep=self._keep(best.assignment), predicted_ms=best.totals.ms)

    def _nearest(self, solutions: list[tuple[PriceTable, Solution]]) -> Counts:
        """The fewest units that are on offer, and what stands in the way."""
        table, solution = solutions[0]
        fewest = {
            site: min(c.level for c in row if isinstance(c.level, int))
            for site, row in self.offers.by_site().items()
        }
        ms = table.predict_ms(fewest, self.session.tensors)
        reachable = ", ".join(f"{name} {value:.4g}" for name, value in solution.reachable.items())
        return Counts(
            keep=self._keep(fewest),
            predicted_ms=ms,
            note=f"the target {self.target.describe()} can't be met by fewer units alone: "
            f"{solution.binding} binds; what can be reached: {reachable}",
        )

    def _keep(self, assignment: Mapping[str, Level]) -> dict[str, int]:
        sites = self.session.site_by_name
        return {
            sites[name].width: level
            for name, level in assignment.items()
            if isinstance(level, int) and name in sites and sites[name].kind == "width"
        }

    def _solved(self, table: PriceTable, scores: Mapping[str, Tensor]) -> Solution:
        sites = self.session.site_by_name
        candidates = {
            site: tuple(
                replace(c, error=_loss(scores.get(sites[site].width), c.level)) for c in row
            )
            for site, row in self.offers.by_site().items()
        }
        moving = Problem(
            candidates=candidates,
            table=table,
            tensors=self.session.tensors,
            size_terms=self.prices.size_terms,
            objective="error",
            max_ms=self._max_ms(),
        )
        rest = max(0, self.session.original_bytes - moving.totals({}).size_bytes)
        return solve(replace(moving, fixed_bytes=rest, max_bytes=self._max_bytes()))

    def _max_ms(self) -> float | None:
        target = self.target
        if target.latency_ms is not None:
            return target.latency_ms
        return None if target.speedup is None else self.baseline_ms / target.speedup

    def _max_bytes(self) -> float | None:
        target = self.target
        if target.size_mb is not None:
            return target.size_mb * 1e6
        ratio_wanted = target.size_ratio
        return None if ratio_wanted is None else self.session.original_bytes / ratio_wanted

    def measure(self, small: nn.Module) -> Measured:
        """The small model's build beside the best uncompressed build, in one run."""
        session, choice = self.session, self.prices.baseline.choice
        assert choice is not None
        graph = capture(small, session.parts["calibration"]).graph
        flat = [t[: choice.batch] for t in session.parts["calibration"].tensors]
        dense = build_for(session, session.graph, choice).executable
        tight = build(graph, session.backends[choice.backend], choice, flat).executable
        calls = {
            "dense": session.caller(dense, choice.batch),
            "small": session.caller(tight, choice.batch),
        }
        timings = measure_calls(session, calls, _FINAL)
        return Measured(
            build=choice.describe(),
            dense=timings["dense"],
            small=timings["small"],
            speedup=ratio(timings["dense"], timings["small"]),
            dense_bytes=session.graph.parameter_bytes(),
            small_bytes=graph.parameter_bytes(),
        )


def _check_target(target: Target) -> None:
    asked = target.budgets()
    other = sorted(set(asked) - set(_PROMISED))
    if other:
        raise TargetError(
            f"target: found {', '.join(other)}; training can reach {', '.join(_PROMISED)} and promises no "
            "quality: measure that with finish(validate), and compress the result for the rest"
        )


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
