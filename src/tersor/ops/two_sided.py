"""Rounding in the metric of a layer's outputs as well: tr(G D H D^T), D = W - W'.

H says what an error costs the layer's own output; G, the second moment of the model's gradient at
that output, what an error there costs the model, if both are independent. Rows are then no longer alone:
what one output loses another one can make up for. The metric of the whole weight is the Kronecker
product of G and H, so is its Cholesky factor, and error feedback needs no new idea: rows in order,
columns in order within each, every error taken up by what is still to come in its row and in its
column. Weights on one antidiagonal do not wait for each other; some rows at a time, so that what is
told to the rows behind is a matrix product.

Descent follows. Codes of a column move at once, those that gain most alone first, as long as the next
one still gains beside them: rows are coupled, and each move counts on the others staying.

G alone is a poor metric for large errors: a confident sample has no gradient, however far it moves. A
blend with the identity is (``blended``).

Axes: g groups of a convolution, m outputs and n inputs of one, r rows at a time, k steps of an output.

Source: Tseng et al. 2025 (YAQA), arXiv:2505.22988, section 3 (feedback on both sides); here in order of
rows, as nearest planes of the product.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64, Int8
from torch import Tensor

from tersor.core.errors import ConfigError, ShapeError
from tersor.ops.damping import check_moment
from tersor.ops.group_descent import step_move
from tersor.ops.group_grids import (
    GroupGrid,
    Steps,
    check_sizes,
    dequantize,
    each_input,
    fit_steps,
    storable,
)
from tersor.ops.group_rounding import Feedback, LowBit, RoundingConfig, round_weight

# Rows that go in step: more take fewer steps, and tell more weights that are not on their way yet.
ROWS = 32


def blended(G: Float[Tensor, "g m m"], t: float) -> Float64[Tensor, "g m m"]:
    """The metric t I + (1 - t) G / mean(diag G) of the outputs.

    Args:
        G: Second moment of the output's gradient; read only. A group whose gradients are all zero gets
            the identity.
        t: Share of the identity, 0..1; 1: all outputs count alike, whatever G is.

    Raises:
        ConfigError: ``t`` outside 0..1.
        NumericalError: G is not finite.
    """
    if not 0 <= t <= 1:
        raise ConfigError(f"blend must be within 0..1, got {t}; 0.9 is a good choice")
    check_moment(G)
    metric = G.to(torch.float64)
    mean = metric.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    identity = torch.eye(G.shape[1], dtype=torch.float64, device=G.device)
    return torch.where(mean > 0, t * identity + (1 - t) * metric / mean, identity)


def two_sided_loss(
    delta: Float[Tensor, "g m n"], H: Float[Tensor, "g n n"], G: Float[Tensor, "g m m"]
) -> Float64[Tensor, " g"]:
    """tr(G D H D^T) of every group.

    Args:
        delta: D, a change of the weight; read only.
        H: Second moment or covariance of the input; read only.
        G: Metric of the output; read only.
    """
    D = delta.to(torch.float64)
    return ((G.to(torch.float64) @ D @ H.to(torch.float64)) * D).sum((1, 2))


def round_two_sided(
    weight: Float[Tensor, "g m n"],
    H: Float[Tensor, "g n n"],
    G: Float[Tensor, "g m m"],
    grid: GroupGrid,
    config: RoundingConfig | None = None,
) -> LowBit:
    """Round a weight to a symmetric grid in the metric of its inputs and its outputs.

    Args:
        weight: Weight; read only.
        H: Second moment of the input, or its covariance where the bias takes up the mean; read only.
        G: Metric of the output, positive definite (``blended``); read only.
        grid: Its grid.
        config: How hard to try; None: ``RoundingConfig.for_layer``. Of its stretches, and of what
            ``round_weight`` finds, the whole weight takes the one with the least loss.

    Returns:
        Codes, steps and losses tr(G D H D^T), none above the one before, and so none above that of
        what ``round_weight`` finds.

    Raises:
        ConfigError: Negative damping, or a grid with zero points.
        ShapeError: Sizes that do not fit.
        NumericalError: An argument is not finite, H or G not positive semi-definite, or a step does
            not fit the type that stores it.
    """
    config = RoundingConfig.for_layer(*weight.shape[1:]) if config is None else config
    check_output_metric(weight, G)
    if not grid.symmetric:
        raise ConfigError("a grid with zero points: found one, wanted a symmetric grid")
    inputs = Feedback.of(weight, H, config)
    outputs = Feedback.of(weight.mT, G, RoundingConfig(damping=0.0, act_order=config.act_order))
    fitted = fit_steps(weight, grid, inputs.innovations())
    alone = round_weight(weight, H, grid, config)
    starts = [(alone.codes, alone.steps)]
    for stretch in config.stretches:
        steps = Steps(step=storable(fitted.step * stretch, grid), zero=fitted.zero)
        starts.append((feed_back_two_sided(weight, (inputs, outputs), steps, grid), steps))

    def loss(start: tuple[Int8[Tensor, "g m n"], Steps]) -> float:
        return float(two_sided_loss(weight - dequantize(*start, grid), H, G).sum())

    best = min(starts, key=loss)
    return _descend(weight, best, grid, _Metric.of(H, G), (config, inputs.damping))


def feed_back_two_sided(
    weight: Float[Tensor, "g m n"],
    factors: tuple[Feedback, Feedback],
    steps: Steps,
    grid: GroupGrid,
) -> Int8[Tensor, "g m n"]:
    """Nearest planes of the Kronecker product of both metrics, one antidiagonal after the other.

    Args:
        weight: Weight; read only.
        factors: Of the metric of the inputs, and of that of the outputs.
        steps: Chosen beforehand for the inputs' own places, whatever the order.
        grid: Their grid.

    Returns:
        Codes in the layout of the weight.

    Raises:
        ShapeError: Steps and weight differ in size.
    """
    inputs, outputs = factors
    check_sizes(weight, steps, grid)
    m, n = weight.shape[1:]
    step, zero = each_input(steps, grid, n)
    target, step, zero = (
        _ordered(v, outputs.order, inputs.order) for v in (weight.double(), step, zero)
    )
    found = torch.empty_like(target)
    for top in range(0, m, ROWS):
        rows = slice(top, min(top + ROWS, m))
        grid_rows = (step[:, rows], zero[:, rows])
        codes, errors = _feed_back_rows_(
            target[:, rows], (inputs.U, outputs.U[:, rows, rows]), grid_rows, grid
        )
        found[:, rows] = codes
        target[:, rows.stop :] -= outputs.U[:, rows, rows.stop :].mT @ errors
    ordered = torch.empty_like(found)
    ordered[_places(outputs.order, inputs.order)] = found
    return ordered.to(torch.int8)


def _feed_back_rows_(
    target: Float64[Tensor, "g r n"],
    factors: tuple[Float64[Tensor, "g n n"], Float64[Tensor, "g r r"]],
    steps: tuple[Float64[Tensor, "g r n"], Float64[Tensor, "g r n"]],
    grid: GroupGrid,
) -> tuple[Float64[Tensor, "g r n"], Float64[Tensor, "g r n"]]:
    """Some rows, one antidiagonal after the other; overwrites the target.

    Args:
        target: What the rows are to become, with the errors of the rows before; in order.
        factors: U of the inputs, and V of these outputs.
        steps: Step and zero point of every weight.
        grid: Their grid.

    Returns:
        Codes, and errors of every row as the rows after it take them up, in units of V.
    """
    U, V = factors
    step, zero = steps
    pivots, row_pivots = U.diagonal(dim1=1, dim2=2), V.diagonal(dim1=1, dim2=2)
    moved = torch.zeros_like(target)  # by errors of its own row
    found, errors = torch.empty_like(target), torch.empty_like(target)
    r, n = target.shape[1:]
    for position in range(r + n - 1):
        rows = slice(max(0, position - n + 1), min(r, position + 1))
        columns = slice(position - rows.stop + 1, position - rows.start + 1)
        i = torch.arange(rows.start, rows.stop, device=target.device)
        j = position - i
        wanted, size, origin = target[:, i, j], step[:, i, j], zero[:, i, j]
        now = wanted + moved[:, i, j]
        code = (now / size).round_().add_(origin).clamp_(grid.low, grid.high)
        value = (code - origin) * size
        found[:, i, j] = code
        errors[:, i, j] = error = (wanted - value) / row_pivots[:, rows]
        # What is behind in its own row and column is zero in U and V: only what is to come moves.
        moved[:, rows] -= ((now - value) / pivots[:, j]).unsqueeze(2) * U[:, j]
        target[:, :, columns] -= (error.unsqueeze(2) * V[:, rows]).mT.flip(2)
    return found, errors


def _places(rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Indices of a weight whose rows and columns are in an order."""
    groups = torch.arange(len(rows), device=rows.device)[:, None, None]
    return groups, rows.unsqueeze(2), columns.unsqueeze(1)


