"""The last sound state of a run on disk, for when a later step turns into no numbers."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from tersor.train.resuming import load_state, save_state

SECONDS = 60.0  # between two states at least: writing one takes time


@dataclass
class Rescue:
    """Writes a state at looks whose scores are sound, not more often than once a minute.

    Attributes:
        folder: Where the state is; the newest one replaces the others.
        step: Of the state that lies there; None before the first.
    """

    folder: Path
    clock: Callable[[], float]
    step: int | None = None
    _last: float = field(default=float("-inf"), repr=False)

    def keep(
        self, model: nn.Module, optimizer: Optimizer, shrinker: Mapping[str, Any], step: int
    ) -> None:
        """Write all three states, where enough time has passed."""
        now = self.clock()
        if now - self._last < SECONDS:
            return
        states = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "shrinker": dict(shrinker),
        }
        save_state(states, self.folder)
        self._last, self.step = now, step

    def describe(self) -> str:
        """Where to find what, for a message."""
        if self.step is None:
            return ""
        return (
            f"; the last sound state, after step {self.step}, is in {self.folder}: "
            "tersor.train.rescued(folder) reads it"
        )


def rescued(folder: str | Path) -> dict[str, Any]:
    """The states of a run that was stopped by gradients that are no numbers.

    Returns:
        ``shrinker``, ``model`` and ``optimizer``, for their ``load_state_dict`` in that order.

    Raises:
        ConfigError: There is none in the folder.
    """
    found = load_state(folder)
    state = found["optimizer"]["state"]
    found["optimizer"]["state"] = {int(n): dict(own) for n, own in state.items()}
    return found
