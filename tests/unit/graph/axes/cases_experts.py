"""Cases of routers: a top-k chooses among units, and tables, counts and sums follow its numbers."""

from collections.abc import Callable

from torch import fx

from tests.unit.graph.axes.micro import Case, Net

EXPERTS = 6
Routed = Callable[[Net, fx.Node, fx.Node], fx.Node]  # values and numbers of the two that are chosen
A = {"a:experts": (EXPERTS, "experts")}
W = {"w": (5, "neurons")}
AW = A | W
NUMBERS = "computes with the numbers of its units"


def _scores(n: Net, *ops: str) -> fx.Node:
    y = n.lin("a", n.x(), EXPERTS)
    for op in ops:
        y = n(op, y, -1) if op == "softmax.int" else n(op, y)
    return y


def routed(read: Routed, *ops: str, k: int = 2, largest: bool = True) -> Callable[[Net], fx.Node]:
    """Six scores, of which the largest choose what is read."""

    def build(n: Net) -> fx.Node:
        values, places = n("topk", _scores(n, *ops), k, -1, largest)
        return n.lin("b", read(n, values, places), 3)

    return build


def _weighted(n: Net, values: fx.Node, found: fx.Node) -> fx.Node:
    """[b, k, 5] summed by the values [b, k]."""
    y: fx.Node = n("sum.dim_IntList", n("mul.Tensor", found, n("unsqueeze", values, -1)), [1])
    return y


def _table(n: Net, values: fx.Node, places: fx.Node) -> fx.Node:
    return _weighted(n, values, n("index.Tensor", n.param("w", EXPERTS, 5), [places]))


def _moved(n: Net, values: fx.Node, places: fx.Node) -> fx.Node:
    """Numbers in one row and back."""
    flat = n("reshape", n("to.dtype", n("unsqueeze", places, 2), n.values[places].dtype), [-1])
    rows = n("index_select", n.param("w", EXPERTS, 5), 0, flat)
    return _weighted(n, values, n("view", rows, [-1, 2, 5]))


def _each(n: Net, values: fx.Node, places: fx.Node) -> fx.Node:
    """Numbers one by one, as a list."""
    left, right = n("unbind.int", places, 1)
    table = n.param("w", EXPERTS, 5)
    y = n("add.Tensor", n("embedding", table, left), n("embedding", table, right))
    found: fx.Node = n("mul.Tensor", y, n("slice.Tensor", values, 1, 0, 1))
    return found


def _gathered(op: str) -> Routed:
    """What is chosen from other scores of the same units."""

    def read(n: Net, values: fx.Node, places: fx.Node) -> fx.Node:
        found: fx.Node = n(
            "mul.Tensor", n(op, n.lin("c", n.x(), EXPERTS), *_places(op, places)), values
        )
        return found

    return read


def _places(op: str, places: fx.Node) -> tuple[object, ...]:
    return (1, places) if op == "gather" else (places, 1)


def _dense(n: Net, values: fx.Node, places: fx.Node, classes: int = EXPERTS) -> fx.Node:
    """One number a unit, zero at those that are not chosen."""
    spread = _weighted(n, values, n.real(n("one_hot", places, classes)))
    found: fx.Node = n("matmul", spread, n.param("w", classes, 5))
    return found


def _scattered(op: str) -> Routed:
    def read(n: Net, values: fx.Node, places: fx.Node) -> fx.Node:
        zeros = n("mul.Tensor", n.lin("c", n.x(), EXPERTS), 0.0)
        found: fx.Node = n("matmul", n(op, zeros, 1, places, values), n.param("w", EXPERTS, 5))
        return found

    return read


def _counted(n: Net, values: fx.Node, places: fx.Node) -> fx.Node:
    """How often each unit is chosen in all samples."""
    flat, ones = n("reshape", places, [-1]), n("reshape", values, [-1])
    sums = n("index_add", n.param("z", EXPERTS), 0, flat, n("mul.Tensor", ones, 0.1))
    found: fx.Node = n("mul.Tensor", n.x(5), n("matmul", sums, n.param("w", EXPERTS, 5)))
    return found


