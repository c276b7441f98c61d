"""Weights on their way to a grid: the proximal map of piecewise-affine regularised quantization.

Axes: m outputs of a layer, the rest its inputs.

Source: Jin et al. 2025, arXiv:2503.15748 (PARQ), its proximal map for a grid of equal steps.
"""

from jaxtyping import Float
from torch import Tensor

from tersor.core.errors import ConfigError


def pulled(
    latent: Float[Tensor, "m ..."],
    step: Float[Tensor, " m"],
    *,
    low: int,
    high: int,
    softness: float,
) -> Float[Tensor, "m ..."]:
    """Each value p between two points of its grid as clamp(c + (p - c) / s, q_lo, q_hi), c the middle of them.

    Of s = 1 that is p itself; the smaller s, the more values lie on a point, and at 0 each is at its
    nearest. What lies beyond the ends of the grid is at the end plus s times what is beyond, so that
    nothing jumps where s begins at 1.

    Args:
        latent: p, read only.
        step: Distance of the points of each output, of either sign, not 0.
        low: Smallest code.
        high: Largest code.
        softness: s, 0 to 1.

    Returns:
        Values in the type of ``latent``; at 0 exactly code * step, as far as that type holds it.

    Raises:
        ConfigError: ``softness`` outside 0..1, or an empty grid.
    """
    if not 0 <= softness <= 1 or low > high:
        raise ConfigError(
            f"found softness={softness} and codes {low}..{high}, wanted 0..1 and a grid that is not empty"
        )
    each = step.to(latent.dtype).reshape(-1, *[1] * (latent.dim() - 1))
    places = latent / each
    inside = places.clamp(low, high)
    if softness == 0:
        return inside.round_().mul_(each)
    below = inside.floor()
    between = (inside - below).sub_(0.5).div_(softness).add_(0.5).clamp_(0, 1)
    return below.add_(between).add_(places.sub_(inside), alpha=softness).mul_(each)
