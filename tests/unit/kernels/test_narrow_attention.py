"""Narrow attentions: the definition against float64, weights as they are laid out, the op, and what is refused."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import layer_norm, scaled_dot_product_attention

from tersor.core.errors import ShapeError
from tersor.kernels.narrow_attention import (
    AttentionWeights,
    attention_weights,
    narrow_attention,
    narrow_attention_op,
    narrow_attention_reference,
)

# A unit in the last place, halved: what one rounding moves a number by, relative to it; below normal numbers.
HALF_UNIT = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
SMALL = {torch.float16: 2.0**-25, torch.bfloat16: 0.0}
ADDED = 2.0**-24  # of a product and its sum in float32
EPS = 1e-5
Part = tuple[Tensor, Tensor | None]


class Case(NamedTuple):
    """An attention as torch has it: float32, weights rounded to the type that they are stored in."""

    x: Tensor
    parts: tuple[Part, Part, Part]
    heads: int
    norm: tuple[Tensor, Tensor] | None
    scale: float

    @property
    def made(self) -> AttentionWeights:
        return attention_weights(self.parts, self.heads, dtype=self.x.dtype, norm=self.norm)

    @property
    def size(self) -> int:
        return self.parts[2][0].shape[0] // self.heads


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def case(
    batch: int, tokens: int, inp: int, heads: tuple[int, int, int], *, norm: bool = True,
    dtype: torch.dtype = torch.float16,
) -> Case:  # fmt: skip
    """Heads, and sizes of queries and values; a norm's scale of powers of two keeps weights exact."""
    count, size, value = heads
    weights = [
        (drawn(1 + i, count * n, inp) * inp**-0.5).to(dtype).float()
        for i, n in enumerate((size, size, value))
    ]
    parts = (
        (weights[0], 0.3 * drawn(4, count * size)),
        (weights[1], None),
        (weights[2], 0.3 * drawn(5, count * value)),
    )
    powers = 2.0 ** torch.arange(inp).remainder(2)
    x = drawn(6, batch, tokens, inp).to(dtype)
    scale = (
        0.25 * size**-0.5
    )  # scores of about one, whose exponentials move as little as what they are of
    return Case(x, parts, count, (powers, 0.3 * drawn(7, inp)) if norm else None, scale)


def computed(c: Case, mask: Tensor | None = None, *, causal: bool = False) -> Tensor:
    eps = None if c.norm is None else EPS
    return narrow_attention(c.x, *c.made, mask, c.size, c.scale, eps, causal)


def wanted_of(
    c: Case, mask: Tensor | None = None, *, causal: bool = False
) -> tuple[Tensor, Tensor]:
    """The definition in float64, and how far from it the roundings between are at most."""
    unit, inp, tokens = HALF_UNIT[c.x.dtype], c.x.shape[2], c.x.shape[1]
    x = c.x.double()
    x_error = torch.zeros_like(x)
    if c.norm is not None:
        scale, shift = (t.double() for t in c.norm)
        plain = layer_norm(
            x, (inp,), eps=EPS
        )  # what is rounded; scale and shift are in the weights
        x_error = (unit * plain.abs() + SMALL[c.x.dtype]) * scale
        x = layer_norm(x, (inp,), scale, shift, EPS)
    values, errors = [], []
    for weight, bias in c.parts:
        own = weight.double()
        y = x @ own.T + (0.0 if bias is None else bias.double())
        error = x_error @ own.abs().T + 2 * ADDED * (inp + 8) * (x.abs() @ own.abs().T + y.abs())
        error = error + unit * (y.abs() + error) + SMALL[c.x.dtype]
        values.append(_heads(y, c.heads))
        errors.append(_heads(error, c.heads))
    (q, k, v), (q_error, k_error, v_error) = values, errors
    added = _added(mask, tokens, causal=causal)
    scores_error = c.scale * (
        q_error @ (k.abs() + k_error).transpose(2, 3) + q.abs() @ k_error.transpose(2, 3)
    )
    finite = torch.where(torch.isinf(added), 0.0, added).abs()
    scores_error = scores_error + ADDED * 16 * (c.scale * (q @ k.transpose(2, 3)).abs() + finite)
    wanted = scaled_dot_product_attention(q, k, v, attn_mask=added, scale=c.scale).nan_to_num()
    p = torch.softmax(q @ k.transpose(2, 3) * c.scale + added, 3).nan_to_num()
    # exp(e) moves a probability by e^e - 1, those that it is divided by the other way.
    worst = scores_error.masked_fill(torch.isinf(added), 0.0).amax(3, keepdim=True)
    relative = (1 + unit) * torch.exp(2 * worst) - 1
    # Probabilities are at most one before they are divided, and rounded there.
    error = relative * (p @ v.abs()) + (1 + relative) * (p @ v_error)
    error = error + SMALL[c.x.dtype] * v.abs().sum(2, keepdim=True)
    error = error + unit * (wanted.abs() + error) + SMALL[c.x.dtype]
    return wanted.transpose(1, 2).flatten(2), error.transpose(1, 2).flatten(2)


