"""Descent on tr(D H D^T) of a weight on a grid: one code, one step, one zero point at a time.

Each is set to its best value while all others stand still, so that the loss never goes up. The
gradient H D is kept up to date; far columns are told by matrix products, a block of changes at a
time. After the codes of a group of inputs have moved, its step is solved for: a parabola again.

Axes: g groups of a convolution, m outputs and n inputs of one, k steps of an output, b columns of a
block. Inside, weights lie transposed, [g, n, m].
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float64, Int8
from torch import Tensor

from tersor.core.errors import ConfigError
from tersor.ops.damping import check_moment
from tersor.ops.feedback import rates
from tersor.ops.grids import check_finite
from tersor.ops.group_grids import GroupGrid, Steps, check_sizes, storable

# Columns told at a time: wide enough for matrix products at full speed.
BLOCK = 128
# Columns between two small products inside of a block, where the loop over columns is memory bound.
PIECE = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Descended:
    """Where a descent ended."""

    codes: Int8[Tensor, "g m n"]
    steps: Steps
    loss: Float64[Tensor, " g"]
    losses: tuple[float, ...]  # over all groups: before, and after each sweep


def descend_groups(  # noqa: PLR0913 - a weight on a grid is four things, its metric one, three knobs
    weight: Float[Tensor, "g m n"],
    codes: Int8[Tensor, "g m n"],
    steps: Steps,
    grid: GroupGrid,
    H: Float[Tensor, "g n n"],
    *,
    sweeps: int,
    refit_steps: bool = True,
    keep: Bool[Tensor, "g m n"] | None = None,
) -> Descended:
    """Improve codes, steps and zero points.

    q_j <- Q(q_j + (D H)_j / (H_jj step)); step <- step + v H d^T / v H v^T with v = q - zero, d a row
    of D on the group's inputs; zero likewise. A step is taken as its type stores it, at most doubled or
    halved in a sweep, and only where that lowers the loss.

    Args:
        weight: Weight; read only.
        codes: Where to begin, on the grid, zero points where ``keep`` is False; read only.
        steps: Where to begin; read only.
        grid: Their grid.
        H: Second moment or covariance of the input, positive semi-definite; read only.
        sweeps: Passes over all columns at most, >= 0; ends sooner once a pass changes nothing.
        refit_steps: Whether to solve for steps, and for zero points where no mask is given.
        keep: Where codes may move; None: everywhere.

    Returns:
        Codes and steps whose loss, row by row, is not above that of those given. Columns with
        H_jj = 0 and codes that are already best stay as they are.

    Raises:
        ConfigError: Negative ``sweeps``.
        ShapeError: Sizes that do not fit.
        NumericalError: The weight or H is not finite.

    Source: Behdin et al. 2023 (QuantEase), arXiv:2309.01885, eq. 7; steps by their normal equation.
    """
    if sweeps < 0:
        raise ConfigError(f"sweeps must be >= 0, got {sweeps}; 2 to 4 are enough")
    check_finite(weight, "weight")
    check_moment(H)
    check_sizes(weight, steps, grid)
    state = _begin(weight, codes, steps, grid, H, keep)
    losses = [float(_loss(state).sum())]
    for _ in range(sweeps):
        if not _sweep_(state, grid, refit_steps=refit_steps):
            break
        losses.append(float(_loss(state).sum()))
    return Descended(
        codes=state.codes.mT.contiguous().to(torch.int8),
        steps=Steps(step=state.step.mT.contiguous(), zero=state.zero.mT.contiguous().char()),
        loss=_loss(state),
        losses=tuple(losses),
    )


@dataclass(slots=True, kw_only=True)
class _State:
    """A weight on a grid, transposed; all of it changes but H, HW and keep."""

    H: Float64[Tensor, "g n n"]
    codes: Float64[Tensor, "g n m"]
    step: Float64[Tensor, "g k m"]
    zero: Float64[Tensor, "g k m"]
    D: Float64[Tensor, "g n m"]
    gradient: Float64[Tensor, "g n m"]  # H D
    HW: Float64[Tensor, "g n m"] | None  # where one step serves all inputs
    keep: Bool[Tensor, "g n m"] | None


@dataclass(slots=True, kw_only=True)
class _Block:
    """Columns start..stop with a gradient of their own, ahead of the state's."""

    start: int
    stop: int
    H: Float64[Tensor, "g b b"]
    gradient: Float64[Tensor, "g b m"]


