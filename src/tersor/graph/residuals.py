"""Residual branches and whole blocks: what is added to a stream that also goes round it.

A branch is found at an addition y = s + f: f and all that only f needs (its *body*) may go, as no
one else reads it. It counts as residual where the tensor x that the body reads also reaches s, by
itself or through a short chain with at most one linear map (a projection shortcut). Other tensors
that the body reads must not depend on x: a mask, rotary tables, an encoder's output.

A block is a run of two or three branches under one module, from the x of the first to the y of the
last: what is taken for f is y - x.
"""

import heapq
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from tersor.graph.axes.macs import node_macs
from tersor.graph.axes.rulebook import sizes_of
from tersor.graph.contracts import Graph
from tersor.graph.edit import attribute, stored_uses
from tersor.graph.meta import ensure
from tersor.graph.mutation import written_to
from tersor.graph.operators import WeightedOp, weighted_ops

aten = torch.ops.aten

BRANCH_PREFIX = "branch:"  # of the names of branch sites
_CHAIN = 8  # nodes of a shortcut: a slice or a pooling, padding, one map, a norm
_RUN = (3, 2)  # branches of a block: self-attention, cross-attention and neurons at most
_TURNS = (aten.permute.default, aten.transpose.int)


@dataclass(frozen=True, slots=True)
class Branch:
    """A branch, or a block where ``value`` is None.

    Attributes:
        name: With its prefix; unique in the graph.
        add: The addition y = s + f.
        skip: s, which stays; x of a block.
        value: f; None of a block, where it is y - x.
        body: Nodes that nothing needs once f is gone, names.
        ops: Linear maps and convolutions of the body, in graph order.
        projection: s where that is a linear map of its own that can take up another: read by the
            addition alone, with tensors that no other op reads.
        dim: The dimension of y that holds its channels, from 0.
        inputs: What each output of a linear map in the branch's place reads: channels, of a
            projection all that its kernel covers.
        macs: Of the body, per sample.
    """

    name: str
    add: fx.Node
    skip: fx.Node
    value: fx.Node | None
    body: frozenset[str]
    ops: tuple[WeightedOp, ...]
    projection: WeightedOp | None
    dim: int
    inputs: int
    macs: int

    @property
    def channels(self) -> int:
        """Channels of y."""
        return sizes_of(self.add.meta["val"])[self.dim]

    @property
    def source(self) -> fx.Node:
        """What a linear map in the branch's place reads."""
        return self.skip if self.projection is None else self.projection.data

    @property
    def has_map(self) -> bool:
        """Whether a linear map can take the branch's place, at fewer multiply-accumulates."""
        if self.projection is not None:
            return True
        sizes = sizes_of(self.add.meta["val"])
        is_conv = self.dim == 1 and 3 <= len(sizes) <= 5
        macs = math.prod(sizes[1:]) * self.channels
        return (self.dim == len(sizes) - 1 or is_conv) and macs < self.macs


def find_branches(graph: Graph) -> tuple[Branch, ...]:
    """All branches and blocks, in the order of their additions; a block after its branches.

    Nothing that shares memory with what an in-place op writes is part of a branch.
    """
    ensure(graph)
    search = _Search(graph)
    branches = list(search.branches())
    found = [*branches, *search.blocks(branches)]
    return tuple(sorted(found, key=lambda b: search.place[b.add]))


@dataclass(frozen=True, slots=True)
class _Part:
    """A set of nodes behind one node, and the tensors that it reads from outside."""

    inside: set[fx.Node]
    reads: tuple[fx.Node, ...]


