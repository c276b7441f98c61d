"""What a quantiser does to a tensor, in torch: the same arithmetic as the edited graph."""

from dataclasses import replace

import torch
from torch import Tensor

from tersor.graph.contracts import Quantizer
from tersor.ops.float8 import float8_rounded


def scaled(x: Tensor, quantizer: Quantizer) -> Tensor:
    """X * inverse_scale along the channel dimension."""
    scale = quantizer.inverse_scale
    if scale is None:
        return x
    if quantizer.channel_dim in (-1, x.dim() - 1):
        return x * scale.to(x.dtype)
    shape = [1] * x.dim()
    shape[quantizer.channel_dim] = -1
    return x * scale.to(x.dtype).reshape(shape)


def rounded(x: Tensor, quantizer: Quantizer) -> Tensor:
    """What the readers see, without the shift: dequantise(quantise(scaled + shift)) - shift."""
    raw = scaled(x, quantizer) + quantizer.shift
    if quantizer.kind == "fp8":
        return float8_rounded(raw * (1.0 / quantizer.step)) * quantizer.step - quantizer.shift
    codes = torch.clamp(torch.round(raw * (1.0 / quantizer.step)), quantizer.low, quantizer.high)
    return codes * quantizer.step - quantizer.shift


def restored(x: Tensor, quantizer: Quantizer) -> Tensor:
    """What an addition sees: rounded, and in the tensor's own units again."""
    found = rounded(x, quantizer)
    if quantizer.inverse_scale is None:
        return found
    return scaled(found, replace(quantizer, inverse_scale=1.0 / quantizer.inverse_scale))


def column_scale(weight: Tensor, quantizer: Quantizer | None) -> Tensor | None:
    """What each column of a weight is multiplied by: the inverse of its channel's factor.

    Args:
        weight: [g, m, n].
        quantizer: Of the tensor that the weight's op reads.

    Returns:
        [g, 1, n] float64, or None where channels have no factor.
    """
    if quantizer is None or quantizer.inverse_scale is None:
        return None
    per_channel = 1.0 / quantizer.inverse_scale.double()
    groups = weight.shape[0]
    window = weight.shape[2] * groups // per_channel.numel()
    return per_channel.reshape(groups, 1, -1).repeat_interleave(window, dim=2)