def _begin(
    weight: Tensor,
    codes: Tensor,
    steps: Steps,
    grid: GroupGrid,
    H: Tensor,
    keep: Tensor | None,
) -> _State:
    metric, W = H.to(torch.float64), weight.to(torch.float64).mT
    # Where there is one step or one output, transposing copies nothing, and the caller's would change.
    step, zero = (v.to(torch.float64).mT.clone().contiguous() for v in (steps.step, steps.zero))
    current = codes.to(torch.float64).mT.contiguous()
    place = torch.arange(weight.shape[2], device=weight.device) // max(
        1, grid.width(weight.shape[2])
    )
    D = W - (current - zero[:, place]) * step[:, place]
    return _State(
        H=metric,
        codes=current,
        step=step,
        zero=zero,
        D=D,
        gradient=metric @ D,
        HW=metric @ W if step.shape[1] == 1 else None,
        keep=None if keep is None else keep.mT,
    )


def _loss(state: _State) -> Float64[Tensor, " g"]:
    # Rounding can leave a minute negative sum where the loss is zero.
    return (state.D * state.gradient).sum((1, 2)).clamp_min(0)


def _blocks(n: int, width: int) -> Iterator[tuple[int, int]]:
    """Whole groups of inputs that fit into a block, or blocks of one group."""
    if width <= BLOCK:
        size = BLOCK // width * width
        yield from ((start, min(start + size, n)) for start in range(0, n, size))
        return
    for group in range(0, n, width):
        stop = min(group + width, n)
        yield from ((start, min(start + BLOCK, stop)) for start in range(group, stop, BLOCK))


