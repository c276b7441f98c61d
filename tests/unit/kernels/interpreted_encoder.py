"""Run by ``test_narrow_encoder_triton`` under TRITON_INTERPRET=1: kernels against their definitions in float64.

Outputs are poisoned: torch fills what is empty with NaN. Errors go to standard output as JSON, each as a share of
what the formats allow. ``tests/gpu`` runs the same cases on a card, in bfloat16, too: the interpreter multiplies its
bits as integers.
"""

import json
import math
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._library.triton import set_wrap_triton_enabled
from torch.nn.functional import gelu, layer_norm, relu, scaled_dot_product_attention, silu

from tersor.kernels.narrow_attention import AttentionWeights, attention_weights
from tersor.kernels.narrow_attention_triton import Launch
from tersor.kernels.narrow_attention_triton import run as attend
from tersor.kernels.narrow_linear import LinearWeights, linear_weights
from tersor.kernels.narrow_linear_triton import Tile
from tersor.kernels.narrow_linear_triton import run as multiply

UNIT = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}  # half a unit in the last place, relative
STEPS = (
    4  # roundings between what is read and what is written, of values about as large as the result
)
FIRST_EPS, LAST_EPS = 1e-5, 1e-3
ACTIVATIONS = {
    "none": lambda y: y, "relu": relu, "gelu": gelu, "silu": silu,
    "gelu_tanh": lambda y: gelu(y, approximate="tanh"),
}  # fmt: skip
Norm = tuple[Tensor, Tensor] | None


class LinearCase(NamedTuple):
    """A linear: rows, inputs and outputs, and what is around it."""

    rows: int
    inp: int
    out: int
    first: bool = False
    added: bool = False
    last: bool = False
    activation: str = "gelu"
    dtype: torch.dtype = torch.float16


class AttentionCase(NamedTuple):
    """An attention: tokens, inputs, heads, sizes of queries and values, and what is around it."""

    tokens: int
    inp: int
    heads: int
    size: int
    value: int
    norm: bool = True
    mask: str = "none"
    causal: bool = False
    dtype: torch.dtype = torch.float16

    @property
    def scale(self) -> float:
        """Scores of about one."""
        return 0.8 * self.size**-0.5


