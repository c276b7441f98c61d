"""A graph as plain JSON beside its tensors: no pickle, only ops that torch itself registers.

``torch.fx`` writes a graph out as Python and runs it, so every name that a file brings is checked
to be nothing but a name.
"""

import keyword
import math
import operator
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.ao.quantization.fx._decomposed
from torch import Tensor, fx

from tersor.core.errors import ArtifactError
from tersor.core.jsonable import from_json, to_json
from tersor.core.records import Signature
from tersor.graph.contracts import Graph
from tersor.graph.edit import parameters_by_name, rebuild

VERSION = 1
# Python functions that shape arithmetic uses; everything else is a registered op.
_BUILT_IN = {
    f"operator.{name}": getattr(operator, name)
    for name in (
        "getitem", "add", "sub", "mul", "floordiv", "truediv", "mod", "neg", "eq", "ne", "lt",
        "le", "gt", "ge", "pow",
    )
}  # fmt: skip
_NAMES = {function: name for name, function in _BUILT_IN.items()}
_FORBIDDEN = {"aten.from_file"}  # opens, and may create, any file
_TENSOR_NAME = re.compile(r"\w+(\.\w+)*", re.ASCII)
_MAX_EXAMPLE = 1 << 28  # values of one example input
_MALFORMED = (
    AttributeError,
    IndexError,
    KeyError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
)
_NAMESPACES = ("aten", "quantized_decomposed", "torchvision", "prims")
_TYPES: dict[str, Any] = {
    "dtype": torch.dtype,
    "memory_format": torch.memory_format,
    "layout": torch.layout,
}


def graph_to_json(graph: Graph) -> dict[str, Any]:
    """The graph's nodes and signature; tensors are referred to by name.

    Raises:
        ArtifactError: A node that has no plain form; names it.
    """
    nodes = [
        {
            "name": node.name,
            "op": node.op,
            "target": _target_name(node),
            "args": _encode(node.args, node),
            "kwargs": {k: _encode(v, node) for k, v in node.kwargs.items()},
        }
        for node in graph.module.graph.nodes
    ]
    return {"version": VERSION, "signature": to_json(graph.signature), "nodes": nodes}


def graph_tensors(graph: Graph) -> dict[str, Tensor]:
    """The tensors that the graph refers to."""
    return parameters_by_name(graph.module)


