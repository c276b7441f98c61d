"""A layer on the inputs that were kept: least squares, which takes over what the removed ones did.

Axes: g groups, m outputs and n inputs of a group, k kept inputs of a group, c units and s columns
of a unit in a group.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from tersor.core.errors import ShapeError
from tersor.ops.damping import damped_cholesky
from tersor.ops.elimination import all_but, factor
from tersor.ops.moments import Moments, centred
from tersor.ops.refit import layer_loss
from tersor.ops.remembered import remembered


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """A layer on the inputs that were kept."""

    weight: Float64[Tensor, "g m k"]
    bias: Float64[Tensor, "g m"]
    loss: Float64[Tensor, " g"]  # mean squared change of the output, summed over outputs
    damped_loss: Float64[Tensor, " g"]  # in the damped metric: what an order adds up
    damping: float  # in use


@remembered
def damped(H: Float[Tensor, "g n n"], damping: float) -> tuple[Float64[Tensor, "g n n"], float]:
    """H + damping * mean(diag H) * I, positive definite; the identity for a group of zeros.

    Returns:
        The damped moment, which is read only, as whoever asks again gets it, too; and the damping in
        use: more than given where that was too little.

    Raises:
        ConfigError: Negative damping.
        NumericalError: As ``damping.damped_cholesky``.
    """
    _, used = damped_cholesky(H, damping)
    metric = H.to(torch.float64).clone()
    diagonal = metric.diagonal(dim1=1, dim2=2)
    empty = (diagonal == 0).all(1)
    diagonal.add_(torch.where(empty, 1.0, used * diagonal.mean(1)).unsqueeze(1))
    return metric, used


def kept_columns(
    columns: Int64[Tensor, "g c s"], inputs: int, kept: Int64[Tensor, " k"]
) -> Int64[Tensor, "g h"]:
    """Columns that stay where only these units are kept, ascending: theirs and those of no unit.

    Args:
        columns: As of a ``Consumer``; read only.
        inputs: n, inputs of a group.
        kept: Units that are kept, in any order; read only.

    Raises:
        ShapeError: Columns or units that do not fit, or groups that would keep unequally many.
    """
    check_columns(columns, inputs)
    check_units(kept, columns.shape[1])
    gone = columns[:, all_but(kept, columns.shape[1])].flatten(1)
    stays = torch.ones(len(columns), inputs + 1, dtype=torch.bool, device=columns.device)
    stays.scatter_(1, gone.where(gone >= 0, inputs), value=False)
    counts = stays[:, :inputs].sum(1)
    if bool((counts != counts[0]).any()):
        raise ShapeError(
            f"groups would keep {counts.tolist()} inputs each, wanted equally many; "
            "keep units that have as many columns in every group"
        )
    return stays[:, :inputs].nonzero()[:, 1].reshape(len(columns), -1)


def refit_columns(
    weight: Float[Tensor, "g m n"], H: Float[Tensor, "g n n"], kept: Int64[Tensor, "g k"]
) -> tuple[Float64[Tensor, "g m k"], Float64[Tensor, " g"]]:
    """Least-squares weight on the kept columns K, which takes over what the removed ones R did.

    W'_K = W H_:K (H_KK)^-1 = W_K + W_R H_RK (H_KK)^-1.

    Args:
        weight: W; read only.
        H: Second moment, positive definite; damping in it is a ridge towards W_K; read only.
        kept: Columns that are kept, each once; k may be 0.

    Returns:
        W'_K, and its loss tr(D H D^T): what the scores of any order of the removals add up to.

    Raises:
        ShapeError: Columns that do not fit.
        NumericalError: H is not positive definite.

    Source: Hassibi and Stork 1993, the limit of all updates; Meng et al. 2024, arXiv:2403.12983, eq. 4.
    """
    check_columns(kept.unsqueeze(2), weight.shape[2])
    if bool((kept < 0).any()):
        raise ShapeError(f"kept columns {kept.tolist()}: found a negative one, wanted 0..n-1")
    W, metric = weight.to(torch.float64), H.to(torch.float64)
    groups = torch.arange(len(W), device=W.device)[:, None, None]
    rows, columns = kept.unsqueeze(2), kept.unsqueeze(1)
    removed = W.scatter(2, columns.expand(-1, W.shape[1], -1), 0.0)
    L = factor(metric[groups, rows, columns])
    moved = removed @ metric.gather(2, columns.expand(-1, W.shape[2], -1))
    moved = torch.cholesky_solve(moved.mT, L).mT
    delta = removed.scatter(2, columns.expand_as(moved), -moved)
    return W.gather(2, columns.expand_as(moved)) + moved, layer_loss(delta, metric)


def refit_kept(
    weight: Float[Tensor, "g m n"],
    bias: Float[Tensor, "g m"] | None,
    moments: Moments,
    kept: Int64[Tensor, "g k"],
    damping: float = 1e-4,
) -> Kept:
    """Least-squares weight and bias on the kept inputs of a layer.

    Args:
        weight: W on all inputs; after drift, the weight of ``refit``. Read only.
        bias: Its bias; None: zero.
        moments: Of the input xh as it is now, all columns; what they hold of x and d is not looked at.
        kept: Columns that are kept.
        damping: Multiple of the mean diagonal over all inputs; a ridge towards W.

    Returns:
        The weight, the bias with which the mean of the output stays, and the losses.

    Raises:
        ConfigError: Negative damping.
        ShapeError: Columns or moments that do not fit, or no rows.
        NumericalError: The moments are not finite or not positive semi-definite.
    """
    if moments.x.shape != weight[:, 0].shape:
        raise ShapeError(
            f"weight {tuple(weight.shape)} [group, out, in] and moments `x` {tuple(moments.x.shape)} "
            "differ; collect the moments at this layer's input, unfolded for a convolution"
        )
    covariance, mean = centred(moments)
    metric, used = damped(covariance, damping)
    fitted, damped_loss = refit_columns(weight, metric, kept)
    W = weight.to(torch.float64)
    columns = kept.unsqueeze(1).expand_as(fitted)
    delta = W - torch.zeros_like(W).scatter(2, columns, fitted)
    shift = (delta @ mean.unsqueeze(2)).squeeze(2)
    return Kept(
        weight=fitted,
        bias=shift if bias is None else shift + bias,
        loss=layer_loss(delta, covariance),
        damped_loss=damped_loss,
        damping=used,
    )


def check_columns(columns: Int64[Tensor, "g c s"], inputs: int) -> None:
    """Raise ShapeError unless columns are inputs of their group, each given once, or -1."""
    flat = columns.flatten(1)
    if flat.numel() and not -1 <= int(flat.amin()) <= int(flat.amax()) < inputs:
        raise ShapeError(
            f"columns run from {int(flat.amin())} to {int(flat.amax())}, wanted -1..{inputs - 1}: "
            "the inputs of one group, -1 for none"
        )
    for group, row in enumerate(flat):
        used = row[row >= 0]
        values, counts = used.unique(return_counts=True)
        if len(values) != len(used):
            raise ShapeError(
                f"group {group}: column {int(values[counts.argmax()])} is given {int(counts.amax())} times, "
                "wanted once; an input belongs to one unit"
            )


def check_units(kept: Int64[Tensor, " k"], n_units: int) -> None:
    """Raise ShapeError unless these are units, each given once."""
    if len(kept.unique()) != len(kept) or bool(((kept < 0) | (kept >= n_units)).any()):
        raise ShapeError(f"kept units {kept.tolist()}: wanted each once, from 0 to {n_units - 1}")
