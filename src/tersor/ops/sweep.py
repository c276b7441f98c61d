"""One pass over the columns of a weight: what a column loses is taken up by those still to come.

Rounding to a grid, setting to zero and doing both at once are one algorithm: column by column a
weight w_j becomes another value v_j, and with U^T U = (H + damping)^-1 the columns behind it move
by - (w_j - v_j) / U_jj * U_jk, which is where they cancel most of the output's error. The loop runs
over columns only, all groups and outputs in step; what is far from the current column is updated a
block at a time, by a matrix product.

Axes: g groups, m outputs and n inputs of a group, b columns of a block. Weights lie transposed,
[g, n, m], so that a column of W is contiguous.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from tersor.ops.damping import damped_inverse_upper
from tersor.ops.remembered import remembered

BLOCK = 128

# What a column becomes: from its place in the order and its weight [g, m] as it is by then.
Become = Callable[[int, Float64[Tensor, "g m"]], Float64[Tensor, "g m"]]
# Called before each piece, with its first place, its weights [g, b, m] and their pivots U_jj [g, b].
Look = Callable[[int, Float64[Tensor, "g b m"], Float64[Tensor, "g b"]], None]


def feed_back_(
    W: Float64[Tensor, "g n m"],
    U: Float64[Tensor, "g n n"],
    become: Become,
    block: int = BLOCK,
    look: tuple[int, Look] | None = None,
) -> Float64[Tensor, "g m"]:
    """Let every column become what ``become`` says, in order; overwrites W with it.

    Args:
        W: Weight, transposed and in the order of ``U``; overwritten.
        U: Upper triangular, U^T U = (H + damping)^-1 in that order; read only.
        become: The value of a column; called once a column.
        block: Columns between two updates of all that follow; changes speed, not the result.
        look: How many columns a piece has, and what to call before it, when its weights are those
            that all earlier columns left; pieces begin at multiples of that number.

    Returns:
        sum_j ((w_j - v_j) / U_jj)^2 of every row: d (H + damping) d^T of its whole change d.
    """
    pivots = U.diagonal(dim1=1, dim2=2)
    n = W.shape[1]
    piece = n if look is None else look[0]
    # A piece must not cross the end of a block: its last columns would be behind the updates.
    block = block if look is None else max(1, block // piece) * piece
    lost = W.new_zeros(W.shape[0], W.shape[2])
    for start in range(0, n, block):
        stop = min(start + block, n)
        part = W[:, start:stop]
        errors = torch.empty_like(part)
        # A column is so little work that indexing it would be half of the time: all views at once.
        views = zip(
            part.unbind(1),
            errors.unbind(1),
            pivots[:, start:stop, None].unbind(1),
            U[:, start:stop, start:stop, None].unbind(1),
            strict=True,
        )
        for i, (column, error, pivot, pulls) in enumerate(views):
            j = start + i
            if look is not None and j % piece == 0:
                end = min(j + piece, stop)
                look[1](j, W[:, j:end], pivots[:, j:end])
            value = become(j, column)
            error.copy_(column).sub_(value).div_(pivot)
            part[:, i + 1 :].addcmul_(pulls[:, i + 1 :], error.unsqueeze(1), value=-1)
            column.copy_(value)
        W[:, stop:].baddbmm_(U[:, start:stop, stop:].mT, errors, alpha=-1)
        lost += errors.square_().sum(1)
    return lost


def input_order(H: Float64[Tensor, "g n n"], *, act_order: bool) -> Int64[Tensor, "g n"]:
    """Places of the inputs, the most active first; as they are without ``act_order``."""
    diagonal = H.diagonal(dim1=1, dim2=2)
    if act_order:
        return diagonal.argsort(dim=1, descending=True, stable=True)
    return torch.arange(H.shape[1], device=H.device).expand_as(diagonal)


@remembered
def ordered_factor(
    H: Float64[Tensor, "g n n"], order: Int64[Tensor, "g n"], damping: float
) -> tuple[Float64[Tensor, "g n n"], float]:
    """U of ``feed_back_`` for inputs in this order, and the damping in use.

    Inputs that are never active (H_jj = 0) are uncoupled: they neither give nor take feedback.

    Raises:
        ConfigError: Negative damping.
        NumericalError: As ``damping.damped_cholesky``.
    """
    return damped_inverse_upper(_permuted(_without_dead(H), order), damping)


def columns_at(order: Int64[Tensor, "g n"], outputs: int) -> Int64[Tensor, "g n m"]:
    """Index that gathers [g, n, m] into an order, or scatters it back."""
    return order.unsqueeze(2).expand(-1, -1, outputs)


def _permuted(H: Float64[Tensor, "g n n"], order: Int64[Tensor, "g n"]) -> Float64[Tensor, "g n n"]:
    if len(H) == 1:  # whole rows first: half the time of a gather by pairs
        return H[:, order[0]][:, :, order[0]]
    groups = torch.arange(H.shape[0], device=H.device)[:, None, None]
    return H[groups, order.unsqueeze(2), order.unsqueeze(1)]


def _without_dead(H: Float64[Tensor, "g n n"]) -> Float64[Tensor, "g n n"]:
    """Clear the couplings of inputs without activity; rounding noise there would be fed back."""
    alive = H.diagonal(dim1=1, dim2=2) > 0
    if bool(alive.all()):
        return H
    return H * alive.unsqueeze(2) * alive.unsqueeze(1)
