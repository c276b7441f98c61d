"""Factors of a second moment that may be singular: damp, and say by how much.

With fewer rows than inputs, a constant channel or a narrow layer before it, H is singular and the
closed-form solvers divide by its zeros. Adding a small multiple of the mean diagonal is the cure;
too small a multiple makes a Cholesky factorisation that "succeeds" on rounding noise, so that a
pivot below the noise counts as a failure. The damping in use is always handed back.

Axes: g groups, n inputs of a group.
"""

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from tersor.core.errors import ConfigError, NumericalError

# Dampings tried. Eight steps of ten lead from 1e-8 to 0.1; whoever needs more has no second moment.
LADDER_STEPS = 8
LADDER_FACTOR = 10.0
# Where the ladder goes on from zero: some 1e4 float64 roundings, above the noise of a sum of squares.
SMALLEST_DAMPING = 1e-12
# Up to here an inverse is solved for; halves below it would be too small for products at full speed.
DIRECT_COLUMNS = 96


def damped_cholesky(
    H: Float[Tensor, "g n n"], damping: float
) -> tuple[Float64[Tensor, "g n n"], float]:
    """Lower Cholesky factor L of H + damping * mean(diag H) * I.

    Args:
        H: Symmetric positive semi-definite matrices; read only. A group whose diagonal is all zero
            gets the identity instead.
        damping: Multiple of the mean diagonal to begin with, >= 0; ten times more after each
            failure, for all groups alike.

    Returns:
        L in float64, and the damping in use: the given one, or the first of the ladder for which
        every group has pivots above rounding noise.

    Raises:
        ConfigError: Negative damping.
        NumericalError: H is not finite, or ``LADDER_STEPS`` dampings were too small.

    Source: Frantar et al. 2022, arXiv:2210.17323, section 3.3, step 3 (fixed damping).
    """
    if not damping >= 0:
        raise ConfigError(f"damping must be >= 0, got {damping}; 0.01 is the usual choice")
    check_moment(H)
    H = H.to(torch.float64)
    diagonal = H.diagonal(dim1=1, dim2=2)
    mean, empty = diagonal.mean(1), (diagonal == 0).all(1)
    # Rounding of a factorisation grows with n and is relative to the largest entry (Higham 2002, th. 10.3).
    noise = H.shape[-1] * torch.finfo(torch.float64).eps * diagonal.amax(1)
    used = tried = damping
    good = torch.zeros_like(empty)
    for _ in range(LADDER_STEPS):
        damped = H.clone()
        shift = torch.where(empty, 1.0, used * mean)
        damped.diagonal(dim1=1, dim2=2).add_(shift.unsqueeze(1))
        L, info = torch.linalg.cholesky_ex(damped)
        pivots = L.diagonal(dim1=1, dim2=2).square().amin(1)
        good = (info == 0) & (pivots > noise)
        if bool(good.all()):
            return L, used
        tried, used = used, max(used * LADDER_FACTOR, SMALLEST_DAMPING)
    bad = int((~good).nonzero()[0, 0])
    raise NumericalError(
        f"second moment {tuple(H.shape)}, group {bad}: smallest eigenvalue "
        f"{float(torch.linalg.eigvalsh(H[bad])[0]):.3g} against a mean diagonal of {float(mean[bad]):.3g}, and no "
        f"Cholesky factor up to a damping of {tried:.3g}; wanted a positive semi-definite matrix: "
        "check that it is a sum of x x^T over all rows, or begin with a larger damping"
    )


def damped_inverse_upper(
    H: Float[Tensor, "g n n"], damping: float
) -> tuple[Float64[Tensor, "g n n"], float]:
    """Upper triangular U with U^T U = (H + damping * mean(diag H) * I)^-1.

    Row j of U is what rounding column j does to the columns after it. The inverse itself is never
    formed: with J the reversal of the order, J H J = L L^T gives U = (J L J)^-1.

    Args:
        H: As for ``damped_cholesky``.
        damping: As for ``damped_cholesky``.

    Returns:
        U in float64, and the damping in use.

    Raises:
        ConfigError: Negative damping.
        NumericalError: As ``damped_cholesky``.

    Source: Frantar et al. 2022, arXiv:2210.17323, section 3.3, step 3.
    """
    L, used = damped_cholesky(H.flip(1, 2), damping)
    upper = L.flip(1, 2)
    return _inverse_of_upper(upper), used


def _inverse_of_upper(U: Float64[Tensor, "g n n"]) -> Float64[Tensor, "g n n"]:
    """By halves: [[A, B], [0, D]]^-1 = [[A^-1, -A^-1 B D^-1], [0, D^-1]], most of it matrix products.

    As stable as substitution (Higham 2002, section 14.2), in a fifth of the time for 1,536 columns.
    """
    n = U.shape[-1]
    if n <= DIRECT_COLUMNS:
        identity = torch.eye(n, dtype=U.dtype, device=U.device)
        solved: Tensor = torch.linalg.solve_triangular(U, identity.expand_as(U), upper=True)
        return solved
    half = n // 2
    first, last = _inverse_of_upper(U[:, :half, :half]), _inverse_of_upper(U[:, half:, half:])
    inverse = torch.zeros_like(U)
    inverse[:, :half, :half], inverse[:, half:, half:] = first, last
    inverse[:, :half, half:] = (first @ U[:, :half, half:]).neg_() @ last
    return inverse


def check_moment(H: Float[Tensor, "g n n"]) -> None:
    """Raise NumericalError unless all of a second moment is finite."""
    if bool(H.sum().isfinite()):  # no sum with NaN or infinity is; one pass, and no matrix of flags
        return
    finite = H.isfinite().all(2).all(1)
    if not bool(finite.all()):
        bad = int((~finite).nonzero()[0, 0])
        raise NumericalError(
            f"second moment {tuple(H.shape)}, group {bad}: found NaN or infinity, wanted finite values; "
            "look for samples that are not finite or overflow"
        )
