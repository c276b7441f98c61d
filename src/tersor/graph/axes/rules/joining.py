"""Tensors side by side, and parts of one tensor."""

import numpy as np
import torch
from torch import fx

from tersor.graph.axes.labels import NONE, Dim, Rows, free
from tersor.graph.axes.rulebook import Call, Edit, Result, Shape, rewrite, rule

WRITTEN = "places of it are written to"


def _beside(dims: list[Dim]) -> Dim:
    """Elements one after another."""
    width = max(d.rows.shape[1] for d in dims)
    if width == 0:
        return free(sum(d.size for d in dims))
    parts: list[Rows] = []
    for dim in dims:
        padded = np.full((dim.size, width), NONE, dtype=np.int64)
        padded[:, : dim.rows.shape[1]] = dim.rows
        parts.append(padded)
    return Dim(np.concatenate(parts), all(d.zero for d in dims if not d.is_free))


def _alike(call: Call, dims: list[Dim]) -> Dim:
    labelled = next((d for d in dims if not d.is_free), dims[0])
    for other in dims:
        call.unify(labelled, other)
    return Dim(labelled.rows, all(d.zero for d in dims))


@rule("cat", "concat", "concatenate")
def cat(call: Call) -> Result:
    """Side by side along one dimension, alike in the others."""
    nodes = [n for n in call["tensors"] if isinstance(n, fx.Node)]
    shapes = [s for s in (call.of(n) for n in nodes) if s and not (len(s) == 1 and s[0].size == 0)]
    at = call.dim(call["dim"], len(shapes[0]))
    return [
        _beside([s[i] for s in shapes]) if i == at else _alike(call, [s[i] for s in shapes])
        for i in range(len(shapes[0]))
    ]


@rule("stack")
def stack(call: Call) -> Result:
    """A new dimension; alike in the others."""
    shapes = [s for s in (call.of(n) for n in call["tensors"]) if s is not None]
    rank = len(shapes[0]) + 1
    found = [_alike(call, [s[i] for s in shapes]) for i in range(rank - 1)]
    found.insert(call["dim"] % rank, free(len(shapes)))
    return found


@rule("split", "split_with_sizes", "chunk", "tensor_split", "unsafe_split", "unsafe_chunk",
      "unsafe_split_with_sizes")  # fmt: skip
def split(call: Call) -> Result:
    """Ranges of one dimension."""
    x = call.dims("self")
    at = call.dim(call["dim"], len(x))
    found: list[Shape] = []
    start = 0
    if sum(sizes[at] for sizes in call.outs) != x[at].size:
        call.freeze(x[at], "parts that overlap or leave gaps")
        return [[*x[:at], free(sizes[at]), *x[at + 1 :]] for sizes in call.outs]
    for sizes in call.outs:
        part = Dim(x[at].rows[start : start + sizes[at]], x[at].zero)
        found.append([*x[:at], part, *x[at + 1 :]])
        start += sizes[at]
    return found


@rewrite("split", "split_with_sizes", "chunk", "tensor_split", "unsafe_split", "unsafe_chunk",
         "unsafe_split_with_sizes")  # fmt: skip
def shrink_split(edit: Edit) -> None:
    """Equal parts need not stay equal: sizes are written out."""
    x = edit.dims("self")
    at = int(edit["dim"]) % len(x)
    if not edit.shrinks(x[at]):
        return
    counts = [edit.count(shape[at]) for shape in edit.result]
    edit.replace(torch.ops.aten.split_with_sizes.default, edit["self"], counts, at)


@rule("unbind")
def unbind(call: Call) -> Result:
    """Each element by itself: all of them stay."""
    x = call.dims("self")
    at = call.dim(call["dim"], len(x))
    gone = x.pop(at)
    call.freeze(gone, "each element is used by itself")
    return [list(x) for _ in range(gone.size)]


