"""Linear maps: products with a weight, of two activations, convolutions, tables."""

import numpy as np

from tersor.graph.axes.labels import Dim, free
from tersor.graph.axes.rulebook import Call, Edit, Result, Shape, rewrite, rule
from tersor.graph.axes.rules.elementwise import broadcast, some


def contract(call: Call, a: Dim, b: Dim) -> None:
    """A sum of products over a dimension: one factor must be zero where units are gone."""
    call.unify(a, b)
    if not (a.zero or b.zero):
        call.freeze([a, b], "sums over units that are not zero when they are removed")


@rule("linear")
def linear(call: Call) -> Result:
    """Map y = x W^T + b."""
    x, w, bias = call.dims("input"), call.dims("weight"), call.maybe("bias")
    contract(call, w[-1], x[-1])
    call.tag(w[-1], "neurons")
    rest = _samples(x[:-1], bias)
    if len(w) == 1:
        return rest
    call.tag(w[0], "neurons")
    return [*rest, _out(call, w[0], bias)]


def _out(call: Call, rows: Dim, bias: Shape | None) -> Dim:
    if bias is None:
        return rows
    call.unify(rows, bias[0])
    return Dim(rows.rows, rows.zero and bias[0].zero)


@rule("matmul", "bmm", "mm", "mv", "dot")
def matmul(call: Call) -> Result:
    """Batches of matrix products."""
    b = call.maybe("other")
    names = [n for n, v in call.args.items() if n not in ("self", "out_dtype") and v is not None]
    a, b = call.dims("self"), b if b is not None else call.dims(names[0])
    contract(call, a[-1], b[-2] if len(b) > 1 else b[0])
    ends = ([a[-2]] if len(a) > 1 else []) + ([b[-1]] if len(b) > 1 else [])
    batches = [shape[:-2] for shape in (a, b) if len(shape) > 2]
    if not batches:
        return ends
    for shape in (a, b):
        if len(shape) >= 4:
            call.tag(shape[-3], "heads")
    return [*_batch(call, batches, len(call.out) - len(ends)), *ends]


def _batch(call: Call, batches: list[Shape], rank: int) -> Shape:
    found: Shape = []
    for i in range(-rank, 0):
        present = [s[i] for s in batches if -i <= len(s)]
        size = max(d.size for d in present)
        same = [d for d in present if d.size == size]
        for other in same[1:]:
            call.unify(same[0], other)
        labelled = next((d for d in same if not d.is_free), same[0])
        found.append(Dim(labelled.rows, some(list(same))))
    return found


@rule("addmm", "baddbmm", "addbmm")
def addmm(call: Call) -> Result:
    """Sum c + a b; addbmm sums over the batches, too."""
    names = ("mat1", "mat2") if call.name == "addmm" else ("batch1", "batch2")
    a, b, c = call.dims(names[0]), call.dims(names[1]), call.dims("self")
    contract(call, a[-1], b[-2])
    product = [a[-2], b[-1]]
    if call.name == "addbmm":
        contract(call, a[0], b[0])
    elif call.name == "baddbmm":
        product = [*_batch(call, [a[:1], b[:1]], 1), *product]
    return broadcast(call, [product, c], lambda col: all(d is not None and d.zero for d in col))


@rule("einsum")
def einsum(call: Call) -> Result:
    """Letters that meet are one dimension; letters that vanish are summed over."""
    left, arrow, right = str(call["equation"]).replace(" ", "").partition("->")
    shapes = [call.of(n) or [] for n in call["tensors"]]
    terms = left.split(",")
    if "..." in left or not arrow or any(len(set(t)) != len(t) for t in terms):
        for shape in shapes:
            call.freeze(shape, "einsum with an ellipsis, a diagonal or no result written out")
        return call.blank()
    dims: dict[str, list[Dim]] = {}
    for term, shape in zip(terms, shapes, strict=True):
        for letter, dim in zip(term, shape, strict=True):
            dims.setdefault(letter, []).append(dim)
    for letter, found in dims.items():
        for other in found[1:]:
            call.unify(found[0], other)
        if letter not in right and not any(d.zero for d in found):
            call.freeze(found, "sums over units that are not zero when they are removed")
    return [_letter(dims[letter]) for letter in right]


def _letter(found: list[Dim]) -> Dim:
    labelled = next((d for d in found if not d.is_free), found[0])
    return Dim(labelled.rows, any(d.zero and not d.is_free for d in found))


