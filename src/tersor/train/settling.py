"""Whether the stable ranks of some weights have settled: they change by less than 2 % in an epoch."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tersor.core.errors import NumericalError
from tersor.ops.stable_rank import stable_rank

CHANGE = 0.02
FIRST_STEPS, STEPS = 20, 3  # of power iteration: from a random vector, and from the last look's


@dataclass
class StableRanks:
    """Of the weights of some layers, followed from look to look.

    Attributes:
        model: The plain module.
        names: Of the layers.
        history: Step, and the stable rank of each layer after it; of the last epoch.
    """

    model: nn.Module
    names: Sequence[str]
    history: list[tuple[int, list[float]]] = field(default_factory=list)
    _vectors: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def measure(self, step: int, epoch: int, hint: str = "") -> None:
        """Take in the weights as they are; one read from the device for all of them.

        Args:
            step: Steps that are done.
            epoch: In steps.
            hint: What to add to a message.

        Raises:
            NumericalError: A weight is no number.
        """
        found = []
        for place, name in enumerate(self.names):
            weight = self.model.get_submodule(name).get_parameter("weight").detach().flatten(1)
            is_known = name in self._vectors
            vector = self._vectors[name] if is_known else _first(weight, place)
            rank, self._vectors[name] = stable_rank(
                weight, vector, STEPS if is_known else FIRST_STEPS
            )
            found.append(rank)
        values = torch.stack(found)
        numbers: list[float] = values.tolist()
        bad = [n for n, v in zip(self.names, numbers, strict=True) if not v < float("inf")]
        if bad:
            raise NumericalError(
                f"step {step}: the weights of {', '.join(bad[:3])} are not finite; go back to the last "
                f"checkpoint, lower the learning rate, or clip gradients{hint}"
            )
        self.history.append((step, numbers))
        # The last one that is an epoch old is needed, older ones are not.
        old = [i for i, (at, _) in enumerate(self.history) if at <= step - epoch]
        self.history = self.history[old[-1] :] if old else self.history

    def is_settled(self, epoch: int) -> bool:
        """Whether no layer's has changed by 2 % or more since an epoch ago."""
        step, now = self.history[-1]
        at, then = self.history[0]
        if at > step - epoch:
            return False
        return all(abs(a - b) < CHANGE * max(b, 1e-12) for a, b in zip(now, then, strict=True))

    def latest(self) -> dict[str, float]:
        """Layer -> stable rank at the last look."""
        return dict(zip(self.names, self.history[-1][1], strict=True)) if self.history else {}

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers that ``load`` takes."""
        return {
            "history": [[step, values] for step, values in self.history],
            "vectors": {n: v.cpu() for n, v in self._vectors.items()},
        }

    def load(self, state: dict[str, Any], device: torch.device) -> None:
        """Go on from a saved state."""
        self.history = [(int(step), list(values)) for step, values in state["history"]]
        self._vectors = {n: v.to(device) for n, v in state["vectors"].items()}


def _first(weight: Tensor, seed: int) -> Tensor:
    """A random direction, the same in every run."""
    vector = torch.randn(weight.shape[1], generator=torch.Generator().manual_seed(seed))
    found: Tensor = (vector / vector.norm()).to(weight.device)
    return found
