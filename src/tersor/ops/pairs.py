"""Two linear maps with a bend between them, fitted together to what they should give.

Fitting the second map alone leaves the units that stay as they were; fitting both lets them turn
into other ones. The problem is not convex: it starts from maps that were fitted one by one, and
what does not help on rows that the fit has not seen is dropped. No labels are read.

Axes: t rows, n inputs, c units, m outputs.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tersor.core.errors import ShapeError

_HELD_OUT = 8  # one row in so many is never fitted
_HISTORY = 20  # of L-BFGS; more changes nothing on the sizes that were tried


@dataclass(frozen=True, slots=True)
class LinearPair:
    """y = second_weight act(first_weight x + first_bias) + second_bias."""

    first_weight: Float[Tensor, "c n"]
    first_bias: Float[Tensor, " c"]
    second_weight: Float[Tensor, "m c"]
    second_bias: Float[Tensor, " m"]

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """In the order of the fields."""
        return self.first_weight, self.first_bias, self.second_weight, self.second_bias


@dataclass(frozen=True, slots=True)
class PairFit:
    """The better of what was given and what was found.

    Attributes:
        before, after: Share of the outputs' variance that is lost on the held-out rows.
    """

    pair: LinearPair
    before: float
    after: float


def fit_pair(
    inputs: Float[Tensor, "t n"],
    wanted: Float[Tensor, "t m"],
    start: LinearPair,
    activation: Callable[[Tensor], Tensor],
    *,
    iterations: int = 100,
) -> PairFit:
    """Fit both maps by least squares on the second one's outputs (L-BFGS).

    Args:
        inputs: What the first map reads.
        wanted: What the second one should give, t >= 16.
        start: Where to begin; read only.
        activation: Between the two, one value at a time; differentiable almost everywhere.
        iterations: Of L-BFGS at most; one is two or three passes over the rows.

    Raises:
        ShapeError: Fewer than 16 rows.
    """
    if len(inputs) < 2 * _HELD_OUT:
        raise ShapeError(f"found {len(inputs)} rows, wanted at least {2 * _HELD_OUT}")
    unseen = torch.zeros(len(inputs), dtype=torch.bool)
    unseen[::_HELD_OUT] = True
    scale = wanted.float().var(0, unbiased=False).mean().clamp_min(1e-12)

    def lost(pair: LinearPair, x: Tensor, y: Tensor) -> Tensor:
        units = activation(x @ pair.first_weight.T + pair.first_bias)
        return (units @ pair.second_weight.T + pair.second_bias - y).square().mean() / scale

    begin = LinearPair(*(t.detach().float().clone() for t in start.tensors()))
    seen = inputs[~unseen].float(), wanted[~unseen].float()
    found = _minimised(begin, lambda pair: lost(pair, *seen), iterations)
    test = inputs[unseen].float(), wanted[unseen].float()
    with torch.no_grad():
        before, after = float(lost(begin, *test)), float(lost(found, *test))
    if not after < before:  # also where it is no number
        return PairFit(start, before, before)
    return PairFit(found, before, after)


def _minimised(
    start: LinearPair, loss: Callable[[LinearPair], Tensor], iterations: int
) -> LinearPair:
    free = LinearPair(*(t.clone().requires_grad_() for t in start.tensors()))
    optimizer = torch.optim.LBFGS(
        free.tensors(),
        max_iter=iterations,
        history_size=_HISTORY,
        line_search_fn="strong_wolfe",
        tolerance_change=1e-9,
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(free)
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(closure)
    return LinearPair(*(t.detach() for t in free.tensors()))
