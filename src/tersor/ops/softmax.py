"""The best linear classifier for the original's own class probabilities.

Least squares on logits spends the weight on logits of classes that are out of the question. What
counts is the divergence of the softmax, which is convex in the weight: quasi-Newton steps from the
least-squares fit reach its minimum. With few rows it would follow them too closely: rows that no step reads decide
whether it is kept. No labels are read.

Axes: t rows, n inputs, m classes.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from tersor.core.errors import ConfigError, NumericalError, ShapeError

_HELD_OUT = 8  # one row in so many is never fitted
_HISTORY = 20  # of L-BFGS
_FLAT = 1e-9  # of the gradient: rounding of float64 sums


@dataclass(frozen=True, slots=True)
class Classifier:
    """Logits are inputs weight^T + bias."""

    weight: Float64[Tensor, "m n"]
    bias: Float64[Tensor, " m"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SoftmaxFit:
    """The better of what was given and what was found.

    Attributes:
        before, after: Mean divergence on the held-out rows.
        steps: Iterations that were made.
    """

    weight: Float64[Tensor, "m n"]
    bias: Float64[Tensor, " m"]
    before: float
    after: float
    steps: int


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
        The start, where the held-out rows are no better off with what was found.

    Raises:
        ConfigError: Negative damping or iterations.
        ShapeError: Fewer than 16 rows.
        NumericalError: Inputs or logits that are not finite.

    Source: Liu and Nocedal 1989, doi:10.1007/BF01589116 (L-BFGS); ALGORITHMS 3.2b.
    """
    if damping < 0 or iterations < 0:
        raise ConfigError(
            f"found damping={damping} and iterations={iterations}, wanted neither below 0"
        )
    if len(inputs) < 2 * _HELD_OUT:
        raise ShapeError(f"found {len(inputs)} rows, wanted at least {2 * _HELD_OUT}")
    x, target = inputs.to(torch.float64), torch.log_softmax(wanted.to(torch.float64), 1)
    if not bool(torch.isfinite(x).all() and torch.isfinite(target).all()):
        raise NumericalError(
            "inputs or logits: found NaN or infinity, wanted finite values; "
            "look for samples that are not finite or overflow"
        )
    unseen = torch.zeros(len(x), dtype=torch.bool)
    unseen[::_HELD_OUT] = True
    start = Classifier(weight.to(torch.float64), bias.to(torch.float64))
    ridge = 0.5 * damping * float(x[~unseen].var(0, unbiased=False).mean())
    found, steps = _minimised(start, x[~unseen], target[~unseen], ridge, iterations)
    before, after = (float(divergence(c, x[unseen], target[unseen])) for c in (start, found))
    if not after < before:  # also where it is no number
        found, after = start, before
    return SoftmaxFit(weight=found.weight, bias=found.bias, before=before, after=after, steps=steps)


def divergence(
    classifier: Classifier, inputs: Float64[Tensor, "t n"], target: Float64[Tensor, "t m"]
) -> Float64[Tensor, ""]:
    """Mean KL(p || softmax(inputs W^T + b)) for log p = ``target``."""
    log_q = torch.log_softmax(inputs @ classifier.weight.T + classifier.bias, 1)
    return (target.exp() * (target - log_q)).sum(1).mean()


def _minimised(
    start: Classifier,
    inputs: Float64[Tensor, "t n"],
    target: Float64[Tensor, "t m"],
    ridge: float,
    iterations: int,
) -> tuple[Classifier, int]:
    """The minimum of the divergence with the ridge, and how many iterations led there."""
    if not iterations:
        return start, 0
    free = Classifier(*(t.clone().requires_grad_() for t in (start.weight, start.bias)))
    optimizer = torch.optim.LBFGS(
        [free.weight, free.bias],
        max_iter=iterations,
        history_size=_HISTORY,
        line_search_fn="strong_wolfe",
        tolerance_grad=_FLAT,
        tolerance_change=0.0,
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = divergence(free, inputs, target)
        value = value + ridge * (free.weight - start.weight).square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(closure)
    steps = int(optimizer.state[free.weight]["n_iter"])
    return Classifier(free.weight.detach(), free.bias.detach()), steps