def _corrected(n: Net) -> fx.Node:
    """A stored correction decides who is chosen, and is not part of the value."""
    scores = _scores(n, "sigmoid")
    _, places = n("topk", n("add.Tensor", scores, n.param("c", EXPERTS)), 2, -1)
    values = n("gather", scores, 1, places)
    return n.lin("b", _table(n, values, places), 3)


def _two_readers(n: Net) -> fx.Node:
    """Scores that a layer reads, too: only the router sees minus infinity."""
    scores = _scores(n)
    values, places = n("topk", n("softmax.int", scores, -1), 2, -1)
    found: fx.Node = n(
        "add.Tensor", n.lin("b", _table(n, values, places), 3), n.lin("d", scores, 3)
    )
    return found


def _compared(n: Net, values: fx.Node, places: fx.Node) -> fx.Node:
    """A number that is written out."""
    found: fx.Node = n("mul.Tensor", values, n.real(n("eq.Scalar", places, 3)))
    return found


def _written(n: Net, values: fx.Node, places: fx.Node) -> fx.Node:
    """Numbers as what is chosen from, not as what chooses."""
    picked = n.real(n("gather", places, 1, n.indices(2, 2)))
    found: fx.Node = n("mul.Tensor", values, picked)
    return found


def _shown(n: Net) -> list[fx.Node]:
    values, places = n("topk", _scores(n), 2, -1)
    return [values, places]


CASES: list[Case] = [
    Case(op="topk", note="behind a softmax", build=routed(_table, "softmax.int"), widths=AW),
    Case(op="topk", note="before a softmax", build=routed(_table), widths=AW),
    Case(op="topk", note="with a correction", build=_corrected, widths=AW),
    Case(op="topk", note="beside another reader", build=_two_readers, widths=AW),
    Case(op="softmax", note="that a top-k reads", build=routed(_table, "softmax.int"), widths=AW),
    Case(op="index", note="by numbers of units", build=routed(_table, "sigmoid"), widths=AW),
    Case(op="index_select", note="by numbers of units", build=routed(_moved), widths=AW),
    Case(
        op="embedding",
        note="by numbers of units",
        build=routed(_each),
        widths=A | {"w": (5, "stream")},
    ),
    *(
        Case(op=op, note="by numbers of units", build=routed(_gathered(op)), widths=A)
        for op in ("gather", "take_along_dim")
    ),
    Case(op="one_hot", note="of numbers of units", build=routed(_dense), widths=AW, literal=True),
    *(
        Case(op=name, note="by numbers of units", build=routed(_scattered(op)), widths=AW)
        for name, op in (("scatter", "scatter.src"), ("scatter_add", "scatter_add"))
    ),
    Case(op="index_add", note="by numbers of units", build=routed(_counted), widths=A),
    Case(
        op="topk",
        note="of all units",
        build=routed(_table, k=EXPERTS),
        widths=W,
        pinned={("a.weight", 0): ("aten.topk", "values compete over it")},
    ),
    Case(
        op="topk",
        note="of the smallest",
        build=routed(_table, "neg", "exp", largest=False),
        widths=W,
        pinned={("a.weight", 0): ("aten.topk", "values compete over it")},
    ),
    Case(
        op="topk",
        note="that an output shows",
        build=_shown,
        pinned={("a.weight", 0): ("output", NUMBERS)},
        breaks=False,
    ),
    Case(
        op="eq",
        note="of numbers of units",
        build=routed(_compared),
        pinned={("a.weight", 0): ("aten.eq", NUMBERS)},
    ),
    Case(
        op="gather",
        note="from numbers of units",
        build=routed(_written),
        pinned={("a.weight", 0): ("aten.gather", NUMBERS)},
    ),
    Case(
        op="one_hot",
        note="of more classes than units",
        build=routed(lambda n, v, p: _dense(n, v, p, EXPERTS + 1)),
        widths=W,
        pinned={("a.weight", 0): ("aten.one_hot", "a number of classes")},
        breaks=False,
    ),
]