@rule("select")
def select(call: Call) -> Result:
    """One element: it stays, and with it all of them."""
    x = call.dims("self")
    call.freeze(x.pop(call.dim(call["dim"], len(x))), "one element is used by itself")
    return x


@rule("slice", "narrow")
def slices(call: Call) -> Result:
    """A range, or every so many elements."""
    x = call.dims("self")
    at = call.dim(call["dim"], len(x))
    bounds = _bounds(call, x[at].size)
    size = call.out[at]
    if bounds is None or len(range(*bounds)) != size:
        call.freeze(x[at], "a range that is computed")
        x[at] = free(size)
        return x
    rows = x[at].rows[slice(*bounds)]
    if bounds[2] != 1:
        call.freeze(x[at], "every so many elements")
    x[at] = Dim(rows, x[at].zero)
    return x


def _bounds(call: Call, size: int) -> tuple[int, int, int] | None:
    if call.name == "narrow":
        start, length = call["start"], call["length"]
        if isinstance(start, fx.Node) or isinstance(length, fx.Node):
            return None
        return start % size, start % size + length, 1
    values = (call["start"], call["end"], call["step"])
    if any(isinstance(v, fx.Node) for v in values):
        return None
    return slice(*values).indices(size)


@rewrite("slice")
def shrink_slice(edit: Edit) -> None:
    """Borders count what is left before them."""
    x = edit.dims("self")
    dim = x[int(edit["dim"] or 0) % len(x)]
    if not edit.shrinks(dim):
        return
    start, end, _ = slice(edit["start"], edit["end"], edit["step"]).indices(dim.size)
    left = [0, *np.cumsum(edit.kept(dim)).tolist()]
    edit.set(start=left[start], end=left[end])


@rewrite("narrow")
def shrink_narrow(edit: Edit) -> None:
    """As for slices."""
    x = edit.dims("self")
    dim = x[int(edit["dim"]) % len(x)]
    if edit.shrinks(dim):
        start = int(edit["start"]) % dim.size
        left = [0, *np.cumsum(edit.kept(dim)).tolist()]
        edit.set(start=left[start], length=left[start + int(edit["length"])] - left[start])


@rule("slice_scatter")
def slice_written(call: Call) -> Result:
    """A range of one dimension is replaced; all of it where the range is whole."""
    x, source = call.dims("self"), call.dims("src")
    at = call.dim(call["dim"], len(x))
    if _bounds(call, x[at].size) != (0, x[at].size, 1):
        call.freeze([x[at], source[at]], WRITTEN)
        x[at] = source[at] = free(x[at].size)
    return [_alike(call, [a, b]) for a, b in zip(x, source, strict=True)]


@rewrite("slice_scatter")
def shrink_slice_written(edit: Edit) -> None:
    """A dimension that shrinks is replaced as a whole."""
    if edit.shrinks(edit.dims("self")[int(edit["dim"])]):
        edit.set(start=None, end=None)


@rule("select_scatter", "diagonal", "index_put", "index_copy", "masked_scatter",
      "index_fill")  # fmt: skip
def written(call: Call) -> Result:
    """Places are written to; widths that all operands share go along."""
    x = call.dims("self")
    call.freeze_all(WRITTEN)
    return [free(n) for n in call.out] if len(x) != len(call.out) else [free(d.size) for d in x]


@rule("scatter", "scatter_add", "index_add")
def dealt(call: Call) -> Result:
    """Numbers of units say where: nothing is written to those that are gone."""
    if call["index"] not in call.numbers:
        return written(call)
    x = call.dims("self")
    at = call.dim(call["dim"], len(x))
    call.chosen(x[at], call["index"], WRITTEN)
    for shape in (x[:at], x[at + 1 :], *(call.maybe(n) for n in ("index", "src", "source"))):
        call.freeze(shape or [], WRITTEN)
    return [x[at] if i == at else free(d.size) for i, d in enumerate(x)]