def _ordered(value: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    return value[_places(rows, columns)].clone()


def check_output_metric(weight: Tensor, G: Tensor) -> None:
    """Raise ShapeError unless G belongs to the outputs of the weight."""
    wanted = (weight.shape[0], weight.shape[1], weight.shape[1])
    if tuple(G.shape) != wanted:
        raise ShapeError(
            f"weight {tuple(weight.shape)} [group, out, in] and output metric {tuple(G.shape)} differ, "
            f"wanted {wanted}; collect it at this layer's output"
        )


@dataclass(frozen=True, slots=True)
class _Metric:
    """Both sides in float64, and their diagonals."""

    H: Float64[Tensor, "g n n"]
    G: Float64[Tensor, "g m m"]

    @classmethod
    def of(cls, H: Tensor, G: Tensor) -> "_Metric":
        return cls(H.to(torch.float64), G.to(torch.float64))

    @property
    def inputs(self) -> Float64[Tensor, "g n"]:
        return self.H.diagonal(dim1=1, dim2=2)

    @property
    def outputs(self) -> Float64[Tensor, "g m"]:
        return self.G.diagonal(dim1=1, dim2=2)


@dataclass(slots=True)
class _State:
    """A weight on a grid, transposed, and the gradient H D G of half of its loss."""

    codes: Float64[Tensor, "g n m"]
    step: Float64[Tensor, "g k m"]
    D: Float64[Tensor, "g n m"]
    gradient: Float64[Tensor, "g n m"]

    def loss(self) -> Float64[Tensor, " g"]:
        return (self.D * self.gradient).sum((1, 2)).clamp_min(0)


def _descend(
    weight: Tensor,
    start: tuple[Tensor, Steps],
    grid: GroupGrid,
    metric: _Metric,
    effort: tuple[RoundingConfig, float],
) -> LowBit:
    codes, steps = start
    config, damping = effort
    D = (weight.to(torch.float64) - dequantize(codes, steps, grid)).mT.contiguous()
    state = _State(
        codes=codes.to(torch.float64).mT.contiguous(),
        step=steps.step.mT.clone().contiguous(),
        D=D,
        gradient=metric.H @ D @ metric.G,
    )
    losses = [float(state.loss().sum())]
    for _ in range(config.sweeps):
        if not _sweep_(state, grid, metric, refit_steps=config.refit_steps):
            break
        losses.append(float(state.loss().sum()))
    return LowBit(
        codes=state.codes.mT.contiguous().to(torch.int8),
        steps=Steps(step=state.step.mT.contiguous(), zero=steps.zero),
        loss=state.loss(),
        losses=tuple(losses),
        damping=damping,
    )


def _sweep_(state: _State, grid: GroupGrid, metric: _Metric, *, refit_steps: bool) -> bool:
    """One pass over all columns and steps. Returns whether anything changed."""
    n, changed = metric.H.shape[1], False
    width = max(1, grid.width(n))
    for start in range(0, n, width):
        stop = min(start + width, n)
        for j in range(start, stop):
            changed |= _move_column_(state, grid, metric, (j, start // width))
        if refit_steps:
            changed |= _move_steps_(state, grid, metric, (slice(start, stop), start // width))
    return changed


def _move_column_(state: _State, grid: GroupGrid, metric: _Metric, place: tuple[int, int]) -> bool:
    """Codes of one column, to their best if all others stay."""
    j, group = place
    step, code, slope = state.step[:, group], state.codes[:, j], state.gradient[:, j]
    curvature = metric.inputs[:, j, None] * metric.outputs
    wish = torch.where(curvature > 0, slope / (curvature * step), 0.0)
    # Where the code is a nearest one already, a tie or rounding noise must not move it.
    move = torch.where(
        wish.abs() > 0.5, (code + wish).round_().clamp_(grid.low, grid.high) - code, 0.0
    )
    taken = _that_gain(move * step, slope, metric.G * metric.inputs[:, j, None, None])
    if not bool(taken.any()):
        return False
    state.codes[:, j] += (taken / step).round_()
    state.D[:, j] -= taken
    pull = (taken.unsqueeze(1) @ metric.G).squeeze(1)
    state.gradient -= metric.H[:, :, j, None] * pull.unsqueeze(1)
    return True


def _move_steps_(state: _State, grid: GroupGrid, metric: _Metric, place: tuple[slice, int]) -> bool:
    """Steps of one group of inputs, to their best if all others stay."""
    columns, group = place
    v, step = state.codes[:, columns], state.step[:, group]
    H, gradient = metric.H[:, columns, columns], state.gradient[:, columns]
    pull = (H @ v) * metric.outputs.unsqueeze(1)
    move = step_move(v, gradient, pull, step, grid)
    taken = _that_gain(move, (v * gradient).sum(1), (v.mT @ H @ v) * metric.G)
    if not bool(taken.any()):
        return False
    state.step[:, group] += taken
    change = v * taken.unsqueeze(1)
    state.D[:, columns] -= change
    state.gradient -= metric.H[:, :, columns] @ change @ metric.G
    return True


def _that_gain(
    moves: Float64[Tensor, "g m"],
    slope: Float64[Tensor, "g m"],
    coupling: Float64[Tensor, "g m m"],
) -> Float64[Tensor, "g m"]:
    """Of moves that each lower the loss alone those that do so most together, as far as that is known.

    They are taken in the order of what each gains alone, up to where the sum of them gains most.

    Args:
        moves: Each the best one if the others are not made.
        slope: Of half of the loss, against each.
        coupling: Curvature of half of the loss, against each two.
    """
    kept = moves.any(0)  # most stay where they are
    if not bool(kept.any()):
        return moves
    own, slope = moves[:, kept], slope[:, kept]
    second = coupling[:, kept][:, :, kept] * own.unsqueeze(1) * own.unsqueeze(2)
    first = 2 * own * slope
    alone = first - second.diagonal(dim1=1, dim2=2)
    order = alone.argsort(dim=1, descending=True, stable=True)
    groups, rows, columns = _places(order, order)
    second = second[groups, rows, columns]
    each = second.tril(-1).sum(2) * 2 + second.diagonal(dim1=1, dim2=2)
    gains = (first.gather(1, order) - each).cumsum(1)
    # A gain below the rounding of its terms may be a loss.
    noise = 1e3 * torch.finfo(torch.float64).eps * each.abs().cumsum(1)
    gains = torch.where(gains > noise, gains, 0.0)
    count = torch.where(gains.amax(1) > 0, gains.argmax(1) + 1, 0)
    place = torch.empty_like(order).scatter_(1, order, torch.arange(len(order[0])).expand_as(order))
    taken = torch.zeros_like(moves)
    taken[:, kept] = torch.where(place < count.unsqueeze(1), own, 0.0)
    return taken


__all__ = [
    "blended",
    "check_output_metric",
    "feed_back_two_sided",
    "round_two_sided",
    "two_sided_loss",
]
