"""Ops that a backend does not know become others, one by one, without exporting a graph again.

``torch.export`` traces all of a graph to decompose some of its ops, which takes seconds; graphs of
one model with other sizes are lowered dozens of times while builds are measured. Here shapes are
propagated (the batch, and what the signature leaves open, are symbols), ops that the backend takes
are copied, and the others are traced alone; whatever has been seen with the same sizes is known. A
graph that this can't do is None, and has to be exported.
"""

import operator
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
    free_unbacked_symbols,
)
from torch.fx.passes.shape_prop import _extract_tensor_metadata
from torch.utils import _pytree as pytree

from tersor.graph.contracts import Graph
from tersor.graph.edit import attribute
from tersor.graph.mutation import has_mutation, remove_mutation
from tersor.graph.recurrence import opaque, unrolled
from tersor.graph.split import Split

_KEPT_WORLDS, _KEPT_OPS = 8, 8192  # shapes and a few nodes each: no data
_LEAST = 2  # torch takes sizes of 0 and 1 as fixed

K = TypeVar("K")
V = TypeVar("V")


@dataclass(frozen=True, slots=True)
class Decomposed:
    """A graph of ops that a backend takes, and the graph's node that each of its nodes is from."""

    module: fx.GraphModule
    sources: Mapping[str, str]


class _Latest(Generic[K, V]):
    """The latest few of what was made."""

    def __init__(self, most: int) -> None:
        self._most, self._known = most, OrderedDict[K, V]()

    def __call__(self, key: K, make: Callable[[], V]) -> V:
        if key in self._known:
            self._known.move_to_end(key)
            return self._known[key]
        made = self._known[key] = make()
        while len(self._known) > self._most:
            self._known.popitem(last=False)
        return made

    def forget(self, key: K) -> None:
        self._known.pop(key, None)


@dataclass(frozen=True, slots=True)
class _World:
    """Symbols for the open sizes, and what ops make of tensors with such sizes."""

    mode: FakeTensorMode
    symbols: Mapping[str, torch.SymInt]
    values: _Latest[Any, Any] = field(default_factory=lambda: _Latest(_KEPT_OPS))
    traces: _Latest[Any, fx.Graph] = field(default_factory=lambda: _Latest(_KEPT_OPS))

    def empty(self, sizes: tuple[Any, ...], dtype: torch.dtype) -> Tensor:
        """A tensor without data."""
        with self.mode:
            return torch.empty(sizes, dtype=dtype)

    def stayed_open(self) -> bool:
        """Whether no op has fixed a size that is open, or tied two of them together."""
        found = [s.node.expr for s in self.symbols.values()]
        return all(e.is_symbol for e in found) and len(set(found)) == len(found)


class Decomposer:
    """Decomposes graphs by one table; ops that it does not have are kept.

    Args:
        table: Op -> how it is computed by others: ``torch.export.default_decompositions()``
            without what is to be kept.
        recurrent: Recurrent ops that are kept; torch's table always has them.
    """

    def __init__(self, table: Any, recurrent: frozenset[Any] = frozenset()) -> None:
        self._table = table
        self._recurrent = recurrent
        self._python = {op: how for op, how in table.items() if not _is_composite(op)}
        # The full table has every composite op that torch can keep: what is not in ours is kept.
        self._kept = {op for op in torch.export.default_decompositions() if op not in table}
        self._worlds: _Latest[Any, _World] = _Latest(_KEPT_WORLDS)
        self._lock = threading.Lock()

    def __call__(self, graph: Graph, parts: Split) -> Decomposed | None:
        """The graph in ops that are not in the table, or None where it has to be exported."""
        nodes = list(parts.module.graph.nodes)
        if any(n.op == "call_function" and not _is_plain(n.target) for n in nodes):
            return None
        sizes = _open_sizes(graph)
        if any(size < _LEAST for size in sizes.values()):
            return None
        key = tuple(sorted(sizes.items()))
        with self._lock:
            try:
                world = self._worlds(key, lambda: _world(sizes))
                with world.mode, torch.no_grad(), _python(self._recurrent):
                    made = _Lowering(self, world, graph, parts).run()
            except Exception:  # noqa: BLE001 - what torch can't trace alone it may trace as a whole
                self._worlds.forget(key)
                return None
            if not world.stayed_open():
                self._worlds.forget(key)
                return None
            return made

    def stays(self, op: Any) -> bool:
        """Whether an op is left as it is."""
        if op in self._recurrent:
            return True
        return op not in self._table and (op in self._kept or not _is_composite(op))

    def trace(self, node: fx.Node, leaves: list[Any], spec: Any) -> fx.Graph:
        """What an op becomes; its tensors and sizes are placeholders, in the order of its leaves."""
        places = [i for i, leaf in enumerate(leaves) if _is_open(leaf)]

        def call(*values: Any) -> Any:
            every = list(leaves)
            for place, value in zip(places, values, strict=True):
                every[place] = value
            args, kwargs = pytree.tree_unflatten(every, spec)
            return node.target(*args, **kwargs)  # type: ignore[operator]

        # Tensors of one kind are one object here, and tracing tells values apart by the object.
        given = [_twin(leaves[i]) for i in places]
        found = make_fx(call, decomposition_table=self._python)(*given).graph
        remove_mutation(found)  # some ops write to values of their own, cosine_similarity for one
        if has_mutation(found):
            raise TypeError(f"{node.target} writes to a tensor that another name shows")
        return found


