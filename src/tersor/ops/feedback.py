"""Rounding a weight so that later columns make up for the error of earlier ones.

Rounding to nearest minimises |W - W'|; the layer's output needs the least tr(D H D^T), D = W - W'.
``round_with_feedback`` rounds column by column and moves the columns still to come to where they
cancel most of the error (GPTQ: optimal brain quantization in a fixed order, Babai's nearest plane).
``descend`` then improves single codes until none can be. Rows never interact, so that all outputs
and groups go in step; the loop runs over columns only, and what is far from the current column is
updated a block at a time, by a matrix product.

Axes: g groups, m outputs and n inputs of a group. Inside, weights lie transposed, [g, n, m], so that
a column of W is contiguous.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64, Int8
from torch import Tensor

from tersor.core.errors import ConfigError
from tersor.ops.damping import check_moment
from tersor.ops.grids import check_finite, check_limit, check_steps
from tersor.ops.refit import layer_loss
from tersor.ops.sweep import BLOCK, columns_at, feed_back_, input_order, ordered_factor

# Wishes of codes are taken shorter by this share: far above rounding noise, far below what is worth a move.
TIE = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounded:
    """A weight on a grid: the weight is codes * step."""

    codes: Int8[Tensor, "g m n"]
    loss: Float64[Tensor, " g"]  # tr(D H D^T) without damping
    damping: float  # in use


def round_with_feedback(  # noqa: PLR0913 - three tensors and the four knobs of one algorithm
    weight: Float[Tensor, "g m n"],
    step: Float[Tensor, "g m"],
    H: Float[Tensor, "g n n"],
    *,
    limit: int,
    damping: float = 0.01,
    act_order: bool = True,
    block: int = BLOCK,
) -> Rounded:
    """Round column by column; every column still to come absorbs what it can of the error.

    With U^T U = (H + damping)^-1: q_j = Q(w_j), e = (w_j - q_j) / U_jj, w_k -= e U_jk for k > j.

    Args:
        weight: Weight; read only.
        step: Step of every output, > 0, chosen beforehand.
        H: Second moment or covariance of the input; read only. Inputs that are never active (H_jj = 0)
            are rounded to nearest and neither give nor take feedback.
        limit: Largest code, 1..127; columns moved beyond it are clipped, and their error fed back too.
        damping: Multiple of the mean diagonal to begin with, >= 0; more if H is singular even so.
        act_order: Round the most active inputs first, while the others can still make up for them.
            The codes keep the layout of the weight.
        block: Columns between two updates of all that follow; changes speed, not the result.

    Returns:
        Codes within +-limit, their loss and the damping in use.

    Raises:
        ConfigError: ``limit`` outside 1..127, negative damping or ``block`` below 1.
        NumericalError: The weight or H is not finite, a step not positive, or H not positive semi-definite.

    Source: Frantar et al. 2022, arXiv:2210.17323, algorithm 1; Chen et al. 2025, arXiv:2507.18553.
    """
    check_limit(limit)
    check_finite(weight, "weight")
    check_steps(step)
    if block < 1:
        raise ConfigError(f"block must be at least 1 column, got {block}; {BLOCK} is a good choice")
    W, scale, metric = (value.to(torch.float64) for value in (weight, step, H))
    order = input_order(metric, act_order=act_order)
    U, used = ordered_factor(metric, order, damping)
    columns = columns_at(order, weight.shape[1])
    found = torch.empty_like(W.mT)
    places = found.unbind(1)

    def become(j: int, column: Float64[Tensor, "g m"]) -> Float64[Tensor, "g m"]:
        return places[j].copy_(column).div_(scale).round_().clamp_(-limit, limit) * scale

    feed_back_(W.mT.gather(1, columns), U, become, block)
    codes = torch.empty_like(found).scatter_(1, columns, found).mT.contiguous()
    loss = layer_loss(W - codes * scale.unsqueeze(2), metric)
    return Rounded(codes=codes.to(torch.int8), loss=loss, damping=used)


def descend(
    weight: Float[Tensor, "g m n"],
    codes: Int8[Tensor, "g m n"],
    step: Float[Tensor, "g m"],
    H: Float[Tensor, "g n n"],
    limit: int,
    sweeps: int,
) -> Int8[Tensor, "g m n"]:
    """Improve single codes by coordinate descent on tr(D H D^T).

    w'_j <- Q(w'_j + (D H)_j / H_jj), the best code of column j while all others stand still.

    Args:
        weight: Weight; read only.
        codes: Where to begin, within +-limit; read only.
        step: Step of every output, > 0.
        H: Second moment or covariance of the input, positive semi-definite; read only.
        limit: Largest code, 1..127.
        sweeps: Passes over all columns, >= 0; ends sooner once a pass changes nothing.

    Returns:
        Codes whose loss, row by row, is not above that of the codes given. Columns with H_jj = 0 and
        codes that are already best stay as they are.

    Raises:
        ConfigError: ``limit`` outside 1..127 or negative ``sweeps``.
        NumericalError: The weight or H is not finite, or a step not positive.

    Source: Behdin et al. 2023 (QuantEase), arXiv:2309.01885, eq. 7.
    """
    check_limit(limit)
    check_finite(weight, "weight")
    check_steps(step)
    check_moment(H)
    if sweeps < 0:
        raise ConfigError(f"sweeps must be >= 0, got {sweeps}; 2 to 4 are enough")
    metric, scale = H.to(torch.float64), step.to(torch.float64)
    current = codes.to(torch.float64).mT.contiguous()
    for _ in range(sweeps):
        D = weight.to(torch.float64).mT - current * scale.unsqueeze(1)
        if not _descend_once_(current, metric @ D, scale, metric, limit):
            break
    return current.mT.contiguous().to(torch.int8)


def _descend_once_(
    codes: Float64[Tensor, "g n m"],
    gradient: Float64[Tensor, "g n m"],
    step: Float64[Tensor, "g m"],
    H: Float64[Tensor, "g n n"],
    limit: int,
) -> bool:
    """One pass over all columns; overwrites codes and gradient (H D). Returns whether a code changed."""
    n = H.shape[1]
    changed = False
    for start in range(0, n, BLOCK):
        stop = min(start + BLOCK, n)
        part, H_part = gradient[:, start:stop], H[:, start:stop, start:stop]
        moves = torch.empty_like(part)
        views = zip(
            codes[:, start:stop].unbind(1),
            part.unbind(1),
            rates(H_part, step).unbind(1),
            moves.unbind(1),
            H_part.unsqueeze(3).unbind(2),
            strict=True,
        )
        for i, (code, slope, rate, move, pulls) in enumerate(views):
            new = torch.addcmul(code, slope, rate).round_().clamp_(-limit, limit)
            move.copy_(new).sub_(code).mul_(step)
            code.copy_(new)
            part[:, i + 1 :].addcmul_(pulls[:, i + 1 :], move.unsqueeze(1), value=-1)
        if bool(moves.any()):
            changed = True
            gradient[:, stop:].baddbmm_(H[:, stop:, start:stop], moves, alpha=-1)
    return changed


def rates(H: Float64[Tensor, "g b b"], step: Float64[Tensor, "g m"]) -> Float64[Tensor, "g b m"]:
    """Moves of codes to the minima of their parabolas, of a unit gradient; 0 without curvature.

    A little short of the minimum: where a code is a nearest one already, a tie or rounding noise must
    not move it.
    """
    curvature = H.diagonal(dim1=1, dim2=2).unsqueeze(2)
    inverse = torch.where(curvature > 0, (1 - TIE) / curvature, 0.0)
    return inverse / step.unsqueeze(1)
