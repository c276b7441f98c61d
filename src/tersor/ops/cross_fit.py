"""The weight that a compressed form should approach behind a compressed prefix: refitted, or not.

A least-squares fit of n inputs on t rows adds n / t of what it can't explain, and most of what
quantisation does to the prefix can't be explained. So the damping is the one whose fit on one half of
the samples does best on the other; no refit at all is among the choices.

Axes: g groups, m outputs and n inputs of a group.
"""

from functools import reduce

from jaxtyping import Float64
from torch import Tensor

from tersor.ops.moments import Moments, add_moments
from tersor.ops.refit import refit, relative_error

# Ridges of the refit to choose from, relative to the mean diagonal of the covariance.
REFIT_DAMPINGS = (1e-2, 1e-1, 1.0, 10.0)


def cross_fitted(
    weight: Float64[Tensor, "g m n"], halves: tuple[Moments, ...]
) -> tuple[Float64[Tensor, "g m n"], float | None]:
    """The weight to approach, and the damping of its fit; None where it was not refitted.

    Args:
        weight: The original; read only.
        halves: Moments of both halves of the samples; of one, of two of which one is empty (a single
            row was seen), or without the original input, nothing is fitted.

    Raises:
        NumericalError: The moments are not finite or not positive semi-definite.
    """
    if len(halves) < 2 or halves[0].cross is None or not all(h.count for h in halves):
        return weight, None
    costs: dict[float | None, float] = {
        None: sum(relative_error(weight, weight, h) for h in halves)
    }
    for damping in REFIT_DAMPINGS:
        fits = [refit(weight, half, damping)[0] for half in halves]
        costs[damping] = sum(
            relative_error(weight, fit, other)
            for fit, other in zip(fits, reversed(halves), strict=True)
        )
    best = min(costs, key=costs.__getitem__)
    if best is None:
        return weight, None
    return refit(weight, reduce(add_moments, halves), best)[0], best
