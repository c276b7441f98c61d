"""Attention heads with fewer dimensions: narrower projections, and no product more than before.

Values: what a head hands to the output projection, z = sum_t a_t (W_v x_t + b_v), may pass through
E_h (d' x d) first, as that folds into W_v and b_v: attention weights are the same for all d. The output
projection then reads E z. It is the factorisation W_o ~ left blockdiag(E), in the metric of z, whatever
the attention does. Given E the projection is a regression over all heads at once; given that, one
head's E solves a linear system, in the metric of the other heads' current errors.

Queries and keys: scores q . k become (F q) . (E k). Adding a constant to all keys shifts a query's
scores alike, which softmax forgets, so that keys count centred. With queries and keys drawn apart the
mean squared change of scores is |Hq^(1/2) (I - F^T E) Hk^(1/2)|^2, which a truncated singular value
decomposition minimises. A rotation between projection and product (rotary embedding) forbids this.

Value or key heads may each serve several query heads, in neighbouring order: they share E.

Axes: h value or key heads, q query heads, d dimensions of a head, r reduced dimensions, m outputs.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from tersor.core.errors import ConfigError, ShapeError
from tersor.ops.damping import check_moment, damped_cholesky
from tersor.ops.lowrank import check_rank, principal_directions
from tersor.ops.objective import Objective
from tersor.ops.refit import layer_loss


@dataclass(frozen=True, slots=True, kw_only=True)
class ValueReduction:
    """Maps of the value heads, and the output projection that reads what they give."""

    maps: Float64[Tensor, "h r d"]  # E: fold into W_v and b_v with ``fold_head``
    weight: Float64[Tensor, "m inputs"]  # of the output projection, q r inputs
    bias: Float64[Tensor, " m"]  # to be added to that of the output projection
    error: float  # E|change of the projection's output|^2, without damping
    losses: tuple[float, ...]  # the same damped, at the start and after each sweep
    damping: float  # largest of all systems, relative, on top of the objective's


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreCurve:
    """Maps of queries and keys for all ranks: rank r keeps the first r rows."""

    queries: Float64[Tensor, "h d d"]  # F: for W_q and b_q of every query head of this key head
    keys: Float64[Tensor, "h d d"]  # E: for W_k and b_k
    errors: Float64[
        Tensor, "h errors"
    ]  # mean squared change of a score before scaling, rank 0 .. d
    damping: float  # of the keys' covariance


def reduce_values(
    objective: Objective, heads: int, rank: int, *, sharing: int = 1, sweeps: int = 2
) -> ValueReduction:
    """Give every value head ``rank`` dimensions by alternating exact least squares.

    Args:
        objective: Of the output projection: one group, its inputs are heads x d.
        heads: Query heads; a multiple of ``sharing``.
        rank: Dimensions of a head that are left, 1 .. d.
        sharing: Query heads that one value head serves (grouped-query attention), neighbours.
        sweeps: Refits of all maps, each followed by one of the projection, >= 0.

    Returns:
        Maps and projection. Their damped error never rises from sweep to sweep, begins at the principal
        outputs of each head, and is zero for rank d.

    Raises:
        ConfigError: A rank out of range, or negative ``sweeps``.
        ShapeError: More than one group, or inputs that do not split into heads.
        NumericalError: A matrix is not finite.
    """
    d = _head_size(objective, heads, sharing)
    check_rank(rank, d, "head of output projection", objective.weight)
    if rank == 0 or sweeps < 0:
        raise ConfigError(
            f"heads: rank {rank}, sweeps {sweeps}; wanted a rank of 1 or more and sweeps >= 0; to drop whole "
            "heads prune them"
        )
    metric = objective.damped()[0]
    target = objective.weight[0]
    maps = _principal_maps(target, metric, (heads // sharing, sharing, d), rank)
    weight, damping = _projection(target, metric, maps, sharing)
    losses = [_loss(objective, metric, weight @ _block(maps, sharing))]
    for _ in range(sweeps):
        maps, used = _refit_maps(target, metric, weight, maps, sharing)
        maps, spread = _orthogonal(maps, metric, sharing)
        weight, again = _projection(target, metric, maps, sharing)
        losses.append(_loss(objective, metric, weight @ _block(maps, sharing)))
        damping = max(damping, used, spread, again)
    product = (weight @ _block(maps, sharing)).unsqueeze(0)
    return ValueReduction(
        maps=maps,
        weight=weight,
        bias=objective.bias(product)[0],
        error=float(objective.error(product)),
        losses=tuple(losses),
        damping=damping,
    )


def score_curve(
    query_moment: Float[Tensor, "h d d"],
    key_covariance: Float[Tensor, "kh kd kd"],
    damping: float = 1e-6,
) -> ScoreCurve:
    """Maps of queries and keys for all ranks from one decomposition a head.

    Args:
        query_moment: E[q q^T], not centred, with bias; of query heads that share a key head the sum.
        key_covariance: Cov(k).
        damping: Of the keys, relative to the mean diagonal, >= 0; more if it is singular even so.

    Returns:
        Maps balanced so that mapped queries and keys are of one size. The caller keeps the scale of the
        scores, 1 / sqrt(d) of the original d. Errors never rise with the rank; 0 at rank d.

    Raises:
        ConfigError: Negative damping.
        ShapeError: The two differ in size.
        NumericalError: A moment is not finite or not positive semi-definite.

    Source: Lin et al. 2024 (MoDeGPT), arXiv:2408.09632, type-II modules; here as a closed form, centred.
    """
    if query_moment.shape != key_covariance.shape:
        raise ShapeError(
            f"moments of queries {tuple(query_moment.shape)} and keys {tuple(key_covariance.shape)} [head, d, d] "
            "differ; add those of query heads that share a key head"
        )
    check_moment(query_moment)
    Hq = query_moment.to(torch.float64)
    L, used = damped_cholesky(key_covariance, damping)
    values, V = torch.linalg.eigh(_symmetric(L.mT @ Hq @ L))
    squares, V = values.flip(1).clamp(min=0), V.flip(2)
    # Mapped keys V^T L^-1 k have unit variance, mapped queries V^T L^T q that of the scores.
    balance = squares.sqrt().sqrt()
    balance = torch.where(balance > 0, balance, 1.0).unsqueeze(2)
    queries = (L @ V).mT / balance
    keys = torch.linalg.solve_triangular(L.mT, V, upper=True).mT * balance
    tail = squares.flip(1).cumsum(1).flip(1)
    errors = torch.cat([tail, torch.zeros_like(tail[:, :1])], 1)
    return ScoreCurve(queries=queries, keys=keys, errors=errors, damping=used)


def output_moments(
    weight: Float[Tensor, "out inp"],
    bias: Float[Tensor, " out"],
    H: Float[Tensor, "inp inp"],
    mean: Float[Tensor, " inp"],
    heads: int,
) -> tuple[Float64[Tensor, "h d d"], Float64[Tensor, "h d d"]]:
    """Second moment and covariance of what a projection gives to each head.

    Args:
        weight: Of the projection; read only.
        bias: Of the projection; zeros where it has none.
        H: Covariance of its input.
        mean: Mean of its input.
        heads: Heads that the outputs split into.

    Raises:
        ShapeError: The outputs do not split into heads.
    """
    outputs = weight.shape[0]
    if heads < 1 or outputs % heads:
        raise ShapeError(f"projection of {outputs} outputs does not split into {heads} heads")
    W = weight.to(torch.float64).reshape(heads, outputs // heads, -1)
    covariance = W @ H.to(torch.float64) @ W.mT
    level = (W @ mean.to(torch.float64)) + bias.to(torch.float64).reshape(heads, -1)
    return covariance + level.unsqueeze(2) * level.unsqueeze(1), covariance


def fold_head(
    maps: Float64[Tensor, "h r d"],
    weight: Float[Tensor, "out inp"],
    bias: Float[Tensor, " out"] | None,
) -> tuple[Float64[Tensor, "hr inp"], Float64[Tensor, " hr"] | None]:
    """Weight and bias of a narrower projection: each head's map times its rows.

    Args:
        maps: One a head of the projection; repeat shared ones.
        weight: Of the projection, heads x d rows; read only.
        bias: Of the projection, or None.

    Raises:
        ShapeError: The rows are not heads x d.
    """
    heads, _, d = maps.shape
    if weight.shape[0] != heads * d:
        raise ShapeError(
            f"projection {tuple(weight.shape)}: wanted {heads} heads of {d} rows as the maps {tuple(maps.shape)}; "
            "repeat the maps of shared heads"
        )
    folded = (maps @ weight.to(torch.float64).reshape(heads, d, -1)).flatten(0, 1)
    if bias is None:
        return folded, None
    return folded, (maps @ bias.to(torch.float64).reshape(heads, d, 1)).flatten()


def _head_size(objective: Objective, heads: int, sharing: int) -> int:
    groups, _, inputs = objective.weight.shape
    if groups != 1 or min(heads, sharing) < 1 or heads % sharing or inputs % heads:
        raise ShapeError(
            f"output projection {tuple(objective.weight.shape)} [group, out, in]: wanted one group, inputs that split "
            f"into {heads} query heads, and these into sets of {sharing}"
        )
    return inputs // heads


def _principal_maps(
    target: Float64[Tensor, "m n"],
    metric: Float64[Tensor, "n n"],
    sizes: tuple[int, int, int],
    rank: int,
) -> Float64[Tensor, "h r d"]:
    """Principal outputs of each head by itself; heads that share count with their mean covariance."""
    h, sharing, d = sizes
    weight = target.reshape(-1, h, sharing, d).permute(1, 2, 0, 3).flatten(1, 2)
    covariance = _own_covariance(metric, h, sharing)
    maps = (principal_directions(weight, covariance).mT @ weight)[:, :rank]
    missing = rank - maps.shape[1]
    if missing > 0:  # fewer outputs than dimensions: what is left over maps to nothing
        maps = torch.cat([maps, maps.new_zeros(h, missing, d)], 1)
    size = ((maps @ covariance) * maps).sum(2).clamp(min=0).sqrt()
    return maps / torch.where(size > 0, size, 1.0).unsqueeze(2)


def _own_covariance(
    metric: Float64[Tensor, "n n"], heads: int, sharing: int
) -> Float64[Tensor, "h d d"]:
    d = len(metric) // (heads * sharing)
    blocks = metric.reshape(heads * sharing, d, heads * sharing, d)
    own = blocks.diagonal(dim1=0, dim2=2).movedim(2, 0)
    return own.reshape(heads, sharing, d, d).mean(1)


def _block(maps: Float64[Tensor, "h r d"], sharing: int) -> Float64[Tensor, "qr qd"]:
    whole: Tensor = torch.block_diag(*maps.repeat_interleave(sharing, 0))
    return whole


def _projection(
    target: Float64[Tensor, "m n"],
    metric: Float64[Tensor, "n n"],
    maps: Float64[Tensor, "h r d"],
    sharing: int,
) -> tuple[Float64[Tensor, "m qr"], float]:
    """Regression of the target on all mapped heads together."""
    half = _block(maps, sharing) @ metric
    gram = half @ _block(maps, sharing).mT
    L, used = damped_cholesky(_symmetric(gram).unsqueeze(0), 0.0)
    return torch.cholesky_solve(half @ target.mT, L[0]).mT, used


def _refit_maps(
    target: Float64[Tensor, "m n"],
    metric: Float64[Tensor, "n n"],
    weight: Float64[Tensor, "m qr"],
    maps: Float64[Tensor, "h r d"],
    sharing: int,
) -> tuple[Float64[Tensor, "h r d"], float]:
    """One head after the other, each exactly, given all others: r d unknowns."""
    h, rank, d = maps.shape
    maps, damping = maps.clone(), 0.0
    missing = target - weight @ _block(maps, sharing)
    lefts = weight.reshape(-1, h, sharing, rank)
    for head in range(h):
        own = slice(head * sharing * d, (head + 1) * sharing * d)
        left = lefts[:, head]
        gradient = (missing @ metric[:, own]).reshape(-1, sharing, d)
        side = torch.einsum("mkr,mkd->rd", left, gradient).reshape(1, -1, 1)
        pairs = torch.einsum("mkr,mls->klrs", left, left)
        blocks = metric[own, own].reshape(sharing, d, sharing, d)
        system = torch.einsum("klrs,kdle->rdse", pairs, blocks).reshape(1, rank * d, -1)
        L, used = damped_cholesky(_symmetric(system), 0.0)
        move = torch.cholesky_solve(side, L).reshape(rank, d)
        maps[head] += move
        missing[:, own] -= torch.einsum("mkr,rd->mkd", left, move).flatten(1)
        damping = max(damping, used)
    return maps, damping


def _orthogonal(
    maps: Float64[Tensor, "h r d"], metric: Float64[Tensor, "n n"], sharing: int
) -> tuple[Float64[Tensor, "h r d"], float]:
    """The same span with uncorrelated rows of unit variance, for the sake of the next systems."""
    covariance = _own_covariance(metric, len(maps), sharing)
    L, used = damped_cholesky(_symmetric(maps @ covariance @ maps.mT), 0.0)
    return torch.linalg.solve_triangular(L, maps, upper=False), used


def _loss(
    objective: Objective, metric: Float64[Tensor, "n n"], product: Float64[Tensor, "m n"]
) -> float:
    lost = layer_loss((objective.weight[0] - product).unsqueeze(0), metric.unsqueeze(0))
    return float((objective.floor + lost).sum())


def _symmetric(matrix: Float64[Tensor, "*b n n"]) -> Float64[Tensor, "*b n n"]:
    return (matrix + matrix.mT) / 2
