"""Ramp: at each look the lowest units are picked once, fade to zero until the next look, and stay zero.

No unit comes back. Weights and the optimizer's moments of a fading unit are multiplied by
(K - t - 1) / (K - t) at step t of K, so that the network feels no jump.

Source: Chen et al. 2024, arXiv:2409.09085 (HESSO's quota periods); scaling the moments is ours.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tersor.train.scores import Scores, lowest
from tersor.train.sharding import local
from tersor.train.units import Units


@dataclass
class Ramp:
    """Units that fade.

    Attributes:
        length: Steps that a unit takes to fade, at most as many as lie between two looks.
        dead: Group -> flags of the units that are zero, or on their way there.
    """

    units: Units
    optimizer: Optimizer
    length: int
    dead: dict[str, Tensor] = field(default_factory=dict)
    is_open: bool = True  # weights are what they are: there are no latents
    _gone: dict[str, Tensor] = field(default_factory=dict)  # those that are zero
    _step: int = 0  # of the fading ones
    _masks: list[tuple[nn.Parameter, Tensor]] = field(default_factory=list)
    _fading: list[tuple[nn.Parameter, Tensor]] = field(default_factory=list)  # 1 where one fades

    def before(self) -> None:
        """Nothing changes in front of a step."""

    def reveal(self) -> None:
        """There are no latents."""

    def hide(self) -> None:
        """There are no latents."""

    def after(self, *, reveal: bool) -> None:
        """Fade by one step, and hold what is gone at zero."""
        del reveal
        left = self.length - self._step
        if self._fading and left > 0:
            factor = (left - 1) / left
            for parameter, flags in self._fading:
                scale = 1 - flags * (1 - factor)
                local(parameter).mul_(scale)
                self._scale_moments(parameter, scale)
            self._step += 1
            if self._step == self.length:
                self._gone = dict(self.dead)
                self._prepare()
        for parameter, mask in self._masks:
            local(parameter).mul_(mask)

    def _scale_moments(self, parameter: nn.Parameter, scale: Tensor) -> None:
        for value in self.optimizer.state.get(parameter, {}).values():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                local(value).mul_(scale)

    def look(self, scores: Scores, counts: Mapping[str, int]) -> None:
        """Pick as many more units as have to be dead now; those that were fading are gone."""
        self._gone = dict(self.dead)
        for group, count in counts.items():
            if count:
                gone = self._gone.get(group)
                values = scores.values[group]
                if gone is not None:
                    values = torch.where(gone, torch.full_like(values, -1.0), values)
                self.dead[group] = lowest(values, count, None, 0.0)
        self._step = 0
        self._prepare()

    def replace(self, dead: dict[str, Tensor]) -> None:
        """Other units that go."""
        self.dead = dead
        self._prepare()

    def _prepare(self) -> None:
        self._masks = self.units.factors({n: (~flags).float() for n, flags in self._gone.items()})
        fading = {
            n: flags.float() if n not in self._gone else (flags & ~self._gone[n]).float()
            for n, flags in self.dead.items()
        }
        # Where no unit is, ``factors`` gives 1: nothing fades there.
        self._fading = [
            (p, 1 - f) for p, f in self.units.factors({n: 1 - f for n, f in fading.items()})
        ]

    def settle(self) -> dict[str, Tensor]:
        """The end: all that were picked are zero."""
        self._gone = dict(self.dead)
        self._prepare()
        for parameter, mask in self._masks:
            local(parameter).mul_(mask)
        self._masks, self._fading = [], []
        return self.dead

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers that ``load`` takes."""
        return {
            "dead": {n: t.cpu() for n, t in self.dead.items()},
            "gone": {n: t.cpu() for n, t in self._gone.items()},
            "step": self._step,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state."""
        device = self.units.parameters()[0].device
        self.dead = {n: t.to(device) for n, t in state["dead"].items()}
        self._gone = {n: t.to(device) for n, t in state["gone"].items()}
        self._step = int(state["step"])
        self._prepare()
