"""Budgeted proximal: redundant units are pulled to zero as hard as the budget asks.

Behind each step, for the redundant units (the lowest scores, chosen anew at each look):

    z <- z max(0, 1 - eta lambda w_g / (d_g ||z||)),   w_g = sqrt(|g|) cost_g / mean cost

with d_g the mean of sqrt(v) + eps of an adaptive optimizer, 1 of others, so that the pull is in the metric
of the step (a penalty in the gradient would be normalised away). lambda follows the cost of the living units:
log lambda += kappa (C - C*(t)) / C_0 at each look.

Source: Yun et al. 2020, arXiv:2007.07484 (proximal steps in the optimizer's metric); the dual step is a
plain multiplier method on the logarithm.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tersor.train.scores import Scores, lowest
from tersor.train.sharding import local
from tersor.train.units import Units

KAPPA = 0.5
_TINY = 1e-12
_REACH = (
    2.0  # the first lambda takes a mean unit to zero in this part of the window, were it not held
)


@dataclass
class Prox:
    """Units that are pulled.

    Attributes:
        costs: Group -> cost of a unit, in any unit that all share.
        window: Steps between the first and the last look.
        dead: Group -> flags of the redundant units.
    """

    units: Units
    optimizer: Optimizer
    costs: Mapping[str, float]
    window: int
    dead: dict[str, Tensor] = field(default_factory=dict)
    is_open: bool = True
    log_lambda: float | None = None
    _sizes: dict[str, Tensor] = field(default_factory=dict)  # elements of a unit

    def before(self) -> None:
        """Nothing changes in front of a step."""

    def reveal(self) -> None:
        """There are no latents."""

    def hide(self) -> None:
        """There are no latents."""

    def after(self, *, reveal: bool) -> None:
        """Pull the redundant units."""
        del reveal
        if self.log_lambda is None or not self.dead:
            return
        norms = {n: s.sqrt() for n, s in self.units.squares().items()}
        strength = self._strength()
        factors = {
            group: torch.where(
                flags, (1 - strength[group] / (norms[group] + _TINY)).clamp(min=0.0), 1.0
            )
            for group, flags in self.dead.items()
        }
        for parameter, factor in self.units.factors(factors):
            local(parameter).mul_(factor)

    def _strength(self) -> dict[str, Tensor]:
        """Eta lambda w_g / d_g of each unit."""
        assert self.log_lambda is not None
        rate = max(float(group["lr"]) for group in self.optimizer.param_groups)
        mean_cost = sum(self.costs.values()) / max(1, len(self.costs))
        scale = self._metric()
        return {
            group: rate
            * math.exp(self.log_lambda)
            * self._unit_sizes()[group].sqrt()
            * (self.costs.get(group, mean_cost) / mean_cost)
            / scale[group]
            for group in self.dead
        }

    def _metric(self) -> dict[str, Tensor]:
        """The mean of sqrt(v) + eps over each unit; 1 where the optimizer keeps no second moment."""
        sizes = self._unit_sizes()
        sums = self.units.sums(self._root)
        ones = {n: torch.ones_like(s) for n, s in sizes.items()}
        return {n: sums[n] / sizes[n] if n in sums else ones[n] for n in sizes}

    def _root(self, parameter: nn.Parameter) -> Tensor | None:
        state = self.optimizer.state.get(parameter, {})
        second = state.get("exp_avg_sq", state.get("square_avg"))
        return second.sqrt() + 1e-8 if isinstance(second, Tensor) else None

    def _unit_sizes(self) -> dict[str, Tensor]:
        if not self._sizes:
            self._sizes = self.units.sums(torch.ones_like)
        return self._sizes

    def look(self, scores: Scores, counts: Mapping[str, int]) -> None:
        """Choose the redundant units anew, and pull harder where too much lives."""
        for group, count in counts.items():
            if count:
                self.dead[group] = lowest(scores.values[group], count, self.dead.get(group), 0.05)
        if not self.dead:
            return
        norms = {n: s.sqrt() for n, s in self.units.squares().items()}
        if self.log_lambda is None:
            self.log_lambda = self._first_lambda(norms)
        alive = {n: int((v > _TINY).sum()) for n, v in norms.items()}
        wanted = {n: self.units.counts[n] - counts.get(n, 0) for n in alive}
        whole = self._cost(self.units.counts)
        self.log_lambda += KAPPA * (self._cost(alive) - self._cost(wanted)) / whole

    def _cost(self, counts: Mapping[str, int]) -> float:
        return sum(self.costs.get(n, 1.0) * k for n, k in counts.items())

    def _first_lambda(self, norms: Mapping[str, Tensor]) -> float:
        """Such that a mean unit, pulled alone, would be zero within half of the window."""
        self.log_lambda = 0.0
        unit = self._strength()
        pull = float(torch.cat([unit[n] for n in self.dead]).mean())
        mean = float(torch.cat([norms[n] for n in self.dead]).mean())
        return math.log(max(_TINY, _REACH * mean / max(1, self.window) / max(pull, _TINY)))

    def replace(self, dead: dict[str, Tensor]) -> None:
        """Other redundant units."""
        self.dead = dead

    def settle(self) -> dict[str, Tensor]:
        """The end: exactly the redundant units are zero."""
        keep = {n: (~flags).float() for n, flags in self.dead.items()}
        for parameter, mask in self.units.factors(keep):
            local(parameter).mul_(mask)
        return self.dead

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers that ``load`` takes."""
        dead = {n: t.cpu() for n, t in self.dead.items()}
        return {"dead": dead, "log_lambda": self.log_lambda}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state."""
        device = self.units.parameters()[0].device
        self.dead = {n: t.to(device) for n, t in state["dead"].items()}
        self.log_lambda = state["log_lambda"]