def _heads(y: Tensor, heads: int) -> Tensor:
    return y.unflatten(2, (heads, -1)).transpose(1, 2)


def _added(mask: Tensor | None, tokens: int, *, causal: bool) -> Tensor:
    found = torch.zeros(tokens, tokens, dtype=torch.float64)
    if mask is not None and mask.dtype == torch.bool:
        found = torch.where(mask, found, -math.inf)
    elif mask is not None:
        found = found + mask.double()
    later = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
    return found.masked_fill(later, -math.inf) if causal else found


def check(c: Case, mask: Tensor | None = None, *, causal: bool = False) -> None:
    found = computed(c, mask, causal=causal)
    wanted, bound = wanted_of(c, mask, causal=causal)
    assert found.dtype == c.x.dtype
    assert found.shape == wanted.shape
    assert bool(((found.double() - wanted).abs() <= bound).all())


@pytest.mark.parametrize("dtype", list(HALF_UNIT))
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("heads", [(3, 16, 16), (1, 8, 12), (2, 20, 8), (1, 128, 1)])
def test_definition_against_float64(
    heads: tuple[int, int, int], norm: bool, dtype: torch.dtype
) -> None:
    c = case(2, 9, 40, heads, norm=norm, dtype=dtype)
    check(c)
    check(c, causal=True)
    if dtype == torch.float16:  # the worst of all roundings at once: in fewer bits that says little
        wanted, bound = wanted_of(c)
        assert float(bound.max() / wanted.abs().max()) < 0.15


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 3), st.integers(1, 20), st.integers(1, 70),
    st.tuples(st.integers(1, 3), st.integers(1, 20), st.integers(1, 20)), st.booleans(),
)  # fmt: skip
def test_any_size(
    batch: int, tokens: int, inp: int, heads: tuple[int, int, int], causal: bool
) -> None:
    check(case(batch, tokens, inp, heads), causal=causal)


def masks(batch: int, heads: int, tokens: int) -> dict[str, Tensor]:
    lengths = torch.arange(batch) * 3 + 1
    seen = (torch.arange(tokens)[None] < lengths[:, None])[:, None, None]
    return {
        "a row": drawn(8, tokens).half(),
        "one for all": drawn(8, tokens, tokens).half(),
        "a head": drawn(8, heads, tokens, tokens).half(),
        "a sample": (~seen).half() * -1e4,
        "every score": drawn(8, batch, heads, tokens, tokens).half(),
        "a query": drawn(8, batch, 1, tokens, 1).half(),
        "infinite": torch.zeros(batch, 1, 1, tokens).half().masked_fill(~seen, -math.inf),
        "seen": seen,
        "seen by all": torch.ones(tokens, tokens, dtype=torch.bool).tril(2),
        "with gaps": torch.stack([drawn(8, tokens, tokens).half()] * 2, -1)[..., 0].T,
    }


@pytest.mark.parametrize("name", masks(2, 3, 7))
@pytest.mark.parametrize("causal", [False, True])
def test_masks_are_broadcast(name: str, causal: bool) -> None:
    c = case(2, 7, 24, (3, 8, 12))
    mask = masks(2, 3, 7)[name]
    check(c, mask, causal=causal)
    whole = mask.expand(2, 3, 7, 7)
    assert torch.equal(computed(c, mask, causal=causal), computed(c, whole, causal=causal))
    if name != "a query":  # which moves all scores of a query alike
        assert not torch.equal(computed(c, mask), computed(c))


@pytest.mark.parametrize("is_bool", [True, False])
@pytest.mark.parametrize("causal", [False, True])
def test_a_sample_that_sees_nothing_gets_zeros(is_bool: bool, causal: bool) -> None:
    c = case(3, 6, 24, (2, 8, 8))
    seen = torch.tensor([False, True, True])[:, None, None, None].expand(3, 1, 1, 6).clone()
    seen[1, ..., 0] = False  # the first query of a causal one sees nothing
    mask = seen if is_bool else torch.zeros(3, 1, 1, 6).half().masked_fill(~seen, -math.inf)
    check(c, mask, causal=causal)
    found = computed(c, mask, causal=causal)
    assert not found[0].any()
    assert bool(found[2].any(1).all())
    assert bool(found[1, 0].any()) != causal


