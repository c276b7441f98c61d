"""Narrow linears: the definition against float64, weights as they are laid out, the op, and what is refused."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm, relu, silu

from tersor.core.errors import ShapeError
from tersor.kernels.epilogue import ACTIVATIONS
from tersor.kernels.narrow_linear import (
    LinearWeights,
    linear_weights,
    narrow_linear,
    narrow_linear_op,
    narrow_linear_reference,
)

# A unit in the last place, halved: what one rounding moves a number by, relative to it; below normal numbers.
HALF_UNIT = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
SMALL = {torch.float16: 2.0**-25, torch.bfloat16: 0.0}
ADDED = 2.0**-24  # of a product and its sum in float32
STEEPEST = 1.13  # slope of GELU and SiLU at most
ACTS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda y: y, "relu": relu, "gelu": gelu, "silu": silu,
    "gelu_tanh": lambda y: gelu(y, approximate="tanh"),
}  # fmt: skip
FIRST_EPS, LAST_EPS = 1e-5, 1e-3
Norm = tuple[Tensor, Tensor] | None


class Case(NamedTuple):
    """A layer as torch has it: float32, the weight rounded to the type that it is stored in."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    first: Norm = None
    activation: str = "none"
    added: Tensor | None = None
    last: Norm = None

    @property
    def made(self) -> LinearWeights:
        return linear_weights(
            self.weight, self.bias, dtype=self.x.dtype, first=self.first, last=self.last
        )

    @property
    def out(self) -> int:
        return self.weight.shape[0]


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def case(
    sizes: tuple[int, ...], inp: int, out: int, flags: tuple[int, int, int] = (0, 0, 0),
    activation: str = "none", dtype: torch.dtype = torch.float16,
) -> Case:  # fmt: skip
    """With a norm in front, an addition, a norm behind as flags say.

    The first one's scale of powers of two keeps the weight that it becomes part of exact.
    """
    first, added, last = flags
    weight = (drawn(1, out, inp) * inp**-0.5).to(dtype).float()
    powers = 2.0 ** torch.arange(inp).remainder(3)
    return Case(
        drawn(2, *sizes, inp).to(dtype), weight, drawn(3, out),
        (powers, drawn(4, inp)) if first else None, activation,
        drawn(5, *sizes, out).to(dtype) if added else None,
        (1 + 0.2 * drawn(6, out), drawn(7, out)) if last else None,
    )  # fmt: skip


def deviation_of(x: Tensor, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return (centred.square().mean(-1, keepdim=True) + eps).sqrt()


def computed(c: Case) -> Tensor:
    made = c.made
    return narrow_linear(
        c.x, *made[:3], c.added, *made[3:], c.out, c.activation, FIRST_EPS, LAST_EPS
    )


def wanted_of(c: Case) -> tuple[Tensor, Tensor]:
    """The definition in float64, and how far from it float32 sums and one rounding are at most."""
    x, weight, bias = c.x.double(), c.weight.double(), c.bias.double()
    inp = weight.shape[1]
    sums = x.abs() @ weight.abs().T
    y = x
    if c.first is not None:
        scale, shift = (t.double() for t in c.first)
        y = layer_norm(x, (inp,), scale, shift, FIRST_EPS)
        own, mean = weight * scale, x.mean(-1, keepdim=True)
        deviation = deviation_of(x, FIRST_EPS)
        # (x W - mean sums) / deviation: what cancels is as large as x W itself.
        sums = (x.abs() @ own.abs().T + mean.abs() * own.abs().sum(1)) / deviation
        bias = bias + weight @ shift
        y = y @ weight.T + c.bias.double()
        # The mean, too, is a sum in float32, as are squares; both are relative to the largest numbers.
        spread = x.abs().amax(-1, keepdim=True) / deviation
        sums = sums + spread * (own.sum(1).abs() + own.abs().sum(1)) + y.abs() * spread
    else:
        y = y @ weight.T + bias
    error = ADDED * (inp + 8) * (sums + bias.abs())
    y = ACTS[c.activation](y)
    error = STEEPEST * error + 8 * ADDED * y.abs()
    if c.added is not None:
        y = y + c.added.double()
        error = error + ADDED * y.abs()
    if c.last is not None:
        y, error = _normed(y, error, c.last)
    unit = HALF_UNIT[c.x.dtype]
    return y, error + unit * (y.abs() + error) + SMALL[c.x.dtype]


def _normed(y: Tensor, error: Tensor, norm: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """A mean and a deviation move by the largest error in a row at most."""
    scale, shift = (t.double() for t in norm)
    error = error + ADDED * (y.shape[-1] + 8) * y.abs().amax(-1, keepdim=True)
    plain = layer_norm(y, y.shape[-1:], eps=LAST_EPS)
    deviation = deviation_of(y, LAST_EPS)
    most = error.amax(-1, keepdim=True)
    found = plain * scale + shift
    return found, scale.abs() * (2 + plain.abs()) * most / deviation + 4 * ADDED * found.abs()


def check(c: Case) -> None:
    found = computed(c)
    wanted, bound = wanted_of(c)
    assert found.dtype == c.x.dtype
    assert found.shape == wanted.shape
    assert bool(((found.double() - wanted).abs() <= bound).all())


@pytest.mark.parametrize("dtype", list(HALF_UNIT))
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    "flags", [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 1, 1), (1, 1, 0), (1, 1, 1), (0, 0, 1)]
)
def test_definition_against_float64(
    flags: tuple[int, int, int], activation: str, dtype: torch.dtype
) -> None:
    check(case((2, 7), 72, 200, flags, activation, dtype))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 5), st.integers(1, 140), st.integers(1, 150), st.tuples(*[st.booleans()] * 3),
    st.sampled_from(ACTIVATIONS),
)  # fmt: skip
def test_any_size(
    rows: int, inp: int, out: int, flags: tuple[bool, bool, bool], activation: str
) -> None:
    check(case((rows,), inp, out, flags, activation))


