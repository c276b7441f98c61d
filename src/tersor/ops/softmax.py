"""The best linear classifier for the original's own class probabilities.

Least squares on logits spends the weight on logits of classes that are out of the question. What
counts is the divergence of the softmax, which is convex in the weight: quasi-Newton steps from the
least-squares fit reach its minimum. No labels are read.

Axes: t rows, n inputs, m classes.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from tersor.core.errors import ConfigError, NumericalError, ShapeError

_HISTORY = 20  # of L-BFGS
_FLAT = 1e-9  # of the gradient: rounding of float64 sums


@dataclass(frozen=True, slots=True, kw_only=True)
class SoftmaxFit:
    """A classifier, and the mean divergence on the rows before and after, ridge left out."""

    weight: Float64[Tensor, "m n"]
    bias: Float64[Tensor, " m"]
    before: float
    after: float


def fit_softmax(
    inputs: Float[Tensor, "t n"],
    wanted: Float[Tensor, "t m"],
    weight: Float[Tensor, "m n"],
    bias: Float[Tensor, " m"],
    *,
    damping: float = 1e-4,
    iterations: int = 100,
) -> SoftmaxFit:
    """Minimise mean KL(softmax(wanted) || softmax(inputs W^T + b)) + ridge |W - weight|^2.

    The ridge is ``damping`` times the mean variance of the inputs over 2, so that it means the same
    at any scale of them.

    Args:
        inputs: What the classifier reads.
        wanted: The original's logits.
        weight: Where to begin, and what strong damping leads to; read only.
        bias: Where to begin; read only.
        damping: Relative to the inputs' mean variance, >= 0.
        iterations: Of L-BFGS at most; 0 gives the start.

    Returns:
        A classifier that is not worse on these rows than the start, ridge included.

    Raises:
        ConfigError: Negative damping or iterations.
        ShapeError: No rows.
        NumericalError: Inputs or logits that are not finite.

    Source: Liu and Nocedal 1989, doi:10.1007/BF01589116 (L-BFGS); ALGORITHMS 3.2b.
    """
    if damping < 0 or iterations < 0:
        raise ConfigError(
            f"found damping={damping} and iterations={iterations}, wanted neither below 0"
        )
    if not len(inputs):
        raise ShapeError("found no rows to fit, wanted at least one; give calibration samples")
    x, start = inputs.to(torch.float64), weight.to(torch.float64)
    target = torch.log_softmax(wanted.to(torch.float64), 1)
    if not bool(torch.isfinite(x).all() and torch.isfinite(target).all()):
        raise NumericalError(
            "inputs or logits: found NaN or infinity, wanted finite values; "
            "look for samples that are not finite or overflow"
        )
    ridge = 0.5 * damping * float(x.var(0, unbiased=False).mean())
    free = [start.clone().requires_grad_(), bias.to(torch.float64).clone().requires_grad_()]

    def divergence(found: list[Tensor]) -> Tensor:
        log_q = torch.log_softmax(x @ found[0].T + found[1], 1)
        return (target.exp() * (target - log_q)).sum(1).mean()

    def objective(found: list[Tensor]) -> Tensor:
        return divergence(found) + ridge * (found[0] - start).square().sum()

    given = [t.detach().clone() for t in free]
    if iterations:
        _minimise_(free, lambda: objective(free), iterations)
    best = [t.detach() for t in free]
    if not float(objective(best)) <= float(objective(given)):  # also where it is no number
        best = given
    return SoftmaxFit(
        weight=best[0],
        bias=best[1],
        before=float(divergence(given)),
        after=float(divergence(best)),
    )


def _minimise_(free: list[Tensor], loss: Callable[[], Tensor], iterations: int) -> None:
    optimizer = torch.optim.LBFGS(
        free,
        max_iter=iterations,
        history_size=_HISTORY,
        line_search_fn="strong_wolfe",
        tolerance_grad=_FLAT,
        tolerance_change=0.0,
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(closure)
