"""How units die: by name."""

from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol, runtime_checkable

from torch import Tensor
from torch.optim import Optimizer

from tersor.train.prox import Prox
from tersor.train.ramp import Ramp
from tersor.train.regrow import Regrow
from tersor.train.schedule import Schedule
from tersor.train.scores import Scores
from tersor.train.units import Units

Name = Literal["regrow", "ramp", "prox"]
NAMES: tuple[Name, ...] = ("regrow", "ramp", "prox")


@runtime_checkable
class Algorithm(Protocol):
    """What a run calls, around each step of the optimizer and at each look."""

    dead: dict[str, Tensor]
    is_open: bool

    def before(self) -> None:
        """In front of a step."""
        ...

    def after(self, *, reveal: bool) -> None:
        """Behind a step; ``reveal``: a look follows the next pass."""
        ...

    def reveal(self) -> None:
        """Latents in the weights' place, where there are any."""
        ...

    def hide(self) -> None:
        """The weights as the network is to be."""
        ...

    def look(self, scores: Scores, counts: Mapping[str, int]) -> None:
        """Choose the units that have to be dead now."""
        ...

    def replace(self, dead: dict[str, Tensor]) -> None:
        """Take another process's choice."""
        ...

    def settle(self) -> dict[str, Tensor]:
        """Exactly the chosen units are zero, for good."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers."""
        ...

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state."""
        ...


def make(
    name: str,
    units: Units,
    optimizer: Optimizer,
    schedule: Schedule,
    costs: Callable[[], Mapping[str, float]],
) -> Algorithm:
    """An algorithm by its name, one of ``NAMES``."""
    if name == "ramp":
        return Ramp(units, optimizer, schedule.every)
    if name == "prox":
        return Prox(units, optimizer, costs(), schedule.last - schedule.first)
    assert name == "regrow"
    return Regrow(units, optimizer)