class _Search:
    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.nodes: list[fx.Node] = list(graph.module.graph.nodes)
        self.place = {node: i for i, node in enumerate(self.nodes)}
        self.written = written_to(graph.module.graph)
        found = (op for op in weighted_ops(graph.module) if op.kind != "embedding")
        self.ops = {op.node: op for op in found}
        self.paths = {node: _module_path(op) for node, op in self.ops.items()}
        self.names: set[str] = set()
        self._uses = stored_uses(graph.module)
        self._reached: dict[fx.Node, set[fx.Node]] = {}

    def branches(self) -> Iterator[Branch]:
        for node in self.nodes:
            operands = _addition(node)
            if operands is None or node in self.written:
                continue
            ways = (self._branch(node, f, s) for f, s in (operands, operands[::-1]))
            found = [branch for branch in ways if branch is not None]
            if found:
                yield self._named(max(found, key=lambda branch: branch.macs))

    def blocks(self, branches: Sequence[Branch]) -> Iterator[Branch]:
        taken: set[str] = set()
        for start, first in enumerate(branches):
            for length in _RUN:
                run = branches[start : start + length]
                if len(run) < length or first.projection or taken & {b.name for b in run}:
                    continue
                block = self._block(run)
                if block is not None:
                    taken |= {b.name for b in run}
                    yield self._named(block)
                    break

    def _branch(self, add: fx.Node, value: fx.Node, skip: fx.Node) -> Branch | None:
        if set(value.users) != {add} or value.op != "call_function":
            return None
        part = self._part({value}, frozenset())
        x = self._origin(skip, part)
        if x is None or not self._is_alone(part, x):
            return None
        projection = self._projection(add, skip)
        return self._made(add, skip, value, part.inside, projection)

    def _block(self, run: Sequence[Branch]) -> Branch | None:
        first, last = run[0], run[-1]
        if first.skip.op == "get_attr" or _shape(first.skip) != _shape(last.add):
            return None
        part = self._part({last.add}, frozenset({first.skip}))
        body = part.inside - {last.add}
        inner = [node.add for node in run[:-1]]
        if not all(node in body for node in inner) or not self._is_alone(part, first.skip):
            return None
        if first.skip not in part.reads or not self._owned(self._inside(body)):
            return None
        return self._made(last.add, first.skip, None, body, None)

    def _made(
        self,
        add: fx.Node,
        skip: fx.Node,
        value: fx.Node | None,
        inside: set[fx.Node],
        projection: WeightedOp | None,
    ) -> Branch | None:
        ops = self._inside(inside)
        if not ops:
            return None
        batch = max(1, len(self.graph.example[0]))
        if projection is None:
            dim = _channel_dim(ops[-1], add, inside)
            inputs = _shape(add)[dim]
        else:
            dim = 1 if projection.window is not None else len(_shape(add)) - 1
            inputs = attribute(self.graph.module, str(projection.weight.target))[0].numel()
        return Branch(
            name="",
            add=add,
            skip=skip,
            value=value,
            body=frozenset(node.name for node in inside),
            ops=ops,
            projection=projection,
            dim=dim,
            inputs=inputs,
            macs=sum(node_macs(self.graph, node) for node in inside) // batch,
        )

    def _part(self, seeds: set[fx.Node], stop: frozenset[fx.Node]) -> _Part:
        """Seeds, and before them all nodes that nothing outside reads; ``stop`` stays outside."""
        inside = set(seeds)
        queue = [(-self.place[n], n.name, n) for seed in seeds for n in seed.all_input_nodes]
        heapq.heapify(queue)
        reads: dict[fx.Node, None] = {}
        while queue:  # latest first: all readers of a node have been decided
            _, _, node = heapq.heappop(queue)
            if node in inside or node in reads:
                continue
            is_free = node.op in ("call_function", "get_attr") and node not in stop
            if is_free and all(user in inside for user in node.users):
                inside.add(node)
                for source in node.all_input_nodes:
                    heapq.heappush(queue, (-self.place[source], source.name, source))
            else:
                reads[node] = None
        return _Part(inside, tuple(node for node in reads if _is_data(node)))

    def _origin(self, skip: fx.Node, part: _Part) -> fx.Node | None:
        """The tensor that the body reads and a shortcut leads to, or None."""
        node, maps = skip, 0
        for _ in range(_CHAIN):
            if node in part.reads:
                return node
            sources = [n for n in node.all_input_nodes if _is_data(n)]
            maps += node in self.ops
            if len(sources) != 1 or maps > 1 or node.op != "call_function":
                return None
            node = sources[0]
        return None

    def _is_alone(self, part: _Part, x: fx.Node) -> bool:
        """Whether the body knows of x by x alone, and no value in it is written to."""
        if self.written & {*part.inside, *part.reads}:
            return False
        return not any(other in self._after(x) for other in part.reads if other is not x)

    def _after(self, x: fx.Node) -> set[fx.Node]:
        """All tensors that depend on x."""
        if x not in self._reached:
            found, queue = {x}, [x]
            while queue:
                fresh = [u for u in queue.pop().users if u not in found and _is_data(u)]
                found.update(fresh)
                queue += fresh
            self._reached[x] = found
        return self._reached[x]

    def _projection(self, add: fx.Node, skip: fx.Node) -> WeightedOp | None:
        op = self.ops.get(skip)
        if op is None or set(skip.users) != {add} or _shape(skip) != _shape(add):
            return None
        tensors = [node for node in (op.weight, op.bias) if node is not None]
        return op if all(self._uses[str(node.target)] == 1 for node in tensors) else None

    def _inside(self, nodes: set[fx.Node]) -> tuple[WeightedOp, ...]:
        return tuple(op for node, op in self.ops.items() if node in nodes)

    def _named(self, branch: Branch) -> Branch:
        """The module that holds the branch and nothing else, its first op's, or the addition."""
        around = () if branch.projection is None else (branch.projection,)
        common = ".".join(_common(self.paths[op.node] for op in branch.ops))
        first = ".".join(self.paths[branch.ops[0].node])
        own = [common] if self._owned((*branch.ops, *around)) else []
        names = (*own, first, f"{first} {branch.add.name}".strip())
        name = next(n for n in names if n and f"{BRANCH_PREFIX}{n}" not in self.names)
        self.names.add(f"{BRANCH_PREFIX}{name}")
        return replace(branch, name=f"{BRANCH_PREFIX}{name}")

    def _owned(self, ops: Sequence[WeightedOp]) -> bool:
        """Whether some ops are all those below the module that they have in common."""
        inside = [op.node for op in ops]
        common = _common(self.paths[node] for node in inside)
        below = {n for n, path in self.paths.items() if path[: len(common)] == common}
        return bool(common) and below <= set(inside)


