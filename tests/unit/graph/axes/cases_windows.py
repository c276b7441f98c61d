"""Cases of reductions, rankings, pooling, padding, and places that become channels."""

from collections.abc import Callable
from typing import Any

from torch import fx

from tests.unit.graph.axes.cases_shapes import Apply, before, chain, op, pinned, tokens
from tests.unit.graph.axes.micro import Case, Net

A = {"a": (6, "neurons")}
CHANNELS = {"a": (6, "channels")}
SUMS = "sums over units that are not zero"


def _sum(n: Net, x: fx.Node, *dims: int) -> fx.Node:
    found: fx.Node = n("sum.dim_IntList", x, list(dims))
    return found


def _first(apply: Apply) -> Apply:
    """The first of several results."""
    return lambda n, a: apply(n, a)[0]


def _second(apply: Apply) -> Apply:
    return lambda n, a: n.real(apply(n, a)[1])


def _real(apply: Apply) -> Apply:
    return lambda n, a: n.real(apply(n, a))


def _pre(name: str, apply: Apply) -> Apply:
    return chain(op(name), apply)


def image(
    apply: Apply, rank: int = 2, size: int = 4, out: int = 4, channels: int = 6
) -> Callable[[Net], fx.Node]:
    """Convolution, op, convolution."""
    return lambda n: n.conv("b", apply(n, n.conv("a", n.x(3, *[size] * rank), channels)), out)


def _image_sum(apply: Apply) -> Callable[[Net], fx.Node]:
    return lambda n: _sum(n, apply(n, n.conv("a", n.x(3, 4, 4), 6)), 1)


def _canvas(apply: Apply, *shape: int) -> Callable[[Net], fx.Node]:
    """A stored image [5, *shape] of which the channels meet a layer."""

    def build(n: Net) -> fx.Node:
        y = n("mean.dim", apply(n, n.param("p", 1, 5, *shape)), list(range(2, len(shape) + 2)))
        return n.lin("b", n("mul.Tensor", y, n.lin("c", n.x(), 5)), 3)

    return build


def _along(
    rule: str, apply: Apply, text: str, note: str = "", *, breaks: bool = True
) -> list[Case]:
    """An op along the last dimension: over tokens, then over the width."""
    turned = chain(op("transpose.int", 1, 2), apply)
    return [
        Case(
            op=rule,
            note=f"{note} beside the width",
            build=lambda n: _tail(n, turned(n, n.lin("a", n.x(5, 4), 6))),
            widths=A,
        ),
        pinned(rule, before(apply), text, note, breaks=breaks),
    ]


def _tail(n: Net, y: fx.Node) -> fx.Node:
    """A layer over dimension 1."""
    if len(n.sizes(y)) > 2:
        y = n("transpose.int", y, 1, 2)
    return n.lin("b", y, 3)


