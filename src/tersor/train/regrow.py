"""Regrow: dead units keep a latent weight that goes on training, and may come back.

Per step: the weights take their latents' place, the optimizer makes its step with the gradient at the
masked weights (straight-through), what it gives is the new latent, and dead units are zero again. The
optimizer's moments belong to the latents and are never masked. Which units are dead is decided anew at
every look; before one, a forward and backward pass runs with every latent in place.

Source: Lin et al. 2020, arXiv:2006.07253 (dynamic masks with feedback); the cube of ``schedule``.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tersor.train.scores import Scores, lowest
from tersor.train.sharding import joined, local, rows_of
from tersor.train.units import Units

# Elements: below that a launch takes longer than reading a mask of a parameter's own shape.
_SMALL = 2**20
MARGIN = 0.05  # by which a dead unit must be better than a living one to take its place


@dataclass
class Regrow:
    """Masks with latents.

    Attributes:
        dead: Group -> flags of the dead units; a group without any is absent.
    """

    units: Units
    optimizer: Optimizer
    dead: dict[str, Tensor] = field(default_factory=dict)
    is_open: bool = True  # whether the weights are the latents
    _latents: dict[nn.Parameter, Tensor] = field(default_factory=dict)
    _masks: list[tuple[nn.Parameter, Tensor]] = field(default_factory=list)

    needs_looks = True

    def before(self) -> None:
        """In front of the optimizer's step: it changes the latents."""
        self.reveal()

    def after(self, *, reveal: bool) -> None:
        """Behind the optimizer's step.

        Args:
            reveal: Leave the latents in place for the next pass, which a look follows.
        """
        self._forgive_decay()
        self.is_open = True
        if not reveal:
            self.hide()

    def reveal(self) -> None:
        """The latents in the weights' place."""
        if not self.is_open and self._latents:
            torch._foreach_copy_([local(p) for p in self._latents], list(self._latents.values()))
        self.is_open = True

    def hide(self) -> None:
        """Dead units at zero; what the weights were is kept as latents."""
        if self.is_open and self._latents:
            torch._foreach_copy_(list(self._latents.values()), [local(p) for p in self._latents])
            torch._foreach_mul_([local(p) for p, _ in self._masks], [m for _, m in self._masks])
        self.is_open = False

    def look(self, scores: Scores, counts: Mapping[str, int]) -> None:
        """Choose the dead units anew; the weights are the latents.

        Args:
            scores: Of all groups.
            counts: Group -> how many have to be dead now.
        """
        for group, count in counts.items():
            if count:
                self.dead[group] = lowest(scores.values[group], count, self.dead.get(group), MARGIN)
        self._prepare()

    def replace(self, dead: dict[str, Tensor]) -> None:
        """Other dead units; the weights are the latents."""
        self.dead = dead
        self._prepare()

    def _prepare(self) -> None:
        keep = {group: (~flags).float() for group, flags in self.dead.items()}
        self._masks = _merged(self.units.factors(keep))
        known = self._latents
        self._latents = {p: known[p] if p in known else local(p).clone() for p, _ in self._masks}

    def _forgive_decay(self) -> None:
        """Decoupled weight decay shrinks latents that nothing else moves: it is taken back."""
        factors = {
            id(p): 1 - group["lr"] * group["weight_decay"]
            for group in self.optimizer.param_groups
            if _is_decoupled(self.optimizer, group)
            for p in group["params"]
        }
        done: set[int] = set()
        for parameter, mask in self._masks:
            factor = factors.get(id(parameter))
            if factor is not None and id(parameter) not in done:
                done.add(id(parameter))
                local(parameter).mul_(mask + (1 - mask) / factor)

    def settle(self) -> dict[str, Tensor]:
        """The end: dead units stay zero, latents are gone. Group -> flags of the dead units."""
        self.hide()
        self._latents, self._masks = {}, []
        self.is_open = True
        return self.dead

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers that ``load`` takes."""
        names = _names(self.units)
        return {
            "dead": {group: flags.cpu() for group, flags in self.dead.items()},
            "latents": {
                names[id(p)]: joined(z.detach(), p).cpu() for p, z in self._latents.items()
            },
            "is_open": self.is_open,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state; the weights are loaded by the caller."""
        parameters = self.units.parameters()
        device = parameters[0].device
        self.dead = {group: flags.to(device) for group, flags in state["dead"].items()}
        self._prepare()
        names = _names(self.units)
        for parameter, latent in self._latents.items():
            kept = state["latents"][names[id(parameter)]]
            latent.copy_(kept[rows_of(parameter)].to(latent.device))
        self.is_open = bool(state["is_open"])


def _merged(factors: Iterable[tuple[nn.Parameter, Tensor]]) -> list[tuple[nn.Parameter, Tensor]]:
    """One mask a parameter, of its own shape where it is small: those are multiplied in one launch."""
    found: dict[nn.Parameter, Tensor] = {}
    for parameter, mask in factors:
        known = found.get(parameter)
        found[parameter] = mask if known is None else known * mask
    for parameter, mask in found.items():
        rows = local(parameter)
        if rows.numel() <= _SMALL:
            found[parameter] = torch.empty_like(rows).copy_(mask.expand_as(rows))
    return list(found.items())


def _names(units: Units) -> dict[int, str]:
    """A name for each parameter that is the same in every process."""
    return {id(p): f"{i}" for i, p in enumerate(units.parameters())}


def _is_decoupled(optimizer: Optimizer, group: Mapping[str, Any]) -> bool:
    is_own = isinstance(optimizer, torch.optim.AdamW) or bool(group.get("decoupled_weight_decay"))
    return is_own and bool(group.get("weight_decay", 0))
