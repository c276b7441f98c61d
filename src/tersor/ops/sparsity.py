"""Which weights to keep: scores, patterns, and elimination with the others adapting.

Removing the weight w_j of an output costs w_j^2 / (H^-1)_jj once the others have adapted: the OBS
score, beside which magnitude and |w| |x| (Wanda) are crude. A mask may be taken from scores at
once, from one pass over the columns that adapts what is still to come (``eliminate``, SparseGPT), or
exactly, one weight at a time with an inverse for each output (``eliminate_exactly``, for small
layers); ``admm.choose_support`` is best above 60 %. Whatever chose the mask, ``support.refit_support`` then
gives the exact weights on it.

Axes: g groups, m outputs and n inputs of a group, r rows of a chunk, b columns of a block.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from tersor.core.errors import ConfigError, ShapeError
from tersor.ops.column_grid import ColumnGrid
from tersor.ops.damping import damped_cholesky
from tersor.ops.grids import check_finite
from tersor.ops.group_grids import GroupGrid, Steps
from tersor.ops.sweep import BLOCK, columns_at, feed_back_, input_order, ordered_factor

# Float64 values of the inverses of one chunk of rows: 64 MiB.
CHUNK_VALUES = 2**23
# Rank-one updates of exact elimination read and write m n^3 values: about ten seconds.
EXACT_VALUES = 2e10


@dataclass(frozen=True, slots=True, kw_only=True)
class Unstructured:
    """Any weights may go.

    Args:
        kept: Share of the weights that stay, 0..1; rounded to a whole number of them.
        each_row: Whether every output keeps that share; else the layer as a whole does.
    """

    kept: float
    each_row: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.kept <= 1:
            raise ConfigError(f"kept must be a share within 0..1, got {self.kept}")


@dataclass(frozen=True, slots=True, kw_only=True)
class NofM:
    """At most ``kept`` of every ``of`` neighbouring inputs stay, in every output: 2 of 4 for sparse tensor cores."""

    kept: int = 2
    of: int = 4

    def __post_init__(self) -> None:
        if not 0 <= self.kept <= self.of or self.of < 1:
            raise ConfigError(f"pattern {self.kept} of {self.of}: wanted 0 <= kept <= of, of >= 1")


Pattern = Unstructured | NofM


@dataclass(frozen=True, slots=True, kw_only=True)
class Eliminated:
    """A sparse weight, perhaps on a grid."""

    keep: Bool[Tensor, "g m n"]
    weight: Float64[Tensor, "g m n"]  # zero where keep is False
    damping: float  # in use


def best_mask(scores: Float[Tensor, "g m n"], pattern: Pattern) -> Bool[Tensor, "g m n"]:
    """The mask of a pattern that keeps the highest scores; ties go to the lower index.

    Raises:
        ShapeError: Inputs that do not split into the groups of the pattern.
    """
    groups, outputs, inputs = scores.shape
    if isinstance(pattern, NofM):
        check_splits(inputs, pattern)
        parts = scores.reshape(groups, outputs, inputs // pattern.of, pattern.of)
        order = parts.argsort(dim=3, descending=True, stable=True)
        ranks = torch.arange(pattern.of, device=scores.device).expand_as(order)
        return (torch.empty_like(order).scatter_(3, order, ranks) < pattern.kept).flatten(2)
    if pattern.each_row:
        return _highest(scores.flatten(0, 1), round(pattern.kept * inputs)).reshape(scores.shape)
    count = round(pattern.kept * scores.numel())
    return _highest(scores.reshape(1, -1), count).reshape(scores.shape)


def magnitude_scores(weight: Float[Tensor, "g m n"]) -> Float64[Tensor, "g m n"]:
    """w^2."""
    return weight.to(torch.float64).square()


def activity_scores(
    weight: Float[Tensor, "g m n"], H: Float[Tensor, "g n n"]
) -> Float64[Tensor, "g m n"]:
    """w_j^2 H_jj, what a removal costs with no other weight adapting (Sun et al. 2023, Wanda, arXiv:2306.11695)."""
    return magnitude_scores(weight) * H.to(torch.float64).diagonal(dim1=1, dim2=2).unsqueeze(1)


def obs_scores(
    weight: Float[Tensor, "g m n"], H: Float[Tensor, "g n n"], damping: float = 0.01
) -> Float64[Tensor, "g m n"]:
    """w_j^2 / (H^-1)_jj, what the removal of one weight costs with all others adapting.

    Raises:
        ConfigError: Negative damping.
        NumericalError: H is not finite or not positive semi-definite.

    Source: Hassibi and Stork 1993 (OBS), eq. 5.
    """
    return magnitude_scores(weight) / _inverse_diagonal(H, damping).unsqueeze(1)


def _inverse_diagonal(H: Float[Tensor, "g n n"], damping: float) -> Float64[Tensor, "g n"]:
    """Of the inverse of the damped H: columns' squares of a triangular factor U, H^-1 = U^T U."""
    metric = H.to(torch.float64)
    order = input_order(metric, act_order=True)  # as error feedback has it, which shares the factor
    values = ordered_factor(metric, order, damping)[0].square().sum(1)
    return torch.empty_like(values).scatter_(1, order, values)