@pytest.mark.parametrize("sizes", [(), (0,), (2, 0, 3), (2, 3, 4, 5)])
def test_any_dimensions_in_front(sizes: tuple[int, ...]) -> None:
    check(case(sizes, 40, 24, (1, 1, 1)))


@pytest.mark.parametrize("offset", [16.0, 64.0])
def test_rows_far_from_zero_stay_as_near(offset: float) -> None:
    """The norm is behind its product, where a mean of many deviations cancels."""
    c = case((9,), 192, 96, (1, 0, 0))
    c = c._replace(x=(c.x.float() + offset).half())
    wanted, bound = wanted_of(c)
    assert float(bound.max() / wanted.abs().max()) < 0.02  # else nothing would be said
    check(c)
    constant = c._replace(x=torch.full_like(c.x, offset))  # no deviation at all
    check(constant)


def test_zeros_give_what_the_bias_does() -> None:
    c = case((3,), 40, 24, (1, 0, 1), activation="relu")
    check(c._replace(x=torch.zeros_like(c.x)))


def test_x_with_gaps_is_read() -> None:
    c = case((4, 6), 40, 24, (1, 1, 0))
    wanted = computed(c)
    gaps = torch.stack([c.x, c.x], -1)[..., 0]
    turned = c.x.transpose(0, 1).contiguous().transpose(0, 1)
    for x in (gaps, turned):
        assert not x.is_contiguous()
        assert torch.equal(computed(c._replace(x=x)), wanted)


@pytest.mark.parametrize("has_last", [False, True])
@pytest.mark.parametrize("sizes", [(1, 5, 24), (5, 24), (24,), (1,), (), (3, 1, 24)], ids=str)
def test_what_is_added_is_broadcast(sizes: tuple[int, ...], has_last: bool) -> None:
    c = case((3, 5), 40, 24, (0, 0, has_last))
    added = drawn(9, *sizes).half()
    check(c._replace(added=added))
    whole = computed(c._replace(added=added.expand(3, 5, 24)))
    assert torch.equal(computed(c._replace(added=added)), whole)


