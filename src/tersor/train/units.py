"""The made tensors of all groups, as they lie in a model: what scores, masks and norms read and write."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tersor.train.groups import Group
from tersor.train.sharding import local, over_shards, rows_of

PerUnit = Mapping[str, Tensor]  # group -> one number a unit


@dataclass(frozen=True, slots=True)
class Made:
    """One dimension of one parameter whose elements are zero where a unit is.

    Where the parameter lies in rows over several processes, this process's rows.
    """

    group: str
    parameter: nn.Parameter
    dim: int
    units: Tensor  # [size] on the parameter's device; -1 of none

    def broadcast(self, values: Tensor) -> Tensor:
        """A value a unit as one that multiplies the parameter; 1 where no unit is."""
        padded = torch.cat([values, values.new_ones(1)])[self.units]
        shape = [1] * self.parameter.dim()
        shape[self.dim] = -1
        return padded.reshape(shape).to(self.parameter.dtype)

    def summed(self, elements: Tensor, count: int) -> Tensor:
        """Sum of elements of the parameter's shape over each unit [count], float32."""
        others = [d for d in range(elements.dim()) if d != self.dim]
        along = elements.float().sum(others) if others else elements.float()
        # One place more takes what belongs to no unit: no index leaves the device.
        places = torch.where(self.units < 0, count, self.units)
        return along.new_zeros(count + 1).index_add_(0, places, along)[:count]


@dataclass(frozen=True, slots=True)
class Units:
    """Of all groups that may shrink.

    Attributes:
        counts: Group -> units.
        made: In the order of the groups.
    """

    counts: Mapping[str, int]
    made: tuple[Made, ...]

    @classmethod
    def of(cls, model: nn.Module, groups: Sequence[Group]) -> "Units":
        """The made tensors of a model that has all units of the groups."""
        made: list[Made] = []
        for group in groups:
            seen: set[tuple[int, int]] = set()
            for slot in group.slots:
                if not slot.is_made:
                    continue
                parameter = model.get_parameter(slot.tensor)
                if (id(parameter), slot.dim) not in seen:
                    seen.add((id(parameter), slot.dim))
                    rows = rows_of(parameter) if slot.dim == 0 else slice(None)
                    units = slot.units[rows].to(parameter.device)
                    made.append(Made(group.name, parameter, slot.dim, units))
        return cls({g.name: g.units for g in groups}, tuple(made))

    def parameters(self) -> list[nn.Parameter]:
        """Every parameter that a unit is made of, once."""
        return list({id(m.parameter): m.parameter for m in self.made}.values())

    def sums(self, elements: Callable[[nn.Parameter], Tensor | None]) -> dict[str, Tensor]:
        """For each group the sum over a unit's elements of something of each parameter's shape.

        Args:
            elements: Of a parameter; None where there is nothing (no gradient), which counts as zero.
        """
        found: dict[str, Tensor] = {}
        for made in self.made:
            values = elements(made.parameter)
            if values is None:
                continue
            own = made.summed(local(values), self.counts[made.group])
            found[made.group] = found[made.group] + own if made.group in found else own
        return over_shards(found, self.counts, (m.parameter for m in self.made))

    def saliency(self) -> dict[str, Tensor]:
        """For each unit the sum of weight times gradient: the loss's first-order change, negated."""
        with torch.no_grad():
            return self.sums(lambda p: None if p.grad is None else p.detach() * p.grad)

    def squares(self) -> dict[str, Tensor]:
        """For each unit the sum of its squared weights."""
        with torch.no_grad():
            return self.sums(lambda p: p.detach().square())

    def factors(self, values: PerUnit) -> list[tuple[nn.Parameter, Tensor]]:
        """What multiplies each parameter so that each unit is multiplied by its value."""
        return [(m.parameter, m.broadcast(values[m.group])) for m in self.made if m.group in values]
