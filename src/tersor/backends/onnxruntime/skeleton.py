"""A float graph becomes an ONNX model whose weights are inputs, once for all formats.

Every node carries the name of the *graph's* node that it comes from as the first part of its
name, so that measured node times lead back to the graph.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import onnx
import torch

from tersor.core.errors import BackendError
from tersor.graph.contracts import Graph
from tersor.graph.floats import Lowered, exported_floats, weight_names
from tersor.graph.onnx_form import to_onnx
from tersor.graph.split import Split

_MARK = "tersor:"


@dataclass(frozen=True, slots=True)
class Skeleton:
    """A converted float graph; its batch, and what the signature leaves open, are dynamic.

    Attributes:
        model: Its inputs: the graph's, then the weights. Never edited: copy it.
        sources: Name of an output of the model -> the graph node that makes it.
    """

    model: onnx.ModelProto
    sources: Mapping[str, str]


def _convert(graph: Graph, parts: Split) -> Skeleton:
    """The skeleton of a float graph.

    Raises:
        BackendError: An op that ONNX has no form for; the message names it.
    """
    inputs = [*(s.name for s in graph.signature.inputs), *weight_names(parts)]
    outputs = [s.name for s in graph.signature.outputs]
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # of torch's own export internals
            program, names = exported_floats(graph, parts)
            for node in program.graph.nodes:  # what decompositions and the exporter hand on
                if node.op == "call_function":
                    node.meta["stack_trace"] = f"{_MARK}{names.get(node.name, node.name)}"
            model = to_onnx(program, inputs, outputs)
    except Exception as error:  # of torch's exporter and its converters, which have no common type
        text = " ".join(str(error).split())
        raise BackendError(
            f"onnxruntime: {text}. Write it with other ops in the model, or use another backend"
        ) from error
    return Skeleton(model, _name_by_source(model))


def _name_by_source(model: onnx.ModelProto) -> dict[str, str]:
    """Nodes and the values between them read ``graph node/kind``; returns who makes the outputs."""
    graph = model.graph
    fixed = {v.name for v in (*graph.input, *graph.output, *graph.initializer)}
    values: dict[str, str] = {}
    made: dict[str, str] = {}
    for i, node in enumerate(graph.node):
        source = next((p.value.removeprefix(_MARK) for p in node.metadata_props
                       if p.value.startswith(_MARK)), "")  # fmt: skip
        source = source.splitlines()[0] if source else ""
        node.name = f"{source}/{node.op_type}_{i}" if source else f"{node.op_type}_{i}"
        for name in node.output:
            if name and name not in fixed:
                values[name] = f"{source}/{name}" if source else name
            elif source:
                made[name] = source
        node.input[:] = [values.get(name, name) for name in node.input]
        node.output[:] = [values.get(name, name) for name in node.output]
        del node.metadata_props[:]
        node.doc_string = ""
    del graph.value_info[:]
    del graph.metadata_props[:]
    del model.metadata_props[:]
    return made


skeleton_of = Lowered(_convert)
