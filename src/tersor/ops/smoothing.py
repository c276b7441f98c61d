"""Moving the spread of activation channels into the weight, where rounding bears it better.

W x = (W diag(s)) (diag(1/s) x): a channel with outliers is divided by a large s and its weight
column multiplied, which folds into the layer or norm before and costs nothing at run time.

Axes: n input channels.
"""

import math

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from tersor.core.errors import ConfigError, NumericalError

# |log2 s| stays below 2 * 31 after normalising, so that s, 1/s and s^2 are normal float32 numbers.
LARGEST_LOG2 = 31


def smoothing_scale(
    activation_amax: Float[Tensor, " n"], weight_amax: Float[Tensor, " n"], alpha: float
) -> Float64[Tensor, " n"]:
    """Scale s by which input channels are divided and weight columns multiplied.

    s_j = a_j^alpha / w_j^(1 - alpha), then divided by the geometric mean over channels.

    Args:
        activation_amax: a, the largest (or 99.9 % quantile of the) magnitude of each channel, >= 0.
        weight_amax: w, the largest magnitude of each weight column, over all consumers, >= 0.
        alpha: 0 evens the weight columns, 1 the activations; 0.9 won for a BERT-like encoder.

    Returns:
        Positive finite scales of geometric mean 1. A channel that is silent or unused (a_j or w_j is
        0) has nothing to move and gets 1, which is safe should it wake up at run time.

    Raises:
        ConfigError: ``alpha`` outside 0..1.
        NumericalError: A magnitude is negative or not finite.

    Source: Xiao et al. 2022, arXiv:2211.10438, eq. 4.
    """
    if not 0 <= alpha <= 1:
        raise ConfigError(f"alpha must be within 0..1, got {alpha}; try 0.5 or 0.9")
    a, w = activation_amax.to(torch.float64), weight_amax.to(torch.float64)
    for name, value in (("activation_amax", a), ("weight_amax", w)):
        good = value.isfinite() & (value >= 0)
        if not bool(good.all()):
            bad = int((~good).nonzero()[0, 0])
            raise NumericalError(
                f"{name} ({value.numel()} channels): channel {bad} is {float(value[bad])}, wanted a finite magnitude "
                ">= 0; drop samples that are not finite before taking it"
            )
    live = (a > 0) & (w > 0)
    if not bool(live.any()):
        return torch.ones_like(a)
    log_scale = alpha * a[live].log() - (1 - alpha) * w[live].log()
    limit = LARGEST_LOG2 * math.log(2)
    log_scale = (log_scale - log_scale.mean()).clamp(-limit, limit)
    scale = torch.ones_like(a)
    scale[live] = (log_scale - log_scale.mean()).exp()
    return scale