def drawn(seed: int, *shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def share(found: Tensor, wanted: Tensor) -> float:
    """The largest error over what a few roundings of the largest values make; infinite where nothing was written."""
    if found.shape != wanted.shape or not torch.isfinite(found).all():
        return math.inf
    error = (found.double() - wanted).abs().max() / wanted.abs().max().clamp(min=1e-3)
    return float(error) / (STEPS * UNIT[found.dtype])


def normed(x: Tensor, norm: Norm, eps: float) -> Tensor:
    """In float64."""
    return x if norm is None else layer_norm(x, x.shape[-1:], *(t.double() for t in norm), eps)


def exact_norm(width: int) -> tuple[Tensor, Tensor]:
    """A scale of powers of two keeps the weight that it becomes part of exact, but for the smallest numbers."""
    return 2.0 ** torch.arange(width).remainder(3).sub(1), drawn(3, width, scale=0.2)


def linear_parts(case: LinearCase) -> tuple[Tensor, Tensor, Norm, Norm, LinearWeights]:
    """Weight and bias, norms in front and behind, and the weights as the kernel reads them."""
    weight = drawn(1, case.out, case.inp, scale=case.inp**-0.5).to(case.dtype).float()
    bias = drawn(2, case.out, scale=0.3)
    first = exact_norm(case.inp) if case.first else None
    last = (1 + drawn(4, case.out, scale=0.2), drawn(5, case.out, scale=0.2)) if case.last else None
    made = linear_weights(weight, bias, dtype=case.dtype, first=first, last=last)
    return weight, bias, first, last, made


def linear_result(case: LinearCase, tile: Tile) -> tuple[Tensor, Tensor]:
    """What the kernel gives, and its definition in float64."""
    weight, bias, first, last, made = linear_parts(case)
    x, other = (drawn(s, case.rows, n).to(case.dtype) for s, n in ((6, case.inp), (7, case.out)))
    parts = [None if t is None else t.to(device()) for t in made]
    added = other.to(device()) if case.added else None
    arguments: Any = (
        x.to(device()), *parts[:3], added, *parts[3:], case.out, case.activation, FIRST_EPS, LAST_EPS, tile,
    )  # fmt: skip
    y = normed(x.double(), first, FIRST_EPS)
    y = ACTIVATIONS[case.activation](y @ weight.double().T + bias.double())
    y = y + other.double() if case.added else y
    return multiply(*arguments).cpu(), normed(y, last, LAST_EPS)


def attention_parts(
    case: AttentionCase,
) -> tuple[list[tuple[Tensor, Tensor]], Norm, AttentionWeights]:
    """Weights and biases of queries, keys and values, the norm in front, and the weights as the kernel reads them."""
    parts = [
        (
            drawn(10 + i, case.heads * n, case.inp, scale=case.inp**-0.5).to(case.dtype).float(),
            drawn(20 + i, case.heads * n, scale=0.3),
        )
        for i, n in enumerate((case.size, case.size, case.value))
    ]
    norm = exact_norm(case.inp) if case.norm else None
    made = attention_weights(
        (parts[0], parts[1], parts[2]), case.heads, dtype=case.dtype, norm=norm
    )
    return parts, norm, made


def mask_of(kind: str, batch: int, tokens: int) -> Tensor | None:
    """float: lengths as BERT adds them; seen: likewise, a sample that sees nothing; scores: one for every score."""
    if kind == "none":
        return None
    lengths = torch.arange(batch).remainder(3) * tokens // 3 + (0 if kind == "seen" else 1)
    seen = torch.arange(tokens)[None] < lengths[:, None]
    if kind == "seen":
        return seen[:, None, None, :]
    if kind == "scores":
        return drawn(30, batch, 1, tokens, tokens)
    return (1 - seen.float())[:, None, None, :] * -1e4


def added_mask(mask: Tensor | None, tokens: int, *, causal: bool) -> Tensor:
    """What is added to scores, in float64."""
    found = torch.zeros(tokens, tokens, dtype=torch.float64)
    if mask is not None and mask.dtype == torch.bool:
        found = torch.where(mask, found, -math.inf)
    elif mask is not None:
        found = found + mask.double()
    later = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
    return found.masked_fill(later, -math.inf) if causal else found


def attention_result(case: AttentionCase, launch: Launch, batch: int = 3) -> tuple[Tensor, Tensor]:
    """What the kernel gives, and its definition in float64."""
    parts, norm, made = attention_parts(case)
    x = drawn(6, batch, case.tokens, case.inp).to(case.dtype)
    mask = mask_of(case.mask, batch, case.tokens)
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(case.dtype)
    sizes = (batch, case.heads, case.tokens, case.tokens)
    whole = None if mask is None else mask.to(device()).expand(sizes)
    arguments: Any = (
        x.to(device()), *(t.to(device()) for t in made), whole, case.value, case.scale,
        FIRST_EPS if case.norm else None, case.causal, launch,
    )  # fmt: skip
    y = normed(x.double(), norm, FIRST_EPS)
    q, k, v = (
        (y @ w.double().T + b.double()).unflatten(2, (case.heads, -1)).transpose(1, 2)
        for w, b in parts
    )
    scores = added_mask(mask, case.tokens, causal=case.causal)
    wanted = scaled_dot_product_attention(q, k, v, attn_mask=scores, scale=case.scale)
    return attend(*arguments).cpu(), wanted.transpose(1, 2).flatten(2).nan_to_num()


def device() -> str:
    """A card where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


# Rows, inputs, outputs: whole tiles; odd sizes; fewer rows than a tile.
SIZES = ((64, 64, 128), (70, 72, 200), (5, 33, 17))
FLAGS = (
    (False, False, False), (True, False, False), (False, True, True), (True, True, False), (True, True, True),
)  # fmt: skip
LINEARS = (
    *(LinearCase(*sizes, *flags) for sizes, flags in product(SIZES, FLAGS)),
    *(LinearCase(20, 64, 100, added=True, activation=name) for name in ACTIVATIONS),
)
ATTENTIONS = (
    *(AttentionCase(49, 72, 3, 16, 16, norm=norm) for norm in (True, False)),
    *(AttentionCase(16, 64, 1, 8, 12, norm=norm) for norm in (True, False)),
    *(AttentionCase(5, 33, 2, 20, 8, norm=norm) for norm in (True, False)),
    *(AttentionCase(21, 40, 2, 16, 16, mask=mask) for mask in ("float", "seen", "scores")),
    *(AttentionCase(21, 40, 2, 16, 16, mask=mask, causal=True) for mask in ("none", "seen")),
    AttentionCase(1, 64, 2, 16, 16, mask="float"), AttentionCase(18, 33, 4, 8, 12, mask="scores", causal=True),
)  # fmt: skip


def tiles_of(case: LinearCase) -> tuple[Tile, ...]:
    """Small ones, which take the interpreter less time; rows that are normed are one tile wide."""
    if not case.last:
        return (Tile(64, 64, 128, 1, 4, 1), Tile(16, 64, 64, 1, 4, 1), Tile(16, 32, 64, 2, 4, 1))
    wide = ((64, 32, 64), (16, 64, 128))
    return tuple(Tile(rows, step, c, -(-case.out // c), 4, 1) for rows, step, c in wide)


def every_case() -> dict[str, float]:
    found = {}
    for linear in LINEARS:
        for tile in tiles_of(linear):
            found[f"{tuple(linear)} {tuple(tile)}"] = share(*linear_result(linear, tile))
    for attention in ATTENTIONS:
        pairs = () if attention.heads % 2 else (Launch(64, 4, 1, 2),)
        for launch in (Launch(64, 4, 1), Launch(32, 4, 1), *pairs):
            found[f"{tuple(attention)} {tuple(launch)}"] = share(
                *attention_result(attention, launch)
            )
    return found


def poisoned(plain: Any) -> Any:
    """``new_empty`` that gives NaN."""

    def filled(self: Tensor, *size: Any, **fields: Any) -> Tensor:
        found: Tensor = plain(self, *size, **fields).fill_(torch.nan)
        return found

    return filled


if __name__ == "__main__":
    torch.Tensor.new_empty = poisoned(torch.Tensor.new_empty)  # type: ignore[method-assign]
    with set_wrap_triton_enabled(False):
        print(json.dumps(every_case()))  # noqa: T201
