"""Prices of whole builds on the device that will serve a model, and the best plan within a target by them."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from tersor.api.latency import measure_calls
from tersor.api.proposing import Offers
from tersor.api.session import Session, Settings, open_session
from tersor.api.stages import build_for, price
from tersor.build.build import build
from tersor.capture.module import capture
from tersor.core.data import Data
from tersor.core.errors import TargetError
from tersor.core.records import Candidate, Prices, PriceTable, Timing
from tersor.core.target import Target
from tersor.plan.problem import Problem
from tersor.plan.solve import Solution, solve
from tersor.timing.protocol import Protocol, Ratio, ratio

_PROMISED = ("speedup", "latency_ms", "size_mb", "size_ratio")  # what training alone can reach
_FINAL = Protocol(rounds=9, runs=15, max_seconds=60.0, turn_ms=500.0)
Errors = Callable[[Candidate], float]  # what it costs to take one


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


class Pricing:
    """What one method offers for a model, with prices on one device."""

    def __init__(
        self,
        model: nn.Module,
        example: Any,
        target: Target,
        serving: Serving,
        offers: tuple[str, Callable[[Session], Offers]],
    ) -> None:
        """Build and measure; a minute or so the first time on a machine.

        Args:
            model: As it trains.
            example: One batch of its inputs.
            target: What it has to reach.
            serving: Where.
            offers: The name of a method, and what is priced of what it offers.

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
            methods=(offers[0],),
            cache_dir=serving.cache_dir,
            progress=serving.progress,
        )
        data = Data(calibration=[example], search=[example], test=[example], output="values")
        self.session: Session = open_session(model, data, settings)
        self.offers = offers[1](self.session)
        self.prices: Prices = price(self.session, self.offers)

    @property
    def baseline_ms(self) -> float:
        """Latency of the best uncompressed build."""
        return self.prices.baseline.timing.median_ms

    def solved(self, errors: Errors) -> list[tuple[PriceTable, Solution]]:
        """For each way to build, the plan that loses the least within the target."""
        return [(table, self._solved(table, errors)) for table in self.prices.tables]

    def _solved(self, table: PriceTable, errors: Errors) -> Solution:
        candidates = {
            site: tuple(replace(c, error=errors(c)) for c in row)
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

    def missed(self, solution: Solution) -> str:
        """What stands in the way of the target."""
        reachable = ", ".join(f"{name} {value:.4g}" for name, value in solution.reachable.items())
        return f"{solution.binding} binds; what can be reached: {reachable}"

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
