"""A weight on a grid of 2 to 8 bits: steps, error feedback, then descent in codes, steps and zero points.

What is minimised is tr(D H D^T), D = W - W'. Steps come first, by what feedback will leave of each
column's error; several stretches of them go through the feedback, and every output keeps its best.
Then ``group_descent`` improves single codes, steps and zero points in turn; no step of it raises the
loss. With a mask, weights that are zero stay zero and their error is fed back like any other: prune
first and round last, in the same loop.

Axes: g groups of a convolution, m outputs and n inputs of one, k steps of an output.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float64, Int8, Int64
from torch import Tensor

from tersor.core.errors import ConfigError, ShapeError
from tersor.ops.column_grid import ColumnGrid
from tersor.ops.damping import check_moment
from tersor.ops.grids import check_finite
from tersor.ops.group_descent import descend_groups
from tersor.ops.group_grids import GroupGrid, Steps, fit_steps, storable
from tersor.ops.sweep import columns_at, feed_back_, input_order, ordered_factor

# Steps that feedback likes are a little off those that rounding to nearest likes, to either side.
STRETCHES = (0.92, 1.0, 1.08)
# m n^2 of a layer of 2048 x 2048: each stretch or sweep beyond it takes a second and more.
LARGE = 2.0**33


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundingConfig:
    """How hard to try.

    Args:
        damping: Of the feedback, a multiple of the mean diagonal of H, >= 0.
        act_order: Feed back from the most active inputs first.
        stretches: Multiples of the fitted steps that are tried, each for one pass of feedback.
        sweeps: Passes of descent at most, >= 0; ends sooner once a pass changes nothing.
        refit_steps: Whether the descent solves for steps and zero points as well.
    """

    damping: float = 0.01
    act_order: bool = True
    stretches: tuple[float, ...] = STRETCHES
    sweeps: int = 4
    refit_steps: bool = True

    @classmethod
    def for_layer(cls, outputs: int, inputs: int) -> "RoundingConfig":
        """The defaults; for a large layer less, so that 4096 x 4096 weights take seconds, not a minute."""
        if float(outputs) * float(inputs) ** 2 <= LARGE:
            return cls()
        return cls(stretches=(1.0,), sweeps=2)

    def __post_init__(self) -> None:
        if not self.stretches or min(self.stretches) <= 0:
            raise ConfigError(f"stretches {self.stretches}: wanted one or more, all > 0; (1.0,)")
        if self.sweeps < 0:
            raise ConfigError(f"sweeps must be >= 0, got {self.sweeps}; 2 to 4 are enough")


@dataclass(frozen=True, slots=True, kw_only=True)
class LowBit:
    """A weight on a grid, and how it came there."""

    codes: Int8[Tensor, "g m n"]
    steps: Steps
    loss: Float64[Tensor, " g"]  # tr(D H D^T) without damping
    losses: tuple[float, ...]  # over all groups: after the feedback and after each sweep
    damping: float  # in use


def round_weight(
    weight: Float[Tensor, "g m n"],
    H: Float[Tensor, "g n n"],
    grid: GroupGrid,
    config: RoundingConfig | None = None,
    keep: Bool[Tensor, "g m n"] | None = None,
) -> LowBit:
    """Round a weight to a grid.

    Args:
        weight: Weight, after drift or pruning the refitted one; read only.
        H: Second moment of the input, or its covariance where the bias takes up the mean; read only.
        grid: Its grid.
        config: How hard to try; None: ``RoundingConfig.for_layer``.
        keep: Where weights may differ from zero; None: everywhere. What is elsewhere in ``weight``
            counts as error, so give a weight that is zero there.

    Returns:
        Codes, steps and the losses on the way, none above the one before. All-zero outputs and inputs
        that are never active (H_jj = 0) are rounded to nearest.

    Raises:
        ConfigError: Negative damping.
        ShapeError: Sizes that do not fit.
        NumericalError: The weight or H is not finite, H not positive semi-definite, or a step does
            not fit the type that stores it.

    Source: Frantar et al. 2022, arXiv:2210.17323 (feedback); Behdin et al. 2023, arXiv:2309.01885 (descent).
    """
    config = RoundingConfig.for_layer(*weight.shape[1:]) if config is None else config
    feedback = Feedback.of(weight, H, config)
    fitted = fit_steps(weight, grid, feedback.innovations())
    best: tuple[Tensor, Steps] | None = None
    least = torch.full_like(fitted.step[:, :, 0], torch.inf)
    for stretch in config.stretches:
        steps = Steps(step=storable(fitted.step * stretch, grid), zero=fitted.zero)
        codes, lost = feedback.round(weight, steps, grid, keep)
        better = lost < least
        least = torch.where(better, lost, least)
        best = (codes, steps) if best is None else _better(better, (codes, steps), best)
    assert best is not None
    done = descend_groups(
        weight,
        best[0],
        best[1],
        grid,
        H,
        sweeps=config.sweeps,
        refit_steps=config.refit_steps,
        keep=keep,
    )
    return LowBit(
        codes=done.codes,
        steps=done.steps,
        loss=done.loss,
        losses=done.losses,
        damping=feedback.damping,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Feedback:
    """The factor of a second moment in the order of the rounding, for any number of passes."""

    order: Int64[Tensor, "g n"]
    U: Float64[Tensor, "g n n"]
    damping: float  # in use

    @classmethod
    def of(
        cls,
        weight: Float[Tensor, "g m n"],
        H: Float[Tensor, "g n n"],
        config: RoundingConfig,
    ) -> "Feedback":
        """Factor H for weights of this size.

        Raises:
            ConfigError: Negative damping.
            ShapeError: Sizes that do not fit.
            NumericalError: The weight or H is not finite, or H not positive semi-definite.
        """
        check_metric(weight, H)
        check_finite(weight, "weight")
        check_moment(H)
        metric = H.to(torch.float64)
        order = input_order(metric, act_order=config.act_order)
        U, damping = ordered_factor(metric, order, config.damping)
        return cls(order=order, U=U, damping=damping)

    def innovations(self) -> Float64[Tensor, "g n"]:
        """As the function of that name."""
        values = self.U.diagonal(dim1=1, dim2=2).pow(-2)
        return torch.empty_like(values).scatter_(1, self.order, values)

    def round(
        self,
        weight: Float[Tensor, "g m n"],
        steps: Steps,
        grid: GroupGrid,
        keep: Bool[Tensor, "g m n"] | None = None,
    ) -> tuple[Int8[Tensor, "g m n"], Float64[Tensor, "g m"]]:
        """Round column by column; every column still to come absorbs what it can of the error.

        Args:
            weight: Weight; read only.
            steps: Chosen beforehand for the inputs' own places, whatever the order.
            grid: Their grid.
            keep: Where weights may differ from zero; None: everywhere.

        Returns:
            Codes in the layout of the weight, and d (H + damping) d^T of every row of D.

        Raises:
            ShapeError: Sizes that do not fit.
        """
        check_keep(weight, keep)
        columns = columns_at(self.order, weight.shape[1])
        W = weight.to(torch.float64).mT.gather(1, columns)
        masks = None if keep is None else keep.mT.gather(1, columns).unbind(1)
        found, columns_grid = torch.empty_like(W), ColumnGrid.of(weight, self.order, grid, steps)
        places = found.unbind(1)

        def become(j: int, column: Float64[Tensor, "g m"]) -> Float64[Tensor, "g m"]:
            code, zero, _ = columns_grid.code(j, column)
            if masks is not None:
                code = torch.where(masks[j], code, zero)
            return columns_grid.value(j, places[j].copy_(code))

        lost = feed_back_(W, self.U, become)
        codes = torch.empty_like(found).scatter_(1, columns, found).mT.contiguous()
        return codes.to(torch.int8), lost


def check_metric(weight: Tensor, H: Tensor) -> None:
    """Raise ShapeError unless H belongs to the inputs of the weight."""
    wanted = (weight.shape[0], weight.shape[2], weight.shape[2])
    if tuple(H.shape) != wanted:
        raise ShapeError(
            f"weight {tuple(weight.shape)} [group, out, in] and second moment {tuple(H.shape)} differ, wanted {wanted}; "
            "collect it at this layer's input, unfolded for a convolution"
        )


def check_keep(weight: Tensor, keep: Tensor | None) -> None:
    """Raise ShapeError unless the mask has the size of the weight."""
    if keep is not None and keep.shape != weight.shape:
        raise ShapeError(
            f"mask {tuple(keep.shape)} and weight {tuple(weight.shape)} [group, out, in] differ, wanted equal sizes"
        )


def _better(
    rows: Bool[Tensor, "g m"], new: tuple[Tensor, Steps], old: tuple[Tensor, Steps]
) -> tuple[Tensor, Steps]:
    """The new codes and steps in these rows, the old ones elsewhere."""
    where = rows.unsqueeze(2)
    step = torch.where(where, new[1].step, old[1].step)
    zero = torch.where(where, new[1].zero, old[1].zero)
    return torch.where(where, new[0], old[0]), Steps(step=step, zero=zero)
