"""Cases of views, of tensors side by side, and of elements that indices choose."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from tests.unit.graph.axes.micro import Case, Net

A = {"a": (6, "neurons")}
AC = {"a": (6, "neurons"), "c": (5, "neurons")}
Make = Callable[[Net], fx.Node]
Apply = Callable[[Net, fx.Node], Any]
FIXED = {("a.weight", 0): ("", "")}


def _sum(n: Net, x: fx.Node, *dims: int) -> fx.Node:
    found: fx.Node = n("sum.dim_IntList", x, list(dims))
    return found


def between(apply: Apply, out: int = 6) -> Make:
    """Linear, op, linear."""
    return lambda n: n.lin("b", apply(n, n.lin("a", n.x(), out)), 3)


def tokens(apply: Apply, out: int = 6) -> Make:
    """The same with tokens: [batch, 5, out]."""
    return lambda n: n.lin("b", apply(n, n.lin("a", n.x(5, 4), out)), 3)


def before(apply: Apply) -> Make:
    """Linear, op, and the result is an output."""
    return lambda n: apply(n, n.lin("a", n.x(5, 4), 6))


def op(name: str, *args: Any, **kwargs: Any) -> Apply:
    return lambda n, a: n(name, a, *args, **kwargs)


def chain(*steps: Apply) -> Apply:
    def apply(n: Net, a: fx.Node) -> fx.Node:
        for step in steps:
            a = step(n, a)
        return a

    return apply


def pinned(
    rule: str,
    build: Make,
    text: str,
    note: str = "",
    *,
    breaks: bool = True,
    place: tuple[str, int] = ("a.weight", 0),
) -> Case:
    """A width that an op holds."""
    pin = {place: (f"aten.{rule}", text)}
    return Case(op=rule, note=f"{note} pins", build=build, pinned=pin, breaks=breaks)


def _apart(split: Apply, *names: str) -> Make:
    """A split of one layer, each part to a layer of its own."""

    def build(n: Net) -> Sequence[fx.Node]:
        parts = split(n, n.lin("a", n.x(), 11))
        return [n.lin(name, part, 3) for name, part in zip(names, parts, strict=True)]

    return build  # type: ignore[return-value]


def _split(name: str, *args: Any) -> Case:
    return Case(
        op=name.partition(".")[0],
        note=name,
        build=_apart(op(name, *args), "b", "c"),
        widths={"a": (6, "neurons"), "a#2": (5, "neurons")},
        literal=True,
    )


def _cat(name: str) -> Make:
    def build(n: Net) -> fx.Node:
        a, c = n.lin("a", n.x(), 6), n.lin("c", n.x(), 5)
        return n.lin("b", n(name, [a, n.x(2), c], 1), 3)

    return build


def _stack(n: Net) -> fx.Node:
    parts = [n.lin(name, n.x(), 6) for name in "ac"]
    return n.lin("b", n("stack", parts, 1), 3)


def _as_other(name: str) -> Make:
    """A view in the shape of another layer."""

    def build(n: Net) -> fx.Node:
        a, c = n.lin("a", n.x(), 6), n.lin("c", n.x(1), 6)
        a = n(name, n("unsqueeze", a, 1), n("unsqueeze", c, 1))
        return n.lin("b", a, 3)

    return build


def _expand_as(n: Net) -> fx.Node:
    return n.lin("b", n("expand_as", n("slice.Tensor", n.x(), 1, 0, 1), n.lin("a", n.x(), 6)), 3)


def _virtual(n: Net) -> fx.Node:
    """A repeated value that meets a width: the count that is written out follows."""
    a, once = n.lin("a", n.x(5, 4), 6), n("unsqueeze", n.x(5), -1)
    return n.lin("b", n("mul.Tensor", a, n("expand", once, [-1, -1, 6])), 3)


def _broadcast_to(n: Net) -> fx.Node:
    a = n.lin("a", n.x(), 6)
    return n.lin("b", n("mul.Tensor", a, n("broadcast_to", n.param("p", 1), [6])), 3)


def _turned(name: str) -> Make:
    """Layers of which the weights are stored the other way round."""

    def build(n: Net) -> fx.Node:
        hidden = n("matmul", n.x(4), n(name, n.param("w", 6, 4)))
        found: fx.Node = n("matmul", hidden, n(name, n.param("v", 3, 6)))
        return found

    return build


def _factory(name: str, *args: Any, tail: Apply | None = None) -> Make:
    """A constant that meets a width."""

    def build(n: Net) -> fx.Node:
        a = n.lin("a", n.x(), 6)
        made = n(name, a, *args) if name.startswith("new_") else n(name, *args)
        made = tail(n, made) if tail else made
        return n.lin("b", n("add.Tensor", a, made), 3)

    return build


def _positions(name: str, *args: Any, form: str = "default") -> Case:
    """Values that tell elements apart hold the width that they meet."""

    def build(n: Net) -> fx.Node:
        made = n(f"{name}.{form}", *args)
        made = n.real(made)
        made = _sum(n, made, 0) if len(n.sizes(made)) > 1 else made
        return n.lin("b", n("add.Tensor", n.lin("a", n.x(), 6), made), 3)

    pin = {("a.weight", 0): ("aten.add", "meets a dimension")}
    return Case(op=name, note=form, build=build, pinned=pin, breaks=False)


def _noise(name: str, *args: Any) -> Case:
    """Random numbers, of which nothing is left."""

    def build(n: Net) -> fx.Node:
        return n("add.Tensor", n("mul.Tensor", n.real(n(name, *args)), 0.0), n.lin("a", n.x(), 6))  # type: ignore[no-any-return]

    return Case(op=name, build=build)


def _one_hot(n: Net) -> fx.Node:
    place = n("argmax", n.lin("a", n.x(5, 4), 6), 1)
    return n.real(n("one_hot", place, 7))


def _places(n: Net, *values: int) -> fx.Node:
    return n.stored("places", torch.tensor(values))


def _shuffle(groups: int, width: int) -> Apply:
    """Channels dealt out to groups by a view."""
    return chain(
        op("view", [-1, groups, width // groups]),
        op("transpose.int", 1, 2),
        op("reshape", [-1, width]),
    )


def _index(n: Net, a: fx.Node) -> fx.Node:
    found: fx.Node = n("index.Tensor", a, [None, _places(n, 0, 3, 3)])
    return found


def _index_last(n: Net, a: fx.Node) -> fx.Node:
    found: fx.Node = n("index.Tensor", a, [None, None, _places(n, 5, 0, 3)])
    return found


def _gather(name: str) -> Apply:
    """Tokens chosen alike for every unit."""

    def apply(n: Net, a: fx.Node) -> fx.Node:
        places = n("expand", n("unsqueeze", n.indices(5, 3), -1), [-1, -1, 6])
        found: fx.Node = (
            n(name, a, places, 1) if name == "take_along_dim" else n(name, a, 1, places)
        )
        return found

    return apply


def _take_flat(n: Net, a: fx.Node) -> fx.Node:
    found: fx.Node = n("take_along_dim", a, n.stored("places", torch.arange(7)), None)
    return found


def _bucketize(n: Net) -> fx.Node:
    return n.lin(
        "b",
        n.real(
            n(
                "bucketize.Tensor",
                n.lin("a", n.x(), 6),
                n.stored("e", torch.tensor([-1.0, 0.2, 1.0])),
            )
        ),
        3,
    )


def _borders(n: Net) -> fx.Node:
    edges = n.stored("e", torch.tensor([-1.0, 0.2, 1.0]))
    return n.lin("b", n.real(n("searchsorted.Tensor", edges, n.lin("a", n.x(), 6))), 3)


def _border_rows(n: Net) -> fx.Node:
    """One row of borders a unit."""
    edges = n("cumsum", n("exp", n.param("e", 6, 3)), 1)
    values = n("permute", n.lin("a", n.x(), 6), [1, 0])
    return n("permute", n.real(n("searchsorted.Tensor", edges, values)), [1, 0])  # type: ignore[no-any-return]


def _written(name: str) -> Case:
    def build(n: Net) -> fx.Node:
        found: fx.Node = _WRITTEN[name](n, n.lin("a", n.x(5, 4), 6))
        return found

    return pinned(name, build, "places of it are written to", breaks=False)


def _ids(n: Net) -> fx.Node:
    return n.stored("places", torch.tensor([1, 3]))


_WRITTEN: dict[str, Apply] = {
    "select_scatter": lambda n, a: n("select_scatter", a, n.x(6), 1, 0),
    "diagonal": lambda n, a: n("diagonal", a, 0, 1, 2),
    "index_put": lambda n, a: n("index_put", a, [None, _ids(n)], n.x(2, 6)),
    "scatter": lambda n, a: n("scatter.value", a, 1, n.indices(5, 2, 6), 0.5),
    "scatter_add": lambda n, a: n("scatter_add", a, 1, n.indices(5, 2, 6), n.x(2, 6)),
    "index_add": lambda n, a: n("index_add", a, 1, _ids(n), n.x(2, 6)),
    "index_copy": lambda n, a: n("index_copy", a, 1, _ids(n), n.x(2, 6)),
    "masked_scatter": lambda n, a: n("masked_scatter", a, n("gt.Scalar", a, 0.0), n.x(5, 6)),
    "index_fill": lambda n, a: n("index_fill.int_Scalar", a, 1, _ids(n), 0.5),
}


def _overwritten(tokens: int, out: int, *where: int) -> Make:
    """A layer of 6 by 5 tokens, a part of it another layer's: dimension, start, end."""

    def build(n: Net) -> fx.Node:
        a, c = n.lin("a", n.x(5, 4), 6), n.lin("c", n.x(tokens, 4), out)
        return n.lin("b", n("slice_scatter", a, c, *where), 3)

    return build


