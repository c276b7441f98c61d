"""The codes of one column of a weight, wherever an order of rounding puts it.

Groups of inputs are static: an input has the step of its own place, whatever the order, so that the
layout needs no index of groups.

Axes: g groups of a convolution, m outputs and n inputs of one, k steps of an output.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from tersor.ops.group_grids import GroupGrid, Steps, check_sizes


@dataclass(frozen=True, slots=True, kw_only=True)
class ColumnGrid:
    """Steps and zero points of the column at each place of an order."""

    grid: GroupGrid
    steps: tuple[Float64[Tensor, "g m"], ...]
    zeros: tuple[Float64[Tensor, "g m"], ...]

    @classmethod
    def of(
        cls,
        weight: Float[Tensor, "g m n"],
        order: Int64[Tensor, "g n"],
        grid: GroupGrid,
        steps: Steps,
    ) -> "ColumnGrid":
        """For the columns of a weight in this order.

        Raises:
            ShapeError: Steps and weight differ in size.
        """
        check_sizes(weight, steps, grid)
        place = order // max(1, grid.width(weight.shape[2]))
        step, zero = (_at(v.to(torch.float64).mT, place) for v in (steps.step, steps.zero))
        return cls(grid=grid, steps=step, zeros=zero)

    def code(
        self, j: int, column: Float64[Tensor, "g m"]
    ) -> tuple[Float64[Tensor, "g m"], Float64[Tensor, "g m"], Float64[Tensor, "g m"]]:
        """Nearest codes of the column at place j, their zero points and steps."""
        step, zero = self.steps[j], self.zeros[j]
        code = (column / step).round_()
        if not self.grid.symmetric:
            code.add_(zero)
        return code.clamp_(self.grid.low, self.grid.high), zero, step

    def value(self, j: int, code: Float64[Tensor, "g m"]) -> Float64[Tensor, "g m"]:
        """What codes of the column at place j stand for."""
        return (code if self.grid.symmetric else code - self.zeros[j]) * self.steps[j]


def _at(
    values: Float64[Tensor, "g k m"], place: Int64[Tensor, "g n"]
) -> tuple[Float64[Tensor, "g m"], ...]:
    """The values that each place uses."""
    values = values.contiguous()
    if len(values) == 1:  # views: no copy of the size of the weight
        rows = values.unbind(1)
        return tuple(rows[p] for p in place[0].tolist())
    index = place.unsqueeze(2).expand(-1, -1, values.shape[2])
    return values.gather(1, index).unbind(1)
