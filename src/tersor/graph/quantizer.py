"""What a quantiser does to a tensor, in torch: the same arithmetic as the edited graph."""

import torch
from torch import Tensor

from tersor.graph.contracts import Quantizer


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
    codes = torch.clamp(torch.round(raw * (1.0 / quantizer.step)), quantizer.low, quantizer.high)
    return codes * quantizer.step - quantizer.shift
