"""Codes and tables of a weight for the layer's output: the best tables, codes, and tables again.

The tables begin as exact k-means of the weights. Codes are then given column by column, the nearest
entry each, and every later column absorbs what it can of the error (as ``feedback`` does for grids).
What then counts of an input is not its mean square but what later inputs can't make up for, 1 / U_jj^2,
its variance given those: k-means weights by that. After that three steps take turns, none of which raises tr(D (H + lam I) D^T), D = W - W':

* entries: the least squares over all entries of a table, in the full metric, codes as they are;
* codes: coordinate descent, the best entry of a column while all others stand still;
* codes anew, by feedback with the new entries, kept for each table's outputs only where it is better.

The normal equations of the entries are never formed: their matrix times a vector is a gather, one
product with H and a scatter, the same work for one table and for one a row. Conjugate gradients need
a few of these, as a table's entries are coupled weakly.

Axes: g groups, m outputs and n inputs of a group, b blocks of outputs, c blocks of inputs, k entries.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Float64, Int64, UInt8
from torch import Tensor

from tersor.core.errors import ConfigError
from tersor.ops.codebook import (
    Codebook,
    CodebookScheme,
    ColumnTables,
    ascending,
    decode,
    first_tables,
    gathered,
    looked_up,
    nearest_codes,
)
from tersor.ops.feedback import rates
from tersor.ops.grids import check_finite
from tersor.ops.kmeans import EXACT_WORK
from tersor.ops.refit import layer_loss
from tersor.ops.sweep import feed_back_, ordered_factor

BLOCK = 128
# Of the gradient, relative to where it began. A round's loss was within 4e-4 of that of the exact
# solution at 0.01; codes move again in the next.
SOLVED = 0.01
MOST_STEPS = 50  # of conjugate gradients; they never raise the loss, solved or not
# Rounds end where the loss falls by less: what is left is below the choice of calibration samples.
ENOUGH = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class CodebookFit:
    """The best codes and tables, and how they were come by."""

    codebook: Codebook  # entries are values of ``value_dtype``
    losses: tuple[float, ...]  # damped, over all groups: nearest entries, feedback, then each round
    loss: Float64[Tensor, " g"]  # tr(D H D^T) of the result, without damping
    damping: float  # of H, in use
    merged: (
        float  # share of the k-means error that merging neighbours hid; 0: the tables began exact
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Problem:
    """What all steps share."""

    W: Float64[Tensor, "g m n"]
    H: Float64[Tensor, "g n n"]  # damped
    U: Float64[Tensor, "g n n"]  # U^T U = H^-1 in the order of the columns
    order: Int64[Tensor, " n"]


def fit_codebook(
    weight: Float[Tensor, "g m n"],
    H: Float[Tensor, "g n n"],
    scheme: CodebookScheme,
    *,
    rounds: int = 3,
    damping: float = 0.01,
    exact_work: int = EXACT_WORK,
) -> CodebookFit:
    """Tables and codes with a low output error.

    Args:
        weight: What to approach, W* where something changed before the layer; read only.
        H: Second moment, or covariance with the best bias shift, of the input; read only. Inputs that are
            never active (H_jj = 0) take their nearest entries.
        scheme: Tables; their blocks must divide g m outputs and n inputs.
        rounds: Of entries and codes at most, >= 0; ends sooner where the loss falls by less than a
            thousandth.
        damping: lam, relative to the mean diagonal, >= 0; more if H is singular even so. Few rows fit the
            codes to their noise: 0.03 is better than 0.01 below some five rows an input.
        exact_work: Values times entries of a table beyond which neighbours are merged before the tables
            begin; what a start hides, the rounds mostly find again.

    Returns:
        Codes and tables. From feedback on the losses never rise, but for the rounding of the entries to
        ``value_dtype``, which is part of the last.

    Raises:
        ConfigError: Negative ``rounds`` or damping.
        ShapeError: Blocks that do not divide the weight.
        NumericalError: The weight or H is not finite, or H not positive semi-definite.

    Source: Kim et al. 2024 (SqueezeLLM), arXiv:2306.07629, section 4.1, weighted k-means; Frantar et al.
    2022, arXiv:2210.17323, feedback; van Baalen et al. 2024 (GPTVQ), arXiv:2402.15319, section 3.3, update
    of the entries.
    """
    if rounds < 0:
        raise ConfigError(f"rounds must be >= 0, got {rounds}; 2 or 3 are enough")
    check_finite(weight, "weight")
    problem, used = _problem(weight, H, damping)
    tables, merged = first_tables(weight, _given_later(problem), scheme, exact_work)
    nearest = Codebook(codes=nearest_codes(problem.W, tables), tables=tables)
    current, fed_back = _feedback(problem, tables)
    losses = [float(_row_losses(problem, nearest).sum()), float(fed_back.sum())]
    for _ in range(rounds):
        current, rows = _round(problem, current)
        losses.append(float(rows.sum()))
        if losses[-1] > (1 - ENOUGH) * losses[-2]:
            break
    if rounds:
        current, rows = _rounded_entries(problem, current, scheme.value_dtype)
        losses[-1] = float(rows.sum())
    loss = layer_loss(problem.W - decode(current), H)
    return CodebookFit(
        codebook=current, losses=tuple(losses), loss=loss, damping=used, merged=merged
    )


def refit_entries(
    weight: Float64[Tensor, "g m n"],
    H: Float64[Tensor, "g n n"],
    codebook: Codebook,
    tolerance: float = SOLVED,
) -> Codebook:
    """Least squares over all entries, codes as they are: the minimum of tr(D H D^T).

    Args:
        weight: What to approach; read only.
        H: Second moment or covariance of the input; read only.
        codebook: Where to begin; entries without codes stay as they are. Read only.
        tolerance: Of the gradient, relative to where it began; at most ``MOST_STEPS`` steps.

    Returns:
        Ascending tables, codes with them. The loss is never above that of the start.
    """
    missing = (weight - decode(codebook)) @ H
    b, c, k = codebook.tables.shape
    spread = H.diagonal(dim1=1, dim2=2).unsqueeze(1).expand_as(weight)
    curvature = gathered(codebook, spread)
    inverse = torch.where(curvature > 0, 1 / torch.where(curvature > 0, curvature, 1.0), 0.0)
    x = torch.zeros_like(curvature)
    r = gathered(codebook, missing)
    z = inverse * r
    p, power = z, (r * z).sum(1, keepdim=True)
    end = tolerance**2 * power
    for _ in range(min(c * k, MOST_STEPS)):
        pulled = gathered(codebook, looked_up(codebook.codes, p.reshape(b, c, k)) @ H)
        bend = (p * pulled).sum(1, keepdim=True)
        length = torch.where(bend > 0, power / torch.where(bend > 0, bend, 1.0), 0.0)
        x, r = x + length * p, r - length * pulled
        z = inverse * r
        before, power = power, (r * z).sum(1, keepdim=True)
        if bool((power <= end).all()):
            break
        p = z + p * torch.where(before > 0, power / torch.where(before > 0, before, 1.0), 0.0)
    return ascending(Codebook(codes=codebook.codes, tables=codebook.tables + x.reshape(b, c, k)))


def descend_codes(
    weight: Float64[Tensor, "g m n"],
    H: Float64[Tensor, "g n n"],
    codebook: Codebook,
    sweeps: int = 1,
) -> Codebook:
    """Coordinate descent on tr(D H D^T): the best entry of each column while all others stand still.

    Args:
        weight: What to approach; read only.
        H: Second moment or covariance of the input; read only.
        codebook: Where to begin; read only. Columns with H_jj = 0 stay.
        sweeps: Passes over all columns; ends sooner once a pass changes nothing.

    Returns:
        Codes whose loss, row by row, is not above that of the start.

    Source: Behdin et al. 2023 (QuantEase), arXiv:2309.01885, eq. 7, with tables in place of a grid.
    """
    for _ in range(sweeps):
        before, codebook = codebook, _descended(weight, H, codebook)[0]
        if torch.equal(before.codes, codebook.codes):
            break
    return codebook


def _descended(
    weight: Float64[Tensor, "g m n"], H: Float64[Tensor, "g n n"], codebook: Codebook
) -> tuple[Codebook, Float64[Tensor, "g m"]]:
    """After one pass over all columns, with the loss of every row."""
    codes = codebook.codes.mT.contiguous()
    columns = ColumnTables.of(codebook.tables, weight.shape)
    current = looked_up(codebook.codes, codebook.tables).mT.contiguous()
    D = weight.mT - current
    gradient = H @ D
    rows = (D * gradient).sum(1) - _descend_once_(codes, current, gradient, H, columns)
    return Codebook(codes=codes.mT.contiguous(), tables=codebook.tables), rows


def _problem(
    weight: Float[Tensor, "g m n"], H: Float[Tensor, "g n n"], damping: float
) -> tuple[_Problem, float]:
    metric = (H.to(torch.float64) + H.to(torch.float64).mT) / 2
    diagonal = metric.diagonal(dim1=1, dim2=2)
    # One order for all groups: the most active inputs first, while the others can make up for them.
    order = diagonal.mean(0).argsort(descending=True, stable=True)
    U, used = ordered_factor(metric, order.expand(len(metric), -1), damping)
    alive = diagonal > 0  # couplings of inputs without activity are rounding noise
    metric = metric * alive.unsqueeze(2) * alive.unsqueeze(1)
    ridge = (used * diagonal.mean(1)).unsqueeze(1)
    metric.diagonal(dim1=1, dim2=2).add_(ridge)
    return _Problem(W=weight.to(torch.float64), H=metric, U=U, order=order), used


def _given_later(problem: _Problem) -> Float64[Tensor, "g n"]:
    """Variance of each input given those that are rounded after it."""
    variances = torch.empty_like(problem.U[:, 0])
    variances[:, problem.order] = 1 / problem.U.diagonal(dim1=1, dim2=2).square()
    return variances


def _feedback(
    problem: _Problem, tables: Float64[Tensor, "b c k"]
) -> tuple[Codebook, Float64[Tensor, "g m"]]:
    """Nearest entries column by column, the columns still to come absorb what they can; row losses."""
    columns = ColumnTables.of(tables, problem.W.shape)
    W = problem.W.mT[:, problem.order].contiguous()
    codes = torch.empty_like(W, dtype=torch.uint8)
    places, into = problem.order.tolist(), codes.unbind(1)

    def become(j: int, column: Float64[Tensor, "g m"]) -> Float64[Tensor, "g m"]:
        found, entries = columns.nearest(places[j], column)
        into[places[j]].copy_(found)
        return entries

    rows = feed_back_(W, problem.U, become)
    # A group without any activity has the identity for a factor, and no loss.
    rows = rows * problem.H.diagonal(dim1=1, dim2=2).any(1).unsqueeze(1)
    return Codebook(codes=codes.mT.contiguous(), tables=tables), rows


def _round(problem: _Problem, codebook: Codebook) -> tuple[Codebook, Float64[Tensor, "g m"]]:
    """Entries, then codes: by descent, or anew where that is better for an output; row losses."""
    W, H = problem.W, problem.H
    fitted = refit_entries(W, H, codebook)
    descended, rows = _descended(W, H, fitted)
    anew, others = _descended(W, H, _feedback(problem, fitted.tables)[0])
    better = others < rows
    codes = torch.where(better.unsqueeze(2), anew.codes, descended.codes)
    return Codebook(codes=codes, tables=fitted.tables), torch.where(better, others, rows)


def _rounded_entries(
    problem: _Problem, codebook: Codebook, dtype: torch.dtype
) -> tuple[Codebook, Float64[Tensor, "g m"]]:
    stored = codebook.tables.to(dtype).to(torch.float64)
    return _descended(problem.W, problem.H, replace(codebook, tables=stored))


def _descend_once_(
    codes: UInt8[Tensor, "g n m"],
    current: Float64[Tensor, "g n m"],
    gradient: Float64[Tensor, "g n m"],
    H: Float64[Tensor, "g n n"],
    columns: ColumnTables,
) -> Float64[Tensor, "g m"]:
    """One pass over all columns; overwrites codes, their entries and the gradient H D.

    Returns:
        What every row gains.
    """
    gains = torch.zeros_like(current[:, 0])
    for start in range(0, H.shape[1], BLOCK):
        stop = min(start + BLOCK, H.shape[1])
        part, H_part = gradient[:, start:stop], H[:, start:stop, start:stop]
        moves = torch.empty_like(part)
        views = zip(
            codes[:, start:stop].unbind(1),
            current[:, start:stop].unbind(1),
            part.unbind(1),
            rates(H_part, torch.ones_like(H_part[:, 0, :1])).unbind(1),
            moves.unbind(1),
            H_part.unsqueeze(3).unbind(2),
            strict=True,
        )
        for i, (code, entry, slope, rate, move, pulls) in enumerate(views):
            found, new = columns.nearest(start + i, torch.addcmul(entry, slope, rate))
            move.copy_(new).sub_(entry)
            code.copy_(found)
            entry.copy_(new)
            part[:, i + 1 :].addcmul_(pulls[:, i + 1 :], move.unsqueeze(1), value=-1)
        gradient[:, stop:].baddbmm_(H[:, stop:, start:stop], moves, alpha=-1)
        # Each column's gradient stands as it was when the column moved.
        bend = H_part.diagonal(dim1=1, dim2=2).unsqueeze(2)
        gains += (moves * (2 * part - moves * bend)).sum(1)
    return gains


def _row_losses(problem: _Problem, codebook: Codebook) -> Float64[Tensor, "g m"]:
    D = problem.W - decode(codebook)
    return ((D @ problem.H) * D).sum(2)
