"""Integer grids of 2 to 8 bits with one step for a few neighbouring inputs.

A code q stands for (q - zero) * step. Codes are the signed integers of their width; a grid is
symmetric (zero = 0) or has a zero point for every step. A signed grid has one code more below zero
than above: a symmetric step may be negative, so that this code serves whichever side needs it,
which at 2 to 4 bits is worth as much as half a zero point and costs nothing.

Steps are chosen by squared error over fractions of the largest weight. What counts is the share of
a column's error that no other column can take up: ``innovations`` rather than the diagonal of H.

Axes: g groups of a convolution, m outputs and n inputs of one, k steps of an output, b inputs that
share a step, c codes.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64, Int8, Int64
from torch import Tensor
from torch.nn.functional import pad

from tersor.core.errors import ConfigError, NumericalError, ShapeError
from tersor.ops.grids import check_finite
from tersor.ops.sweep import input_order, ordered_factor

_TYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}

# At 2 bits the best largest code is about half of the largest of 400 normal weights, with 8 bits nearly
# all of it; 5 % apart, the error at the best fraction is within a percent of the least.
FRACTIONS = tuple(1.0 - 0.05 * i for i in range(14))

# Values of the rows whose steps are searched together: 1 MiB of float64 stays in a core's cache.
CHUNK_VALUES = 2**17


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupGrid:
    """The grid of a weight.

    Args:
        bits: Width of a code, 2..8.
        group: Neighbouring inputs that share a step, >= 1; the last group of an output is shorter where
            this does not divide the inputs. None: one step an output.
        symmetric: No zero points.
        signed_steps: Whether a symmetric step may be negative; False where a device wants positive ones.
        step_type: Type in which steps are stored, float16, bfloat16 or float32; codes belong to steps that were rounded to it.
    """

    bits: int = 4
    group: int | None = None
    symmetric: bool = True
    signed_steps: bool = True
    step_type: str = "float16"

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ConfigError(f"bits must be 2..8, got {self.bits}")
        if self.group is not None and self.group < 1:
            raise ConfigError(f"group must be at least 1 input, got {self.group}; None: all inputs")
        if self.step_type not in _TYPES:
            raise ConfigError(f"step_type must be one of {', '.join(_TYPES)}, got {self.step_type}")

    @property
    def low(self) -> int:
        """Smallest code."""
        return -(1 << (self.bits - 1))

    @property
    def high(self) -> int:
        """Largest code."""
        return (1 << (self.bits - 1)) - 1

    def width(self, inputs: int) -> int:
        """Inputs that share a step, of a layer with so many inputs."""
        return inputs if self.group is None else min(self.group, inputs)

    def n_steps(self, inputs: int) -> int:
        """Steps of an output."""
        return -(-inputs // max(1, self.width(inputs)))

    def size_bytes(self, outputs: int, inputs: int) -> int:
        """Bytes of the codes, rows padded to whole bytes, the steps and the zero points (packed alike)."""
        steps = self.n_steps(inputs)
        zeros = 0 if self.symmetric else packed_bytes(steps, self.bits)
        step_bytes = _TYPES[self.step_type].itemsize
        return outputs * (packed_bytes(inputs, self.bits) + steps * step_bytes + zeros)


@dataclass(frozen=True, slots=True, kw_only=True)
class Steps:
    """Steps and zero points: code q of group i stands for (q - zero_i) * step_i."""

    step: Float64[Tensor, "g m k"]  # not zero; exact in the type that stores them
    zero: Int8[Tensor, "g m k"]  # 0 on a symmetric grid


def packed_bytes(n_codes: int, bits: int) -> int:
    """Bytes of a row of codes, see ``packing.pack``."""
    return -(-n_codes * bits // 8)


def innovations(
    H: Float[Tensor, "g n n"], damping: float = 0.01, *, act_order: bool = True
) -> Float64[Tensor, "g n"]:
    """What of a column's squared error the columns rounded after it can't take up: 1 / U_jj^2.

    With error feedback the loss is sum_j err_j^2 / U_jj^2, U^T U = (H + damping)^-1. As weights of a
    step search these beat the diagonal of H, which knows nothing of the feedback.

    Args:
        H: Second moment or covariance of the input; read only.
        damping: As of the feedback that follows.
        act_order: As of the feedback that follows.

    Raises:
        ConfigError: Negative damping.
        NumericalError: H is not finite or not positive semi-definite.

    Source: Frantar et al. 2022, arXiv:2210.17323, eq. 2: the loss of one step.
    """
    metric = H.to(torch.float64)
    order = input_order(metric, act_order=act_order)
    U, _ = ordered_factor(metric, order, damping)
    values = U.diagonal(dim1=1, dim2=2).pow(-2)
    return torch.empty_like(values).scatter_(1, order, values)


def fit_steps(
    weight: Float[Tensor, "g m n"],
    grid: GroupGrid,
    importance: Float[Tensor, "g n"] | None = None,
    fractions: tuple[float, ...] = FRACTIONS,
) -> Steps:
    """Steps and zero points, the best of several fractions of the range of the weights.

    Args:
        weight: Weight; read only.
        grid: Its grid.
        importance: Weight of each column's squared error, >= 0: ``innovations`` or the diagonal of H.
            None: all alike.
        fractions: What part of the range the codes span, each > 0; the first wins a tie.

    Returns:
        Steps that minimise sum_j importance_j (w_j - w'_j)^2 of each group of inputs, w' the nearest
        point of the grid. A group of zeros gets step 1 and zero point 0.

    Raises:
        ConfigError: No fractions, or one that is not positive.
        NumericalError: The weight is not finite, or a step does not fit the type that stores it.
    """
    if not fractions or min(fractions) <= 0:
        raise ConfigError(
            f"fractions {fractions}: wanted at least one, all > 0, such as (1.0, 0.8)"
        )
    check_finite(weight, "weight")
    matter = _importance(weight, importance, grid)
    rows = max(1, CHUNK_VALUES // max(1, weight.shape[0] * weight.shape[2]))
    parts = [_best_steps(part, matter, grid, fractions) for part in weight.split(rows, 1)]
    return Steps(
        step=torch.cat([step for step, _ in parts], 1),
        zero=torch.cat([zero for _, zero in parts], 1).to(torch.int8),
    )


def _best_steps(
    weight: Float[Tensor, "g r n"],
    matter: Float64[Tensor, "g one k b"],
    grid: GroupGrid,
    fractions: tuple[float, ...],
) -> tuple[Float64[Tensor, "g r k"], Float64[Tensor, "g r k"]]:
    W = grouped(weight.to(torch.float64), grid)
    least = torch.full(W.shape[:3], torch.inf, dtype=W.dtype, device=W.device)
    best_step, best_zero = torch.ones_like(least), torch.zeros_like(least)
    wanted = -W
    for step, zero in _candidates(W, grid, fractions):
        stored = storable(step, grid)
        codes = (W / stored.unsqueeze(3)).round_()
        if grid.symmetric:
            codes.clamp_(grid.low, grid.high)
        else:
            codes.add_(zero.unsqueeze(3)).clamp_(grid.low, grid.high).sub_(zero.unsqueeze(3))
        error = torch.addcmul(wanted, codes, stored.unsqueeze(3))
        cost = error.square_().mul_(matter).sum(3)
        better = cost < least
        least = torch.minimum(cost, least)
        best_step = torch.where(better, stored, best_step)
        best_zero = torch.where(better, zero, best_zero)
    empty = (W == 0).all(3)
    return best_step.masked_fill(empty, 1.0), best_zero.masked_fill(empty, 0.0)


def nearest_codes(
    weight: Float[Tensor, "g m n"], steps: Steps, grid: GroupGrid
) -> Int8[Tensor, "g m n"]:
    """Codes of the nearest points of the grid.

    Raises:
        NumericalError: The weight is not finite.
        ShapeError: Steps and weight differ in size.
    """
    check_finite(weight, "weight")
    check_sizes(weight, steps, grid)
    step, zero = each_input(steps, grid, weight.shape[2])
    codes = (weight.to(torch.float64) / step).round_().add_(zero).clamp_(grid.low, grid.high)
    return codes.to(torch.int8)


def dequantize(
    codes: Int8[Tensor, "g m n"], steps: Steps, grid: GroupGrid
) -> Float64[Tensor, "g m n"]:
    """The weight that codes stand for, (code - zero) * step.

    Raises:
        ShapeError: Steps and codes differ in size.
    """
    check_sizes(codes, steps, grid)
    step, zero = each_input(steps, grid, codes.shape[2])
    return (codes.to(torch.float64) - zero) * step


def each_input(
    steps: Steps, grid: GroupGrid, inputs: int
) -> tuple[Float64[Tensor, "g m n"], Float64[Tensor, "g m n"]]:
    """Step and zero point of every weight."""
    place = group_of(grid, inputs).to(steps.step.device)
    return steps.step[:, :, place], steps.zero[:, :, place].to(torch.float64)


def group_of(grid: GroupGrid, inputs: int) -> Int64[Tensor, " n"]:
    """Which step of its output each input uses."""
    return torch.arange(inputs) // max(1, grid.width(inputs))


def grouped(weight: Float64[Tensor, "g m n"], grid: GroupGrid) -> Float64[Tensor, "g m k b"]:
    """The weight group by group; a short last group is filled up with zeros."""
    inputs = weight.shape[2]
    width, n_steps = grid.width(inputs), grid.n_steps(inputs)
    padded: Tensor = pad(weight, [0, width * n_steps - inputs])
    return padded.reshape(*weight.shape[:2], n_steps, width)


def storable(step: Float64[Tensor, "*shape"], grid: GroupGrid) -> Float64[Tensor, "*shape"]:
    """Steps rounded to the type that stores them, those that would vanish to its smallest number.

    Raises:
        NumericalError: A step exceeds the type's largest number.
    """
    kind = _TYPES[grid.step_type]
    limits = torch.finfo(kind)
    # float16 is too short a range to do without its subnormals; those of the others are often flushed.
    smallest = limits.tiny * (limits.eps if kind == torch.float16 else 1.0)
    if bool((step.abs() > limits.max).any()):
        raise NumericalError(
            f"steps {tuple(step.shape)}: found {float(step.abs().max()):.4g}, wanted at most {limits.max:.4g} "
            f"({grid.step_type}); store steps as float32, or look for an outlier in the checkpoint"
        )
    floor = torch.where(step < 0, -smallest, smallest)
    return torch.where(step.abs() < smallest, floor, step).to(kind).to(torch.float64)


def check_sizes(weight: Tensor, steps: Steps, grid: GroupGrid) -> None:
    """Raise ShapeError unless there is a step for every group of inputs."""
    wanted = (*weight.shape[:2], grid.n_steps(weight.shape[2]))
    for name, value in (("step", steps.step), ("zero", steps.zero)):
        if tuple(value.shape) != wanted:
            raise ShapeError(
                f"{name} {tuple(value.shape)} and weight {tuple(weight.shape)} [group, out, in] differ, wanted {wanted}: "
                f"one for each {grid.width(weight.shape[2])} inputs"
            )


def _importance(
    weight: Tensor, importance: Float[Tensor, "g n"] | None, grid: GroupGrid
) -> Float64[Tensor, "g one k b"]:
    if importance is None:
        importance = weight.new_ones(weight.shape[0], weight.shape[2])
    return grouped(importance.to(torch.float64).unsqueeze(1), grid)


def _candidates(
    W: Float64[Tensor, "g m k b"], grid: GroupGrid, fractions: tuple[float, ...]
) -> Iterator[tuple[Float64[Tensor, "g m k"], Float64[Tensor, "g m k"]]]:
    """Steps, never zero, and zero points to choose from."""
    least, most = W.amin(3).clamp(max=0), W.amax(3).clamp(min=0)
    if grid.symmetric:
        yield from _symmetric(least, most, grid, fractions)
        return
    span = grid.high - grid.low
    width = torch.where(most > least, most - least, 1.0) / span
    for fraction in fractions:
        step = width * fraction
        middle = (least + most) / 2
        # The range shrinks around its middle, or towards the side on which it begins or ends.
        for start in _distinct(least * fraction, middle - step * (span / 2), least):
            yield step, (grid.low - (start / step).round()).clamp(grid.low, grid.high)


def _symmetric(
    least: Tensor, most: Tensor, grid: GroupGrid, fractions: tuple[float, ...]
) -> Iterator[tuple[Tensor, Tensor]]:
    largest = torch.maximum(most, -least)
    largest = torch.where(largest > 0, largest, 1.0)
    zero = torch.zeros_like(largest)
    for fraction in fractions:
        yield largest * (fraction / grid.high), zero
        if grid.signed_steps:
            # The lower end, one code further away, on the side of the largest weight.
            towards = torch.where(most > -least, -1.0, 1.0)
            yield towards * largest * (fraction / -grid.low), zero
        else:
            yield largest * (fraction / -grid.low), zero


def _distinct(*values: Tensor) -> list[Tensor]:
    kept: list[Tensor] = []
    for value in values:
        if not any(torch.equal(value, other) for other in kept):
            kept.append(value)
    return kept


def bits_per_weight(grid: GroupGrid, outputs: int, inputs: int) -> float:
    """Stored bits for each weight, steps and zero points included; NaN for an empty layer."""
    n_weights = outputs * inputs
    return 8 * grid.size_bytes(outputs, inputs) / n_weights if n_weights else math.nan
