"""The support of a sparse weight by ADMM: the whole layer's problem, not one column after the other.

min tr(D H D^T) over weights of a pattern is split into a least squares, solved for all outputs by
one eigendecomposition of H, and a projection onto the pattern, tied by a multiplier whose penalty rho
grows while the support still changes. Above 60 % zeros this finds better supports than elimination.
Inputs are scaled to H_jj = 1 first, so that the projection compares like with like.

The loop only has to choose a support, and runs in float32; the weights come from ``support``.

Axes: g groups, m outputs and n inputs of a group. Inside, weights lie transposed, [g, n, m].
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tersor.core.errors import ConfigError
from tersor.ops.grids import check_finite
from tersor.ops.kept import damped
from tersor.ops.sparsity import NofM, Pattern, best_mask, check_splits

# The schedule of the paper's code: how fast rho grows while more than a share of the support changes.
RHO, UPDATE_EVERY = 0.1, 3
GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))


@dataclass(frozen=True, slots=True, kw_only=True)
class Support:
    """A support, and how it was found."""

    keep: Bool[Tensor, "g m n"]
    steps: int  # of ADMM
    is_settled: bool  # the support had stopped changing
    damping: float  # in use


def choose_support(
    weight: Float[Tensor, "g m n"],
    H: Float[Tensor, "g n n"],
    pattern: Pattern,
    *,
    damping: float = 0.01,
    steps: int = 300,
) -> Support:
    """Choose which weights to keep.

    Args:
        weight: Weight; read only.
        H: Second moment or covariance of the input; read only.
        pattern: What to keep.
        damping: Multiple of the mean diagonal of H, >= 0.
        steps: At most, >= 1; ends sooner once the support stands still. A step costs 2 m n^2 products.

    Returns:
        The support. Inputs that are never active keep no weight unless the pattern has room to spare.

    Raises:
        ConfigError: Negative damping or ``steps`` below 1.
        ShapeError: Inputs that do not split into the groups of the pattern.
        NumericalError: The weight or H is not finite, or H not positive semi-definite.

    Source: Meng et al. 2024 (ALPS), arXiv:2406.07831, algorithm 1 and section 3.2.
    """
    if steps < 1:
        raise ConfigError(f"steps must be at least 1, got {steps}; 300 are enough")
    if isinstance(pattern, NofM):
        check_splits(weight.shape[2], pattern)
    check_finite(weight, "weight")
    metric, used = damped(H, damping)
    scale = metric.diagonal(dim1=1, dim2=2).sqrt()
    metric = metric / scale.unsqueeze(2) / scale.unsqueeze(1)
    values, vectors = (v.float() for v in torch.linalg.eigh(metric))
    W = (weight.to(torch.float64) * scale.unsqueeze(1)).mT
    keep, taken, is_settled = _iterate(
        (metric @ W).float(), W.float(), values, vectors, pattern, steps
    )
    return Support(keep=keep.mT.contiguous(), steps=taken, is_settled=is_settled, damping=used)


def _iterate(
    HW: Float[Tensor, "g n m"],
    W: Float[Tensor, "g n m"],
    values: Float[Tensor, "g n"],
    vectors: Float[Tensor, "g n n"],
    pattern: Pattern,
    steps: int,
) -> tuple[Bool[Tensor, "g n m"], int, bool]:
    D, V, rho = W.clone(), torch.zeros_like(W), RHO
    held = keep = torch.ones_like(W, dtype=torch.bool)
    for step in range(1, steps + 1):
        B = vectors.mT @ (HW - V + rho * D)
        B = vectors @ (B / (values.unsqueeze(2) + rho))
        V = V + rho * B
        keep = best_mask(V.square().mT, pattern).mT
        D = V * keep / rho
        V = V - rho * D
        if step % UPDATE_EVERY == 0:
            changed = float((keep != held).sum()) / max(1.0, float(keep.sum()))
            if changed == 0:
                return keep, step, True
            rho *= next(growth for share, growth in GROWTH if changed > share)
            held = keep
    return keep, steps, False
