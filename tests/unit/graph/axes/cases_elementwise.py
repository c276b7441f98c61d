"""Cases of ops that work element by element.

Each op stands between two layers, where any value at a removed unit is fine, and before a sum,
where it must be zero.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from tests.unit.graph.axes.micro import Case, Net

Apply = Callable[[Net, fx.Node], fx.Node]
A = {"a": (6, "neurons")}
SUM = ("aten.sum", "sums over units that are not zero")


def through(apply: Apply) -> Callable[[Net], fx.Node]:
    """Linear, op, linear."""
    return lambda n: n.lin("b", apply(n, n.lin("a", n.x(), 6)), 3)


def summed(apply: Apply) -> Callable[[Net], fx.Node]:
    """Linear, op, sum over the width."""
    return lambda n: n("sum.dim_IntList", apply(n, n.lin("a", n.x(), 6)), [-1])


def unary(op: str, *args: Any, pre: str = "", form: str = "", **kwargs: Any) -> Apply:
    """An op on the width, behind another one where it is not defined everywhere."""

    def apply(n: Net, a: fx.Node) -> fx.Node:
        found: fx.Node = n(f"{op}.{form or 'default'}", n(pre, a) if pre else a, *args, **kwargs)
        return found

    return apply


def keeps(op: str, apply: Apply, note: str = "") -> list[Case]:
    """Zero stays zero, so that even a sum over the width loses nothing."""
    return [Case(op=op, note=note, build=summed(apply), widths=A)]


def loses(op: str, apply: Apply, note: str = "", *, breaks: bool = True) -> list[Case]:
    """Zero becomes another number, or may."""
    return [
        Case(op=op, note=f"{note} between layers", build=through(apply), widths=A),
        Case(
            op=op,
            note=f"{note} summed",
            build=summed(apply),
            pinned={("a.weight", 0): SUM},
            breaks=breaks,
        ),
    ]


def pole(
    op: str, apply: Apply, note: str = "", text: str = "is infinite at zero", at: str = "a.weight"
) -> Case:
    """Zero becomes infinite: the masked model would not be finite."""
    return Case(
        op=op,
        note=f"{note} at zero",
        build=through(apply),
        pinned={(at, 0): (f"aten.{op}", text)},
    )


def with_other(
    op: str,
    form: str = "Tensor",
    *,
    left: str = "",
    right: str = "",
    extra: tuple[Any, ...] = (),
) -> Apply:
    """An op of the width and of another layer's, each behind a function."""

    def apply(n: Net, a: fx.Node) -> fx.Node:
        c = n.lin("c", n.x(), 6)
        operands = (n(left, a) if left else a, n(right, c) if right else c)
        found: fx.Node = n(f"{op}.{form}", *operands, *extra)
        return found

    return apply


def compared(op: str, form: str = "Tensor", *, positive: bool = False) -> Apply:
    """Booleans of two layers as numbers, beside the width itself, which has an effect."""

    def apply(n: Net, a: fx.Node) -> fx.Node:
        c = n.lin("c", n.x(), 6)
        left, right = (n("gt.Scalar", v, 0.0) if positive else v for v in (a, c))
        found: fx.Node = n("add.Tensor", n.real(n(f"{op}.{form}", left, right)), a)
        return found

    return apply


def asked(op: str) -> Apply:
    """A question about each element, beside the element."""
    return lambda n, a: n("add.Tensor", n.real(n(op, a)), a)


KEEPS: dict[str, Apply] = {
    op: unary(op)
    for op in (
        "relu", "relu6", "gelu", "silu", "mish", "hardswish", "tanh", "leaky_relu", "elu", "selu",
        "celu", "neg", "abs", "square", "sin", "erf", "atan", "sinh", "asinh", "trunc",
        "floor", "ceil", "round", "sign", "sgn", "softshrink", "hardshrink", "rrelu", "clone",
        "contiguous", "detach", "alias", "lift_fresh_copy", "lift_fresh", "nan_to_num", "positive",
        "real", "resolve_conj",
    )
}  # fmt: skip
KEEPS |= {
    "sqrt": unary("sqrt", pre="abs"),
    "expm1": unary("expm1", pre="tanh"),
    "log1p": unary("log1p", pre="abs"),
    "tan": unary("tan", pre="tanh"),
    "asin": unary("asin", pre="tanh"),
    "to": unary("to", torch.float64, form="dtype"),
    "_to_copy": unary("_to_copy", dtype=torch.float64),
    "dropout": unary("dropout", 0.5, False),
    "feature_dropout": unary("feature_dropout", 0.5, False),
    "alpha_dropout": unary("alpha_dropout", 0.5, False),
}
LOSES: dict[str, Apply] = {
    op: unary(op)
    for op in (
        "exp", "sigmoid", "hardsigmoid", "cos", "cosh", "softplus", "log_sigmoid", "erfc", "exp2",
    )
} | {"acos": unary("acos", pre="tanh")}  # fmt: skip


