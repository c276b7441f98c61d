"""Ops that work element by element, with broadcasting."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

from tersor.graph.axes.labels import Dim, free
from tersor.graph.axes.rulebook import Call, Result, Shape, rule

Zero = Callable[[Sequence[Dim | None]], bool]  # operands of one dimension; None: constant along it

# f(0) = 0 for every setting.
_KEEPS_ZERO = (
    "relu", "relu6", "gelu", "silu", "mish", "hardswish", "tanh", "leaky_relu", "elu", "selu",
    "celu", "neg", "abs", "square", "sin", "sqrt", "erf", "tan", "asin", "atan", "sinh", "asinh",
    "expm1", "log1p", "trunc", "floor", "ceil", "round", "sign", "sgn", "softshrink", "hardshrink",
    "rrelu", "clone", "contiguous", "to", "_to_copy", "dropout", "feature_dropout",
    "alpha_dropout", "detach", "alias", "lift_fresh_copy", "lift_fresh", "nan_to_num", "positive",
    "real", "resolve_conj",
)  # fmt: skip
# Finite at 0, but not 0 there, or not always.
_LOSES_ZERO = (
    "exp", "sigmoid", "hardsigmoid", "cos", "cosh", "softplus", "log_sigmoid", "erfc", "exp2",
    "logical_not", "bitwise_not", "isnan", "isinf", "isfinite", "acos",
)  # fmt: skip
_POLES = ("log", "log2", "log10", "rsqrt", "reciprocal")  # infinite at 0
_SUMS = ("add", "sub", "rsub", "maximum", "minimum", "fmax", "fmin", "hypot")
_PRODUCTS = ("mul", "logical_and", "bitwise_and", "__and__", "multiply")
_COMPARISONS = (
    "eq", "ne", "lt", "le", "gt", "ge", "logical_or", "bitwise_or", "logical_xor", "bitwise_xor",
    "__or__", "greater", "less", "not_equal", "isclose", "logaddexp",
)  # fmt: skip


def broadcast(call: Call, operands: Sequence[Shape | None], zero: Zero) -> Shape:
    """The result's dimensions; ``None`` stands for a number."""
    sizes = call.out
    found: Shape = []
    for i, size in enumerate(sizes):
        column = [_at(shape, i - len(sizes), size) for shape in operands]
        present = [d for d in column if d is not None]
        if size == 1 or not present:
            found.append(free(size))
            continue
        labelled = next((d for d in present if not d.is_free), present[0])
        for other in present:
            call.unify(labelled, other)
        found.append(labelled if labelled.is_free else Dim(labelled.rows, zero(column)))
    return found


def _at(shape: Shape | None, offset: int, size: int) -> Dim | None:
    """An operand's dimension counted from the right; None where it is constant."""
    if shape is None or -offset > len(shape):
        return None
    dim = shape[offset]
    return None if dim.size != size else dim


def every(column: Sequence[Dim | None]) -> bool:
    """Zero where all operands are."""
    return all(d is not None and d.zero for d in column)


def some(column: Sequence[Dim | None]) -> bool:
    """Zero where any operand is."""
    return any(d is not None and d.zero and not d.is_free for d in column)


def never(_: Sequence[Dim | None]) -> bool:
    """Not zero."""
    return False


def tensors(call: Call) -> list[Shape]:
    """The dimensions of all tensor inputs."""
    found = (call.of(n) for n in call.node.all_input_nodes)
    return [shape for shape in found if shape is not None]


@rule(*_KEEPS_ZERO)
def keeps_zero(call: Call) -> Result:
    """f(0) = 0."""
    return broadcast(call, [_first(call)], every)


@rule(*_LOSES_ZERO)
def loses_zero(call: Call) -> Result:
    """f(0) is another finite number."""
    return broadcast(call, [_first(call)], never)


@rule(*_POLES)
def pole(call: Call) -> Result:
    """Infinite at 0: what is removed would not be finite in the masked model."""
    first = _first(call)
    call.freeze([d for d in first if d.zero], "is infinite at zero")
    return broadcast(call, [first], never)


@rule("logit")
def logit(call: Call) -> Result:
    """Infinite at 0, unless x is clamped away from it."""
    return loses_zero(call) if call["eps"] is not None else pole(call)


def _first(call: Call) -> Shape:
    name = next(iter(call.args))
    return call.dims(name)


@rule(*_SUMS)
def add(call: Call) -> Result:
    """Zero only if all operands are, numbers included."""
    return broadcast(call, [_operand(call, "self"), _operand(call, "other")], every)


def _operand(call: Call, name: str) -> Shape | None:
    """A tensor's dimensions; a number that is 0 does not count against zero."""
    value = call[name]
    if isinstance(value, fx.Node):
        return call.maybe(name)
    return [Dim(d.rows, zero=True) for d in call.dims("self")] if value == 0 else None


@rule(*_PRODUCTS)
def mul(call: Call) -> Result:
    """Zero where any operand is."""
    return broadcast(call, [call.maybe("self"), call.maybe("other")], some)


@rule("div", "floor_divide", "true_divide", "fmod", "remainder", "divide")
def div(call: Call) -> Result:
    """Zero where the numerator is; a denominator that becomes zero is no number."""
    above, below = call.maybe("self"), call.maybe("other")
    if below is not None:
        call.freeze([d for d in below if d.zero], "divides by units that are zero when removed")
    return broadcast(call, [above, below], lambda c: c[0] is not None and c[0].zero)


