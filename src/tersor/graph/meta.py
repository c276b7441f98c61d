"""Shapes of nodes: what tracing knew, computed again after an edit."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from tersor.graph.contracts import Graph
from tersor.graph.recurrence import opaque


def ensure(graph: Graph) -> None:
    """Give every node its shape; only nodes that lack one cost anything."""
    module = graph.module
    if all("val" in n.meta for n in module.graph.nodes if n.op in ("call_function", "placeholder")):
        return
    holders = [n for n in module.graph.nodes if n.op == "placeholder"]
    if not all(isinstance(n.meta.get("val"), FakeTensor) for n in holders):
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        for node, tensor in zip(holders, graph.example, strict=True):
            node.meta["val"] = mode.from_tensor(tensor, static_shapes=True)
    refresh(module)


def read_back(graph: Graph, original: Graph) -> Graph:
    """A graph that was written and read again, with the example inputs and the shapes that it had.

    Args:
        graph: Without either.
        original: What it was made of; its inputs are the same, open sizes among them.
    """
    known = {n.name: n for n in original.module.graph.nodes if n.op == "placeholder"}
    for node in graph.module.graph.nodes:
        if node.op == "placeholder" and "val" in known[node.name].meta:
            node.meta["val"] = known[node.name].meta["val"]
    found = replace(graph, example=original.example)
    ensure(found)
    return found


def sizes(graph: Graph) -> dict[str, tuple[str, ...]]:
    """The sizes of every node's tensor, symbols as text."""
    ensure(graph)
    values = ((n.name, n.meta.get("val")) for n in graph.module.graph.nodes)
    return {name: tuple(map(str, v.shape)) for name, v in values if isinstance(v, Tensor)}


def refresh(module: fx.GraphModule) -> None:
    """Compute the shape of every node from those of the inputs, without data."""
    holders = [n for n in module.graph.nodes if n.op == "placeholder"]
    values = [n.meta.get("val") for n in holders]
    modes = [v.fake_mode for v in values if isinstance(v, FakeTensor)]
    if not modes:
        return
    env: dict[str, Any] = {}
    fakes: dict[str, Any] = {}

    def load(node: fx.Node) -> Any:
        return env[node.name]

    # Without the dispatcher torch's C++ kernels meet the batch's symbol, and some want a number.
    with modes[0], torch.no_grad(), enable_python_dispatcher(), opaque():
        for node in module.graph.nodes:
            if node.op == "placeholder":
                env[node.name] = node.meta["val"]
            elif node.op == "get_attr":
                env[node.name] = _fake(module, node, modes[0], fakes)
            elif node.op == "call_function":
                assert callable(node.target)
                value = node.target(*fx.map_arg(node.args, load), **fx.map_arg(node.kwargs, load))
                env[node.name] = node.meta["val"] = value


def _fake(
    module: fx.GraphModule, node: fx.Node, mode: FakeTensorMode, known: dict[str, Any]
) -> Tensor:
    from tersor.graph.edit import attribute

    name = str(node.target)
    if name not in known:
        known[name] = mode.from_tensor(attribute(module, name), static_shapes=True)
    return known[name]  # type: ignore[no-any-return]
