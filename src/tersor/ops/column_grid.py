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
    """Steps and zero points, transposed, and which of them each place of an order uses."""

    grid: GroupGrid
    step: Float64[Tensor, "g k m"]
    zero: Float64[Tensor, "g k m"]
    place: Int64[Tensor, "g n"]

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
        step, zero = (v.to(torch.float64).mT.contiguous() for v in (steps.step, steps.zero))
        width = max(1, grid.width(weight.shape[2]))
        return cls(grid=grid, step=step, zero=zero, place=order // width)

    def code(
        self, j: int, column: Float64[Tensor, "g m"]
    ) -> tuple[Float64[Tensor, "g m"], Float64[Tensor, "g m"], Float64[Tensor, "g m"]]:
        """Nearest codes of the column at place j, their zero points and steps."""
        groups = torch.arange(len(column), device=column.device)
        step, zero = self.step[groups, self.place[:, j]], self.zero[groups, self.place[:, j]]
        code = (column / step).round_().add_(zero).clamp_(self.grid.low, self.grid.high)
        return code, zero, step