@rule("pow")
def power(call: Call) -> Result:
    """A positive power keeps zero, a negative one is infinite there."""
    exponent = call["exponent"]
    keeps = isinstance(exponent, int | float) and exponent > 0
    base = call.maybe("self")
    if base is not None and not keeps and exponent != 0:
        call.freeze(_poles(base, call.maybe("exponent")), "is infinite at zero")
    return broadcast(call, tensors(call), every if keeps else never)


def _poles(x: Shape, other: Shape | None) -> Shape:
    """Dimensions where x is zero and the other operand is not: 0 ** 0 and 0 log 0 are finite."""
    finite = {-i for i, d in enumerate((other or [])[::-1], 1) if d.zero and not d.is_free}
    return [d for i, d in enumerate(x) if d.zero and i - len(x) not in finite]


@rule("xlogy")
def xlogy(call: Call) -> Result:
    """Zero at x = 0, and infinite at y = 0 where x is not zero."""
    x, y = call.maybe("self"), call.maybe("other")
    if y is not None:
        call.freeze(_poles(y, x), "is infinite at zero")
    return broadcast(call, [x, y], never)


@rule("clamp", "hardtanh", "clip")
def clamp(call: Call) -> Result:
    """Keeps zero if zero lies within the bounds."""
    low, high = (call[a] if call[a] is not None else call[b] for a, b in _BOUNDS)
    return broadcast(call, tensors(call), every if _holds_zero(low, high) else never)


_BOUNDS = (("min", "min_val"), ("max", "max_val"))


@rule("clamp_min")
def clamp_min(call: Call) -> Result:
    """Keeps zero if the bound is not above it."""
    return broadcast(call, tensors(call), every if _holds_zero(call["min"], None) else never)


@rule("clamp_max")
def clamp_max(call: Call) -> Result:
    """Keeps zero if the bound is not below it."""
    return broadcast(call, tensors(call), every if _holds_zero(None, call["max"]) else never)


def _holds_zero(low: Any, high: Any) -> bool:
    numbers = [(-math.inf if low is None else low), (math.inf if high is None else high)]
    if not all(isinstance(n, int | float) for n in numbers):
        return False
    return bool(numbers[0] <= 0 <= numbers[1])


@rule("threshold")
def threshold(call: Call) -> Result:
    """X above the threshold, else a number."""
    keeps = call["value"] == 0 or call["threshold"] < 0
    return broadcast(call, [call.dims("self")], every if keeps else never)


@rule(*_COMPARISONS)
def compare(call: Call) -> Result:
    """Not zero."""
    return broadcast(call, tensors(call), never)


@rule("where")
def where(call: Call) -> Result:
    """Zero where both branches are; the condition only goes along."""
    operands = [call.maybe(name) for name in ("condition", "self", "other")]
    return broadcast(call, operands, lambda c: every(c[1:]))


@rule("masked_fill")
def masked_fill(call: Call) -> Result:
    """Zero where x is and the filling is 0."""
    keeps = call["value"] == 0
    return broadcast(
        call,
        [call.dims("self"), call.dims("mask")],
        lambda c: keeps and c[0] is not None and c[0].zero,
    )


@rule("addcmul")
def addcmul(call: Call) -> Result:
    """Sum a + b * c."""
    operands = [call.dims(n) for n in ("self", "tensor1", "tensor2")]
    return broadcast(call, operands, lambda c: every(c[:1]) and some(c[1:]))


@rule("lerp")
def lerp(call: Call) -> Result:
    """Between a and b."""
    operands = [call.dims("self"), call.dims("end"), call.maybe("weight")]
    return broadcast(call, operands, lambda c: every(c[:2]))


@rule("prelu")
def prelu(call: Call) -> Result:
    """One slope a channel, or one for all."""
    x, slope = call.dims("self"), call.dims("weight")
    if len(slope) == 1 and slope[0].size > 1:
        call.unify(x[1] if len(x) > 1 else x[0], slope[0])
    return x


@rule("_prelu_kernel")
def prelu_kernel(call: Call) -> Result:
    """Slopes in a shape that broadcasts."""
    return broadcast(call, [call.dims("self"), call.dims("weight")], lambda c: every(c[:1]))


@rule("glu")
def glu(call: Call) -> Result:
    """The first half of a dimension times the sigmoid of the second."""
    x = call.dims("self")
    at = call.dim(call["dim"], len(x))
    half = x[at].size // 2
    left, right = (Dim(part, x[at].zero) for part in (x[at].rows[:half], x[at].rows[half:]))
    call.unify(left, right)
    x[at] = left
    return x


@rule("copy")
def copy(call: Call) -> Result:
    """The source in the shape of the destination."""
    return broadcast(call, [call.dims("self"), call.dims("src")], lambda c: every(c[1:]))


@rule("type_as")
def type_as(call: Call) -> Result:
    """Only the type of the second operand counts."""
    return call.dims("self")


@rule("zeros_like", "ones_like", "full_like", "fill", "empty_like", "rand_like", "randn_like")
def like(call: Call) -> Result:
    """The size of the input, other values."""
    is_zero = call.name == "zeros_like" or call["fill_value"] == 0 or call["value"] == 0
    return [Dim(d.rows, is_zero) for d in call.dims(next(iter(call.args)))]
