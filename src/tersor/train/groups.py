"""Groups of units that may go, by the names of a model's own tensors."""

from dataclasses import dataclass

from torch import Tensor

from tersor.core.records import WidthKind


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Slot:
    """One dimension of one tensor that a group runs through.

    Attributes:
        tensor: Its name in the model.
        units: The unit of each element of the dimension [size]; -1 of none.
        is_made: Zeroing these elements zeroes the unit: rows of what makes it, biases, the scale and
            shift of norms. Else they are columns of what reads it, or statistics.
    """

    tensor: str
    dim: int
    units: Tensor
    is_made: bool


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Group:
    """Units that are alike: each may go, with everything that is coupled to it.

    Attributes:
        name: The first producer's module path.
        units: How many there are.
        least: So many must stay.
    """

    name: str
    kind: WidthKind
    units: int
    slots: tuple[Slot, ...]
    least: int = 1


@dataclass(frozen=True, slots=True)
class Held:
    """A width that stays whole, and why."""

    name: str
    reason: str
