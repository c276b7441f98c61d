"""The loss of a block, and how large its steps are.

A block is trained until its outputs are those of the original: squared differences over the
outputs' own variance, so that blocks are comparable and a loss of 1 is that of the mean.
"""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tersor.core.errors import ConfigError

_TINY = 1e-30
_WARM = 0.05  # of all steps, over which they grow to full size: Adam's moments are noise before


def spread(values: Float[Tensor, "*shape"]) -> float:
    """Mean squared deviation from the mean of each channel's place over the samples.

    Args:
        values: [samples, ...]. A single sample tells no deviation: its mean square counts.

    Returns:
        At least a tiny positive number, so that it can be divided by.
    """
    flat = values.detach().reshape(len(values), -1).to(torch.float64)
    centre = flat.mean(0) if len(flat) > 1 else torch.zeros_like(flat[0])
    return max(_TINY, float((flat - centre).square().mean()))


def block_loss(
    found: Float[Tensor, "*shape"],
    wanted: Float[Tensor, "*shape"],
    scale: float,
    mask: Bool[Tensor, "n t"] | None = None,
) -> Float[Tensor, ""]:
    """Mean squared difference over ``scale``.

    Args:
        found: A block's output.
        wanted: The original's.
        scale: What it is divided by: ``spread`` of the original's.
        mask: Real tokens, where the values are [n, t, ...]: others do not count.
    """
    difference = (found - wanted).square()
    if mask is not None and difference.shape[:2] == mask.shape:
        difference = difference[mask]
    return difference.mean() / scale


def step_share(progress: float) -> float:
    """Share of the full step size at some share of all steps: a short rise, then half a cosine.

    Args:
        progress: From 0 to 1; beyond 1 the steps are over, and the share is 0.

    Raises:
        ConfigError: A negative progress.

    Source: Loshchilov and Hutter 2017, arXiv:1608.03983, eq. 5, one period.
    """
    if progress < 0:
        raise ConfigError(f"progress: found {progress}, wanted a share of all steps from 0 on")
    rise = min(1.0, progress / _WARM) if _WARM else 1.0
    return max(rise, 1e-2) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))


def step_size(tensor: Float[Tensor, "*shape"], rate: float) -> float:
    """The absolute size of Adam's steps for a tensor: a share of its root mean square.

    A tensor of zeros has no size of its own, and gets 0: the caller knows what stands beside it.
    """
    return rate * float(tensor.detach().to(torch.float64).square().mean().sqrt())