@rule("conv1d", "conv2d", "conv3d")
def convolution(call: Call) -> Result:
    """Channels meet the weight; kernel and space stay."""
    x, w, bias = call.dims("input"), call.dims("weight"), call.maybe("bias")
    at = len(x) - len(w) + 1  # 1, or 0 without a batch
    groups = int(call["groups"] or 1)
    _freeze_windows(call, x[at + 1 :], w[2:])
    for dim in (x[at], w[0], w[1]):
        call.tag(dim, "channels")
    out = _grouped(call, x[at], w, groups)
    space = [free(n) for n in call.out[at + 1 :]]
    return [*_samples(x[:at], bias), _out(call, out, bias), *space]


def _samples(dims: Shape, bias: Shape | None) -> Shape:
    """Dimensions that a map leaves alone: a bias is added at removed elements, too."""
    return [Dim(d.rows, d.zero and bias is None) for d in dims]


def _freeze_windows(call: Call, space: Shape, kernel: Shape) -> None:
    call.freeze(space, "a window slides over it")
    call.freeze(kernel, "kernel")


def _grouped(call: Call, channels: Dim, w: Shape, groups: int) -> Dim:
    if groups == 1:
        contract(call, w[1], channels)
        return w[0]
    c, o = channels.size // groups, w[0].size // groups
    if c == 1:  # depthwise: every output of a channel goes with it
        call.unify(w[0], Dim(np.repeat(channels.rows, o, axis=0), channels.zero))
        return w[0]
    for k in range(groups):
        part = channels.rows[k * c : (k + 1) * c]
        contract(call, w[1], Dim(part, channels.zero))
        if k:
            call.unify(Dim(w[0].rows[:o]), Dim(w[0].rows[k * o : (k + 1) * o]))
    call.tag(w[0], "groups")
    return w[0]


@rewrite("conv1d", "conv2d", "conv3d")
def shrink_groups(edit: Edit) -> None:
    """A depthwise convolution has as many groups as channels; others keep their groups."""
    x, w, groups = edit.dims("input"), edit.dims("weight"), int(edit["groups"] or 1)
    channels = x[len(x) - len(w) + 1]
    if groups > 1 and groups == channels.size:
        edit.set(groups=edit.count(channels))


@rule("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def transposed_convolution(call: Call) -> Result:
    """The weight is [in, out / groups, kernel]."""
    x, w, bias = call.dims("input"), call.dims("weight"), call.maybe("bias")
    at = len(x) - len(w) + 1
    groups = int(call["groups"] or 1)
    _freeze_windows(call, x[at + 1 :], w[2:])
    for dim in (x[at], w[0], w[1]):
        call.tag(dim, "channels")
    contract(call, w[0], x[at])
    out = _transposed_out(call, w, groups)
    space = [free(n) for n in call.out[at + 1 :]]
    return [*_samples(x[:at], bias), _out(call, out, bias), *space]


def _transposed_out(call: Call, w: Shape, groups: int) -> Dim:
    if groups == 1:
        return w[1]
    c = w[0].size // groups
    if c == 1:
        call.freeze(w[1], "outputs of one group")
        return Dim(np.repeat(w[0].rows, w[1].size, axis=0), w[0].zero)
    for k in range(1, groups):
        call.unify(Dim(w[0].rows[:c]), Dim(w[0].rows[k * c : (k + 1) * c]))
    return Dim(np.tile(w[1].rows, (groups, 1)), w[1].zero)


@rewrite("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def shrink_transposed_groups(edit: Edit) -> None:
    """As for convolutions."""
    x, w, groups = edit.dims("input"), edit.dims("weight"), int(edit["groups"] or 1)
    channels = x[len(x) - len(w) + 1]
    if groups > 1 and groups == channels.size:
        edit.set(groups=edit.count(channels))


@rule("embedding")
def embedding(call: Call) -> Result:
    """Rows are entries of a vocabulary; columns are a width."""
    w, index = call.dims("weight"), call.dims("indices")
    call.chosen(w[0], call["indices"], "entries of a table that indices choose")
    call.freeze(index, "entries of a table that indices choose")
    call.tag(w[1], "stream")
    return [*[free(d.size) for d in index], w[1]]


@rule("bilinear")
def bilinear(call: Call) -> Result:
    """y_k = x1^T W_k x2 + b_k."""
    a, b, w, bias = (
        call.dims("input1"),
        call.dims("input2"),
        call.dims("weight"),
        call.maybe("bias"),
    )
    contract(call, w[1], a[-1])
    contract(call, w[2], b[-1])
    for left, right in zip(a[:-1], b[:-1], strict=True):
        call.unify(left, right)
    return [*_samples(a[:-1], bias), _out(call, w[0], bias)]
