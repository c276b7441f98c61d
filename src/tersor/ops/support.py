"""The exact weight on a support: least squares for every output, on the inputs that it kept.

An output with kept inputs K and weight w gets w'_K = (H_KK)^-1 (H w)_K, where the gradient of its
loss is zero. Outputs of one pattern share a factorisation; else those of like sizes are factored in
batches, or, where that is dearer, all outputs are solved together by conjugate gradients. Those of a
coarse tolerance run in float32, at twice the speed; the gradient that is left is taken in float64, and
outputs above the tolerance go on in float64.

Axes: g groups, m outputs and n inputs of a group, p patterns, r rows, k kept inputs.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from tersor.core.errors import ConfigError
from tersor.ops.elimination import factor
from tersor.ops.grids import check_finite
from tersor.ops.kept import damped

# Float64 values of the matrices of one batch: 128 MiB.
BATCH_VALUES = 2**24
# Conjugate gradients at the default tolerance took 40 to 200 steps on layers of MiniLM; a step costs
# m n^2 products, a factorisation k^3 / 3 an output.
USUAL_STEPS = 100
TOLERANCE = 1e-6
MOST_STEPS = 1000
# Gradients of float32 steps drift from the true ones by some 1e-6 of what they began with, times the
# root of the condition number: far below this for a usual damping, and checked in any case.
SINGLE_TOLERANCE = 1e-4
# Outputs that are solved leave the products once they are this share: each time all others are copied.
SOLVED_SHARE = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Supported:
    """Weights on a support."""

    weight: Float64[Tensor, "g m n"]  # zero outside of the support
    loss: Float64[Tensor, " g"]  # tr(D H D^T) without damping
    damping: float  # in use
    steps: int  # of conjugate gradients; 0: solved directly
    single_steps: int  # how many of them were in float32, before those in float64 if any
    residual: float  # largest |gradient on the support| / |(H w)_K| of an output, with damping


def refit_support(  # noqa: PLR0913 - a layer, its support, and the knobs of two ways to solve it
    weight: Float[Tensor, "g m n"],
    H: Float[Tensor, "g n n"],
    keep: Bool[Tensor, "g m n"],
    *,
    damping: float = 1e-4,
    direct: bool | None = None,
    tolerance: float = TOLERANCE,
    start: Float[Tensor, "g m n"] | None = None,
) -> Supported:
    """Least-squares weight on a support.

    Args:
        weight: Weight on all inputs; read only.
        H: Second moment or covariance of the input; read only.
        keep: The support; read only.
        damping: Multiple of the mean diagonal, >= 0; a ridge towards ``weight``.
        direct: Factor (True), or use conjugate gradients (False); None: what takes fewer products.
        tolerance: Of conjugate gradients, for the ``residual``, > 0; from ``SINGLE_TOLERANCE`` on they
            begin in float32.
        start: Where conjugate gradients begin, on the support; None: at ``weight``. Read only.

    Returns:
        The weight, with how far it is from its normal equations: some roundings times the condition
        number if direct, below ``tolerance`` after conjugate gradients unless ``steps`` is
        ``MOST_STEPS``.

    Raises:
        ConfigError: Negative damping or a tolerance that is not positive.
        NumericalError: The weight or H is not finite, or H not positive semi-definite.

    Source: Hassibi and Stork 1993, the limit of all updates; Meng et al. 2024 (ALPS), arXiv:2406.07831, eq. 10.
    """
    if not tolerance > 0:
        raise ConfigError(f"tolerance must be > 0, got {tolerance}; {TOLERANCE} is a good choice")
    check_finite(weight, "weight")
    metric, used = damped(H, damping)
    W = weight.to(torch.float64)
    pulled = W @ metric
    bound = (pulled * keep).norm(dim=2)
    if direct is None:
        direct = _is_direct_cheaper(keep)
    steps = single_steps = 0
    if direct:
        new = torch.stack([_solve(w, h, k) for w, h, k in zip(W, metric, keep, strict=True)])
    else:
        new = (W if start is None else start.to(torch.float64)) * keep
        if tolerance >= SINGLE_TOLERANCE:
            aim = tolerance * (1 - SINGLE_TOLERANCE) * bound
            single_steps = _descend_(new, W, metric, keep, aim.float())
    slope = pulled - new @ metric
    if not direct and bool(((slope * keep).norm(dim=2) > tolerance * bound).any()):
        steps = _descend_(new, W, metric, keep, tolerance * bound)
        slope = pulled - new @ metric
    return Supported(
        weight=new,
        loss=_loss(W - new, slope, metric, H),
        damping=used,
        steps=0 if direct else max(1, steps + single_steps),
        single_steps=single_steps,
        residual=_residual(slope * keep, bound),
    )


def _is_direct_cheaper(keep: Bool[Tensor, "g m n"]) -> bool:
    groups, outputs, n = keep.shape
    direct = float(keep.sum(2).to(torch.float64).pow(3).sum()) / 3
    return direct <= USUAL_STEPS * float(groups * outputs * n * n)


def _loss(D: Tensor, slope: Tensor, metric: Tensor, H: Tensor) -> Float64[Tensor, " g"]:
    """tr(D H D^T) of the gradient in the damped metric, which saves the product with H."""
    ridge = (metric.diagonal(dim1=1, dim2=2) - H.diagonal(dim1=1, dim2=2)).mean(1)
    return (D * (slope - D * ridge.reshape(-1, 1, 1))).sum((1, 2))


def _residual(slope: Tensor, bound: Tensor) -> float:
    left = slope.norm(dim=2)
    relative = torch.where(bound > 0, left / bound, left)
    return float(relative.max()) if relative.numel() else 0.0


def _solve(
    W: Float64[Tensor, "m n"], H: Float64[Tensor, "n n"], keep: Bool[Tensor, "m n"]
) -> Float64[Tensor, "m n"]:
    patterns, owner = keep.unique(dim=0, return_inverse=True)
    new = torch.zeros_like(W)
    # What the removed weights did, to be taken over: the kept ones need not be solved for anew.
    moved = (W * ~keep) @ H
    if len(patterns) <= len(W) // 2:
        for index, pattern in enumerate(patterns):
            rows, columns = (owner == index).nonzero().squeeze(1), pattern.nonzero().squeeze(1)
            if len(columns):
                L = factor(H[columns][:, columns])
                part = torch.cholesky_solve(moved[rows][:, columns].mT, L).mT
                new[rows.unsqueeze(1), columns] = W[rows][:, columns] + part
        return new
    counts = keep.sum(1)
    order = counts.argsort(descending=True, stable=True)
    start = 0
    while start < len(order):
        size = max(1, int(counts[order[start]]))
        rows = order[start : start + max(1, BATCH_VALUES // size**2)]
        _solve_batch_(new, W, moved, H, (rows, keep[rows]))
        start += len(rows)
    return new


def _solve_batch_(
    new: Float64[Tensor, "m n"],
    W: Float64[Tensor, "m n"],
    moved: Float64[Tensor, "m n"],
    H: Float64[Tensor, "n n"],
    part: tuple[Int64[Tensor, " r"], Bool[Tensor, "r n"]],
) -> None:
    """Rows of like counts, filled up to the largest with inputs that nothing is coupled to."""
    rows, keep = part
    size = int(keep.sum(1).max())
    if not size:
        return
    columns = (~keep).to(torch.int8).argsort(dim=1, stable=True)[:, :size]
    real = keep.gather(1, columns)
    matrices = H[columns.unsqueeze(2), columns.unsqueeze(1)]
    matrices.mul_(real.unsqueeze(2)).mul_(real.unsqueeze(1))
    matrices.diagonal(dim1=1, dim2=2).add_(~real)
    rhs = moved[rows].gather(1, columns) * real
    shift = torch.cholesky_solve(rhs.unsqueeze(2), factor(matrices)).squeeze(2)
    values = (W[rows].gather(1, columns) + shift) * real
    new[rows] = torch.zeros_like(W[rows]).scatter_(1, columns, values)


def _descend_(
    new: Float64[Tensor, "g m n"],
    W: Float64[Tensor, "g m n"],
    H: Float64[Tensor, "g n n"],
    keep: Bool[Tensor, "g m n"],
    bound: Float[Tensor, "g m"],
) -> int:
    """Conjugate gradients for all outputs at once, preconditioned by the diagonal, in the bound's type.

    Overwrites the weight that they begin with, and returns their steps. Outputs are solved once the
    gradient on their support is within the bound.
    """
    H, mask = H.to(bound.dtype), keep.to(bound.dtype)
    diagonal = H.diagonal(dim1=1, dim2=2).unsqueeze(1)
    residual = ((W - new).to(bound.dtype) @ H).mul_(mask)
    ahead = residual / diagonal
    product = (residual * ahead).sum(2)
    moved, rows = torch.zeros_like(residual), torch.arange(W.shape[1], device=W.device)
    steps = 0
    while steps < MOST_STEPS:
        is_open = residual.norm(dim=2) > bound
        if not bool(is_open.any()):
            break
        if len(W) == 1 and float(is_open.sum()) <= (1 - SOLVED_SHARE) * len(rows):
            new[:, rows] += moved
            left = is_open[0]
            rows, moved = rows[left], torch.zeros_like(moved[:, left])
            residual, ahead, mask = residual[:, left], ahead[:, left], mask[:, left]
            product, bound = product[:, left], bound[:, left]
        pulled = (ahead @ H).mul_(mask)
        curvature = (ahead * pulled).sum(2)
        length = torch.where(curvature > 0, product / curvature, 0.0).unsqueeze(2)
        moved.addcmul_(length, ahead)
        residual.addcmul_(length, pulled, value=-1)
        scaled = residual / diagonal
        fresh = (residual * scaled).sum(2)
        ahead = scaled.addcmul_(torch.where(product > 0, fresh / product, 0.0).unsqueeze(2), ahead)
        product = fresh
        steps += 1
    new[:, rows] += moved
    return steps