def test_causal_is_what_its_mask_is() -> None:
    c = case(2, 9, 24, (2, 8, 8))
    tri = torch.ones(9, 9, dtype=torch.bool).tril()
    assert torch.equal(computed(c, causal=True), computed(c, tri))
    assert not torch.equal(computed(c, causal=True), computed(c))


def test_rows_far_from_zero_and_zeros() -> None:
    c = case(2, 5, 64, (2, 8, 8))
    check(c._replace(x=(c.x.float() + 64).half()))
    check(c._replace(x=torch.zeros_like(c.x)))


def test_scores_beyond_what_an_exponential_has() -> None:
    c = case(1, 6, 32, (1, 16, 16), norm=False)
    found = computed(c._replace(x=c.x * 30, scale=4.0))
    assert bool(torch.isfinite(found).all())
    _, _, (weight, bias) = c.parts
    assert bias is not None
    values = (c.x * 30).float() @ weight.T + bias
    best = (found.float()[:, :, None] - values[:, None]).abs().amax(3).amin(2)
    assert float(best.max()) <= 4 * HALF_UNIT[torch.float16] * float(values.abs().max())  # one each


def test_x_with_gaps_is_read() -> None:
    c = case(3, 6, 24, (2, 8, 8))
    turned = c.x.transpose(0, 1).contiguous().transpose(0, 1)
    assert not turned.is_contiguous()
    assert torch.equal(computed(c._replace(x=turned)), computed(c))


def test_weights_are_laid_out_and_filled_up() -> None:
    c = case(1, 3, 72, (3, 12, 20))
    made = c.made
    assert c.norm is not None
    assert made.weight.shape == (3, 3, 128, 32)
    assert made.bias.shape == (3, 3, 32)
    assert made.weight.is_contiguous()
    assert made.bias.dtype == torch.float32
    scale, shift = c.norm
    for i, (weight, bias) in enumerate(c.parts):
        n = weight.shape[0] // 3
        moved = weight.double() @ shift.double() + (0.0 if bias is None else bias.double())
        for head in range(3):
            rows = slice(head * n, (head + 1) * n)
            assert torch.equal(made.weight[head, i, :72, :n].float(), (weight * scale)[rows].T)
            assert torch.equal(made.bias[head, i, :n], moved[rows].float())
        assert not made.weight[:, i, 72:].any()
        assert not made.weight[:, i, :, n:].any()
        assert not made.bias[:, i, n:].any()


@pytest.mark.parametrize(
    ("size", "value", "wide"), [(1, 1, 16), (16, 17, 32), (33, 8, 64), (8, 65, 128)]
)
def test_sizes_of_heads_as_products_have_them(size: int, value: int, wide: int) -> None:
    assert case(1, 2, 8, (2, size, value)).made.weight.shape == (2, 3, 64, wide)


class Layer(nn.Module):
    def __init__(self, c: Case) -> None:
        super().__init__()
        self.made, self.size = c.made, c.size

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return narrow_attention(x, *self.made, mask, self.size, 0.3, EPS, False)


@pytest.mark.parametrize("name", ["a sample", "seen", "every score"])
def test_compilers_see_one_op(name: str) -> None:
    c = case(2, 7, 24, (3, 8, 12))
    mask = masks(2, 3, 7)[name]
    arguments = (c.x, *c.made, mask.expand(2, 3, 7, 7), c.size, 0.3, EPS, False)
    torch.library.opcheck(
        narrow_attention_op(), arguments, test_utils=("test_schema", "test_faketensor")
    )
    wanted = narrow_attention_reference(*arguments)
    assert torch.equal(narrow_attention_op()(*arguments), wanted)
    program = torch.export.export(Layer(c), (c.x, mask))
    assert torch.ops.tersor.narrow_attention.default in [n.target for n in program.graph.nodes]
    assert torch.equal(program.module()(c.x, mask), wanted)


def test_any_number_of_samples() -> None:
    c = case(4, 7, 24, (3, 8, 12))
    layer, mask = Layer(c), drawn(9, 4, 1, 1, 7).half()
    auto = torch.export.Dim.AUTO
    program = torch.export.export(
        layer, (c.x, mask), dynamic_shapes=({0: auto}, {0: auto}), strict=False
    )
    for batch in (4, 3, 2):
        x, given_ = c.x[:batch] * 2, mask[:batch] * 2
        assert torch.equal(program.module()(x, given_), layer(x, given_))


