"""Attention of few tokens with all that is in front of it: norm, queries, keys, values, scores.

``narrow_attention`` is what graphs call: on a CUDA device with Triton ``narrow_attention_triton``, elsewhere
``narrow_attention_reference``, the definition that the kernel is tested against. Weights are laid out once by
``attention_weights``. Compilers and exporters see one op, ``tersor::narrow_attention``.
"""

import math
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, pad

from tersor.core.errors import ShapeError
from tersor.kernels.narrow_linear import DTYPES, MOST, READ, STEP, folded

HAS_KERNEL = find_spec("triton") is not None
TOKENS = 128  # of a sample at most
SIZES = (16, 32, 64, 128)  # of a head, as products have it
_PARTS = 3  # queries, keys, values

Linear = tuple[Tensor, Tensor | None]


class AttentionWeights(NamedTuple):
    """Weights of queries, keys and values as the kernel reads them, filled up with zeros.

    Attributes:
        weight: [heads, 3, inputs, size], inputs a multiple of 64, size one of ``SIZES``.
        bias: [heads, 3, size] float32.
    """

    weight: Tensor
    bias: Tensor


def attention_weights(
    parts: tuple[Linear, Linear, Linear],
    heads: int,
    *,
    dtype: torch.dtype,
    norm: tuple[Tensor | None, Tensor | None] | None = None,
) -> AttentionWeights:
    """Lay out the weights of an attention.

    Args:
        parts: Weight [heads * n, inp] and bias of queries, keys and values; n is one for queries and keys.
        heads: How many; all three have as many.
        dtype: float16 or bfloat16.
        norm: Scale and shift [inp] of a norm in front of all three, which become part of weights and biases.

    Raises:
        ShapeError: Tensors that do not fit together, heads of more than 128 numbers, or another type.
    """
    if dtype not in DTYPES:
        raise ShapeError(f"narrow attention: found type {dtype}, wanted float16 or bfloat16")
    shapes = [tuple(weight.shape) for weight, _ in parts]
    sizes = [out // heads for out, _ in shapes]
    is_whole = all(out == heads * n for (out, _), n in zip(shapes, sizes, strict=True))
    fits = len({inp for _, inp in shapes}) == 1 and sizes[0] == sizes[1]
    if not is_whole or not fits or not 1 <= max(sizes) <= SIZES[-1]:
        raise ShapeError(
            f"narrow attention: found weights {shapes} for {heads} heads, wanted [heads * n, inp], n at most "
            f"{SIZES[-1]} and equal for queries and keys; leave the attention as it is"
        )
    inp = shapes[0][1]
    if norm is not None and inp > READ:
        raise ShapeError(
            f"narrow attention: found {inp} channels, wanted at most {READ} with a norm"
        )
    size = next(n for n in SIZES if n >= max(sizes))
    weights, biases = [], []
    for (weight, bias), n in zip(parts, sizes, strict=True):
        own, shift = folded(weight, bias, norm)
        turned = own.reshape(heads, n, inp).transpose(1, 2)
        weights.append(pad(turned, (0, size - n, 0, -inp % STEP)))
        biases.append(pad(shift.reshape(heads, n), (0, size - n)))
    return AttentionWeights(
        torch.stack(weights, 1).to(dtype).contiguous(), torch.stack(biases, 1).contiguous()
    )


def narrow_attention(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mask: Tensor | None,
    size: int,
    scale: float,
    eps: float | None,
    causal: bool,
) -> Tensor:
    """softmax(scale q k' + mask) v, head by head, of q, k, v = norm(x) W + bias.

    Args:
        x: [b, tokens, inp] float16 or bfloat16, at most 128 tokens.
        weight: Of the weights, as bias: see ``AttentionWeights``.
        bias: Added to queries, keys and values.
        mask: What is added to scores, or what is seen (bool); broadcast to [b, heads, tokens, tokens].
        size: Numbers of a head that are written.
        scale: Of scores.
        eps: Of the norm in front, whose scale and shift are in the weights; None: there is none.
        causal: No token sees a later one.

    Returns:
        [b, tokens, heads * size] in x's type. Sums are taken in float32; queries, keys, values and
        probabilities are rounded to x's type. Zeros where nothing is seen.

    Raises:
        ShapeError: Tensors that do not fit together, another type, or too many tokens or elements.
    """
    _check(x, weight, bias, size)
    if mask is not None:
        batch, tokens, _ = x.shape
        if isinstance(mask.numel(), int) and mask.numel() > MOST:
            raise ShapeError(
                f"narrow attention: found a mask {tuple(mask.shape)}, wanted at most {MOST} elements; split the batch"
            )
        mask = mask.contiguous().expand(batch, weight.shape[0], tokens, tokens)
    call: Any = narrow_attention_op()
    if x.is_cuda and HAS_KERNEL:
        from tersor.kernels.narrow_attention_triton import narrow_attention_cuda as call
    found: Tensor = call(x.contiguous(), weight, bias, mask, size, scale, eps, causal)
    return found


def _check(x: Tensor, weight: Tensor, bias: Tensor, size: int) -> None:
    if x.dtype not in DTYPES or weight.dtype != x.dtype:
        raise ShapeError(
            f"narrow attention: found x in {x.dtype} and a weight in {weight.dtype}, wanted both in float16 or both "
            "in bfloat16"
        )
    heads, parts, inp, wide = weight.shape
    is_laid_out = parts == _PARTS and not inp % STEP and wide in SIZES
    if not is_laid_out or tuple(bias.shape) != (heads, parts, wide) or not 1 <= size <= wide:
        raise ShapeError(
            f"narrow attention: found a weight {tuple(weight.shape)} and a bias {tuple(bias.shape)} for heads of "
            f"{size}, wanted what attention_weights gives"
        )
    if x.dim() != 3 or not inp - STEP < x.shape[2] <= inp or not 1 <= x.shape[1] <= TOKENS:
        raise ShapeError(
            f"narrow attention: found x {tuple(x.shape)}, wanted [b, 1 to {TOKENS} tokens, {inp} channels]"
        )
    if isinstance(x.shape[0], int) and x.numel() // x.shape[2] * max(inp, heads * wide) > MOST:
        raise ShapeError(f"narrow attention: found x {tuple(x.shape)}, wanted fewer samples")


def narrow_attention_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mask: Tensor | None,
    size: int,
    scale: float,
    eps: float | None,
    causal: bool,
) -> Tensor:
    """As ``narrow_attention``, in torch's own ops in float32; a mask is as large as scores are."""
    inputs, tokens = x.shape[2], x.shape[1]
    read = x.float()
    if eps is not None:
        read = layer_norm(read, (inputs,), eps=eps).to(x.dtype).float()
    found = torch.einsum("bti,hpis->pbhts", read, weight[:, :, :inputs].float())
    q, k, v = (found + bias.transpose(0, 1)[:, None, :, None]).to(x.dtype).float().unbind(0)
    scores = q @ k.transpose(2, 3) * scale
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -math.inf)
    elif mask is not None:
        scores = scores + mask.float()
    if causal:
        seen = torch.ones(tokens, tokens, dtype=torch.bool, device=x.device).tril()
        scores = scores.masked_fill(~seen, -math.inf)
    most = scores.amax(3, keepdim=True)
    p = torch.exp(scores - torch.where(torch.isinf(most), torch.zeros_like(most), most))
    whole = p.sum(3, keepdim=True)
    y = p.to(x.dtype).float() @ v / torch.where(whole == 0, torch.ones_like(whole), whole)
    heads = weight.shape[0]
    return y[..., :size].transpose(1, 2).reshape(x.shape[0], tokens, heads * size).to(x.dtype)


def narrow_attention_op() -> Any:
    """What compilers and exporters see; the kernel's module takes a second to import."""
    if HAS_KERNEL:
        from tersor.kernels.narrow_attention_triton import narrow_attention_op as found

        return found
    return _plain_op


if not HAS_KERNEL:
    _plain_op: Any = torch.library.custom_op(
        "tersor::narrow_attention", narrow_attention_reference, mutates_args=()
    )

    @_plain_op.register_fake
    def _shape_of(x: Tensor, weight: Tensor, *others: Any) -> Tensor:
        return x.new_empty(*x.shape[:2], weight.shape[0] * others[2])
