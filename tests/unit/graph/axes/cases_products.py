"""Cases of products, convolutions, tables, attention and norms."""

from collections.abc import Callable

from torch import fx

from tests.unit.graph.axes.micro import Case, Net, Width

A = {"a": (6, "neurons")}
AC = {"a": (6, "neurons"), "c": (5, "neurons")}
CHANNELS = {"a": (6, "channels")}
SUMS = "sums over units that are not zero"


def _sum(n: Net, x: fx.Node, *dims: int) -> fx.Node:
    found: fx.Node = n("sum.dim_IntList", x, list(dims))
    return found


def _tokens(n: Net) -> tuple[fx.Node, fx.Node]:
    """Two layers of the same tokens [batch, 5, 6]."""
    x = n.x(5, 4)
    return n.lin("a", x, 6), n.lin("c", x, 6)


def _scores(op: str, left: str = "", right: str = "") -> Callable[[Net], fx.Node]:
    """Products of the widths of two layers over their units."""

    def build(n: Net) -> fx.Node:
        a, c = _tokens(n)
        a, c = (n(f, v) if f else v for f, v in ((left, a), (right, c)))
        found: fx.Node = n(op, a, n("transpose.int", c, 1, 2))
        return found

    return build


def _mixed(n: Net, *, bias: bool = True) -> fx.Node:
    """A linear map of the tokens, while the width goes along."""
    a = n("transpose.int", n.lin("a", n.x(5, 4), 6), 1, 2)
    found: fx.Node = n("transpose.int", n.lin("t", a, 7, bias=bias), 1, 2)
    return found


def _addbmm(n: Net) -> fx.Node:
    batches = n.param("a", 5, 3, 6), n.param("c", 5, 6, 2)
    found: fx.Node = n("add.Tensor", n("addbmm", n.param("d", 3, 2), *batches), n.x(3, 2))
    return found


def _dot(n: Net) -> fx.Node:
    found: fx.Node = n("add.Tensor", n("dot", n.param("a", 6), n.param("c", 6)), n.x())
    return found


def _baddbmm(n: Net) -> fx.Node:
    a, c = _tokens(n)
    found: fx.Node = n("baddbmm", n.x(5, 5), a, n("transpose.int", c, 1, 2))
    return found


def _einsum(equation: str, left: str = "", right: str = "") -> Callable[[Net], fx.Node]:
    def build(n: Net) -> fx.Node:
        operands = [n(f, v) if f else v for f, v in zip((left, right), _tokens(n), strict=True)]
        found: fx.Node = n("einsum", equation, operands)
        return found

    return build


def _conv(rank: int, out: int = 6, groups: int = 1) -> Callable[[Net], fx.Node]:
    """Three convolutions, that in the middle 3 wide and in groups."""

    def build(n: Net) -> fx.Node:
        a = n.conv("a", n.x(3, *[5] * rank), 6)
        return n.conv("b", n.conv("c", a, out, 3, groups=groups), 4)

    return build


def _transposed(
    rank: int, form: str = "default", each: int = 5, groups: int = 1
) -> Callable[[Net], fx.Node]:
    def build(n: Net) -> fx.Node:
        a = n.conv("a", n.x(3, *[3] * rank), 6)
        weight, bias = n.param("c.weight", 6, each, *[2] * rank), n.param("c.bias", each * groups)
        zero, two, one = [0] * rank, [2] * rank, [1] * rank
        op = f"conv_transpose{rank}d.{form}"
        return n.conv("b", n(op, a, weight, bias, two, zero, zero, groups, one), 4)

    return build


def _table(n: Net) -> fx.Node:
    return n.lin("b", n("embedding", n.param("a.weight", 9, 6), n.indices(9, 5)), 3)


def _bilinear(n: Net) -> fx.Node:
    a, c = n.lin("a", n.x(), 6), n.lin("c", n.x(), 5)
    found: fx.Node = n("bilinear", a, c, n.param("w", 3, 6, 5), n.param("wb", 3))
    return found


def _windowless(n: Net) -> fx.Node:
    """A convolution of which the units are the samples, and its bias."""
    a = n("view", n.lin("a", n.x(5, 4), 6), [-1, 1, 5])
    a = n("transpose.int", n("view", n.lin("p", n.x(6), 7), [-1, 7]), 0, 1)
    weight, bias = n.param("k", 2, 1, 3), n.param("kb", 2)
    return _sum(n, n("conv1d", n("unsqueeze", a, 1), weight, bias), 0)


