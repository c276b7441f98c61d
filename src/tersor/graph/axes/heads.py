"""Widths whose dimensions may be mixed inside of every head: what a product of heads reads and gives.

Between the projection of values and the projection behind attention nothing knows one dimension of a
head from another: attention weighs them alike. An invertible map of each head, folded into the one and
undone in the other, changes no output; and so between queries and keys, which only meet in a product.
Such widths need not lose dimensions as they are: the best few directions can be turned to the front
first. A rotation that depends on the position, a norm or a nonlinearity in between forbids it.

Axes: h heads of a tensor, d dimensions of a head.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor, fx

from tersor.graph.axes.rulebook import arguments, op_name
from tersor.graph.axes.widths import Axes, Width
from tersor.graph.contracts import Graph
from tersor.graph.edit import attribute, copy_graph, rebuild

# Ops that only move elements, or treat all of them alike.
_MOVES = frozenset(
    (
        "view", "reshape", "_unsafe_view", "flatten", "unflatten", "transpose", "permute", "movedim", "t",
        "expand", "expand_as", "unsqueeze", "squeeze", "clone", "contiguous", "alias", "detach", "select", "slice",
        "unbind", "split", "split_with_sizes", "chunk", "getitem", "repeat_interleave",
    )
)  # fmt: skip
_SCALES = ("mul", "div")  # by a number
_PRODUCTS = ("matmul", "bmm")
_ATTENTION = "scaled_dot_product_attention"
MOST_DIMENSIONS = 256  # of a head: more make the systems of the solver large, and no model has them
HeadKind = Literal["values", "scores"]
Turn = Mapping[str, Tensor]  # stored tensor -> map of each head [h, d, d]


@dataclass(frozen=True, slots=True, kw_only=True)
class Heads:
    """How a width lies in the tensors around it.

    Attributes:
        kind: ``values`` between two projections; ``scores`` of queries and keys.
        first: Projection of values or queries, as node names; None: there is no such op.
        second: The projection that reads the values, or that of keys.
        sink: Where queries and keys meet; of values the projection that reads them.
        places: Stored tensor -> (dimension, elements [h, d] of each head and unit).
        sharing: Heads of the second tensor (values) or of the first one (scores) to one of the other.
    """

    kind: HeadKind
    first: str
    second: str
    sink: str
    places: Mapping[str, tuple[int, Int64[Tensor, "h d"]]]
    sharing: int

    def tensors_of(self, graph: Graph, side: Literal["first", "second"]) -> tuple[str, ...]:
        """Stored tensors of a projection that the width runs through: weight, then bias."""
        node = next(n for n in graph.module.graph.nodes if n.name == getattr(self, side))
        args = arguments(node)
        names = [str(a.target) for a in (args["weight"], args.get("bias")) if a is not None]
        return tuple(name for name in names if name in self.places)


def heads_of(axes: Axes, width: Width) -> Heads | None:
    """How a width's dimensions may be mixed; None where they may not, or nothing shows that they may."""
    if width.exactness != "exact" or width.units > MOST_DIMENSIONS:
        return None
    places = _places(axes, width)
    makers = [n for n in _projections(axes) if _weight(n) in _tensors(width, "producer")]
    readers = [n for n in _projections(axes) if _weight(n) in _tensors(width, "consumer")]
    if places is None or not _is_all(width, (*makers, *readers)):
        return None
    if (len(makers), len(readers)) == (1, 1):
        return _values(axes, width, places, (makers[0], readers[0]))
    if (len(makers), len(readers)) == (2, 0):
        return _scores(axes, width, places, makers)
    return None


def turned(graph: Graph, places: Mapping[str, tuple[int, Tensor]], turn: Turn) -> Graph:
    """A graph in which each head's part of some stored tensors is multiplied by its map.

    Args:
        graph: The graph that was analysed, or one with the same tensors.
        places: As of ``Heads``.
        turn: Tensor -> map of each of its heads; absent ones stay.
    """
    fresh, tensors = copy_graph(graph.module)
    for name, maps in turn.items():
        if name in tensors:
            tensors[name] = turned_tensor(tensors[name], places[name], maps)
    return replace(graph, module=rebuild(fresh, tensors))


def turned_tensor(
    tensor: Tensor, place: tuple[int, Int64[Tensor, "h d"]], maps: Float[Tensor, "h d d"]
) -> Tensor:
    """One stored tensor with the maps along a dimension; in float64, returned in its own type."""
    dim, rows = place
    moved = tensor.detach().movedim(dim, 0).double()
    found = moved.clone()
    found[rows.flatten()] = torch.einsum("hrd,hd...->hr...", maps.double(), moved[rows]).flatten(
        0, 1
    )
    return found.movedim(0, dim).contiguous().to(tensor.dtype)


def _projections(axes: Axes) -> Iterator[fx.Node]:
    """Linear layers with a stored weight."""
    for node in axes.graph.module.graph.nodes:
        if node.op == "call_function" and op_name(node) == "linear":
            weight = arguments(node)["weight"]
            if isinstance(weight, fx.Node) and weight.op == "get_attr" and len(weight.users) == 1:
                yield node


def _weight(node: fx.Node) -> str:
    return str(arguments(node)["weight"].target)


def _tensors(width: Width, role: str) -> set[str]:
    return {c.tensor for c in width.couplings if c.role == role}