def eliminate(
    weight: Float[Tensor, "g m n"],
    H: Float[Tensor, "g n n"],
    pattern: Pattern,
    *,
    damping: float = 0.01,
    block: int = BLOCK,
    onto: tuple[GroupGrid, Steps] | None = None,
) -> Eliminated:
    """One pass over the columns: remove, round what stays, and let the columns still to come adapt.

    Before each block of columns its cheapest weights are marked, by w_j^2 / U_jj^2 of the weights as
    they are by then; the pass sets them to zero and feeds their error back like that of rounding.

    Args:
        weight: Weight; read only.
        H: Second moment or covariance of the input; read only.
        pattern: What to keep; an unstructured share holds in every block.
        damping: Multiple of the mean diagonal of H, >= 0.
        block: Columns whose mask is chosen at a time; a pattern n of m chooses m at a time.
        onto: Grid and steps for what stays; None: no rounding.

    Returns:
        The mask and the weight; on a grid ``nearest_codes`` gives its codes. ``round_weight`` with the
        mask of a better search, on its refitted weight, is slower and leaves less error.

    Raises:
        ConfigError: Negative damping or ``block`` below 1.
        ShapeError: Sizes that do not fit.
        NumericalError: The weight or H is not finite, or H not positive semi-definite.

    Source: Frantar and Alistarh 2023 (SparseGPT), arXiv:2301.00774, algorithm 1.
    """
    if block < 1:
        raise ConfigError(f"block must be at least 1 column, got {block}; {BLOCK} is a good choice")
    check_finite(weight, "weight")
    inputs, metric = weight.shape[2], H.to(torch.float64)
    is_structured = isinstance(pattern, NofM)
    if isinstance(pattern, NofM):
        check_splits(inputs, pattern)
        block = pattern.of
    order = input_order(metric, act_order=not is_structured)
    U, used = ordered_factor(metric, order, damping)
    columns = columns_at(order, weight.shape[1])
    W = weight.to(torch.float64).mT.gather(1, columns)
    keep = torch.ones_like(W, dtype=torch.bool)
    masks = keep.unbind(1)

    def look(start: int, part: Float64[Tensor, "g b m"], pivots: Float64[Tensor, "g b"]) -> None:
        scores = (part / pivots.unsqueeze(2)).square().mT
        keep[:, start : start + part.shape[1]] = best_mask(scores, pattern).mT

    columns_grid = None if onto is None else ColumnGrid.of(weight, order, *onto)

    def become(j: int, column: Float64[Tensor, "g m"]) -> Float64[Tensor, "g m"]:
        if columns_grid is not None:
            column = columns_grid.value(j, columns_grid.code(j, column)[0])
        return column * masks[j]

    feed_back_(W, U, become, look=(block, look))
    return Eliminated(
        keep=torch.empty_like(keep).scatter_(1, columns, keep).mT.contiguous(),
        weight=torch.empty_like(W).scatter_(1, columns, W).mT.contiguous(),
        damping=used,
    )