def _heads(n: Net, name: str, heads: int, size: int = 4, **kwargs: bool) -> fx.Node:
    x = n.lin(name, next(iter(n.values)) if n.inputs else n.x(5, 8), heads * size, **kwargs)
    found: fx.Node = n("transpose.int", n("view", x, [-1, 5, heads, size]), 1, 2)
    return found


def _attend(
    heads: int, groups: int, *, mask: tuple[int, ...] = (), causal: bool = False, gqa: bool = False
) -> Callable[[Net], fx.Node]:
    def build(n: Net) -> fx.Node:
        q, k, v = _heads(n, "q", heads), _heads(n, "k", groups), _heads(n, "v", groups)
        bias = n.param("mask", *mask) if mask else None
        y = n("scaled_dot_product_attention", q, k, v, bias, 0.0, causal, scale=0.5, enable_gqa=gqa)
        y = n("reshape", n("transpose.int", y, 1, 2), [-1, 5, heads * 4])
        return n.lin("o", y, 3)

    return build


def _memory(n: Net) -> fx.Node:
    """Attention to stored tokens."""
    q = _heads(n, "q", 3)
    still = n("mul.Tensor", n("slice.Tensor", q, 2, 0, 1), 0.0)
    k, v = (n("add.Tensor", still, n.param(name, 1, 3, 7, 4)) for name in ("k", "v"))
    return _sum(n, n("scaled_dot_product_attention", q, k, v, scale=0.5), 1)


def _queries(n: Net) -> fx.Node:
    """Stored queries: without one its answer would still be the mean of the values."""
    k, v = _heads(n, "k", 3), _heads(n, "v", 3)
    q = n("mul.Tensor", n("ones_like", n("slice.Tensor", k, 2, 0, 1)), n.param("q", 7, 4))
    return _sum(n, n("scaled_dot_product_attention", q, k, v, scale=0.5), 2)


def _one_key(n: Net) -> fx.Node:
    """A head of which the query is zero still reads the mean of the values."""
    q, k, v = _heads(n, "q", 6), _heads(n, "k", 1), _heads(n, "v", 1)
    y = n("scaled_dot_product_attention", q, k, v, scale=0.5, enable_gqa=True)
    return _sum(n, y, 1)


Q: dict[str, Width] = {"q:head_dim": (4, "head_dim"), "v:head_dim": (4, "head_dim")}
SDPA = "scaled_dot_product_attention"


def _normed(
    op: str, *names: str, pre: str = "", args: tuple[object, ...] = (), out: int = 0
) -> Callable[[Net], fx.Node]:
    """A norm of channels with its vectors, before a convolution or a sum over them."""

    def build(n: Net) -> fx.Node:
        a = n.conv("a", n.x(3, 4, 4), 6)
        a = n(pre, a) if pre else a
        vectors = [n.stored(f"n.{v}", n.random(6).abs() + 0.5) if v else None for v in names]
        y = n(op, a, *vectors, *args)
        return n.conv("b", y, out) if out else _sum(n, y, 1)

    return build


BN = (False, 0.1, 1e-5, False)
ALL = ("weight", "bias", "mean", "var")


def _group_norm(groups: int, *names: str, out: int = 4) -> Callable[[Net], fx.Node]:
    def build(n: Net) -> fx.Node:
        a = n.conv("a", n.x(3, 4, 4), 6)
        y = n("group_norm", a, groups, *(n.param(f"n.{v}", 6) for v in names))
        return n.conv("b", y, out) if out else _sum(n, y, 1)

    return build


def _row_norm(op: str, *names: str, pre: str = "") -> Callable[[Net], fx.Node]:
    def build(n: Net) -> fx.Node:
        a = n.lin("a", n.x(5, 4), 6)
        a = n(pre, a) if pre else a
        return n.lin("b", n(op, a, [6], *(n.param(f"n.{v}", 6) for v in names)), 3)

    return build


