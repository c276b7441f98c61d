"""Graphs of a few ops, written node by node, so that any op can be put between two layers."""

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from tersor.core.records import Signature, Structure
from tersor.graph.contracts import Graph
from tersor.graph.edit import rebuild

aten = torch.ops.aten
BATCH = 8
Width = tuple[int, str]  # units, kind
Nodes = fx.Node | Sequence[fx.Node]
Build = Callable[["Net"], Nodes]
_EMPTY = Structure(kind="tuple")
_SIGNATURE = Signature(inputs=(), outputs=(), args=_EMPTY, kwargs=_EMPTY, result=_EMPTY)


def overload(name: str) -> torch._ops.OpOverload:
    """An op by its name: "relu", "split.Tensor"."""
    packet, _, form = name.partition(".")
    found = getattr(getattr(aten, packet), form or "default")
    assert isinstance(found, torch._ops.OpOverload)
    return found


class Net:
    """A graph under construction; every op is also computed, so that sizes are known."""

    def __init__(self, seed: int = 0) -> None:
        self.graph = fx.Graph()
        self.tensors: dict[str, Tensor] = {}
        self.inputs: list[Tensor] = []
        self.values: dict[fx.Node, Any] = {}
        self.generator = torch.Generator().manual_seed(seed)

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def x(self, *shape: int) -> fx.Node:
        """An input [batch, *shape]; (4,) unless told otherwise."""
        return self.input(self.random(BATCH, *(shape or (4,))))

    def indices(self, high: int, *shape: int) -> fx.Node:
        return self.input(torch.randint(high, (BATCH, *shape), generator=self.generator))

    def input(self, value: Tensor) -> fx.Node:
        node = self.graph.placeholder(f"x{len(self.inputs)}")
        self.inputs.append(value)
        self.values[node] = value
        return node

    def param(self, name: str, *shape: int) -> fx.Node:
        return self.stored(name, self.random(*shape))

    def stored(self, name: str, value: Tensor) -> fx.Node:
        node = self.graph.get_attr(name)
        self.tensors[name] = value
        self.values[node] = value
        return node

    def sizes(self, node: fx.Node) -> list[int]:
        return list(self.values[node].shape)

    def __call__(self, op: str, *args: Any, **kwargs: Any) -> Any:
        """One op; several results come as a list of nodes."""
        target = overload(op)
        node = self.graph.call_function(target, args, kwargs)
        known = self.values.__getitem__
        with torch.no_grad():
            value = target(*fx.map_arg(args, known), **fx.map_arg(kwargs, known))
        self.values[node] = value
        if isinstance(value, Tensor):
            return node
        items = [self.graph.call_function(operator.getitem, (node, i)) for i in range(len(value))]
        self.values |= dict(zip(items, value, strict=True))
        return items

    def lin(self, name: str, x: fx.Node, out: int, *, bias: bool = True) -> fx.Node:
        weight = self.param(f"{name}.weight", out, self.sizes(x)[-1])
        b = self.param(f"{name}.bias", out) if bias else None
        found: fx.Node = self("linear", x, weight, b)
        return found

    def conv(self, name: str, x: fx.Node, out: int, kernel: int = 1, *, groups: int = 1) -> fx.Node:
        """A convolution of the input's rank, padded to keep its size."""
        rank = len(self.sizes(x)) - 2
        weight = self.param(f"{name}.weight", out, self.sizes(x)[1] // groups, *[kernel] * rank)
        bias = self.param(f"{name}.bias", out)
        padding = [kernel // 2] * rank
        found: fx.Node = self(
            f"conv{rank}d", x, weight, bias, [1] * rank, padding, [1] * rank, groups
        )
        return found

    def real(self, x: fx.Node) -> fx.Node:
        """Booleans and integers as float32."""
        found: fx.Node = self("to.dtype", x, torch.float32)
        return found

    def close(self, outputs: Nodes) -> Graph:
        flat = [outputs] if isinstance(outputs, fx.Node) else list(outputs)
        self.graph.output(tuple(flat))
        return Graph(rebuild(self.graph, self.tensors), _SIGNATURE, tuple(self.inputs))


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One op in a graph, and what the analysis must say of it.

    Attributes:
        op: Name in the table of rules.
        note: What is particular about this use.
        build: Writes the graph; returns its outputs.
        widths: Name -> (units, kind) of every exact width.
        approximate: The same of every other width.
        pinned: (tensor, dim) -> (op, a part of the reason).
        breaks: Whether cutting what is pinned would change the output.
        literal: Whether the op's own literals change with its width.
        seed: Of weights and inputs.
    """

    op: str
    build: Build
    note: str = ""
    widths: Mapping[str, Width] = field(default_factory=dict)
    approximate: Mapping[str, Width] = field(default_factory=dict)
    pinned: Mapping[tuple[str, int], tuple[str, str]] = field(default_factory=dict)
    breaks: bool = True
    literal: bool = False
    seed: int = 0

    @property
    def id(self) -> str:
        return f"{self.op} {self.note}".strip()

    def graph(self) -> Graph:
        net = Net(self.seed)
        return net.close(self.build(net))
