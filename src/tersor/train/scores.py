"""How much the loss would change without a unit, followed over the run.

S_u = E[(sum over the unit's weights of w g)^2], the squared first-order change, with every latent weight
in place: the gradient of a unit that is zero says nothing about it.

Source: Molchanov et al. 2019, arXiv:1906.10771, eq. 8.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.optim import Optimizer

from tersor.train.units import Units

DECAY = 0.9
_TINY = 1e-30


@dataclass
class Scores:
    """Exponential means of squared saliencies, one a unit, on the parameters' device."""

    values: dict[str, Tensor] = field(default_factory=dict)
    looks: int = 0

    def update(self, units: Units, optimizer: Optimizer) -> None:
        """Take in the gradients of this step; those of a step that is skipped do not count.

        Nothing is read from the device.
        """
        scale, skipped = _amp(optimizer)
        for group, sums in units.saliency().items():
            square = (sums if scale is None else sums / scale).square()
            old = self.values.get(group)
            new = square if old is None else torch.lerp(square, old, DECAY)
            if skipped is not None:
                new = torch.where(skipped > 0, torch.zeros_like(new) if old is None else old, new)
            self.values[group] = new
        self.looks += 1

    def completed(self, units: Units) -> tuple["Scores", tuple[str, ...]]:
        """With the squared weights of units, brought to the mean of all other scores, where no look saw a gradient.

        Such a layer is trained at other steps (heads that take turns) or not at all: its units have to be
        chosen all the same.

        Args:
            units: Of all groups; the weights are the latents.

        Returns:
            The scores of every group, and the names of those that were filled up.
        """
        missing = tuple(n for n in units.counts if n not in self.values)
        if not missing:
            return self, ()
        squares = units.squares()
        filled = {n: squares[n] / squares[n].mean().clamp_min(_TINY) for n in missing}
        if self.values:
            mean = torch.stack([v.mean() for v in self.values.values()]).mean()
            filled = {n: v * mean for n, v in filled.items()}
        return Scores({**self.values, **filled}, self.looks), missing

    def state_dict(self) -> dict[str, object]:
        """Tensors and numbers that ``load`` takes."""
        return {
            "values": {n: t.detach().cpu() for n, t in self.values.items()},
            "looks": self.looks,
        }

    def load(self, state: Mapping[str, object], device: torch.device) -> None:
        """Go on from a saved state."""
        values = state["values"]
        assert isinstance(values, Mapping)
        self.values = {str(n): t.to(device) for n, t in values.items()}
        self.looks = int(str(state["looks"]))


def _amp(optimizer: Optimizer) -> tuple[Tensor | None, Tensor | None]:
    """What a GradScaler leaves with a fused optimizer: its scale, and whether the step is skipped."""
    scale, skipped = getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)
    return (
        scale if isinstance(scale, Tensor) else None,
        skipped if isinstance(skipped, Tensor) else None,
    )


def lowest(scores: Tensor, count: int, dead: Tensor | None, margin: float) -> Tensor:
    """Flags of the units with the lowest scores [units].

    A dead unit comes back only if its score is above that of a living one by the margin.

    Args:
        scores: At least 0.
        count: How many.
        dead: Those that are dead now.
        margin: 0.05: five per cent better.
    """
    if dead is not None:
        scores = torch.where(dead, scores, scores * (1 + margin))
    flags = torch.zeros_like(scores, dtype=torch.bool)
    # A stable order, so that equal scores do not swap.
    return flags.index_fill_(0, torch.argsort(scores, stable=True)[:count], value=True)