def _addition(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The operands of a sum of two different float tensors of the result's shape."""
    if node.target is not aten.add.Tensor or len(node.args) != 2 or node.kwargs:
        return None
    left, right = node.args
    if not isinstance(left, fx.Node) or not isinstance(right, fx.Node) or left is right:
        return None
    values = [n.meta.get("val") for n in (node, left, right)]
    tensors = [v for v in values if isinstance(v, Tensor) and v.is_floating_point() and v.dim() > 1]
    if len(tensors) < 3 or len({tuple(sizes_of(v)) for v in tensors}) > 1:
        return None
    return left, right


def _is_data(node: fx.Node) -> bool:
    """Whether a node is a tensor that the inputs decide."""
    return node.op != "get_attr" and (isinstance(node.meta.get("val"), Tensor | list | tuple))


def _shape(node: fx.Node) -> tuple[int, ...]:
    return tuple(sizes_of(node.meta["val"]))


def _module_path(op: WeightedOp) -> tuple[str, ...]:
    """From the weight's name; a weight without a module's name has the node's own."""
    parts = tuple(str(op.weight.target).split(".")[:-1])
    stack = list((op.node.meta.get("nn_module_stack") or {"": ("",)}).values())
    return parts or tuple(str(stack[-1][0]).partition("@")[0].split("."))


def _common(paths: Iterable[tuple[str, ...]]) -> tuple[str, ...]:
    rows = list(paths)
    shortest = min(rows, key=len)
    for i, part in enumerate(shortest):
        if any(row[i] != part for row in rows):
            return shortest[:i]
    return shortest


def _channel_dim(op: WeightedOp, add: fx.Node, inside: set[fx.Node]) -> int:
    """Where the channels of the body's last map are in y.

    Followed through transpositions; where a reshape hides them, the map's own layout is taken: a
    wrong one makes a poor replacement, whose error is measured, not a wrong one.
    """
    rank, channels = len(_shape(add)), _shape(op.node)[op.channel_dim]
    default = rank - 1 if op.window is None else 1
    dim, node = op.channel_dim % len(_shape(op.node)), op.node
    while True:
        following = next((u for u in node.users if u in inside), add)
        if following is add:
            break
        if isinstance(following.meta["val"], Tensor):
            dim = _turned(following, dim) if following.target in _TURNS else dim
            shape = _shape(following)
            if dim >= len(shape) or shape[dim] != channels:
                dim = len(shape) - 1 if shape[-1] == channels else 1
        node = following
    return dim if dim < rank and _shape(add)[dim] == channels else default


def _turned(node: fx.Node, dim: int) -> int:
    """Where a dimension goes in a permutation or transposition."""
    rank = len(_shape(node))
    if node.target is aten.transpose.int:
        pair = [int(d) % rank for d in node.args[1:3]]  # type: ignore[arg-type]
        return pair[1 - pair.index(dim)] if dim in pair else dim
    order = [int(d) % rank for d in node.args[1]]  # type: ignore[union-attr, arg-type]
    return order.index(dim)