def test_what_has_more_elements_is_added_behind() -> None:
    c = case((1, 5), 40, 24, activation="gelu")
    added = drawn(9, 3, 5, 24).half()
    found = computed(c._replace(added=added))
    assert torch.equal(found, computed(c) + added)
    wide = c._replace(added=added.float())  # another type, as torch adds it
    assert computed(wide).dtype == torch.float32
    assert torch.equal(computed(wide), computed(c) + added.float())
    assert torch.equal(
        computed(c._replace(added=torch.ones(1, dtype=torch.int64))), computed(c) + 1
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_what_has_more_elements_is_normed_behind(dtype: torch.dtype) -> None:
    c = case((1, 5), 40, 24, (1, 0, 1), activation="gelu")
    assert c.last is not None
    added = drawn(9, 3, 5, 24).to(dtype)
    found = computed(c._replace(added=added))
    wide = computed(c._replace(last=None)) + added
    norm = (t.to(dtype) for t in c.last)
    assert found.dtype == dtype
    assert torch.equal(found, layer_norm(wide, (24,), *norm, LAST_EPS))


def test_weights_are_laid_out_and_filled_up() -> None:
    c = case((1,), 72, 200, (1, 0, 1))
    made = c.made
    assert c.first is not None
    assert c.last is not None
    scale, shift = c.first
    assert made.weight.shape == (128, 256)
    assert made.weight.is_contiguous()
    assert torch.equal(made.weight[:72, :200].float(), (c.weight * scale).T)
    assert not made.weight[72:].any()
    assert not made.weight[:, 200:].any()
    moved = (c.bias.double() + c.weight.double() @ shift.double()).float()
    assert torch.equal(made.bias[:200], moved)
    assert made.sums is not None
    assert torch.equal(made.sums, made.weight.double().sum(0).float())
    for found, given_ in ((made.scale, c.last[0]), (made.shift, c.last[1]), (made.bias, moved)):
        assert found is not None
        assert found.dtype == torch.float32
        assert torch.equal(found[:200], given_)
        assert not found[200:].any()


def test_sums_are_those_of_the_weight_as_it_is_stored() -> None:
    """Else a row's mean would come back, times what rounding took."""
    weight = drawn(1, 24, 40)
    made = linear_weights(weight, None, dtype=torch.bfloat16, first=(None, None))
    assert made.sums is not None
    assert torch.equal(
        made.sums[:24].double(), made.weight[:, :24].double().sum(0).float().double()
    )
    assert not torch.equal(made.sums[:24], weight.double().sum(1).float())


def test_what_is_not_given_is_neutral() -> None:
    weight = drawn(1, 24, 40).half().float()
    bare = linear_weights(weight, None, dtype=torch.float16)
    assert (bare.sums, bare.scale, bare.shift) == (None, None, None)
    assert not bare.bias.any()
    made = linear_weights(weight, None, dtype=torch.float16, first=(None, None), last=(None, None))
    assert torch.equal(made.weight, bare.weight)
    assert not made.bias.any()
    assert made.scale is not None
    assert made.shift is not None
    assert bool((made.scale[:24] == 1).all())
    assert not made.shift.any()
    x = drawn(2, 3, 40).half()
    found = narrow_linear(x, *made[:3], None, *made[3:], 24, "none", FIRST_EPS, LAST_EPS)
    whole = linear_weights(
        weight, torch.zeros(24), dtype=torch.float16,
        first=(torch.ones(40), torch.zeros(40)), last=(torch.ones(24), torch.zeros(24)),
    )  # fmt: skip
    again = narrow_linear(x, *whole[:3], None, *whole[3:], 24, "none", FIRST_EPS, LAST_EPS)
    assert torch.equal(found, again)


def test_outputs_beyond_the_weight_are_zeros() -> None:
    """So that a next layer reads eights."""
    c = case((5,), 40, 21, activation="gelu")
    made = c.made
    wide = narrow_linear(c.x, *made[:3], None, *made[3:], 24, "gelu", 0.0, 0.0)
    assert torch.equal(wide[:, :21], computed(c))
    assert not wide[:, 21:].any()
    after = case((5,), 21, 16).made
    read = (*after[:3], None, *after[3:], 16, "none", 0.0, 0.0)
    assert torch.equal(narrow_linear(wide, *read), narrow_linear(wide[:, :21], *read))


class Layer(nn.Module):
    def __init__(self, c: Case) -> None:
        super().__init__()
        self.c, self.made = c, c.made

    def forward(self, x: Tensor) -> Tensor:
        c, made = self.c, self.made
        return narrow_linear(
            x, *made[:3], c.added, *made[3:], c.out, c.activation, FIRST_EPS, LAST_EPS
        )


@pytest.mark.parametrize("has_all", [False, True])
def test_compilers_see_one_op(has_all: bool) -> None:
    c = case((2, 5), 40, 24, (has_all, has_all, has_all), activation="gelu")
    made = c.made
    arguments = (c.x, *made[:3], c.added, *made[3:], 24, "gelu", FIRST_EPS, LAST_EPS)
    torch.library.opcheck(
        narrow_linear_op(), arguments, test_utils=("test_schema", "test_faketensor")
    )
    wanted = narrow_linear_reference(*arguments)
    assert torch.equal(narrow_linear_op()(*arguments), wanted)
    program = torch.export.export(Layer(c), (c.x,))
    assert torch.ops.tersor.narrow_linear.default in [n.target for n in program.graph.nodes]
    assert torch.equal(program.module()(c.x), wanted)


class Added(Layer):
    def forward(self, x: Tensor, added: Tensor) -> Tensor:  # type: ignore[override]
        c, made = self.c, self.made
        return narrow_linear(x, *made[:3], added, *made[3:], c.out, "gelu", FIRST_EPS, LAST_EPS)


@pytest.mark.parametrize("shape", [(6, 5, 24), (5, 24), (24,)], ids=str)
def test_any_number_of_rows(shape: tuple[int, ...]) -> None:
    c = case((6, 5), 40, 24, (1, 0, 1), activation="gelu")
    layer, added = Added(c), drawn(9, *shape).half()
    auto = torch.export.Dim.AUTO
    sizes = tuple(dict.fromkeys(range(t.dim() - 1), auto) for t in (c.x, added))
    program = torch.export.export(layer, (c.x, added), dynamic_shapes=sizes, strict=False)
    for rows in (6, 4, 2):
        x = drawn(8, rows, 5, 40).half()
        other = added[:rows] if len(shape) == 3 else added
        assert torch.equal(program.module()(x, other), layer(x, other))


def weights(out: int = 24, inp: int = 40, **changed: Any) -> dict[str, Any]:
    return {"weight": torch.zeros(out, inp), "bias": None, "dtype": torch.float16, **changed}


PAIR = (None, None)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (weights(dtype=torch.float32), "found type torch.float32, wanted float16 or bfloat16"),
        (
            weights(513, last=PAIR),
            "found 40 channels to 513, wanted at most 1024 with a norm in front and 512 with one behind",
        ),
        (weights(24, 1025, first=PAIR), "found 1025 channels to 24, wanted at most 1024 with"),
        (weights(bias=torch.zeros(23)), r"found vectors \[\(23,\)\] beside a weight \(24, 40\)"),
        (
            weights(first=(torch.zeros(24), None)),
            r"found vectors \[None, \(24,\), None\] beside a weight",
        ),
        (
            weights(last=(None, torch.zeros(40))),
            r"found vectors \[None, None, \(40,\)\] beside a weight",
        ),
        (weights(bias=torch.zeros(24, 1)), r"found vectors \[\(24, 1\)\]"),
    ],
)
def test_weights_that_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        linear_weights(**fields)