def eliminate_exactly(
    weight: Float[Tensor, "g m n"],
    H: Float[Tensor, "g n n"],
    pattern: Unstructured,
    damping: float = 0.01,
) -> Bool[Tensor, "g m n"]:
    """Remove one weight at a time, the cheapest of its output, all others adapting exactly.

    Every output has an inverse of its own, conditioned on what it has lost. Over the layer, outputs
    go on with what costs least next.

    Args:
        weight: Weight; read only.
        H: Second moment or covariance of the input; read only.
        pattern: What to keep.
        damping: Multiple of the mean diagonal of H, >= 0.

    Returns:
        The mask; ``support.refit_support`` gives the weights.

    Raises:
        ConfigError: Negative damping, or a layer of more than ``EXACT_VALUES`` m n^3.
        NumericalError: The weight or H is not finite, or H not positive semi-definite.

    Source: Frantar et al. 2022 (OBC), arXiv:2208.11580, algorithms 1 and 2.
    """
    groups, outputs, inputs = weight.shape
    if groups * outputs * float(inputs) ** 3 > EXACT_VALUES:
        raise ConfigError(
            f"weight {tuple(weight.shape)}: exact elimination takes {groups * outputs * float(inputs) ** 3:.2g} "
            f"updates, wanted at most {EXACT_VALUES:.0g}; use `eliminate` or `admm.choose_support`"
        )
    check_finite(weight, "weight")
    inverse = torch.cholesky_inverse(damped_cholesky(H, damping)[0])
    W = weight.to(torch.float64)
    order = torch.empty(weight.shape, dtype=torch.int64, device=weight.device)
    cost = torch.empty_like(W)
    rows = max(1, CHUNK_VALUES // max(1, inputs**2))
    for g in range(groups):
        for start in range(0, outputs, rows):
            part = slice(start, start + rows)
            order[g, part], cost[g, part] = _traces(W[g, part], inverse[g])
    # An output can go no further than its dearest step so far, so that its prefix goes at that price.
    price = torch.empty_like(cost).scatter_(2, order, cost.cummax(2).values)
    if not pattern.each_row:
        # Rows differ in price, and within a row later removals must win ties to stay longer.
        return _prefixes(price, order, round(pattern.kept * weight.numel()))
    rank = torch.empty_like(order)
    rank.scatter_(2, order, torch.arange(inputs, device=order.device).expand_as(order))
    return rank >= inputs - round(pattern.kept * inputs)


def check_splits(inputs: int, pattern: NofM) -> None:
    """Raise ShapeError unless the inputs split into the groups of a pattern."""
    if inputs % pattern.of:
        raise ShapeError(
            f"{inputs} inputs do not split into groups of {pattern.of} for the pattern {pattern.kept} of {pattern.of}; "
            "leave this layer dense or choose an unstructured pattern"
        )


def _highest(scores: Float[Tensor, "r n"], count: int) -> Bool[Tensor, "r n"]:
    """The ``count`` highest of each row; of equals the first ones."""
    n = scores.shape[1]
    if count <= 0 or count >= n:
        return torch.full_like(scores, count > 0, dtype=torch.bool)
    bound = scores.kthvalue(n - count + 1, dim=1, keepdim=True).values
    above, equal = scores > bound, scores == bound
    missing = count - above.sum(1, keepdim=True)
    return above | (equal & (equal.cumsum(1) <= missing))


def _traces(
    W: Float64[Tensor, "r n"], inverse: Float64[Tensor, "n n"]
) -> tuple[Int64[Tensor, "r n"], Float64[Tensor, "r n"]]:
    """Order in which each row loses its weights, and what each removal costs."""
    rows, n = W.shape
    w, Hinv = W.clone(), inverse.expand(rows, n, n).clone()
    every = torch.arange(rows, device=W.device)
    gone = torch.zeros_like(W, dtype=torch.bool)
    order = torch.empty(rows, n, dtype=torch.int64, device=W.device)
    cost = torch.empty_like(W)
    for step in range(n):
        diagonal = Hinv.diagonal(dim1=1, dim2=2)
        scores = (w.square() / diagonal).masked_fill_(gone, torch.inf)
        cost[:, step], j = scores.min(1)
        order[:, step], gone[every, j] = j, True
        pivot, row = diagonal[every, j].clone(), Hinv[every, j].clone()
        w -= row * (w[every, j] / pivot).unsqueeze(1)
        Hinv.baddbmm_((row / pivot.unsqueeze(1)).unsqueeze(2), row.unsqueeze(1), alpha=-1)
        # What has left must stay out of the way of later steps.
        Hinv[every, j, :] = 0
        Hinv[every, :, j] = 0
        Hinv[every, j, j] = 1
    return order, cost


def _prefixes(
    price: Float64[Tensor, "g m n"], order: Int64[Tensor, "g m n"], kept: int
) -> Bool[Tensor, "g m n"]:
    """Keep what is dearest over the layer; equals of a row leave in their order."""
    steps = torch.arange(order.shape[2], device=order.device).expand_as(order)
    step_of = torch.empty_like(order).scatter_(2, order, steps)
    by_step = step_of.flatten().argsort(stable=True)
    by_price = by_step[price.flatten()[by_step].argsort(stable=True)]
    keep = torch.ones(price.numel(), dtype=torch.bool, device=price.device)
    keep[by_price[: price.numel() - kept]] = False
    return keep.reshape(price.shape)