def _halves(n: Net) -> fx.Node:
    return n.lin("b", n("glu", n.lin("a", n.x(), 8), -1), 3)


def _back(apply: Apply) -> Apply:
    """A float64 value as float32 again."""
    return lambda n, a: n.real(apply(n, a))


def _bits(op: str) -> Apply:
    """Integers of two layers."""

    def apply(n: Net, a: fx.Node) -> fx.Node:
        parts = [
            n("to.dtype", n("mul.Tensor", v, 8.0), torch.int32) for v in (a, n.lin("c", n.x(), 6))
        ]
        return n.real(n(f"{op}.Tensor", *parts))

    return apply


def _bitwise_not(n: Net, a: fx.Node) -> fx.Node:
    return n.real(n("bitwise_not", n("to.dtype", n("mul.Tensor", a, 8.0), torch.int32)))


def _where(n: Net, a: fx.Node) -> fx.Node:
    c = n.lin("c", n.x(), 6)
    found: fx.Node = n("where.self", n("gt.Tensor", a, c), a, n("neg", c))
    return found


def _filled(value: float) -> Apply:
    return lambda n, a: n("masked_fill.Scalar", a, n("gt.Scalar", a, 0.3), value)


def _addcmul(n: Net, a: fx.Node) -> fx.Node:
    c = n.lin("c", n.x(), 6)
    found: fx.Node = n("addcmul", a, c, n("sigmoid", c), value=0.5)
    return found


def _prelu(op: str, *shape: int) -> Apply:
    return lambda n, a: n(op, a, n.stored("slope", n.random(*shape).abs()))


def _like(op: str, *args: Any) -> Apply:
    return lambda n, a: n("add.Tensor", n(op, a, *args), a)


def _noise(op: str, *args: Any) -> Apply:
    """Random numbers whose value does not count: their floor, or zero times them."""

    def apply(n: Net, a: fx.Node) -> fx.Node:
        noise = n(op, a, *args)
        still = n("floor", noise) if op == "rand_like" else n("mul.Tensor", noise, 0.0)
        found: fx.Node = n("add.Tensor", still, a)
        return found

    return apply


def _onto(n: Net, a: fx.Node) -> fx.Node:
    found: fx.Node = n("copy", n("ones_like", a), a)
    return found


CASES: list[Case] = []
for _op, _apply in KEEPS.items():
    CASES += keeps(_op, _back(_apply) if _op in ("to", "_to_copy") else _apply)
for _op, _apply in LOSES.items():
    CASES += loses(_op, _apply)
for _op in ("isnan", "isinf", "isfinite", "logical_not"):
    CASES += loses(_op, asked(_op), breaks=_op in ("isfinite", "logical_not"))
CASES += loses("bitwise_not", _bitwise_not)
for _op in ("log", "log2", "log10", "rsqrt", "reciprocal"):
    CASES += [pole(_op, unary(_op, pre="square")), loses(_op, unary(_op, pre="sigmoid"))[0]]
CASES += [
    pole("logit", unary("logit", pre="tanh")),
    loses("logit", unary("logit", pre="sigmoid"))[0],
    *loses("logit", unary("logit", 1e-2), "clamped"),
]
for _op, _form in (
    ("add", "Tensor"), ("sub", "Tensor"), ("mul", "Tensor"), ("multiply", "Tensor"),
    *[(o, "default") for o in ("maximum", "minimum", "fmax", "fmin", "hypot")],
    ("logical_and", "default"), ("rsub", "Tensor"), ("max", "other"), ("min", "other"),
):  # fmt: skip
    _apply = with_other(_op, _form)
    CASES += keeps(_op, _apply if _op != "logical_and" else _back(_apply), "of two")
CASES += [
    *loses("logaddexp", with_other("logaddexp", "default")),
    *keeps("mul", with_other("mul", right="exp"), "by what is not zero"),
    *keeps("mul", unary("mul", 2.0, form="Tensor"), "by a number"),
    *keeps("add", unary("add", 0, form="Tensor"), "of 0"),
    *loses("add", unary("add", 0.5, form="Tensor"), "of a number"),
    *loses("sub", with_other("sub", right="exp"), "of what is not zero"),
    *loses("rsub", unary("rsub", 1.0, form="Scalar"), "from a number"),
    *loses("rsub", with_other("rsub", right="exp"), "from what is not zero"),
    *keeps("rsub", unary("rsub", 0, form="Scalar"), "from 0"),
]
for _op in ("bitwise_and", "__and__"):
    CASES += keeps(_op, _bits(_op), "of integers")
    CASES += loses(_op, compared(_op, positive=True), "of booleans", breaks=False)[:1]
for _op in ("bitwise_or", "bitwise_xor", "__or__"):
    CASES += loses(_op, compared(_op, positive=True), breaks=False)