EXTREME = "an extreme over it"
CASES: list[Case] = [
    Case(op="mean", build=before(op("mean.dim", [-1])), widths=A, literal=True),
    Case(
        op="mean",
        note="of all",
        build=lambda n: n("mul.Tensor", n.x(), n("mean", n.param("p", 6, 5))),
        widths={"p": (6, "features"), "p#2": (5, "features")},
        literal=True,
    ),
    pinned("mean", before(_pre("exp", op("mean.dim", [-1], True))), SUMS),
    *(
        Case(
            op=name.partition(".")[0],
            note=str(args),
            build=before(_real(op(name, *args))),
            widths=A,
        )
        for name, *args in (
            ("sum.dim_IntList", [-1], True),
            ("linalg_vector_norm", 2, [-1]),
            ("norm.ScalarOpt_dim", 3, [-1]),
            ("nansum", [-1]),
            ("count_nonzero.dim_IntList", [-1]),
            ("frobenius_norm.dim", [-1]),
            ("linalg_vector_norm", float("inf"), [-1]),
        )
    ),
    Case(
        op="sum",
        note="of all",
        build=lambda n: n("mul.Tensor", n.x(), n("sum", n.param("p", 6))),
        widths={"p": (6, "features")},
    ),
    Case(
        op="norm",
        note="of all",
        build=lambda n: n("mul.Tensor", n.x(), n("norm.Scalar", n.param("p", 6))),
        widths={"p": (6, "features")},
    ),
    pinned(
        "linalg_vector_norm",
        before(op("linalg_vector_norm", 0, [-1])),
        "a norm that zeros change",
        "0",
        breaks=False,
    ),
    pinned(
        "linalg_vector_norm",
        before(op("linalg_vector_norm", float("-inf"), [-1])),
        "a norm that zeros change",
        "-inf",
    ),
    *(
        Case(op=name.partition(".")[0], build=before(op(name, [-1])), widths=A, literal=True)
        for name in ("var.dim", "std.dim")
    ),
    *(
        Case(
            op=name.partition(".")[0],
            build=before(_first(op(name, [-1]))),
            widths=A,
            literal=True,
        )
        for name in ("var_mean.dim", "std_mean.dim")
    ),
    pinned("var", before(_pre("exp", op("var.dim", [-1], True))), SUMS),
    Case(op="var", note="beside the width", build=tokens(op("var.dim", [1])), widths=A),
    *(
        case
        for name, pre, args in (
            ("amax", op("neg"), ([-1],)),
            ("amin", op("abs"), ([-1],)),
            ("prod.dim_int", op("abs"), (-1,)),
            ("logsumexp", op("abs"), ([-1],)),
        )
        for case in _along(
            name.partition(".")[0], chain(op("square"), pre, op(name, *args)), EXTREME
        )
    ),
    *(
        case
        for name, pre in (("all.dim", "ceil"), ("any.dim", "relu"), ("argmax", ""), ("argmin", ""))
        for case in _along(
            name.partition(".")[0],
            _real(_pre(pre, op(name, -1)) if pre else op(name, -1)),
            EXTREME,
            breaks="arg" in name,
        )
    ),
    *(
        case
        for name, pre, args in (
            ("median.dim", op("abs"), (-1,)),
            ("mode", op("abs"), (-1,)),
            ("kthvalue", op("abs"), (2, -1)),
            ("max.dim", chain(op("square"), op("neg")), (-1,)),
            ("min.dim", op("square"), (-1,)),
        )
        for case in _along(
            name.partition(".")[0], _first(chain(pre, op(name, *args))), EXTREME, name
        )
    ),
    Case(
        op="max",
        note="places summed",
        build=lambda n: _sum(
            n, n.real(n("max.dim", n("transpose.int", n.lin("a", n.x(5, 4), 6), 1, 2), -1)[1]), 1
        ),
        pinned={("a.weight", 0): ("aten.sum", SUMS)},
        breaks=False,
    ),
    pinned(
        "max",
        lambda n: n("mul.Tensor", n.x(), n("max", n("abs", n.param("a.weight", 6)))),
        EXTREME,
        "of all",
        breaks=False,
    ),
    pinned(
        "median",
        lambda n: n("mul.Tensor", n.x(), n("median", n("abs", n.param("a.weight", 6)))),
        EXTREME,
        "of all",
    ),
    *(
        case
        for name in ("softmax.int", "log_softmax.int")
        for case in (
            Case(
                op=name.partition(".")[0],
                note="beside the width",
                build=tokens(op(name, 1)),
                widths=A,
            ),
            Case(
                op=name.partition(".")[0],
                note="beside the width, summed",
                build=before(chain(op(name, 1), lambda n, y: _sum(n, y, 2))),
                pinned={("a.weight", 0): ("aten.sum", SUMS)},
            ),
            pinned(name.partition(".")[0], tokens(op(name, -1)), "shares a softmax"),
        )
    ),
    Case(op="_softmax", note="beside the width", build=tokens(op("_softmax", 1, False)), widths=A),
    *(
        case
        for name in ("cumsum", "cumprod", "logcumsumexp")
        for case in (
            Case(op=name, note="beside the width", build=tokens(op(name, 1)), widths=A),
            pinned(name, tokens(op(name, -1)), "a running sum", breaks=name == "logcumsumexp"),
        )
    ),
    Case(
        op="cumsum",
        note="beside the width, summed",
        build=before(chain(op("cumsum", 1), lambda n, y: _sum(n, y, 2))),
        widths=A,
    ),
    Case(
        op="logcumsumexp",
        note="beside the width, summed",
        build=before(chain(op("logcumsumexp", 1), lambda n, y: _sum(n, y, 2))),
        pinned={("a.weight", 0): ("aten.sum", SUMS)},
    ),
    *(
        case
        for name in ("cummax", "cummin")
        for case in (
            Case(op=name, note="beside the width", build=tokens(_first(op(name, 1))), widths=A),
            pinned(name, tokens(_first(op(name, -1))), "a running sum"),
        )
    ),
    *(
        case
        for name, args in (("topk", (2, -1)), ("sort", (-1,)))
        for case in _along(
            name,
            _first(op(name, *args)),
            "values compete over it",
            # A top-k without its numbers would stand it: units that are gone are never taken.
            breaks=name == "sort",
        )
    ),
    *_along("argsort", _real(op("argsort", -1)), "values compete over it"),
    Case(
        op="msort",
        note="beside the width",
        build=lambda n: n.lin(
            "b",
            n(
                "mul.Tensor",
                n.lin("a", n.x(), 6),
                n("sum.dim_IntList", n("msort", n.param("p", 5, 6)), [0]),
            ),
            3,
        ),
        widths=A,
        pinned={("p", 0): ("aten.msort", "values compete over it")},
        breaks=False,
    ),
    Case(
        op="sort",
        note="places summed",
        build=lambda n: _sum(
            n, n.real(n("sort", n("transpose.int", n.lin("a", n.x(5, 4), 6), 1, 2), -1)[1]), 1
        ),
        pinned={("a.weight", 0): ("aten.sum", SUMS)},
    ),
    Case(
        op="cosine_similarity",
        build=lambda n: n(
            "cosine_similarity", n.lin("a", n.x(5, 4), 6), n.lin("c", n.x(5, 4), 6), -1
        ),
        widths=A,
    ),
    pinned(
        "cosine_similarity",
        lambda n: n("cosine_similarity", n.lin("a", n.x(5, 4), 6), n.param("p", 6), -1),
        "a broadcast inside",
        breaks=False,
    ),
]