def _norm_along(op: str) -> Callable[[Net], fx.Node]:
    """Units beside those that are normalised: behind a shift they are not zero."""

    def build(n: Net) -> fx.Node:
        a = n("transpose.int", n.lin("a", n.x(5, 4), 6), 1, 2)
        return _sum(n, n(op, a, [5], n.param("w", 5), n.param("wb", 5)), 1)

    return build


STREAM = {"a": (6, "stream")}
STATISTICS = "statistics over units that are not zero"


def _recurrent(
    op: str, gates: int, *, layers: int = 1, both: bool = False, start: float = 0.0, out: int = 3
) -> Callable[[Net], fx.Node]:
    """Steps are the batch [8, 1, 4]: linear, six units a layer and direction, linear."""

    def build(n: Net) -> fx.Node:
        x = n("unsqueeze", n.lin("a", n.x(), 5), 1)
        ways = 2 if both else 1
        states = [n("full", [layers * ways, 1, 6], start) for _ in range(2 if op == "lstm" else 1)]
        weights = []
        for k in range(layers * ways):
            inputs = 5 if k < ways else 6 * ways
            weights += [n.param(f"r{k}.i", 6 * gates, inputs), n.param(f"r{k}.h", 6 * gates, 6)]
            weights += [n.param(f"r{k}.b{j}", 6 * gates) for j in range(2)]
        hx = states if op == "lstm" else states[0]
        y, *_ = n(f"{op}.input", x, hx, weights, True, layers, 0.0, False, both, False)
        return n.lin("b", y, out) if out else _sum(n, y, 2)

    return build


RECURRENT = {"a": (5, "neurons"), "r0.i": (6, "neurons")}