@contextmanager
def _python(kept: frozenset[Any]) -> Iterator[None]:
    """Torch's decompositions in Python, with recurrent ops unrolled but for those that are kept."""
    with enable_python_dispatcher(), unrolled(), opaque(kept):
        yield


def _twin(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    return torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype)


def _open_sizes(graph: Graph) -> dict[str, int]:
    """Symbol -> its size in the example."""
    found: dict[str, int] = {}
    for spec, example in zip(graph.signature.inputs, graph.example, strict=True):
        for dim, size in enumerate(example.shape):
            name = _symbol(spec, dim)
            if name is not None:
                found.setdefault(name, int(size))
    return found


def _symbol(spec: Any, dim: int) -> str | None:
    return "batch" if spec.shape[dim] is None else spec.symbol(dim) or None


def _world(sizes: Mapping[str, int]) -> _World:
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    symbols = {}
    for name, size in sizes.items():
        context: Any = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
        symbols[name] = mode.from_tensor(torch.empty(size), symbolic_context=context).shape[0]
    return _World(mode, symbols)  # type: ignore[arg-type]


class _Lowering:
    """One graph, written again."""

    def __init__(self, by: Decomposer, world: _World, graph: Graph, parts: Split) -> None:
        self._by, self._world = by, world
        self._module = parts.module
        self._holders = iter(self._inputs(graph, parts))
        self._graph = fx.Graph()
        self._twins: dict[fx.Node, Any] = {}  # node of the module -> its node here, or several
        self._sources: dict[str, str] = {}
        self._sizes: dict[str, fx.Node] = {}  # one node for each open size, whoever asks

    def _inputs(self, graph: Graph, parts: Split) -> list[Tensor]:
        symbols, made = self._world.symbols, []
        for spec, example in zip(graph.signature.inputs, graph.example, strict=True):
            names = [_symbol(spec, dim) for dim in range(example.dim())]
            sizes = (symbols[s] if s else int(n) for s, n in zip(names, example.shape, strict=True))
            made.append(self._world.empty(tuple(sizes), example.dtype))
        holders = [n.name for n in parts.module.graph.nodes if n.op == "placeholder"]
        weights = (parts.weight_shapes[name] for name in holders[len(made) :])
        return made + [self._world.empty(shape, torch.float32) for shape in weights]

    def run(self) -> Decomposed:
        """All nodes in order."""
        for node in self._module.graph.nodes:
            self._twins[node] = self._write(node)
        self._graph.eliminate_dead_code()
        return Decomposed(fx.GraphModule(self._module, self._graph), self._sources)

    def _write(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            return self._put(node, node.op, node.target, (), {}, next(self._holders))
        if node.op == "get_attr":
            tensor = attribute(self._module, str(node.target))
            value = self._world.empty(tuple(tensor.shape), tensor.dtype)
            return self._put(node, node.op, node.target, (), {}, value)
        args = fx.map_arg(node.args, lambda n: self._twins[n])
        kwargs = fx.map_arg(node.kwargs, lambda n: self._twins[n])
        if node.op == "output":
            return self._graph.output(args[0])
        if node.target is operator.getitem and isinstance(args[0], (list, tuple)):
            return args[0][int(args[1])]  # type: ignore[arg-type] # of an op that has become several nodes
        if self._by.stays(node.target):
            return self._call(node, node.target, args, kwargs)
        return self._inline(node, args, kwargs)

    def _inline(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        nodes, spec = pytree.tree_flatten((args, kwargs))
        leaves = [_value(leaf) for leaf in nodes]
        key = (node.target, spec, tuple(_signature(leaf) for leaf in leaves))
        steps = self._world.traces(key, lambda: self._by.trace(node, leaves, spec))
        given = (n for n, leaf in zip(nodes, leaves, strict=True) if _is_open(leaf))
        inner: dict[fx.Node, Any] = {}
        for step in steps.nodes:
            if step.op == "placeholder":
                inner[step] = next(given)
                continue
            args = fx.map_arg(step.args, lambda n: inner[n])
            kwargs = fx.map_arg(step.kwargs, lambda n: inner[n])
            if step.op == "output":
                return args[0]
            if step.op != "call_function":
                raise TypeError(f"{node.target} needs a constant of its own")
            inner[step] = self._call(node, step.target, args, kwargs)
        raise AssertionError("a graph without an output")

    def _call(self, node: fx.Node, target: Any, args: Any, kwargs: Any) -> Any:
        if target is torch.ops.aten.sym_numel.default:
            return self._elements(node, args[0])
        leaves, spec = pytree.tree_flatten((args, kwargs))
        values = [_value(leaf) for leaf in leaves]
        key = (target, spec, tuple(_signature(leaf) for leaf in values))

        def compute() -> Any:
            given, named = pytree.tree_unflatten(values, spec)
            found = target(*given, **named)
            if free_unbacked_symbols([v for v in pytree.tree_leaves(found) if _is_open(v)]):
                raise TypeError(f"{target}: sizes depend on the data, and differ from call to call")
            return found

        value = self._world.values(key, compute)
        size = str(value) if isinstance(value, torch.SymInt) else ""
        if size in self._sizes:
            return self._sizes[size]
        made = self._put(node, "call_function", target, args, kwargs, value)
        if size:
            self._sizes[size] = made
        return made

    def _elements(self, node: fx.Node, of: fx.Node) -> Any:
        """How many elements a value has, from its sizes: not every backend has an op for it."""
        product: Any = 1
        for dim, size in enumerate(_value(of).shape):
            is_open = isinstance(size, torch.SymInt)
            factor = (
                self._call(node, torch.ops.aten.sym_size.int, (of, dim), {}) if is_open else size
            )
            if isinstance(product, int) and isinstance(factor, int):
                product *= factor
            else:
                product = self._call(node, operator.mul, (factor, product), {})
        return product

    def _put(
        self, node: fx.Node, op: str, target: Any, args: Any, kwargs: Any, value: Any
    ) -> fx.Node:
        twin = self._graph.create_node(op, target, args, kwargs, node.name)
        twin.meta["val"] = value
        if isinstance(value, Tensor):
            twin.meta["tensor_meta"] = _extract_tensor_metadata(value)
        self._sources[twin.name] = node.name
        return twin


def _value(leaf: Any) -> Any:
    return leaf.meta["val"] if isinstance(leaf, fx.Node) else leaf


def _is_open(leaf: Any) -> bool:
    return isinstance(leaf, (Tensor, torch.SymInt))


def _signature(leaf: Any) -> Any:
    """All that a shape, or a trace, depends on: kinds, sizes, strides, plain values."""
    if isinstance(leaf, Tensor):
        return ("tensor", leaf.dtype, str(leaf.shape), str(leaf.stride()))
    if isinstance(leaf, torch.SymInt):
        return ("size", str(leaf))
    if isinstance(leaf, (list, tuple)):  # results of an op that gives several
        return tuple(_signature(part) for part in leaf)
    return (type(leaf).__name__, leaf)


def _is_composite(op: Any) -> bool:
    key = torch._C.DispatchKey.CompositeImplicitAutograd  # noqa: SLF001
    return isinstance(op, torch._ops.OpOverload) and op.has_kernel_for_dispatch_key(key)  # noqa: SLF001


def _is_plain(target: Any) -> bool:
    """Whether it is an op that writes to none of its inputs, or arithmetic of sizes."""
    if isinstance(target, torch._ops.OpOverload):  # noqa: SLF001
        return not target._schema.is_mutable  # noqa: SLF001
    return callable(target) and getattr(target, "__module__", "") in ("_operator", "math")