for _op in ("logical_or", "logical_xor", "isclose"):
    CASES += loses(_op, compared(_op, "default"), breaks=_op == "isclose")
for _op in ("eq", "ne", "lt", "le", "gt", "ge", "greater", "less", "not_equal"):
    CASES += loses(_op, compared(_op), breaks=_op in ("eq", "le", "ge"))
for _op, _form in (
    ("div", "Tensor"), ("floor_divide", "default"), ("true_divide", "Tensor"), ("fmod", "Tensor"),
    ("remainder", "Tensor"), ("divide", "Tensor"),
):  # fmt: skip
    CASES += keeps(_op, with_other(_op, _form, right="exp"), "by what is not zero")
    CASES.append(
        pole(_op, with_other(_op, _form), "by a layer", "divides by units that are", "c.weight")
    )
CASES += [
    *keeps("div", unary("div", 2.0, form="Tensor"), "by a number"),
    *keeps("pow", unary("pow", 3.0, form="Tensor_Scalar"), "3"),
    *keeps("pow", unary("pow", 0.5, pre="abs", form="Tensor_Scalar"), "1/2"),
    *loses("pow", unary("pow", -0.5, pre="exp", form="Tensor_Scalar"), "-1/2"),
    pole("pow", unary("pow", -0.5, pre="square", form="Tensor_Scalar"), "-1/2"),
    *loses("pow", lambda n, a: n("pow.Scalar", 2.0, a), "of a number"),
    *loses("pow", with_other("pow", "Tensor_Tensor", left="sigmoid", right="tanh"), "of two"),
    *loses(
        "pow", with_other("pow", "Tensor_Tensor", left="abs", right="tanh"), "of two that vanish"
    ),
    pole(
        "pow",
        with_other("pow", "Tensor_Tensor", left="square", right="log_sigmoid"),
        "negative tensor",
    ),
    *keeps("clamp", unary("clamp", -0.5, 0.7)),
    *keeps("clamp", unary("clamp", None, 0.7), "above"),
    *loses("clamp", unary("clamp", 0.1, 0.7), "without 0"),
    *loses(
        "clamp", lambda n, a: n("clamp.Tensor", a, n("exp", n.lin("c", n.x(), 6))), "by a layer"
    ),
    *keeps("clip", unary("clip", -0.5, 0.7)),
    *keeps("hardtanh", unary("hardtanh", -0.5, 0.7)),
    *loses("hardtanh", unary("hardtanh", 0.2, 0.7), "without 0"),
    *keeps("clamp_min", unary("clamp_min", -0.5)),
    *loses("clamp_min", unary("clamp_min", 0.5), "without 0"),
    *keeps("clamp_max", unary("clamp_max", 0.5)),
    *loses("clamp_max", unary("clamp_max", -0.5), "without 0"),
    *keeps("threshold", unary("threshold", 0.1, 0.0)),
    *keeps("threshold", unary("threshold", -0.1, 4.0), "below 0"),
    *loses("threshold", unary("threshold", 0.1, 0.7), "with a number"),
    *loses("xlogy", with_other("xlogy", right="sigmoid"), breaks=False),
    *loses("xlogy", with_other("xlogy", right="abs"), "of two that vanish", breaks=False),
    pole(
        "xlogy",
        with_other("xlogy", left="exp", right="square"),
        "of what is not zero",
        at="c.weight",
    ),
    *keeps("where", _where),
    *keeps("masked_fill", _filled(0.0), "with 0"),
    *loses("masked_fill", _filled(0.7), "with a number", breaks=False),
    *keeps("addcmul", _addcmul),
    *keeps("lerp", with_other("lerp", "Scalar", extra=(0.3,))),
    *loses("lerp", with_other("lerp", "Scalar", right="exp", extra=(0.3,)), "to what is not zero"),
    *keeps("prelu", _prelu("prelu", 6), "a slope a unit"),
    *keeps("prelu", _prelu("prelu", 1), "one slope"),
    *keeps("_prelu_kernel", _prelu("_prelu_kernel", 1, 6)),
    Case(op="glu", build=_halves, widths={"a": (4, "neurons")}),
    *keeps("copy", _onto),
    *keeps("type_as", lambda n, a: n("type_as", a, n.x())),
    *keeps("zeros_like", _like("zeros_like")),
    *loses("ones_like", _like("ones_like")),
    *loses("full_like", _like("full_like", 0.5)),
    *keeps("full_like", _like("full_like", 0), "0"),
    *loses("fill", _like("fill.Scalar", 0.5)),
    *keeps("fill", _like("fill.Scalar", 0), "0"),
    *loses("rand_like", _noise("rand_like"), breaks=False),
    *loses("randn_like", _noise("randn_like"), breaks=False),
    *loses(
        "empty_like", lambda n, a: n("add.Tensor", n("fill.Scalar", n("empty_like", a), 2.0), a)
    ),
]
