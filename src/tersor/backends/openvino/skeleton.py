"""A float graph becomes an OpenVINO model whose weights are inputs, once for all formats.

The graph is decomposed with OpenVINO's own table (exported again where that can't be done op by
op), then read by its PyTorch frontend. Every node of the result carries the name of the *graph's* node that it comes from as
the first part of its friendly name, so that measured node times lead back to the graph.
"""

import operator
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import openvino as ov
import torch
from openvino.frontend import (
    FrontEndManager,
    GeneralFailure,
    NotImplementedFailure,
    OpConversionFailure,
    OpValidationFailure,
)
from openvino.frontend.pytorch.fx_decoder import TorchFXPythonDecoder
from openvino.frontend.pytorch.torchdynamo.export_decompositions import ops_to_not_decompose
from torch import Tensor, fx
from torch.export.decomp_utils import CustomDecompTable

from tersor.backends.openvino.attention import spell_out
from tersor.backends.openvino.failures import conversion_failed
from tersor.backends.openvino.recurrent import cut, join
from tersor.graph.contracts import Graph
from tersor.graph.decompose import Decomposer
from tersor.graph.floats import Lowered, exported_floats
from tersor.graph.recurrence import native_ops, opaque, unrolled
from tersor.graph.split import Split

_KEPT_HINTS = {"fused_names_0"}

FAILURES = (
    RuntimeError,
    GeneralFailure,
    NotImplementedFailure,
    OpConversionFailure,
    OpValidationFailure,
)


@dataclass(frozen=True, slots=True)
class Skeleton:
    """A converted float graph; its batch, and what the signature leaves open, are dynamic.

    Attributes:
        model: Its parameters: the graph's inputs, then the weights. Never edited: clone it.
        parameters: Position of every parameter by name.
    """

    model: Any
    parameters: Mapping[str, int]


@lru_cache(maxsize=4)
def _decomposer(kept: frozenset[Any]) -> Decomposer:
    return Decomposer(_decompositions(kept), kept)


@lru_cache(maxsize=4)
def _decompositions(kept: frozenset[Any]) -> CustomDecompTable:
    table = CustomDecompTable()
    for op in (*ops_to_not_decompose(), *kept):
        if op in table:
            table.pop(op)
    table[torch.ops.aten.mish.default] = _mish
    return table


def _mish(x: Tensor) -> Tensor:
    """Mish by one exponential: x n / (n + 2) with n = e^x (e^x + 2), which is x tanh(log(1 + e^x)).

    Where OpenVINO sees Mish, in any form that it knows, behind a linear layer, some processors get no
    build (2026.4). Beyond 20 the quotient is 1 in float32.
    """
    e = torch.exp(torch.clamp(x, max=20.0))
    n = e * (e + 2.0)
    return x * (n / (n + 2.0))


# On sizes, as a model writes them that works out the scale of what it was given.
_OF_TENSORS: dict[Any, Any] = {operator.truediv: torch.ops.aten.div.Tensor}


def _convert(graph: Graph, parts: Split) -> Skeleton:
    """The skeleton of a float graph.

    Raises:
        BackendError: An op that OpenVINO's frontend does not know; the message names it.
    """
    kept = native_ops(parts.module)
    module, sources = _decompose(graph, parts, kept)
    cuts = cut(module, kept)
    for node in module.graph.nodes:  # its frontend divides tensors, and takes sizes for such
        node.target = _OF_TENSORS.get(node.target, node.target)
    decoder = TorchFXPythonDecoder(module, dynamic_shapes=False)  # SymInt sizes become dynamic
    frontend = FrontEndManager().load_by_framework("pytorch")
    try:
        model = ov.Model(frontend.convert(frontend.load(decoder)))
    except FAILURES as error:
        raise conversion_failed(error) from error
    join(model, cuts)
    _name_by_source(model, sources)
    spell_out(model)
    _forget_hints(model)
    wanted = [s.name for s in graph.signature.inputs]
    between = {name for one in cuts for name in one.gives.values()}
    holders = [n.name for n in module.graph.nodes if n.op == "placeholder"]
    holders = [name for name in holders if name not in between]
    parameters = [*wanted, *holders[len(wanted) :]]
    return Skeleton(model, _positions(model, holders, parameters))


def _positions(model: Any, holders: list[str], names: list[str]) -> dict[str, int]:
    found = {p.get_friendly_name(): i for i, p in enumerate(model.get_parameters())}
    return {
        name: found[holder] for holder, name in zip(holders, names, strict=True) if holder in found
    }


def _decompose(
    graph: Graph, parts: Split, kept: frozenset[Any]
) -> tuple[fx.GraphModule, Mapping[str, str]]:
    """The graph without the ops that OpenVINO has no converter for, its batch open.

    Recurrent ops that are ``kept`` stay one node each.

    Returns:
        The decomposed graph, and the graph's nodes that its nodes come from.
    """
    quick = _decomposer(kept)(graph, parts)
    if quick is not None:
        return quick.module, quick.sources
    try:
        with warnings.catch_warnings(), torch.no_grad(), unrolled(), opaque(kept):
            warnings.simplefilter("ignore")  # of torch's own export internals
            program, names = exported_floats(graph, parts)
            decomposed = program.run_decompositions(_decompositions(kept))
            module: fx.GraphModule = decomposed.module(check_guards=False)
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:
        raise conversion_failed(error) from error
    found = {node.name: _origin(node) for node in module.graph.nodes}
    return module, {name: names.get(origin, origin) for name, origin in found.items()}


def _name_by_source(model: Any, source: Mapping[str, str]) -> None:
    for op in model.get_ops():
        first, slash, rest = op.get_friendly_name().partition("/")
        if slash and source.get(first, first) != first:
            op.set_friendly_name(f"{source[first]}/{rest}")


def _forget_hints(model: Any) -> None:
    """Drop the frontend's hints that IR files do not hold: a loaded model computes the same."""
    for node in model.get_ops():
        info = node.get_rt_info()
        for key in [k for k in info if k not in _KEPT_HINTS]:
            del info[key]


def _origin(node: fx.Node) -> str:
    """The name in the export before it was decomposed: the end of the chain of ``from_node``."""
    name, chain = node.name, node.meta.get("from_node")
    while chain:
        name, chain = chain[-1].name, chain[-1].from_node
    return name


skeleton_of = Lowered(_convert)