_POOLS: dict[str, tuple[Any, ...]] = {
    "max_pool{r}d": ([2],), "avg_pool{r}d": ([2],), "adaptive_avg_pool{r}d": ([2],),
}  # fmt: skip
_NEAREST = (None, [2.0])
for _r in (1, 2, 3):
    for _name, (_size,) in _POOLS.items():
        _op = _name.format(r=_r)
        CASES.append(Case(op=_op, build=image(op(_op, _size * _r), rank=_r), widths=CHANNELS))
    CASES.append(
        Case(
            op=f"adaptive_max_pool{_r}d",
            build=image(_first(op(f"adaptive_max_pool{_r}d", [2] * _r)), rank=_r),
            widths=CHANNELS,
        )
    )
    _op = f"max_pool{_r}d_with_indices"
    CASES.append(Case(op=_op, build=image(_first(op(_op, [2] * _r)), rank=_r), widths=CHANNELS))
    CASES.append(
        Case(
            op=f"upsample_nearest{_r}d",
            build=image(op(f"upsample_nearest{_r}d.vec", None, [2.0] * _r), rank=_r),
            widths=CHANNELS,
        )
    )
for _op, _r in (("upsample_linear1d", 1), ("upsample_bilinear2d", 2), ("upsample_bicubic2d", 2), ("upsample_trilinear3d", 3),
                ("_upsample_bilinear2d_aa", 2), ("_upsample_bicubic2d_aa", 2)):  # fmt: skip
    CASES.append(
        Case(
            op=_op, build=image(op(f"{_op}.vec", None, False, [2.0] * _r), rank=_r), widths=CHANNELS
        )
    )


def _grid(n: Net, a: fx.Node) -> fx.Node:
    found: fx.Node = n("grid_sampler", a, n("tanh", n.x(4, 4, 2)), 0, 0, False)
    return found


def _grid_of(name: str, rank: int) -> Apply:
    return lambda n, a: n(name, a, n("tanh", n.x(*[4] * rank, rank)), 0, 0, False)


def _affine(n: Net) -> fx.Node:
    """Stored matrices for as many samples as there are."""
    grid = n("affine_grid_generator", n.param("theta", 5, 2, 3), [5, 3, 4, 4], False)
    return n("add.Tensor", _sum(n, grid, 0), n.x(4, 4, 2))  # type: ignore[no-any-return]