VIEWED = {"a": (3, "neurons"), "a#2": (4, "neurons")}  # 12 as 3 x 4
TURNED = chain(op("view", [-1, 3, 4]), op("permute", [0, 2, 1]))

CASES: list[Case] = [
    Case(op="slice_scatter", build=_overwritten(2, 6, 1, 0, 2), widths=A),
    Case(
        op="slice_scatter", note="whole", build=_overwritten(5, 6, 2, 0, 6), widths=A, literal=True
    ),
    pinned("slice_scatter", _overwritten(5, 2, 2, 1, 3), "places of it are written to"),
    Case(
        op="view",
        build=between(chain(TURNED, op("reshape", [-1, 12])), 12),
        widths=VIEWED,
        literal=True,
    ),
    Case(
        op="reshape",
        build=between(chain(op("reshape", [-1, 2, 3]), op("reshape", [-1, 6]))),
        widths={"a": (2, "neurons"), "a#2": (3, "neurons")},
        literal=True,
    ),
    Case(
        op="_unsafe_view",
        build=between(chain(TURNED, op("contiguous"), op("_unsafe_view", [-1, 12])), 12),
        widths=VIEWED,
        literal=True,
    ),
    Case(
        op="flatten", build=between(chain(TURNED, op("flatten.using_ints", 1)), 12), widths=VIEWED
    ),
    Case(
        op="unflatten",
        build=between(
            chain(
                op("unflatten.int", 1, [3, 4]),
                op("permute", [0, 2, 1]),
                op("flatten.using_ints", 1),
            ),
            12,
        ),
        widths=VIEWED,
        literal=True,
    ),
    Case(
        op="view",
        note="square",
        build=between(
            chain(op("view", [-1, 4, 4]), op("permute", [0, 2, 1]), op("reshape", [-1, 16])), 16
        ),
        widths={"a": (4, "neurons"), "a#2": (4, "neurons")},
        literal=True,
    ),
    Case(
        op="view",
        note="shuffled twice",
        build=between(chain(_shuffle(2, 12), op("relu"), _shuffle(3, 12)), 12),
        widths={"a": (2, "neurons"), "a#2": (2, "neurons")},
        literal=True,
    ),
    pinned("view", before(chain(op("view", [-1, 4]))), "does not split into factors", breaks=False),
    pinned(
        "view",
        before(op("view.dtype", torch.int16)),
        "elements that are read as others",
        "as shorts",
    ),
    Case(op="view_as", build=_as_other("view_as"), widths=A),
    Case(op="reshape_as", build=_as_other("reshape_as"), widths=A),
    Case(
        op="ravel",
        build=lambda n: n(
            "mul.Tensor",
            n.x(),
            n("sum", n("mul.Tensor", n("ravel", n.param("p", 2, 3)), n.param("q", 6))),
        ),
        widths={"p": (2, "features"), "p#2": (3, "features")},
    ),
    Case(
        op="permute",
        build=before(chain(op("permute", [2, 0, 1]), lambda n, a: _sum(n, a, 0))),
        widths=A,
    ),
    *(
        Case(op=name, build=_turned(name), widths={"w": (6, "features")})
        for name in ("numpy_T", "t", "mT", "adjoint", "matrix_H")
    ),
    *(
        Case(
            op=name.partition(".")[0],
            build=before(chain(op(name, 1, -1), lambda n, a: _sum(n, a, 1))),
            widths=A,
        )
        for name in ("transpose.int", "swapaxes", "swapdims")
    ),
    *(
        Case(
            op=name,
            note=str(args),
            build=before(chain(op(f"{name}.{form}", *args), lambda n, a: _sum(n, a, 1))),
            widths=A,
        )
        for name in ("movedim", "moveaxis")
        for form, args in (("int", (2, 1)), ("intlist", ([1, 2], [2, 1])))
    ),
    *(
        Case(op="unsqueeze", note=str(dim), build=between(op("unsqueeze", dim)), widths=A)
        for dim in (0, 1, -2)
    ),
    *(
        Case(
            op="squeeze",
            note=name,
            build=between(chain(op("unsqueeze", 1), op(name, *args))),
            widths=A,
            literal=True,
        )
        for name, *args in (("squeeze",), ("squeeze.dim", 1), ("squeeze.dims", [1, 2]))
    ),
    Case(op="expand", build=_virtual, widths=A, literal=True),
    Case(op="broadcast_to", build=_broadcast_to, widths=A, literal=True),
    Case(op="expand_as", build=_expand_as, widths=A),
    Case(op="repeat", build=between(op("repeat", [1, 2])), widths=A),
    Case(op="tile", build=between(op("tile", [2])), widths=A),
    Case(op="repeat_interleave", build=between(op("repeat_interleave.self_int", 2, 1)), widths=A),
    Case(
        op="repeat_interleave",
        note="of a size that is promised",
        build=between(op("repeat_interleave.self_int", 2, 1, output_size=12)),
        widths=A,
        literal=True,
    ),
    pinned(
        "repeat_interleave",
        before(op("repeat_interleave.self_int", 2)),
        "repeats that are not one number",
        "all",
        breaks=False,
    ),
    *(
        Case(op=name, build=_factory(name, [6], *args), widths=A, literal=True)
        for name, *args in (
            ("zeros",),
            ("ones",),
            ("full", 0.5),
            ("new_zeros",),
            ("new_ones",),
            ("new_full", 0.5),
        )
    ),
    *(
        Case(
            op=name.partition(".")[0],
            build=_factory(name, [6], tail=op("fill.Scalar", 0.5)),
            widths=A,
            literal=True,
        )
        for name in ("empty.memory_format", "new_empty")
    ),
    _positions("arange", 6),
    _positions("linspace", 0.0, 1.0, 6),
    _positions("eye", 4, 6, form="m"),
    _positions("tril_indices", 6, 1),
    _positions("triu_indices", 1, 6),
    _positions("hann_window", 6),
    *(_noise(name, [6]) for name in ("rand", "randn")),
    _noise("randint", 5, [6]),
    _noise("scalar_tensor", 0.5),
    Case(
        op="meshgrid",
        build=lambda n: n(
            "add.Tensor",
            n.lin("u", n.x(), 3),
            _sum(
                n, n("meshgrid.indexing", [n.param("p", 4), n.param("q", 3)], indexing="ij")[1], 0
            ),
        ),
        pinned={("q", 0): ("aten.meshgrid", "positions are counted")},
        breaks=False,
    ),
    Case(
        op="one_hot",
        build=_one_hot,
        pinned={("a.weight", 0): ("aten.one_hot", "positions are counted")},
        breaks=False,
    ),
    *(Case(op=name, build=_cat(name), widths=AC) for name in ("cat", "concat", "concatenate")),
    Case(op="stack", build=_stack, widths=A),
    _split("split.Tensor", 6, 1),
    _split("split.sizes", [6, 5], 1),
    _split("split_with_sizes", [6, 5], 1),
    _split("chunk", 2, 1),
    _split("tensor_split.sections", 2, 1),
    _split("tensor_split.indices", [6], 1),
    _split("unsafe_split.Tensor", 6, 1),
    _split("unsafe_chunk", 2, 1),
    _split("unsafe_split_with_sizes", [6, 5], 1),
    pinned(
        "tensor_split",
        before(lambda n, a: n("tensor_split.indices", a, [4, 2], 2)),
        "overlap or leave gaps",
        "overlapping",
        breaks=False,
    ),
    Case(
        op="split_with_sizes",
        note="with a single unit",
        build=_apart(op("split_with_sizes", [10, 1], 1), "b", "c"),
        widths={"a": (10, "neurons")},
        pinned={("a.weight", 0): ("aten.split_with_sizes", "a single element")},
        breaks=False,
        literal=True,
    ),
    pinned(
        "unbind",
        before(lambda n, a: n("unbind.int", a, 2)),
        "each element is used by itself",
        breaks=False,
    ),
    pinned("select", before(op("select.int", 2, 5)), "one element is used by itself"),
    *(
        Case(
            op=name.partition(".")[0],
            note=note,
            build=_apart(
                chain(lambda n, a, name=name, args=args: [n(name, a, *x) for x in args]), "b", "c"
            ),
            widths={"a": (6, "neurons"), "a#2": (5, "neurons")},
            literal=True,
        )
        for name, note, *args in (
            ("slice.Tensor", "", (1, 0, 6), (1, 6, 2**63 - 1)),
            ("slice.Tensor", "from the end", (1, None, -5), (1, -5)),
            ("narrow", "", (1, 0, 6), (1, 6, 5)),
            ("narrow", "from the end", (1, 0, 6), (1, -5, 5)),
        )
    ),
    pinned(
        "slice", tokens(op("slice.Tensor", 2, 0, 6, 2)), "every so many elements", "every other"
    ),
    *(_written(name) for name in _WRITTEN),
    Case(op="index", build=tokens(_index), widths=A),
    pinned("index", before(_index_last), "elements that indices choose"),
    Case(
        op="index_select",
        build=tokens(lambda n, a: n("index_select", a, 1, _places(n, 0, 3, 3))),
        widths=A,
    ),
    pinned(
        "index_select",
        before(lambda n, a: n("index_select", a, 2, _places(n, 5, 0, 3))),
        "elements that indices choose",
    ),
    *(
        Case(op=name, build=tokens(_gather(name)), widths=A)
        for name in ("gather", "take_along_dim")
    ),
    *(
        pinned(
            name,
            before(
                lambda n, a, name=name: n(
                    name,
                    a,
                    *((2, n.indices(6, 5, 3)) if name == "gather" else (n.indices(6, 5, 3), 2)),
                )
            ),
            "elements that indices choose",
        )
        for name in ("gather", "take_along_dim")
    ),
    pinned("take_along_dim", before(_take_flat), "elements that indices choose", "of all"),
    pinned(
        "take",
        before(lambda n, a: n("take", a, _places(n, 0, 7, 11))),
        "elements that values choose",
    ),
    Case(op="roll", build=tokens(op("roll", [2], [1])), widths=A),
    pinned("roll", tokens(op("roll", [2], [-1])), "its elements are shifted"),
    pinned("roll", tokens(op("roll", [2])), "its elements are shifted", "of all"),
    Case(op="flip", build=between(op("flip", [-1])), widths=A),
    Case(op="fliplr", build=between(op("fliplr")), widths=A),
    Case(
        op="flipud",
        build=lambda n: n(
            "matmul",
            n("matmul", n.x(), n("permute", n("flipud", n.param("w", 6, 4)), [1, 0])),
            n.param("v", 6, 3),
        ),
        widths={"w": (6, "features")},
    ),
    *(
        Case(
            op=name,
            build=tokens(op(name)),
            pinned={("a.weight", 0): (f"aten.{name}", "positions are compared")},
        )
        for name in ("tril", "triu")
    ),
    Case(op="bucketize", build=_bucketize, widths=A),
    Case(
        op="bucketize",
        note="summed",
        build=lambda n: _sum(
            n,
            n.real(
                n(
                    "bucketize.Tensor",
                    n.lin("a", n.x(), 6),
                    n.stored("e", torch.tensor([-1.0, -0.2, 1.0])),
                )
            ),
            1,
        ),
        pinned={("a.weight", 0): ("aten.sum", "sums over units that are not zero")},
    ),
    Case(op="searchsorted", build=_borders, widths=A),
    Case(
        op="searchsorted",
        note="in rows",
        build=_border_rows,
        pinned={("e", 1): ("aten.cumsum", "a running sum")},
        breaks=False,
    ),
]