def _sweep_(state: _State, grid: GroupGrid, *, refit_steps: bool) -> bool:
    """One pass over all columns. Returns whether anything changed."""
    n = state.H.shape[1]
    width, changed = grid.width(n), False
    for start, stop in _blocks(n, max(1, width)):
        before = state.D[:, start:stop].clone()
        block = _Block(
            start=start,
            stop=stop,
            H=state.H[:, start:stop, start:stop],
            gradient=state.gradient[:, start:stop].clone(),
        )
        for group in range(start // width, -(-stop // width)):
            first, last = max(start, group * width), min(stop, (group + 1) * width)
            for piece in range(first, last, PIECE):
                _move_codes_(state, block, grid, slice(piece, min(piece + PIECE, last)))
            if refit_steps and width <= BLOCK:
                _refit_within_(state, block, grid, slice(first, last))
        moves = before.sub_(state.D[:, start:stop])
        if bool(moves.any()):
            changed = True
            state.gradient.baddbmm_(state.H[:, :, start:stop], moves, alpha=-1)
        if refit_steps and width > BLOCK and (stop % width == 0 or stop == n):
            changed |= _refit_wide_(state, grid, slice((stop - 1) // width * width, stop))
    return changed


def _move_codes_(state: _State, block: _Block, grid: GroupGrid, piece: slice) -> None:
    """Every code of a few columns to its best, one column after the other."""
    group = piece.start // grid.width(state.H.shape[1])
    step = state.step[:, group]
    local = slice(piece.start - block.start, piece.stop - block.start)
    gradient, H = block.gradient[:, local].clone(), block.H[:, local, local]
    moves, rate = torch.empty_like(gradient), rates(H, step)
    if state.keep is not None:  # codes of other weights are their zero points, and stay so
        rate.mul_(state.keep[:, piece])
    views = zip(
        state.codes[:, piece].unbind(1),
        gradient.unbind(1),
        rate.unbind(1),
        moves.unbind(1),
        H.unsqueeze(3).unbind(2),
        strict=True,
    )
    for i, (code, slope, fast, move, pulls) in enumerate(views):
        new = torch.addcmul(code, slope, fast).round_().clamp_(grid.low, grid.high)
        move.copy_(new).sub_(code).mul_(step)
        code.copy_(new)
        gradient[:, i + 1 :].addcmul_(pulls[:, i + 1 :], move.unsqueeze(1), value=-1)
    state.D[:, piece] -= moves
    block.gradient.baddbmm_(block.H[:, :, local], moves, alpha=-1)


def _refit_within_(state: _State, block: _Block, grid: GroupGrid, columns: slice) -> None:
    """Step and zero point of a group that lies within a block."""
    group = columns.start // grid.width(state.H.shape[1])
    local = slice(columns.start - block.start, columns.stop - block.start)
    v = state.codes[:, columns] - state.zero[:, None, group]
    pull = block.H[:, :, local] @ v
    move = step_move(v, block.gradient[:, local], pull[:, local], state.step[:, group], grid)
    state.step[:, group] += move
    state.D[:, columns] -= v * move.unsqueeze(1)
    block.gradient -= pull * move.unsqueeze(1)
    if grid.symmetric or state.keep is not None:
        return
    column_sums = block.H[:, :, local].sum(2, keepdim=True)
    shift = _zero_move(state, block.gradient[:, local], column_sums[:, local], group, grid)
    state.D[:, columns] += shift.unsqueeze(1)
    block.gradient += column_sums * shift.unsqueeze(1)


def _refit_wide_(state: _State, grid: GroupGrid, columns: slice) -> bool:
    """Step and zero point of a group that is wider than a block. Returns whether they changed."""
    group = columns.start // grid.width(state.H.shape[1])
    step = state.step[:, group]
    v = state.codes[:, columns] - state.zero[:, None, group]
    if state.HW is None:
        pull = state.H[:, :, columns] @ v
    else:  # v step = W - D
        pull = (state.HW - state.gradient) / step.unsqueeze(1)
    move = step_move(v, state.gradient[:, columns], pull[:, columns], step, grid)
    step += move
    state.D[:, columns] -= v * move.unsqueeze(1)
    state.gradient -= pull * move.unsqueeze(1)
    changed = bool(move.any())
    if grid.symmetric or state.keep is not None:
        return changed
    column_sums = state.H[:, :, columns].sum(2, keepdim=True)
    shift = _zero_move(state, state.gradient[:, columns], column_sums[:, columns], group, grid)
    state.D[:, columns] += shift.unsqueeze(1)
    state.gradient += column_sums * shift.unsqueeze(1)
    return changed or bool(shift.any())


def step_move(
    v: Float64[Tensor, "g b m"],
    gradient: Float64[Tensor, "g b m"],
    pull: Float64[Tensor, "g b m"],
    step: Float64[Tensor, "g m"],
    grid: GroupGrid,
) -> Float64[Tensor, "g m"]:
    """What to add to the steps of a group of inputs; 0 where no step that can be stored is better.

    Args:
        v: Codes less their zero points.
        gradient: Of half of the loss, against the weight.
        pull: What that gradient loses where each weight moves by its v.
        step: Steps.
        grid: Their grid.
    """
    slope, curvature = (v * gradient).sum(1), (v * pull).sum(1)
    wanted = step + torch.where(curvature > 0, slope / curvature, 0.0)
    # A step through zero would be no step; codes of the other sign belong to another start. Beyond
    # a factor of two the codes are the wrong ones, and the next sweep goes on from there.
    ratio = (wanted / step).clamp(0.5, 2.0)
    wanted = step * torch.where(wanted * step > 0, ratio, 1.0)
    move = storable(wanted, grid) - step
    gain = move * (2 * slope - move * curvature)
    # A gain below the rounding of its two terms may be a loss.
    noise = 1e3 * torch.finfo(torch.float64).eps * move.square() * curvature
    return torch.where((gain > noise) & (curvature > 0), move, 0.0)


def _zero_move(
    state: _State,
    gradient: Float64[Tensor, "g b m"],
    column_sums: Float64[Tensor, "g b 1"],
    group: int,
    grid: GroupGrid,
) -> Float64[Tensor, "g m"]:
    """Move zero points to their best; returns what that adds to D on all of the group's inputs."""
    step, zero = state.step[:, group], state.zero[:, group]
    curvature = column_sums.sum(1)
    wish = torch.where(curvature > 0, -gradient.sum(1) / (curvature * step), 0.0)
    move = (zero + wish).round_().clamp_(grid.low, grid.high) - zero
    move = torch.where(wish.abs() > 0.5, move, 0.0)
    zero += move
    return move * step