def _is_all(width: Width, ops: Sequence[fx.Node]) -> bool:
    """Whether a width runs through the weights of some ops, their biases, and nothing else."""
    own = {_weight(op) for op in ops}
    for op in ops:
        bias = arguments(op).get("bias")
        if isinstance(bias, fx.Node) and bias.op == "get_attr" and len(bias.users) == 1:
            own.add(str(bias.target))
    return {c.tensor for c in width.couplings} <= own and len(own) > 0


def _places(axes: Axes, width: Width) -> dict[str, tuple[int, Tensor]] | None:
    found: dict[str, tuple[int, Tensor]] = {}
    for coupling in width.couplings:
        if coupling.tensor in found:
            return None  # twice through one tensor
        dim = axes.walk.stored[coupling.tensor][coupling.dim]
        units = torch.from_numpy(axes.units_of(width, dim))
        lists = [(units == u).nonzero()[:, 0] for u in range(width.units)]
        if len({len(own) for own in lists}) != 1:
            return None
        found[coupling.tensor] = coupling.dim, torch.stack(lists, 1)
    return found


def _values(
    axes: Axes,
    width: Width,
    places: dict[str, tuple[int, Tensor]],
    ops: tuple[fx.Node, fx.Node],
) -> Heads | None:
    maker, reader = ops
    ends = _ends(axes, width, maker)
    few, many = len(places[_weight(maker)][1]), len(places[_weight(reader)][1])
    columns = attribute(axes.graph.module, _weight(reader)).shape[1]
    is_whole = many * width.units == columns and many % few == 0
    if ends is None or not ends.passes_product or set(ends.sinks) != {reader} or not is_whole:
        return None
    return Heads(
        kind="values",
        first=maker.name,
        second=reader.name,
        sink=reader.name,
        places=places,
        sharing=many // few,
    )


def _scores(
    axes: Axes, width: Width, places: dict[str, tuple[int, Tensor]], makers: Sequence[fx.Node]
) -> Heads | None:
    sinks: dict[str, fx.Node] = {}
    for maker in makers:
        ends = _ends(axes, width, maker)
        if ends is None or ends.passes_product or len(ends.sinks) != 1:
            return None
        ((sink, argument),) = ends.sinks.items()
        side = "keys" if argument in ("key", "other", "mat2") else "queries"
        sinks[f"{side} {sink.name}"] = maker
    if len({name.split()[1] for name in sinks}) != 1 or len(sinks) != 2:
        return None
    by_side = {name.split()[0]: (name.split()[1], maker) for name, maker in sinks.items()}
    (sink_name, query), (_, key) = by_side["queries"], by_side["keys"]
    many, few = len(places[_weight(query)][1]), len(places[_weight(key)][1])
    if many % few:
        return None
    return Heads(
        kind="scores",
        first=query.name,
        second=key.name,
        sink=sink_name,
        places=places,
        sharing=many // few,
    )


@dataclass
class _Ends:
    sinks: dict[fx.Node, str]  # what sums over the width -> the argument that it is read as
    passes_product: bool = False


def _ends(axes: Axes, width: Width, start: fx.Node) -> _Ends | None:
    """Where a width goes from the op that makes it; None where something tells its units apart."""
    ends = _Ends({})
    todo, seen = [start], {start}
    while todo:
        node = todo.pop()
        for user in node.users:
            if user in seen:
                continue
            step = _step(axes, width, node, user)
            if step == "stop":
                return None
            if step.startswith("sink:"):
                ends.sinks[user] = step.removeprefix("sink:")
                continue
            if step == "leaves":
                continue
            ends.passes_product |= step == "product"
            seen.add(user)
            todo.append(user)
    return ends


def _step(axes: Axes, width: Width, node: fx.Node, user: fx.Node) -> str:
    """What an op does to a width: moves, leaves or multiplies it, sums over it; else ``stop``."""
    if user.op != "call_function":
        return "stop"
    if not isinstance(user.meta.get("val"), Tensor | list | tuple):
        return "leaves"  # a size
    carried = _carried(axes, width, axes.walk.shapes.get(user))
    name, args = op_name(user), arguments(user)
    if name in _MOVES:
        return {"all": "moves", "none": "leaves"}.get(carried, "stop")
    if name in _SCALES:
        is_number = isinstance(args.get("other"), int | float)
        return "moves" if is_number and carried == "all" else "stop"
    used = [k for k, a in args.items() if a is node]
    return _met(name, used[0], carried) if len(used) == 1 else "stop"


def _met(name: str, argument: str, carried: str) -> str:
    """What a product does to a width that it reads as one of its arguments."""
    if name not in (_ATTENTION, *_PRODUCTS, "linear"):
        return "stop"
    if carried == "all":
        return (
            "product" if (name, argument) == (_ATTENTION, "value") or name in _PRODUCTS else "stop"
        )
    is_summed = (
        argument != "value" if name == _ATTENTION else name != "linear" or argument == "input"
    )
    return f"sink:{argument}" if is_summed and carried == "none" else "stop"


def _carried(axes: Axes, width: Width, shape: Any) -> str:
    """Whether a tensor, or any of several, has all units of a width, none, or some."""
    if not shape:
        return "none"
    if isinstance(shape[0], list):
        found = {_carried(axes, width, one) for one in shape}
        return "all" if "all" in found and "some" not in found else "/".join(sorted(found))
    kinds = set()
    for dim in shape:
        units = axes.units_of(width, dim)
        count = len({*units.tolist()} - {-1})
        kinds.add("none" if not count else "all" if count == width.units else "some")
    kinds.discard("none")
    return "none" if not kinds else kinds.pop() if len(kinds) == 1 else "some"
