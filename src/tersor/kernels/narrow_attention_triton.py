"""``narrow_attention`` on a CUDA device: how a shape is launched, and the call.

A program has a head of a sample, or two of small heads. How many, and how many warps and stages, is measured when a call is
first made outside of a compiler (``tiles``).
"""

from functools import cache, partial
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.library import triton_op, wrap_triton

from tersor.kernels.narrow_encoder_kernels_triton import narrow_attention_kernel
from tersor.kernels.tiles import Chosen, Size, choose, is_real, result

_LEAST = 16  # tokens of a product
_WIDE = 64 * 64  # numbers of a head's tokens from which eight warps come first


class Launch(NamedTuple):
    """Inputs of a step, warps, stages, heads of a program."""

    step: int
    warps: int
    stages: int
    heads: int = 1


# The fastest at the shapes of ViTs of 192 and 384 channels and of MiniLM at batch 64 (H200).
_LAUNCHES = (Launch(32, 4, 3), Launch(64, 4, 2), Launch(64, 8, 2))
# Tokens are read half as often; more registers.
_PAIRS = (Launch(64, 8, 2, 2), Launch(64, 4, 2, 2), Launch(32, 4, 3, 2))
_PAIRED = 32  # numbers of a head at most
_Key = tuple[Any, ...]
_CHOSEN: Chosen[_Key, Launch] = Chosen()


def run(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mask: Tensor | None,
    size: int,
    scale: float,
    eps: float | None,
    causal: bool,
    launch: Launch,
) -> Tensor:
    """As ``narrow_attention.narrow_attention`` of x without gaps and a mask as large as scores are."""
    batch, tokens, inputs = x.shape
    heads, _, filled, wide = weight.shape
    y = x.new_empty(batch, tokens, heads * size)
    if isinstance(batch, int) and not batch:
        return y
    kind = 0 if mask is None else 2 if mask.dtype == torch.bool else 1
    steps = (0, 0, 0, 0) if mask is None else mask.stride()
    wrap_triton(_launched(narrow_attention_kernel, launch))[(batch * (heads // launch.heads),)](
        x, weight, bias, x if mask is None else mask, y, heads, 0.0 if eps is None else eps, scale, *steps,
        T=tokens, K=inputs, KP=filled, S=wide, SIZE=size, NORM=eps is not None, MASK=kind, ALIKE=not steps[2], CAUSAL=causal,
        BT=max(_LEAST, triton.next_power_of_2(tokens)),
    )  # fmt: skip
    return y


@cache
def _launched(kernel: Any, launch: Launch) -> Any:
    """The kernel with one launch: a list of one, so that no compiler has anything to tune."""
    sizes = {"G": launch.heads, "BK": launch.step, "STAGES": launch.stages}
    config = triton.Config(sizes, num_warps=launch.warps, num_stages=launch.stages)
    return triton.autotune([config], key=[])(kernel)


def launches(tokens: int, size: int, heads: int = 1) -> tuple[Launch, ...]:
    """What is worth measuring, the one to expect most of first."""
    known = _LAUNCHES if tokens * size <= _WIDE else _LAUNCHES[::-1]
    return (*known, *_PAIRS) if heads % 2 == 0 and size <= _PAIRED else known


def _key(x: Tensor, weight: Tensor, size: int, kind: tuple[Any, ...]) -> _Key:
    batch, tokens, inputs = x.shape
    heads, wide = weight.shape[0], weight.shape[3]
    sizes = (Size(batch), tokens, Size(inputs), Size(heads), wide, Size(size))
    return (*sizes, bool(heads % 2), *kind, x.dtype, str(x.device))


def _kind(mask: Tensor | None, eps: float | None, *, causal: bool) -> tuple[Any, ...]:
    given = None if mask is None else (mask.dtype, bool(mask.stride(2)))
    return (given, eps is not None, causal)


@triton_op("tersor::narrow_attention", mutates_args={})
def narrow_attention_op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mask: Tensor | None,
    size: int,
    scale: float,
    eps: float | None,
    causal: bool,
) -> Tensor:
    """[b, tokens, heads * size] of x without gaps; on other devices than CUDA the reference."""
    if not x.is_cuda:
        from tersor.kernels.narrow_attention import narrow_attention_reference

        return narrow_attention_reference(x, weight, bias, mask, size, scale, eps, causal)
    launch = launches(x.shape[1], weight.shape[3], weight.shape[0])[0]
    batch: Any = x.shape[0]
    if isinstance(batch, int):  # else open: any number of samples
        launch = _CHOSEN.get(_key(x, weight, size, _kind(mask, eps, causal=causal)), launch)
    return run(x, weight, bias, mask, size, scale, eps, causal, launch)


def narrow_attention_cuda(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mask: Tensor | None,
    size: int,
    scale: float,
    eps: float | None,
    causal: bool,
) -> Tensor:
    """As ``narrow_attention.narrow_attention``, by the kernel."""
    call: partial[Tensor] = partial(
        narrow_attention_op, x, weight, bias, mask, size, scale, eps, causal
    )
    if not is_real(x) or not x.numel():
        return call()
    key = _key(x, weight, size, _kind(mask, eps, causal=causal))
    known = launches(x.shape[1], weight.shape[3], weight.shape[0])
    return result(call, is_measured=choose(_CHOSEN, key, known, call))