def weights(*shapes: tuple[int, int], **changed: Any) -> dict[str, Any]:
    given_ = shapes or ((16, 40),) * 3
    parts = tuple((torch.zeros(s), None) for s in given_)
    return {"parts": parts, "heads": 2, "dtype": torch.float16, **changed}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (weights(dtype=torch.float32), "found type torch.float32, wanted float16 or bfloat16"),
        (
            weights(heads=3),
            r"found weights \[\(16, 40\), .*\] for 3 heads, wanted \[heads \* n, inp\], n at most 128",
        ),
        (weights((16, 40), (16, 41), (16, 40)), r"\(16, 41\), \(16, 40\)\] for 2 heads, wanted"),
        (weights((16, 40), (18, 40), (16, 40)), r"\(18, 40\), .* equal for queries and keys"),
        (weights((258, 40), (258, 40), (16, 40)), r"n at most 128 .* leave the attention as it is"),
        (weights((16, 40), (16, 40), (258, 40)), r"\(258, 40\)\] for 2 heads"),
        (weights((1, 40), (1, 40), (1, 40)), r"\(1, 40\)\] for 2 heads"),
        (
            weights(*((16, 1025),) * 3, norm=(None, None)),
            "found 1025 channels, wanted at most 1024 with a norm",
        ),
    ],
)
def test_weights_that_are_refused(fields: dict[str, Any], message: str) -> None:
    parts, heads = fields.pop("parts"), fields.pop("heads")
    with pytest.raises(ShapeError, match=message):
        attention_weights(parts, heads, **fields)


Change = Callable[[Tensor, AttentionWeights], tuple[Tensor, AttentionWeights]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, w: (x.float(), w), "found x in torch.float32 and a weight in torch.float16"),
        (lambda x, w: (x.bfloat16(), w), "found x in torch.bfloat16 and a weight in torch.float16"),
        (
            lambda x, w: (x, w._replace(weight=w.weight[:, :2])),
            r"found a weight \(3, 2, 64, 16\) and a bias \(3, 3, 16\) for heads of 12, wanted what",
        ),
        (
            lambda x, w: (x, w._replace(weight=w.weight[:, :, :24])),
            r"found a weight \(3, 3, 24, 16\) and",
        ),
        (
            lambda x, w: (x, w._replace(weight=w.weight[..., :12], bias=w.bias[..., :12])),
            r"found a weight \(3, 3, 64, 12\) and a bias \(3, 3, 12\)",
        ),
        (lambda x, w: (x, w._replace(bias=w.bias[..., :12])), r"and a bias \(3, 3, 12\) for heads"),
        (lambda x, w: (x[0], w), r"found x \(7, 24\), wanted \[b, 1 to 128 tokens, 64 channels\]"),
        (lambda x, w: (x[:, :0], w), r"found x \(2, 0, 24\), wanted"),
        (lambda x, w: (x.repeat(1, 19, 1), w), r"found x \(2, 133, 24\), wanted \[b, 1 to 128"),
        (lambda x, w: (x.repeat(1, 1, 3), w), r"found x \(2, 7, 72\), wanted .* 64 channels"),
        (
            lambda x, w: (x.new_empty(1).expand(2**23, 7, 24), w),
            r"found x \(8388608, 7, 24\), wanted fewer samples",
        ),
    ],
)
def test_calls_that_are_refused(change: Change, message: str) -> None:
    c = case(2, 7, 24, (3, 8, 12))
    x, made = change(c.x, c.made)
    with pytest.raises(ShapeError, match=message):
        narrow_attention(x, *made, None, 12, 0.3, EPS, False)


@pytest.mark.parametrize("size", [0, 17])
def test_numbers_of_a_head_that_there_are_not(size: int) -> None:
    c = case(2, 7, 24, (3, 8, 12))
    with pytest.raises(ShapeError, match=f"for heads of {size}, wanted what attention_weights"):
        narrow_attention(c.x, *c.made, None, size, 0.3, EPS, False)


def test_a_mask_of_too_many_scores() -> None:
    c = case(2, 7, 24, (3, 8, 12))
    mask = torch.zeros(1, dtype=torch.bool).expand(2**20, 3, 32, 32)
    with pytest.raises(ShapeError, match=r"found a mask \(1048576, 3, 32, 32\), wanted at most"):
        narrow_attention(c.x, *c.made, mask, 12, 0.3, EPS, False)
