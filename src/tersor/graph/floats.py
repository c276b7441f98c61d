"""A float graph without its weights, exported again: what a backend lowers once for all formats.

Its weights are inputs, after the graph's own. Graphs that differ only in what was split off have
one fingerprint, so that a backend finds what it made of the first of them.
"""

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from difflib import SequenceMatcher
from typing import Any, Generic, TypeVar

import torch
from torch import fx

from tersor.graph.contracts import Graph
from tersor.graph.recurrence import opaque
from tersor.graph.split import Split, stored_tensors

_KEPT = 8  # in memory: they hold no weights, only the graph's small constants
T = TypeVar("T")


class Lowered(Generic[T]):
    """What a backend made of float graphs, the latest few at hand, by their fingerprints."""

    def __init__(self, make: Callable[[Graph, Split], T]) -> None:
        self._make = make
        self._known: OrderedDict[str, T] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, graph: Graph, parts: Split) -> T:
        """Made once for graphs that differ only in what was split off."""
        key = fingerprint(graph, parts)
        with self._lock:
            if key in self._known:
                self._known.move_to_end(key)
                return self._known[key]
        fresh = self._make(graph, parts)
        with self._lock:
            self._known[key] = fresh
            while len(self._known) > _KEPT:
                self._known.popitem(last=False)
        return fresh


def fingerprint(graph: Graph, parts: Split) -> str:
    """SHA-256 of all that a lowered float graph depends on."""
    digest = hashlib.sha256()
    for spec in graph.signature.inputs:
        digest.update(repr(spec).encode())
    for node in parts.module.graph.nodes:
        shape = parts.weight_shapes.get(node.name, "")
        line = f"{node.op} {node.target} {node.name} {node.args} {node.kwargs} {shape}\n"
        digest.update(line.encode())
    for target, tensor in stored_tensors(parts.module).items():
        digest.update(f"{target} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes()
                      if tensor.dim() else repr(tensor.item()).encode())  # fmt: skip
    return digest.hexdigest()


def exported_floats(
    graph: Graph, parts: Split
) -> tuple[torch.export.ExportedProgram, Mapping[str, str]]:
    """Export a float graph with its batch, and what the signature leaves open, dynamic.

    Returns:
        The program, and the graph's names by those of the export, which counts its own.
    """
    weights = [torch.empty(parts.weight_shapes[name]) for name in weight_names(parts)]
    inputs = (*graph.example, *weights)
    batch = torch.export.Dim("batch", min=1)
    shapes: list[Any] = [
        {
            dim: batch if size is None else torch.export.Dim.AUTO
            for dim, size in enumerate(spec.shape)
            if size is None or spec.symbol(dim)
        }
        or None
        for spec in graph.signature.inputs
    ]
    shapes += [None] * len(weights)
    with opaque():
        program = torch.export.export(
            parts.module, inputs, dynamic_shapes=tuple(shapes), strict=False
        )
    return program, _graph_names(parts.module, program)


def weight_names(parts: Split) -> list[str]:
    """Names of the weights among the program's inputs, in their order."""
    wanted = {o.weight_input for o in parts.operations}
    return [n.name for n in parts.module.graph.nodes if n.op == "placeholder" and n.name in wanted]


def _graph_names(module: fx.GraphModule, program: torch.export.ExportedProgram) -> dict[str, str]:
    """Nodes of an export -> the graph's; exporting keeps the ops and their order, not the names.

    Ops that it added or dropped (none in the models that were tried) are passed over.
    """
    old, new = _ops(module.graph), _ops(program.graph)
    targets = [[str(n.target) for n in nodes] for nodes in (old, new)]
    if targets[0] == targets[1]:
        return {after.name: before.name for before, after in zip(old, new, strict=True)}
    blocks = SequenceMatcher(None, targets[0], targets[1], autojunk=False).get_matching_blocks()
    return {
        new[block.b + i].name: old[block.a + i].name for block in blocks for i in range(block.size)
    }


def _ops(graph: fx.Graph) -> list[fx.Node]:
    """Ops on tensors, without sizes and checks."""
    return [
        node
        for node in graph.nodes
        if isinstance(node.target, torch._ops.OpOverload)  # noqa: SLF001
        and node.target is not torch.ops.aten.sym_size.int
        and not node.target._schema.name.startswith("aten::_assert")  # noqa: SLF001
    ]
