"""Views: dimensions move, split into factors, merge, repeat."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import fx

from tersor.graph.axes.labels import Dim, free
from tersor.graph.axes.rulebook import Call, Edit, Result, Shape, rewrite, rule


def view(call: Call, shape: Shape, sizes: Sequence[int]) -> Shape:
    """A view over the common refinement of both shapes."""
    before, after = _borders([d.size for d in shape]), _borders(sizes)
    cuts = sorted(set(before) | set(after))
    if 0 in cuts or any(high % low for low, high in pairwise(cuts)):
        call.freeze(shape, "a view that does not split into factors")
        return [free(n) for n in sizes]
    factors: Shape = []
    for i, dim in enumerate(shape):
        if dim.size != 1:
            steps = _steps(cuts, before[i], before[i + 1])
            factors += call.labels.split(dim, steps, call.why("a view"))
    found, at = [], 0
    for i, size in enumerate(sizes):
        if size == 1:
            found.append(free(1))
            continue
        n = len(_steps(cuts, after[i], after[i + 1]))
        found.append(call.labels.merge(factors[at : at + n]))
        at += n
    return found


def _borders(sizes: Sequence[int]) -> list[int]:
    found = [1]
    for size in sizes:
        found.append(found[-1] * size)
    return found


def _steps(cuts: Sequence[int], low: int, high: int) -> list[int]:
    inside = [c for c in cuts if low <= c <= high]
    return [b // a for a, b in pairwise(inside)]


@rule("view", "reshape", "_unsafe_view", "flatten", "unflatten", "view_as", "reshape_as", "ravel")
def reshape(call: Call) -> Result:
    """Any change of shape that keeps the order of the elements."""
    x = call.dims("self")
    if call["dtype"] is not None:
        if [d.size for d in x] != call.out:
            call.freeze(x, "elements that are read as others")
            return call.blank()
        return [Dim(d.rows, d.zero) for d in x]
    return _as_other(call, view(call, x, call.out))


def _as_other(call: Call, found: Shape) -> Shape:
    """The shape of another tensor, if it was given by one: both shrink alike."""
    for dim, other in zip(found, call.maybe("other") or found, strict=True):
        call.unify(dim, other)
    return found


@rewrite("view", "reshape", "_unsafe_view")
def shrink_view(edit: Edit) -> None:
    """Numbers that were a width become the count that is left."""
    name = "size" if "size" in edit.args else "shape"
    if name in edit.args:
        edit.set(**{name: shrunk_sizes(edit, list(edit[name]), edit.result)})


@rewrite("unflatten")
def shrink_unflatten(edit: Edit) -> None:
    """Only the factors of one dimension are written out."""
    x = edit.dims("self")
    at = int(edit["dim"]) % len(x)
    sizes = list(edit["sizes"])
    edit.set(sizes=shrunk_sizes(edit, sizes, edit.result[at : at + len(sizes)]))


def shrunk_sizes(edit: Edit, sizes: list[object], dims: Shape) -> list[object]:
    """Sizes with the counts that are left; a size that is computed is left to the view."""
    found = list(sizes)
    for i, dim in enumerate(dims):
        if not edit.shrinks(dim) or found[i] == -1:
            continue
        if isinstance(found[i], int):
            found[i] = edit.count(dim)
            continue
        for j, other in enumerate(found):  # a view takes one -1
            if j != i and other == -1:
                found[j] = edit.count(dims[j])
        found[i] = -1
    return found


@rule("permute", "numpy_T", "t", "mT", "adjoint", "matrix_H")
def permute(call: Call) -> Result:
    """Dimensions in another order."""
    x = call.dims("self")
    if call.name == "permute":
        return [x[d] for d in call["dims"]]
    if call.name in ("numpy_T", "t"):
        return x[::-1]
    return [*x[:-2], x[-1], x[-2]]


@rule("transpose", "swapaxes", "swapdims")
def transpose(call: Call) -> Result:
    """Two dimensions change places."""
    x = call.dims("self")
    names = [n for n in call.args if n != "self"]
    a, b = (call.dim(call[n], len(x)) for n in names[:2])
    x[a], x[b] = x[b], x[a]
    return x


@rule("movedim", "moveaxis")
def movedim(call: Call) -> Result:
    """Dimensions move to other places."""
    x = call.dims("self")
    source, target = call["source"], call["destination"]
    pairs = (
        [(source, target)] if isinstance(source, int) else list(zip(source, target, strict=True))
    )
    places = {t % len(x): s % len(x) for s, t in pairs}
    rest = iter(i for i in range(len(x)) if i not in places.values())
    return [x[places[i]] if i in places else x[next(rest)] for i in range(len(x))]


@rule("unsqueeze")
def unsqueeze(call: Call) -> Result:
    """A new dimension of size 1."""
    x = call.dims("self")
    at = call["dim"]
    x.insert(at if at >= 0 else len(x) + 1 + at, free(1))
    return x


@rule("squeeze")
def squeeze(call: Call) -> Result:
    """Dimensions of size 1 go."""
    x, dims = call.dims("self"), call["dim"]
    if dims is None:
        gone = set(range(len(x)))
    else:
        gone = {d % len(x) for d in (dims if isinstance(dims, list | tuple) else [dims])}
    return [d for i, d in enumerate(x) if not (i in gone and d.size == 1)]


@rewrite("squeeze")
def keep_single(edit: Edit) -> None:
    """A width of which one unit is left is still a dimension."""
    x, dims = edit.dims("self"), edit["dim"]
    asked = range(len(x)) if dims is None else dims if isinstance(dims, list | tuple) else [dims]
    gone = sorted(d % len(x) for d in asked if x[d].size == 1)
    edit.replace(torch.ops.aten.squeeze.dims, edit["self"], gone)


@rule("expand", "expand_as", "broadcast_to")
def expand(call: Call) -> Result:
    """A repeated value goes with whatever it meets; it is not zero there."""
    return _as_other(call, _spread(call, call.dims("self")))


def _spread(call: Call, x: Shape) -> Shape:
    sizes = call.out
    x = [free(1)] * (len(sizes) - len(x)) + x
    return [
        dim if dim.size == size or size <= 1 else _virtual(call, i, size)
        for i, (dim, size) in enumerate(zip(x, sizes, strict=True))
    ]


def _virtual(call: Call, at: int, size: int) -> Dim:
    """Labels for a repeated value, so that its count can follow a width."""
    value = call.node.meta["val"].shape[at]
    return call.labels.fresh(size, zero=False) if isinstance(value, int) else free(size)


@rewrite("expand", "broadcast_to")
def shrink_expand(edit: Edit) -> None:
    """Counts that are written out."""
    sizes = list(edit["size"])
    for i, dim in enumerate(edit.result):
        if edit.shrinks(dim) and isinstance(sizes[i], int) and sizes[i] != -1:
            sizes[i] = edit.count(dim)
    edit.set(size=sizes)


@rule("repeat", "tile")
def repeat(call: Call) -> Result:
    """The whole dimension again and again."""
    x, sizes = call.dims("self"), call.out
    x = [free(1)] * (len(sizes) - len(x)) + x
    return [
        Dim(np.tile(d.rows, (n // d.size if d.size else 1, 1)), d.zero)
        for d, n in zip(x, sizes, strict=True)
    ]


@rule("repeat_interleave")
def repeat_interleave(call: Call) -> Result:
    """Each element again and again."""
    x, at = call.dims("self"), call["dim"]
    if at is None or isinstance(call["repeats"], fx.Node):
        call.freeze(x, "repeats that are not one number along one dimension")
        return call.blank()
    at = call.dim(at, len(x))
    x[at] = Dim(np.repeat(x[at].rows, int(call["repeats"]), axis=0), x[at].zero)
    return x


@rewrite("repeat_interleave")
def shrink_repeats(edit: Edit) -> None:
    """The size that a caller may have promised."""
    edit.set(output_size=None)


@rule("zeros", "ones", "full", "new_zeros", "new_ones", "new_full", "empty", "new_empty")
def constant(call: Call) -> Result:
    """One value everywhere: its count follows what it meets."""
    is_zero = call.name.endswith("zeros") or call["fill_value"] == 0
    sizes = call.node.meta["val"].shape
    return [
        call.labels.fresh(s, zero=is_zero) if isinstance(s, int) and s > 1 else free(n)
        for s, n in zip(sizes, call.out, strict=True)
    ]


@rewrite("zeros", "ones", "full", "new_zeros", "new_ones", "new_full", "empty", "new_empty")
def shrink_constant(edit: Edit) -> None:
    """Counts that are written out."""
    sizes = list(edit["size"])
    for i, dim in enumerate(edit.result):
        if edit.shrinks(dim):
            sizes[i] = edit.count(dim)
    edit.set(size=sizes)


@rule("arange", "linspace", "scalar_tensor", "rand", "randn", "randint", "eye", "meshgrid",
      "tril_indices", "triu_indices", "hann_window")  # fmt: skip
def position(call: Call) -> Result:
    """Values that tell positions apart."""
    call.freeze_all("positions are counted over it")
    return call.blank()


@rule("one_hot")
def one_hot(call: Call) -> Result:
    """A dimension for each number: of units, it is zero at those that are never chosen."""
    counted = call.numbers.get(call["self"])
    if counted is None or call["num_classes"] != counted.size:
        if counted is not None:
            call.freeze(counted, "a number of classes that is not its size")
        return position(call)
    return [*call.dims("self"), Dim(counted.rows)]


@rewrite("one_hot")
def shrink_one_hot(edit: Edit) -> None:
    """As many classes as units are left."""
    edit.set(num_classes=edit.count(edit.result[-1]))
