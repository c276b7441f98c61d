"""A weight as a product of two thin ones, the best for the layer's output, at every rank at once.

Among all W' of rank r the error tr(D H D^T), D = W - W', is least for W' = U_r U_r^T W, U_r the first
principal directions of the *outputs*: the eigenvectors of W H W^T. That is the same as whitening the
inputs, W L = U S V^T with H = L L^T, and keeping r singular values (W' = U_r S_r V_r^T L^-1), but it
divides by nothing, works for a singular H, and its left factor is orthonormal. Ranks are nested, so
that one decomposition holds the whole curve of errors. Where m > n, W = Q R first, and R takes W's place.

Weights that read the same input (q, k, v; gate, up) share their right factor if they are stacked
along their outputs: one curve, and the rows of the left factor belong to them in that order.

Axes: g groups, m outputs and n inputs of a group, k = min(m, n) directions, r rank.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float64
from torch import Tensor

from tersor.core.errors import ConfigError
from tersor.ops.damping import damped_cholesky
from tersor.ops.objective import Objective
from tersor.ops.refit import layer_loss
from tersor.ops.remembered import remembered

Form = Literal["outputs", "inputs"]
Latent = Literal["orthonormal", "white"]
# Rounds one factor, given the metric that its error is seen in (rows do not interact).
RoundFactor = Callable[[Float64[Tensor, "g a b"], Float64[Tensor, "g b b"]], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class RankCurve:
    """Best factors of all ranks: rank r keeps the first r columns and rows."""

    objective: Objective
    basis: Float64[Tensor, "g m k"]  # U: orthonormal columns, the most important first
    coefficients: Float64[Tensor, "g k n"]  # U^T W*
    errors: Float64[Tensor, "g ranks"]  # E of rank 0 .. k, summed over outputs, without damping
    damping: float  # of the metric that chose the directions


@dataclass(frozen=True, slots=True, kw_only=True)
class Factors:
    """W' = left right, and what to add to the layer's bias."""

    left: Float64[Tensor, "g m r"]
    right: Float64[Tensor, "g r n"]
    bias: Float64[Tensor, "g m"]
    error: Float64[Tensor, " g"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FactorFit:
    """The best pair of rounded factors, and how all pairs went."""

    factors: Factors
    losses: tuple[float, ...]  # damped, over all groups, of each pair of rounded factors
    step: int  # the one that is kept
    damping: float  # of the factors' own products, relative; above 0 where a factor lost rank


def rank_curve(objective: Objective, form: Form = "outputs") -> RankCurve:
    """Decompose once for all ranks.

    Args:
        objective: Of the layer. Several weights of one input: stack them along their outputs.
        form: "outputs" is an eigendecomposition of W H W^T; "inputs" a singular value decomposition of
            W L. Both give the same factors; the second does not square the singular values, resolves
            errors below 1e-16 of the output's variance, takes longer, and damps H until it has a factor.

    Returns:
        Orthonormal directions and the error of every rank. Of the damped error no factors of that rank
        have less. Without drift before the layer the errors never rise with the rank.

    Raises:
        NumericalError: H is not positive semi-definite ("inputs").

    Source: Chen et al. 2021 (DRONE), theorem 1; Wang et al. 2024 (SVD-LLM), arXiv:2403.07378, section 3.
    """
    basis, A, errors, used = _decomposed(objective, form)
    return RankCurve(objective=objective, basis=basis, coefficients=A, errors=errors, damping=used)


@remembered  # every rank of a layer is cut from the same curve
def _decomposed(
    objective: Objective, form: Form
) -> tuple[Float64[Tensor, "g m k"], Float64[Tensor, "g k n"], Float64[Tensor, "g ranks"], float]:
    """Basis, coefficients, errors and damping of a curve."""
    W = objective.weight
    if form == "outputs":
        U, used = principal_directions(W, objective.damped()), objective.damping
    else:
        L, used = damped_cholesky(objective.H, objective.damping)
        U = torch.linalg.svd(W @ L, full_matrices=False).U
    A = U.mT @ W
    # D = sum of u_i a_i over what is left out, with orthonormal u_i: the error is a sum over i.
    # H is a difference of large sums where means are large: its rounding may leave a negative square.
    lost = ((A @ objective.H) * A).sum(2).clamp(min=0)
    lost = lost + 2 * ((U.mT @ objective.residual) * A).sum(2)
    tail = lost.flip(1).cumsum(1).flip(1)
    errors = objective.floor.unsqueeze(1) + torch.cat([tail, torch.zeros_like(tail[:, :1])], 1)
    return U, A, errors, used


def principal_directions(
    weight: Float64[Tensor, "g m n"], H: Float64[Tensor, "g n n"]
) -> Float64[Tensor, "g m k"]:
    """Orthonormal eigenvectors of W H W^T within the span of W, k = min(m, n), largest value first."""
    if weight.shape[1] <= weight.shape[2]:
        return _eigenvectors(weight @ H @ weight.mT)
    Q, R = torch.linalg.qr(weight)
    directions: Tensor = Q @ _eigenvectors(R @ H @ R.mT)
    return directions


def factors(curve: RankCurve, rank: int, latent: Latent = "orthonormal") -> Factors:
    """The factors of one rank.

    Args:
        curve: Of the layer.
        rank: 0 .. k.
        latent: "orthonormal": the left factor has orthonormal columns, so that rounding the right one
            costs no more than it would cost the layer. "white": what passes between the factors has unit
            variance in every channel (of the damped metric), as one step for all of them needs it.

    Returns:
        Factors whose product does not depend on ``latent``, with the best bias shift.

    Raises:
        ConfigError: The rank is not within 0 .. k.
    """
    check_rank(rank, curve.basis.shape[2], "weight", curve.objective.weight)
    left, right = curve.basis[:, :, :rank], curve.coefficients[:, :rank]
    bias = curve.objective.bias(left @ right)
    if latent == "white":
        deviation = ((right @ curve.objective.damped()) * right).sum(2).clamp(min=0).sqrt()
        deviation = torch.where(deviation > 0, deviation, 1.0)
        left, right = left * deviation.unsqueeze(1), right / deviation.unsqueeze(2)
    return Factors(left=left, right=right, bias=bias, error=curve.errors[:, rank])


def refit_left(
    objective: Objective, left: Float64[Tensor, "g m r"], right: Float64[Tensor, "g r n"]
) -> tuple[Float64[Tensor, "g m r"], float]:
    """The best left factor for a fixed right one: regression of W* xh on right xh.

    Args:
        objective: Of the layer.
        left: Where to begin; what a right factor of lower rank leaves open stays as it is. Read only.
        right: Stays as it is.

    Returns:
        The factor, and the damping that ``right H right^T`` needed (0 for a full rank).

    Raises:
        NumericalError: A factor is not finite.
    """
    products = right @ objective.damped()
    L, used = damped_cholesky(products @ right.mT, 0.0)
    missing = (objective.weight - left @ right) @ products.mT
    return left + torch.cholesky_solve(missing.mT, L).mT, used


def refit_right(
    objective: Objective, left: Float64[Tensor, "g m r"], right: Float64[Tensor, "g r n"]
) -> tuple[Float64[Tensor, "g r n"], float]:
    """The best right factor for a fixed left one: (B^T B)^-1 B^T W*, whatever H is.

    Args:
        objective: Of the layer.
        left: Stays as it is.
        right: Where to begin; what a left factor of lower rank leaves open stays as it is. Read only.

    Returns:
        The factor, and the damping that ``left^T left`` needed (0 for a full rank).

    Raises:
        NumericalError: A factor is not finite.
    """
    L, used = damped_cholesky(left.mT @ left, 0.0)
    missing = left.mT @ (objective.weight - left @ right)
    return right + torch.cholesky_solve(missing, L), used


def refit_rounded(
    objective: Objective,
    start: Factors,
    *,
    round_left: RoundFactor,
    round_right: RoundFactor,
    sweeps: int = 2,
) -> FactorFit:
    """Round both factors, each after an exact refit to the other one as rounded.

    Args:
        objective: Of the layer.
        start: Factors to begin with; with latent "orthonormal" rounding the right one costs least.
        round_left: Called with the left factor and right H right^T.
        round_right: Called with the right factor and H. Its error counts through left^T left, which is
            near the identity for an orthonormal left factor.
        sweeps: Times that both are rounded, >= 1.

    Returns:
        The pair with the least damped error of all that were rounded on both sides.

    Raises:
        ConfigError: ``sweeps`` below 1.
        NumericalError: A rounded factor is not finite.
    """
    if sweeps < 1:
        raise ConfigError(f"sweeps must be at least 1, got {sweeps}; 2 are enough")
    metric, damping = objective.damped(), 0.0
    pairs: list[tuple[Tensor, Tensor]] = []
    left, right = start.left, round_right(start.right, metric).to(torch.float64)
    for sweep in range(sweeps):
        if sweep:
            right, used = refit_right(objective, left, right)
            right, damping = round_right(right, metric).to(torch.float64), max(damping, used)
        left, used = refit_left(objective, left, right)
        damping = max(damping, used)
        left = round_left(left, right @ metric @ right.mT).to(torch.float64)
        pairs.append((left, right))
    losses = [float(layer_loss(objective.weight - a @ b, metric).sum()) for a, b in pairs]
    best = min(range(sweeps), key=losses.__getitem__)
    left, right = pairs[best]
    product = left @ right
    found = Factors(
        left=left, right=right, bias=objective.bias(product), error=objective.error(product)
    )
    return FactorFit(factors=found, losses=tuple(losses), step=best, damping=damping)


def check_rank(rank: int, limit: int, what: str, weight: Tensor) -> None:
    """Raise ConfigError unless 0 <= rank <= limit."""
    if not 0 <= rank <= limit:
        raise ConfigError(
            f"{what} {tuple(weight.shape)} [group, out, in]: rank {rank}, wanted 0..{limit}; "
            "above it nothing is left to gain"
        )


def _eigenvectors(covariance: Float64[Tensor, "g k k"]) -> Float64[Tensor, "g k k"]:
    """Largest eigenvalue first; of the symmetric part."""
    vectors: Tensor = torch.linalg.eigh((covariance + covariance.mT) / 2).eigenvectors
    return vectors.flip(2)