CASES: list[Case] = [
    Case(op="linear", build=lambda n: n.lin("b", n.lin("a", n.x(), 6), 3), widths=A),
    Case(
        op="linear",
        note="row",
        build=lambda n: n("linear", n.lin("a", n.x(5, 4), 6), n.param("w", 6)),
        widths=A,
    ),
    Case(
        op="linear",
        note="beside the width",
        build=lambda n: n.lin("b", _mixed(n), 3),
        widths=A,
    ),
    Case(
        op="linear",
        note="beside the width, summed",
        build=lambda n: _sum(n, _mixed(n), 2),
        pinned={("a.weight", 0): ("aten.sum", SUMS)},
    ),
    Case(
        op="linear",
        note="beside the width without a bias, summed",
        build=lambda n: _sum(n, _mixed(n, bias=False), 2),
        widths=A,
    ),
    Case(op="matmul", build=_scores("matmul"), widths=A),
    Case(op="matmul", note="of one that is not zero", build=_scores("matmul", "exp"), widths=A),
    Case(
        op="matmul",
        note="of two that are not zero",
        build=_scores("matmul", "exp", "sigmoid"),
        pinned={("a.weight", 0): ("aten.matmul", SUMS), ("c.weight", 0): ("aten.matmul", SUMS)},
    ),
    Case(
        op="matmul",
        note="with a vector",
        build=lambda n: n("matmul", n.lin("a", n.x(5, 4), 6), n.param("w", 6)),
        widths=A,
    ),
    Case(
        op="matmul",
        note="rows and columns",
        build=lambda n: n(
            "matmul",
            n("softmax.int", n("matmul", n.x(5, 4), n("transpose.int", n.x(5, 4), 1, 2)), -1),
            n.lin("a", n.x(5, 4), 6),
        ),
        pinned={("a.weight", 0): ("output", "an output")},
        breaks=False,
    ),
    Case(op="bmm", build=_scores("bmm"), widths=A),
    Case(
        op="mm",
        build=lambda n: n("mm", n.lin("a", n.x(), 6), n.param("w", 6, 3)),
        widths=A,
    ),
    Case(
        op="mv",
        build=lambda n: n("mv", n.lin("a", n.x(), 6), n.param("w", 6)),
        widths=A,
    ),
    Case(op="dot", build=_dot, widths={"a": (6, "features")}),
    Case(
        op="addmm",
        build=lambda n: n("addmm", n.param("d", 3), n.lin("a", n.x(), 6), n.param("w", 6, 3)),
        widths=A,
    ),
    Case(
        op="addmm",
        note="of a labelled sum",
        build=lambda n: n.lin(
            "b", n("addmm", n.lin("a", n.x(), 6), n.lin("c", n.x(), 5), n.param("w", 5, 6)), 3
        ),
        widths=AC,
    ),
    Case(op="baddbmm", build=_baddbmm, widths=A),
    Case(
        op="addbmm",
        build=_addbmm,
        widths={"a": (5, "features"), "a#2": (6, "features")},
    ),
    Case(op="einsum", build=_einsum("bti,bsi->bts"), widths=A),
    Case(
        op="einsum",
        note="of two that are not zero",
        build=_einsum("bti,bsi->bts", "sigmoid", "cos"),
        pinned={("a.weight", 0): ("aten.einsum", SUMS)},
    ),
    *(
        Case(
            op="einsum",
            note=f"written {equation}",
            build=_einsum(equation),
            pinned={("a.weight", 0): ("aten.einsum", "einsum with")},
            breaks=False,
        )
        for equation in ("...i,...i->...", "bti,bsi")
    ),
    *(
        Case(op=f"conv{r}d", build=_conv(r), widths=CHANNELS | {"c": (6, "channels")})
        for r in (1, 2, 3)
    ),
    *(
        Case(
            op=f"conv{r}d",
            note="depthwise",
            build=_conv(r, 6, 6),
            widths=CHANNELS,
            literal=True,
        )
        for r in (1, 2, 3)
    ),
    Case(
        op="conv2d",
        note="depthwise, two each",
        build=_conv(2, 12, 6),
        widths=CHANNELS,
        literal=True,
    ),
    Case(
        op="conv2d",
        note="in groups",
        build=_conv(2, 8, 2),
        widths={"a": (3, "channels"), "c": (4, "groups")},
    ),
    Case(
        op="conv1d",
        note="over samples",
        build=_windowless,
        pinned={("p.weight", 0): ("aten.sum", SUMS)},
    ),
    *(
        Case(
            op=f"conv_transpose{r}d",
            build=_transposed(r, form),
            widths=CHANNELS | {"c": (5, "channels")},
        )
        for r, form in ((1, "default"), (2, "input"), (3, "input"))
    ),
    *(
        Case(
            op=f"conv_transpose{r}d",
            note="depthwise",
            build=_transposed(r, form, each=1, groups=6),
            widths=CHANNELS,
            literal=True,
        )
        for r, form in ((1, "default"), (2, "input"), (3, "input"))
    ),
    Case(
        op="conv_transpose2d",
        note="depthwise, two each",
        build=_transposed(2, "input", each=2, groups=6),
        widths=CHANNELS,
        pinned={("c.weight", 1): ("aten.conv_transpose2d", "outputs of one group")},
        breaks=False,
        literal=True,
    ),
    Case(
        op="conv_transpose2d",
        note="in groups",
        build=_transposed(2, "input", each=5, groups=2),
        widths={"a": (3, "channels"), "c": (5, "channels")},
    ),
    Case(
        op="embedding",
        build=_table,
        widths=STREAM,
        pinned={("a.weight", 0): ("aten.embedding", "entries of a table")},
    ),
    Case(op="bilinear", build=_bilinear, widths={"a": (6, "neurons"), "c": (5, "neurons")}),
    Case(op=SDPA, build=_attend(3, 3), widths={"q:heads": (3, "heads")} | Q),
    Case(
        op=SDPA,
        note="of groups",
        build=_attend(6, 3, gqa=True),
        widths={"q:heads": (3, "heads")} | Q,
    ),
    Case(
        op=SDPA,
        note="of one key",
        build=_attend(6, 1, gqa=True),
        widths={"q:heads": (6, "heads")} | Q,
    ),
    Case(
        op=SDPA,
        note="with a bias a head",
        build=_attend(3, 3, mask=(1, 3, 5, 5)),
        widths={"q:heads": (3, "heads")} | Q,
        pinned={("mask", 3): (f"aten.{SDPA}", "meets a dimension")},
        breaks=False,
    ),
    Case(
        op=SDPA,
        note="causal",
        build=_attend(3, 3, causal=True),
        widths={"q:heads": (3, "heads")} | Q,
    ),
    Case(
        op=SDPA,
        note="to stored tokens",
        build=_memory,
        widths={"q:heads": (3, "heads")},
        pinned={("k", 2): (f"aten.{SDPA}", "shares a softmax")},
    ),
    Case(
        op=SDPA,
        note="of stored queries",
        build=_queries,
        widths={"k:head_dim": (4, "head_dim")},
        pinned={("q", 0): ("aten.sum", SUMS)},
    ),
    Case(
        op=SDPA,
        note="of one key, summed over heads",
        build=_one_key,
        widths={"q:head_dim": (4, "head_dim")},
        pinned={("q.weight", 0): ("aten.sum", SUMS)},
    ),
    Case(op="batch_norm", build=_normed("batch_norm", *ALL, args=BN, out=4), widths=CHANNELS),
    Case(
        op="batch_norm", note="summed", build=_normed("batch_norm", *ALL, args=BN), widths=CHANNELS
    ),
    Case(
        op="batch_norm",
        note="without a scale, summed",
        build=_normed("batch_norm", "", "", "mean", "var", args=BN),
        widths=CHANNELS,
    ),
    Case(
        op="batch_norm",
        note="without a scale, of what is not zero",
        build=_normed("batch_norm", "", "", "mean", "var", pre="exp", args=BN),
        pinned={("a.weight", 0): ("aten.sum", SUMS)},
    ),
    Case(
        op="instance_norm",
        build=_normed(
            "instance_norm", "weight", "bias", "", "", args=(True, 0.1, 1e-5, False), out=4
        ),
        widths=CHANNELS,
    ),
    Case(
        op="instance_norm",
        note="without a scale, summed",
        build=_normed("instance_norm", "", "", "", "", args=(True, 0.1, 1e-5, False)),
        widths=CHANNELS,
    ),
    Case(
        op="layer_norm",
        build=_row_norm("layer_norm", "weight", "bias"),
        approximate=STREAM,
        literal=True,
    ),
    Case(
        op="layer_norm",
        note="of what is not zero",
        build=_row_norm("layer_norm", "weight", "bias", pre="exp"),
        pinned={("a.weight", 0): ("aten.layer_norm", STATISTICS)},
    ),
    Case(
        op="layer_norm",
        note="beside the width",
        build=_norm_along("layer_norm"),
        pinned={("a.weight", 0): ("aten.sum", SUMS)},
    ),
    Case(op="rms_norm", build=_row_norm("rms_norm", "weight"), widths=STREAM, literal=True),
    Case(op="rms_norm", note="without a scale", build=_row_norm("rms_norm"), widths=STREAM),
    Case(
        op="rms_norm",
        note="of what is not zero",
        build=_row_norm("rms_norm", "weight", pre="exp"),
        pinned={("a.weight", 0): ("aten.rms_norm", STATISTICS)},
    ),
    Case(
        op="group_norm",
        build=_group_norm(2, "weight", "bias"),
        widths={"a": (2, "groups")},
        approximate={"a#2": (3, "channels")},
        literal=True,
    ),
    Case(
        op="group_norm",
        note="of one group",
        build=_group_norm(1, "weight", "bias"),
        approximate=CHANNELS,
    ),
    Case(
        op="group_norm",
        note="as many as channels",
        build=_group_norm(6, "weight", "bias"),
        widths=CHANNELS,
        literal=True,
    ),
    Case(
        op="group_norm",
        note="as many as channels, summed",
        build=_group_norm(6, out=0),
        widths=CHANNELS,
    ),
    *(
        Case(op=op, build=_recurrent(op, gates), widths=RECURRENT)
        for op, gates in (("lstm", 4), ("gru", 3), ("rnn_tanh", 1), ("rnn_relu", 1))
    ),
    Case(
        op="lstm",
        note="of two layers and directions",
        build=_recurrent("lstm", 4, layers=2, both=True),
        widths=RECURRENT,
    ),
    Case(op="lstm", note="summed", build=_recurrent("lstm", 4, out=0), widths=RECURRENT),
    Case(op="gru", note="from states", build=_recurrent("gru", 3, start=0.5), widths=RECURRENT),
    Case(
        op="gru",
        note="from states, summed",
        build=_recurrent("gru", 3, start=0.5, out=0),
        widths={"a": (5, "neurons")},
        pinned={("r0.i", 0): ("aten.sum", "sums over units that are not zero")},
    ),
]