def test_norms_at_their_widest() -> None:
    linear_weights(torch.zeros(512, 1024), None, dtype=torch.float16, first=PAIR, last=PAIR)
    linear_weights(torch.zeros(2048, 1025), None, dtype=torch.float16)


Change = Callable[[Tensor, LinearWeights], tuple[Tensor, LinearWeights]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, w: (x.float(), w), "found x in torch.float32 and a weight in torch.float16"),
        (lambda x, w: (x.bfloat16(), w), "found x in torch.bfloat16 and a weight in torch.float16"),
        (
            lambda x, w: (x, w._replace(weight=w.weight[:40])),
            r"found a weight \(40, 128\) and a bias \(128,\) for 24 outputs, wanted what linear_weights",
        ),
        (
            lambda x, w: (x, w._replace(weight=w.weight[:, :24], bias=w.bias[:24])),
            r"found a weight \(64, 24\) and a bias \(24,\) for 24",
        ),
        (lambda x, w: (x, w._replace(bias=w.bias[:24])), r"and a bias \(24,\) for 24 outputs"),
        (lambda x, w: (x[:, :0], w), r"found x \(3, 0\) for a weight of 64 inputs"),
        (lambda x, w: (torch.cat([x, x], 1), w), r"found x \(3, 80\) for a weight of 64 inputs"),
        (lambda x, w: (x[0, 0], w), r"found x \(\) for a weight of 64 inputs"),
        (
            lambda x, w: (x.new_empty(1).expand(2**24, 40), w),
            "numbers a row, wanted at most 2147483647 elements; split the batch",
        ),
    ],
)
def test_calls_that_are_refused(change: Change, message: str) -> None:
    c = case((3,), 40, 24)
    x, made = change(c.x, c.made)
    with pytest.raises(ShapeError, match=message):
        narrow_linear(x, *made[:3], None, *made[3:], 24, "none", 0.0, 0.0)


@pytest.mark.parametrize("width", [0, -1, 129])
def test_outputs_that_there_are_not(width: int) -> None:
    c = case((3,), 40, 24)
    made = c.made
    with pytest.raises(ShapeError, match=f"for {width} outputs, wanted what linear_weights gives"):
        narrow_linear(c.x, *made[:3], None, *made[3:], width, "none", 0.0, 0.0)


def test_an_activation_that_there_is_not() -> None:
    c = case((3,), 40, 24)
    made = c.made
    with pytest.raises(ShapeError, match=r"found activation 'tanh', wanted one of .*'gelu'"):
        narrow_linear(c.x, *made[:3], None, *made[3:], 24, "tanh", 0.0, 0.0)
