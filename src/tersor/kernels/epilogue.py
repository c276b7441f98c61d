"""What follows an 8-bit product: scale, offset, activation, and the next layer's codes, in torch's own ops."""

import torch
from torch import Tensor

ACTIVATIONS = ("none", "relu", "gelu", "gelu_tanh", "silu")


def activated(y: Tensor, activation: str) -> Tensor:
    """One of ``ACTIVATIONS`` of a tensor."""
    if activation == "relu":
        return torch.relu(y)
    if activation == "gelu":
        return torch.nn.functional.gelu(y)
    if activation == "gelu_tanh":
        return torch.nn.functional.gelu(y, approximate="tanh")
    if activation == "silu":
        return torch.nn.functional.silu(y)
    return y


def finished(
    total: Tensor,
    scale: Tensor,
    offset: Tensor,
    dtype: torch.dtype,
    activation: str,
    inverse: Tensor | None,
    zero: float,
    low: float,
    high: float,
) -> Tensor:
    """Products of codes -> the result of ``linear8.linear8``, computed in float32.

    Args:
        total: [rows, out], any type of numbers.
        scale: Units of y a unit of the product [out], float32.
        offset: [out] float32.
        dtype: Of the result; int8 is rounded half to even, float8_e4m3fn saturates.
        activation: One of ``ACTIVATIONS``.
        inverse: Codes a unit of y [out], float32; None: the result is y itself.
        zero: Added to the codes before they are rounded.
        low: Smallest int8 code.
        high: Largest one.
    """
    y = activated(total.float() * scale + offset, activation)
    if inverse is not None:
        y = y * inverse + zero
        if dtype == torch.int8:
            y = torch.clamp(torch.round(y), low, high)
        else:
            limit = torch.finfo(dtype).max
            y = torch.clamp(y, -limit, limit)
    return y.to(dtype)
