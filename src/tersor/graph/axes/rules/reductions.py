"""Sums, means, extremes, norms over dimensions."""

from typing import Any

from tersor.graph.axes.labels import Dim, free
from tersor.graph.axes.rulebook import Call, Edit, Result, Shape, rewrite, rule
from tersor.graph.axes.rules.restoring import restore


def _reduced(value: Any, rank: int) -> list[int]:
    """The dimensions that go, from the front."""
    if value is None or value == []:
        return list(range(rank))
    dims = value if isinstance(value, list | tuple) else [value]
    return [d % rank for d in dims] if rank else []


def _rest(x: Shape, gone: list[int], keepdim: Any, *, zero: bool) -> Shape:
    return [
        free(1) if i in gone else Dim(d.rows, d.zero and zero)
        for i, d in enumerate(x)
        if keepdim or i not in gone
    ]


@rule("mean")
def mean(call: Call) -> Result:
    """A sum over n units divided by n: exact once it is rescaled."""
    x = call.dims("self")
    gone = _reduced(call["dim"], len(x))
    call.sum_over([x[i] for i in gone])
    return _rest(x, gone, call["keepdim"], zero=True)


@rewrite("mean")
def rescale_mean(edit: Edit) -> None:
    """The mean of the whole width: zeros count."""
    x = edit.dims("self")
    ratio = 1.0
    for i in _reduced(edit["dim"], len(x)):
        ratio *= edit.count(x[i]) / x[i].size
    edit.scale(ratio)


@rule("sum", "linalg_vector_norm", "norm", "nansum", "count_nonzero", "frobenius_norm")
def total(call: Call) -> Result:
    """Zeros add nothing."""
    x = call.dims("self")
    gone = _reduced(call["dim"], len(x))
    order = call["ord"] if "ord" in call.args else call["p"]
    if order is not None and not (isinstance(order, int | float) and order > 0):
        call.freeze([x[i] for i in gone], "a norm that zeros change")
    call.sum_over([x[i] for i in gone])
    return _rest(x, gone, call["keepdim"], zero=True)


@rule("var", "std", "var_mean", "std_mean")
def variance(call: Call) -> Result:
    """Exact once units are put back as zeros."""
    x = call.dims("self")
    gone = _reduced(call["dim"], len(x))
    call.sum_over([x[i] for i in gone])
    found = _rest(x, gone, call["keepdim"], zero=True)
    return [list(found), list(found)] if call.name.endswith("_mean") else found


@rewrite("var", "std", "var_mean", "std_mean")
def restore_units(edit: Edit) -> None:
    """The statistic of the whole width: zeros count."""
    restore(edit, {"self": _reduced(edit["dim"], len(edit.dims("self")))})


@rule("amax", "amin", "prod", "logsumexp", "all", "any", "argmax", "argmin", "median", "mode",
      "kthvalue")  # fmt: skip
def extreme(call: Call) -> Result:
    """What is removed may decide the result."""
    x = call.dims("self")
    gone = _reduced(call["dim"], len(x))
    call.freeze([x[i] for i in gone], "an extreme over it")
    zero = call.name in ("amax", "amin", "prod", "median", "mode", "kthvalue")
    return _with_places(call, _rest(x, gone, call["keepdim"], zero=zero))


def _with_places(call: Call, values: Shape) -> Result:
    """Values, and where they were found, if the op says so: places are not zero."""
    if not isinstance(call.node.meta["val"], list | tuple):
        return values
    return [values, [Dim(d.rows, zero=False) for d in values]]


@rule("max", "min")
def extreme_along(call: Call) -> Result:
    """Over a dimension with places, over all, or of two tensors."""
    if call["other"] is not None:
        from tersor.graph.axes.rules.elementwise import broadcast, every, tensors

        return broadcast(call, tensors(call), every)
    x = call.dims("self")
    gone = _reduced(call["dim"], len(x))
    call.freeze([x[i] for i in gone], "an extreme over it")
    return _with_places(call, _rest(x, gone, call["keepdim"], zero=True))


@rule("softmax", "log_softmax", "_softmax")
def softmax(call: Call) -> Result:
    """All units of the dimension share one sum of exponentials, which is not zero at zero."""
    x = call.dims("self")
    at = call.dim(call["dim"], len(x))
    found = [Dim(d.rows, zero=False) for d in x]
    if call.is_barred:  # minus infinity adds nothing to the sum
        found[at] = Dim(x[at].rows)
    else:
        call.freeze(x[at], "shares a softmax")
    return found


@rule("cumsum", "cumprod", "logcumsumexp", "cummax", "cummin")
def cumulative(call: Call) -> Result:
    """Order matters along the dimension."""
    x = call.dims("self")
    call.freeze(x[call.dim(call["dim"], len(x))], "a running sum over it")
    zero = call.name != "logcumsumexp"
    return _with_places(call, [Dim(d.rows, d.zero and zero) for d in x])


@rule("topk")
def choice(call: Call) -> Result:
    """Of units that are minus infinity once removed none is taken while enough others stay."""
    x, k = call.dims("self"), call["k"]
    at = call.dim(call["dim"], len(x))
    numbers = [user for user in call.node.users if user.args[1] == 1]
    enough = isinstance(k, int) and k < x[at].size and call.labels.are_single(x[at].rows)
    if not (call.is_barred and numbers and enough):
        return ranking(call)
    call.labels.require(x[at].rows, k)
    call.tag(x[at], "experts")
    call.numbers.update(dict.fromkeys(numbers, x[at]))
    return _with_places(call, [*x[:at], free(call.outs[0][at]), *x[at + 1 :]])


@rule("sort", "argsort", "msort")
def ranking(call: Call) -> Result:
    """Values compete along the dimension."""
    x = call.dims("self")
    at = 0 if call.name == "msort" else call.dim(call["dim"], len(x))
    call.freeze(x[at], "values compete over it")
    value = call.node.meta["val"]
    size = (call.outs[0] if isinstance(value, list | tuple) else call.out)[at]
    zero = call.name != "argsort"
    rest = [Dim(d.rows, d.zero and zero) for d in x]
    return _with_places(call, [*rest[:at], free(size), *rest[at + 1 :]])


@rule("cosine_similarity")
def cosine_similarity(call: Call) -> Result:
    """Zeros add nothing to the three sums."""
    a, b = call.dims("x1"), call.dims("x2")
    if [d.size for d in a] != [d.size for d in b]:
        call.freeze([*a, *b], "a broadcast inside cosine similarity")
        return call.blank()
    at = call.dim(call["dim"], len(a))
    for left, right in zip(a, b, strict=True):
        call.unify(left, right)
    call.sum_over([a[at], b[at]])
    return [
        Dim(p.rows, p.zero or q.zero) for i, (p, q) in enumerate(zip(a, b, strict=True)) if i != at
    ]