CASES += [
    Case(
        op="_upsample_nearest_exact2d",
        build=image(op("_upsample_nearest_exact2d.vec", None, [2.0, 2.0])),
        widths=CHANNELS,
    ),
    Case(
        op="max_pool2d",
        note="of a stored image",
        build=_canvas(op("max_pool2d", [2, 2]), 4, 4),
        widths={"c": (5, "neurons")},
        pinned={("p", 2): ("aten.max_pool2d", "a window slides")},
        breaks=False,
    ),
    Case(
        op="max_pool2d_with_indices",
        note="places summed",
        build=_image_sum(_second(op("max_pool2d_with_indices", [2, 2]))),
        pinned={("a.weight", 0): ("aten.sum", SUMS)},
    ),
    *(
        Case(op=name, build=image(_grid_of(name, rank), rank=rank), widths=CHANNELS)
        for name, rank in (("grid_sampler", 2), ("grid_sampler_2d", 2), ("grid_sampler_3d", 3))
    ),
    pinned("affine_grid_generator", _affine, "places to sample", place=("theta", 0), breaks=False),
    *(
        Case(op=name, note=str(args), build=image(op(name, *args)), widths=CHANNELS)
        for name, *args in (
            ("pad", [1, 1, 1, 0]),
            ("pad", [1, 1, 1, 0], "constant", 0.5),
            ("pad", [1, 1, 1, 0], "reflect"),
            ("constant_pad_nd", [1, 0], 0.5),
            ("reflection_pad2d", [1, 1, 1, 1]),
            ("replication_pad2d", [1, 1, 1, 1]),
        )
    ),
    *(
        Case(op=name, build=image(op(name, [1, 1] * rank), rank=rank), widths=CHANNELS)
        for kind in ("reflection", "replication")
        for rank in (1, 3)
        for name in (f"{kind}_pad{rank}d",)
    ),
    Case(
        op="pad",
        note="of the width",
        build=image(op("pad", [0, 0, 0, 0, 2, 1], "constant", 0.5)),
        widths=CHANNELS,
    ),
    Case(
        op="pad",
        note="of the width, summed",
        build=_image_sum(op("pad", [0, 0, 0, 0, 2, 1], "constant", 0.5)),
        widths=CHANNELS,
    ),
    Case(
        op="pad", note="summed", build=_image_sum(op("pad", [1, 1], "constant", 0)), widths=CHANNELS
    ),
    Case(
        op="pad",
        note="with a number, summed",
        build=_image_sum(op("pad", [1, 1], "constant", 0.5)),
        pinned={("a.weight", 0): ("aten.sum", SUMS)},
    ),
    Case(
        op="constant_pad_nd",
        note="with a number, summed",
        build=_image_sum(op("constant_pad_nd", [1, 1], 0.5)),
        pinned={("a.weight", 0): ("aten.sum", SUMS)},
    ),
    pinned(
        "pad",
        lambda n: n.lin(
            "b",
            n(
                "squeeze.dim",
                n("pad", n("unsqueeze", n.lin("a", n.x(), 6), 1), [2, 1], "reflect"),
                1,
            ),
            3,
        ),
        "padded with its own elements",
        "by reflection",
    ),
    pinned(
        "pad",
        lambda n: n("pad", n.lin("a", n.x(), 6), [-1, 0]),
        "padded with its own elements, or cut",
        "less",
    ),
    Case(
        op="pixel_shuffle",
        build=image(op("pixel_shuffle", 2), channels=12),
        widths={"a": (3, "channels")},
    ),
    Case(op="pixel_unshuffle", build=image(op("pixel_unshuffle", 2)), widths=CHANNELS),
    Case(
        op="channel_shuffle", build=image(op("channel_shuffle", 2)), widths={"a": (3, "channels")}
    ),
    Case(
        op="im2col",
        build=lambda n: n.conv(
            "b", n("im2col", n.conv("a", n.x(3, 4, 4), 6), [2, 2], [1, 1], [0, 0], [1, 1]), 4
        ),
        widths=CHANNELS,
    ),
    Case(
        op="im2col",
        note="of one image",
        build=lambda n: n(
            "add.Tensor",
            n.x(3),
            _sum(
                n,
                n(
                    "matmul",
                    n.param("w", 3, 20),
                    n("im2col", n.param("p", 5, 4, 4), [2, 2], [1, 1], [0, 0], [1, 1]),
                ),
                1,
            ),
        ),
        widths={"w": (5, "features")},
        pinned={("p", 1): ("aten.im2col", "a window slides")},
        breaks=False,
    ),
    Case(
        op="col2im",
        build=lambda n: n.conv(
            "b", n("col2im", n.conv("a", n.x(3, 9), 12), [4, 4], [2, 2], [1, 1], [0, 0], [1, 1]), 4
        ),
        widths={"a": (3, "channels")},
    ),
    Case(
        op="unfold",
        build=lambda n: n.lin("b", _sum(n, n("unfold", n.lin("a", n.x(5, 4), 6), 1, 2, 1), 3), 3),
        widths=A,
    ),
    pinned("unfold", before(op("unfold", 2, 2, 1)), "a window slides", breaks=False),
]