def graph_from_json(data: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Graph:
    """Read a graph back.

    Raises:
        ArtifactError: An unknown version, op or value, or a tensor that is absent.
    """
    if data.get("version") != VERSION:
        raise ArtifactError(f"graph.json: version {data.get('version')!r}, wanted {VERSION}")
    signature = from_json(Signature, data.get("signature"), "graph.json signature")
    try:
        return Graph(_module(data["nodes"], tensors), signature, _example(signature))
    except _MALFORMED as error:
        raise ArtifactError(
            f"graph.json describes no graph ({type(error).__name__}: {error}); "
            "the file is damaged or was edited: save it again"
        ) from error


def _module(rows: Sequence[Mapping[str, Any]], tensors: Mapping[str, Tensor]) -> fx.GraphModule:
    graph = fx.Graph()
    values: dict[str, fx.Node] = {}
    for row in rows:
        _add_node(graph, row, values, tensors)
    graph.lint()
    return rebuild(graph, dict(tensors), remove_dead=False)


def _example(signature: Signature) -> tuple[Tensor, ...]:
    example = []
    for spec in signature.inputs:
        shape = [2 if size is None else size for size in spec.shape]
        dtype = getattr(torch, spec.carrier)
        if not isinstance(dtype, torch.dtype) or not 0 <= math.prod(shape) <= _MAX_EXAMPLE:
            raise ArtifactError(
                f"graph.json, input {spec.name!r}: {spec.dtype} {tuple(spec.shape)} is no input; "
                f"wanted a tensor of at most {_MAX_EXAMPLE} values"
            )
        example.append(torch.zeros(shape, dtype=dtype))
    return tuple(example)


def _add_node(
    graph: fx.Graph,
    row: Mapping[str, Any],
    values: dict[str, fx.Node],
    tensors: Mapping[str, Tensor],
) -> None:
    name, op, target = str(row["name"]), str(row["op"]), str(row["target"])
    if op not in ("placeholder", "get_attr", "call_function", "output"):
        raise ArtifactError(f"graph.json, node {name}: op {op!r} is not allowed")
    if op == "get_attr" and target not in tensors:
        raise ArtifactError(f"graph.json, node {name}: tensor {target!r} is absent")
    resolved = _resolve(target, name) if op == "call_function" else target
    if op == "get_attr" and not _TENSOR_NAME.fullmatch(target):
        raise ArtifactError(f"graph.json, node {name}: {target!r} is no name of a tensor")
    for word in [*row["kwargs"], *([target] if op == "placeholder" else [])]:
        if not word.isidentifier() or keyword.iskeyword(word):
            raise ArtifactError(f"graph.json, node {name}: {word!r} is no name of an argument")
    args = _decode(row["args"], values, name)
    if op == "output":  # JSON knows no tuples
        args = [tuple(args[0])]
    kwargs = {str(k): _decode(v, values, name) for k, v in row["kwargs"].items()}
    node = graph.create_node(op, resolved, tuple(args), kwargs, name)
    if node.name != name:
        raise ArtifactError(f"graph.json: node name {name!r} is given twice or is no name")
    values[name] = node


def _target_name(node: fx.Node) -> str:
    if node.op != "call_function":
        return str(node.target)
    if node.target in _NAMES:
        return _NAMES[node.target]
    if isinstance(node.target, torch._ops.OpOverload):  # noqa: SLF001
        return str(node.target)
    raise ArtifactError(f"node {node.name}: {node.target} is no registered op and can't be saved")


def _resolve(target: str, name: str) -> Any:
    if target in _BUILT_IN:
        return _BUILT_IN[target]
    namespace, _, rest = target.partition(".")
    op_name, _, overload = rest.partition(".")
    is_name = op_name.isidentifier() and overload.isidentifier()
    if namespace not in _NAMESPACES or not is_name or f"{namespace}.{op_name}" in _FORBIDDEN:
        raise ArtifactError(f"graph.json, node {name}: {target!r} is not allowed")
    packet = getattr(getattr(torch.ops, namespace), op_name, None)
    found = getattr(packet, overload, None)
    if not isinstance(found, torch._ops.OpOverload):  # noqa: SLF001
        raise ArtifactError(
            f"graph.json, node {name}: torch {torch.__version__} has no op {target!r}"
        )
    return found


def _encode(value: Any, node: fx.Node) -> Any:
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, tuple | list):
        return [_encode(v, node) for v in value]
    if value is None or isinstance(value, bool | int | str):
        return value
    return _encode_tagged(value, node)


def _encode_tagged(value: Any, node: fx.Node) -> dict[str, Any]:
    if isinstance(value, float):
        return {"float": repr(value)}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if isinstance(value, slice):
        return {"slice": [_encode(v, node) for v in (value.start, value.stop, value.step)]}
    for kind, cls in _TYPES.items():
        if isinstance(value, cls):
            return {kind: str(value).removeprefix("torch.")}
    raise ArtifactError(f"node {node.name}: {type(value).__name__} {value!r} can't be saved")


def _decode(value: Any, values: Mapping[str, fx.Node], where: str) -> Any:
    if isinstance(value, list):
        return [_decode(v, values, where) for v in value]
    if not isinstance(value, Mapping):
        return value
    if len(value) != 1:
        raise ArtifactError(f"graph.json, node {where}: {dict(value)} is no value")
    kind, content = next(iter(value.items()))
    if kind == "node" and content in values:
        return values[content]
    return _decode_tagged(str(kind), content, values, where)


def _decode_tagged(kind: str, content: Any, values: Mapping[str, fx.Node], where: str) -> Any:
    if kind == "float":
        return float(content)
    if kind == "device":
        return torch.device(str(content))
    if kind == "slice":
        return slice(*(_decode(v, values, where) for v in content))
    if kind in _TYPES:
        found = getattr(torch, str(content), None)
        if isinstance(found, _TYPES[kind]):
            return found
    raise ArtifactError(f"graph.json, node {where}: {{{kind!r}: {content!r}}} is no value")


def structure_text(graph: Graph) -> str:
    """One text for one structure: what a content hash of the graph reads beside the tensors."""
    from tersor.core.jsonable import dumps

    return dumps(graph_to_json(graph))
