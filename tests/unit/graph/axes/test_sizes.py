"""The law over sizes: odd channels, groups, heads, factors of views, parts of splits."""

import math
from itertools import pairwise

from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import fx

from tersor.graph.axes import Axes, analyse_axes
from tersor.graph.axes.gate import TOLERANCE, check, random_share
from tests.unit.graph.axes.micro import Net

FEW = settings(max_examples=8, deadline=None)  # a graph and its cut take 50 ms
seeds = st.integers(0, 2**16)
sizes = st.integers(2, 7)


def obeys(net: Net, output: fx.Node, seed: int, share: float = 0.4) -> Axes:
    """The widths of a graph whose random cut equals the mask, which has an effect."""
    graph = net.close(output)
    axes = analyse_axes(graph)
    gone = random_share(axes, share, seed)
    if gone:
        report = check(graph, axes, gone)
        assert report.difference <= TOLERANCE, report
        assume(report.passed)  # else the mask did not move the output by enough
    return axes


def units(axes: Axes) -> dict[str, int]:
    return {w.name: w.units for w in axes.widths}


def dealt(n: Net, x: fx.Node, groups: int) -> fx.Node:
    """Channels dealt out to groups."""
    width = n.sizes(x)[1]
    x = n("transpose.int", n("view", x, [-1, groups, width // groups]), 1, 2)
    found: fx.Node = n("reshape", x, [-1, width])
    return found


@FEW
@given(st.lists(sizes, min_size=1, max_size=4), st.booleans(), seeds)
def test_linear_layers(widths: list[int], bias: bool, seed: int):
    n = Net(seed)
    x = n.x(5)
    for i, size in enumerate(widths):
        x = n("tanh", n.lin(f"l{i}", x, size, bias=bias))
    axes = obeys(n, n.lin("end", x, 3), seed)
    assert units(axes) == {f"l{i}": size for i, size in enumerate(widths)}


@FEW
@given(st.integers(1, 3), st.integers(1, 3), sizes, sizes, st.sampled_from([1, 3]), seeds)
def test_convolutions_in_groups(
    rank: int, groups: int, inner: int, outer: int, kernel: int, seed: int
):
    n = Net(seed)
    a = n.conv("a", n.x(2, *[4] * rank), groups * inner)
    c = n.conv("c", n("tanh", a), groups * outer, kernel, groups=groups)
    axes = obeys(n, n.conv("b", n("tanh", c), 3), seed)
    assert units(axes) == {"a": inner, "c": outer}


@FEW
@given(st.integers(2, 7), st.integers(1, 3), seeds)
def test_depthwise_convolutions(channels: int, each: int, seed: int):
    n = Net(seed)
    c = n.conv("c", n.conv("a", n.x(2, 4, 4), channels), channels * each, 3, groups=channels)
    assert units(obeys(n, n.conv("b", c, 3), seed)) == {"a": channels}


@FEW
@given(st.integers(1, 3), st.integers(1, 3), sizes, sizes, seeds)
def test_transposed_convolutions(rank: int, groups: int, inner: int, outer: int, seed: int):
    n = Net(seed)
    a = n("tanh", n.conv("a", n.x(2, *[3] * rank), groups * inner))
    weight = n.param("c.weight", groups * inner, outer, *[2] * rank)
    op = f"conv_transpose{rank}d.{'default' if rank == 1 else 'input'}"
    bias, zero, two = n.param("c.bias", groups * outer), [0] * rank, [2] * rank
    c = n(op, a, weight, bias, two, zero, zero, groups, [1] * rank)
    axes = obeys(n, n.conv("b", n("tanh", c), 3), seed)
    assert units(axes) == {"a": inner, "c": outer}


@st.composite
def parts(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """Sizes of parts, and the order in which they stand side by side again, some twice."""
    found = draw(st.lists(st.integers(1, 5), min_size=2, max_size=4))
    every = range(len(found))
    return found, [
        *draw(st.permutations(every)),
        *draw(st.lists(st.sampled_from(every), max_size=2)),
    ]


@FEW
@given(parts(), st.sampled_from(["split", "slice", "narrow", "tensor_split"]), seeds)
def test_parts_of_a_layer_side_by_side(found: tuple[list[int], list[int]], how: str, seed: int):
    lengths, order = found
    n = Net(seed)
    total = sum(lengths)
    borders = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    a = n.lin("a", n.x(), total)
    if how == "split":
        pieces = n("split_with_sizes", a, lengths, 1)
    elif how == "tensor_split":
        pieces = n("tensor_split.indices", a, borders[1:-1], 1)
    elif how == "slice":
        pieces = [n("slice.Tensor", a, 1, low, high) for low, high in pairwise(borders)]
    else:
        pieces = [
            n("narrow", a, -1, low - total, size)
            for low, size in zip(borders[:-1], lengths, strict=True)
        ]
    pieces = [n(f, p) for f, p in zip(("tanh", "sin", "cos", "sigmoid"), pieces, strict=False)]
    axes = obeys(n, n.lin("b", n("cat", [pieces[i] for i in order], 1), 3), seed)
    # A part of one stays: ops may repeat single elements.
    assert sum(w.units for w in axes.widths) == sum(size for size in lengths if size > 1)


def places(axes: Axes, name: str) -> set[tuple[str, int]]:
    return {(c.tensor, c.dim) for c in axes[name].couplings}


@FEW
@given(st.lists(st.integers(2, 4), min_size=2, max_size=3), st.data(), seeds)
def test_views_and_permutations(factors: list[int], data: st.DataObject, seed: int):
    """A width seen as a product: each factor is a width, whatever the order."""
    order = data.draw(st.permutations(range(len(factors))))
    n = Net(seed)
    a = n("tanh", n.lin("a", n.x(), math.prod(factors)))
    a = n("permute", n("view", a, [-1, *factors]), [0, *(i + 1 for i in order)])
    a = n("sin", n("reshape", a, [-1, math.prod(factors)]))
    axes = obeys(n, n.lin("b", a, 3), seed)
    assert [w.units for w in axes.widths] == factors


@FEW
@given(
    st.lists(st.integers(2, 4), min_size=2, max_size=3),
    st.lists(st.integers(2, 4), min_size=2, max_size=3),
    seeds,
)
def test_views_that_cut_across_each_other(first: list[int], second: list[int], seed: int):
    size = math.lcm(math.prod(first), math.prod(second))
    n = Net(seed)
    a = n.lin("a", n.x(), size)
    for factors in (first, second):
        shape = [*factors, size // math.prod(factors)]
        turned = n("permute", n("view", a, [-1, *shape]), [0, *range(len(shape), 0, -1)])
        a = n("sin", n("reshape", turned, [-1, size]))
    axes = obeys(n, n.lin("b", a, 3), seed)
    assert not axes.unknown


@FEW
@given(st.sampled_from([8, 12, 18, 24]), st.data(), seeds)
def test_two_shuffles(width: int, data: st.DataObject, seed: int):
    divisors = st.sampled_from([d for d in range(2, width) if width % d == 0])
    n = Net(seed)
    a = n("tanh", n.lin("a", n.x(), width))
    for i in range(2):
        a = dealt(
            n, n.lin(f"m{i}", a, width) if data.draw(st.booleans()) else a, data.draw(divisors)
        )
    obeys(n, n.lin("b", a, 3), seed)


@FEW
@given(
    st.integers(1, 3), st.integers(1, 3), st.integers(2, 5), st.integers(2, 5),
    st.sampled_from(["", "causal", "bias"]), seeds,
)  # fmt: skip
def test_attention(keys: int, each: int, size: int, width: int, mask: str, seed: int):
    """Grouped queries: a key goes with all the queries that read it."""
    n, heads = Net(seed), keys * each
    x = n.x(5, 4)

    def seen(name: str, count: int, dim: int) -> fx.Node:
        y = n("view", n.lin(name, x, count * dim), [-1, 5, count, dim])
        found: fx.Node = n("transpose.int", y, 1, 2)
        return found

    q, k, v = seen("q", heads, size), seen("k", keys, size), seen("v", keys, width)
    bias = n.param("bias", 1, heads, 5, 5) if mask == "bias" else None
    y = n(
        "scaled_dot_product_attention", q, k, v, bias, 0.0, mask == "causal", scale=0.7,
        enable_gqa=each > 1,
    )  # fmt: skip
    y = n("reshape", n("transpose.int", y, 1, 2), [-1, 5, heads * width])
    axes = obeys(n, n.lin("o", y, 3), seed)
    found = sorted((w.kind, w.units) for w in axes.widths)
    wanted = [("head_dim", size), ("head_dim", width)]
    count = keys if keys > 1 else heads
    assert found == sorted([*wanted, *([("heads", count)] if count > 1 else [])])


@FEW
@given(sizes, st.sampled_from(["mean", "rms_norm", "rms_norm eps"]), st.booleans(), seeds)
def test_statistics_that_are_rescaled(size: int, op: str, scaled: bool, seed: int):
    n = Net(seed)
    a = n("tanh", n.lin("a", n.x(5, 4), size))
    if op == "mean":
        y = n("unsqueeze", n("mean.dim", a, [-1], True), 0)
    else:
        weight = n.param("w", size) if scaled else None
        eps = 0.1 if op.endswith("eps") else None
        y = n.lin("b", n("rms_norm", a, [size], weight, eps), 3)
    axes = obeys(n, y, seed)
    assert units(axes) == {"a": size}
    assert axes["a"].exactness == "exact"


@FEW
@given(st.integers(1, 4), st.integers(1, 4), seeds)
def test_group_norm(groups: int, each: int, seed: int):
    n = Net(seed)
    a = n.conv("a", n.x(2, 3, 3), groups * each)
    y = n("group_norm", a, groups, n.param("w", groups * each), n.param("wb", groups * each))
    axes = obeys(n, n.conv("b", y, 3), seed)
    wanted = [(groups, "exact"), (each, "approximate")]
    found = [(w.units, w.exactness) for w in axes.widths]
    assert found == [(units, exactness) for units, exactness in wanted if units > 1]


@FEW
@given(
    st.sampled_from(["add.Tensor", "mul.Tensor", "sub.Tensor", "maximum"]),
    st.sampled_from([(6,), (1, 6), (5, 1), (5, 6), (1,), (1, 1, 6)]),
    st.booleans(),
    seeds,
)
def test_broadcasts(op: str, shape: tuple[int, ...], turned: bool, seed: int):
    """A stored operand goes along where it is as large, and stays where it is repeated."""
    n = Net(seed)
    operands = [n.lin("a", n.x(5, 4), 6), n.param("p", *shape)]
    y = n(op, *(operands[::-1] if turned else operands))
    axes = obeys(n, n.lin("b", y, 3), seed)
    assert axes["a"].units == 6
    assert (("p", len(shape) - 1) in places(axes, "a")) == (shape[-1] == 6)
