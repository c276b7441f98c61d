"""Writes a graph for other runtimes: ONNX and torch.export's own format."""

import inspect
import io
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from tersor.core.errors import BackendError
from tersor.core.records import Signature, Structure
from tersor.core.store import write_atomic
from tersor.core.structure import unflatten
from tersor.graph.contracts import Graph
from tersor.graph.modules import called
from tersor.graph.onnx_form import to_onnx
from tersor.graph.recurrence import opaque

_MAX_BATCH = 1 << 16


def exported_program(graph: Graph) -> torch.export.ExportedProgram:
    """The graph exported again: fresh shapes and guards, batch and open sizes dynamic.

    It takes and gives flat tensors, as the graph does.
    """
    return _exported(graph.module, graph.example, {}, tuple(_open_dimensions(graph.signature)))


def called_program(graph: Graph) -> torch.export.ExportedProgram:
    """The same, but called as the original was when it was captured, in the original's types.

    What is an object there (a ``ModelOutput``, a dataclass, a named tuple) is a dict of the fields
    that are not None, so that stock torch reads the file where the object's class is not at hand.
    """
    signature = replace(
        graph.signature,
        args=_plain(graph.signature.args),
        kwargs=_plain(graph.signature.kwargs),
        result=_plain(graph.signature.result),
    )
    example = [
        tensor.to(getattr(torch, spec.dtype))
        for tensor, spec in zip(graph.example, signature.inputs, strict=True)
    ]
    args, kwargs = _nested(signature.args, signature.kwargs, example)
    by_position, by_name = _nested(
        _plain(signature.args, constants=False),
        _plain(signature.kwargs, constants=False),
        _open_dimensions(signature),
    )
    shapes = dict(zip(_positions(signature), by_position, strict=True)) | by_name
    return _exported(_caller(graph.module, signature), args, kwargs, shapes)


def write_onnx(graph: Graph, path: Path) -> None:
    """Write an ONNX model with quantise and dequantise nodes; whole or not at all.

    Raises:
        MissingDependencyError: onnx or onnxscript is not installed.
        BackendError: An op that ONNX has no form for.
    """
    program = exported_program(graph)
    names_in = [spec.name for spec in graph.signature.inputs]
    names_out = [spec.name for spec in graph.signature.outputs]
    try:
        model = to_onnx(program, names_in, names_out)
    except BackendError as error:
        raise BackendError(f"{path}: {error}; export .xml or .pt2 instead") from error
    write_atomic(path, model.SerializeToString())


def write_pt2(graph: Graph, path: Path) -> None:
    """Write a ``torch.export`` archive of the module with the original's calling convention.

    Objects are dicts there (``called_program``).
    """
    buffer = io.BytesIO()
    torch.export.save(called_program(graph), buffer)
    write_atomic(path, buffer.getvalue())


def _exported(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], shapes: Any
) -> torch.export.ExportedProgram:
    with warnings.catch_warnings(), torch.no_grad(), opaque():
        warnings.simplefilter("ignore")
        return torch.export.export(module, args, kwargs, dynamic_shapes=shapes, strict=False)


def _open_dimensions(signature: Signature) -> list[dict[int, Any] | None]:
    """What torch.export is told of each flat input."""
    batch = torch.export.Dim("batch", min=1, max=_MAX_BATCH)
    return [
        {
            dim: batch if size is None else torch.export.Dim.AUTO
            for dim, size in enumerate(spec.shape)
            if size is None or spec.symbol(dim)
        }
        or None
        for spec in signature.inputs
    ]


def _plain(structure: Structure, *, constants: bool = True) -> Structure:
    """The same with dicts for objects; without ``constants``, None for everything but tensors."""
    if structure.kind == "constant" and not constants:
        return Structure(kind="none")
    children = [_plain(child, constants=constants) for child in structure.children]
    if structure.kind != "object":
        return replace(structure, children=tuple(children))
    fields = [
        (key, child)
        for key, child in zip(structure.keys, children, strict=True)
        if child.kind != "none"  # as in ``NamedOutput``: a field that is None is no key
    ]
    return Structure(
        kind="dict", keys=tuple(k for k, _ in fields), children=tuple(c for _, c in fields)
    )


def _nested(
    args: Structure, kwargs: Structure, leaves: Sequence[Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    both = Structure(kind="tuple", children=(args, kwargs))
    nested_args, nested_kwargs = unflatten(both, leaves)
    return tuple(nested_args), dict(nested_kwargs)


def _caller(module: fx.GraphModule, signature: Signature) -> nn.Module:
    """A module around the nodes whose tensors keep their names.

    torch.export runs an ``fx.GraphModule`` as flat nodes, whatever its forward() does; around one
    that is a child, all tensors would get its name as a prefix. So this holds the same children.
    """
    root = nn.Module()
    for name, child in module.named_children():
        root.add_module(name, child)
    for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
        root.register_parameter(name, parameter)
    for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
        root.register_buffer(name, buffer)

    def forward(*args: Any, **kwargs: Any) -> Any:
        with fx.traceback.preserve_node_meta():  # which layer of the original a node is of
            return called(signature, fx.Interpreter(root, graph=module.graph).run, args, kwargs)

    forward.__signature__ = _parameters(signature)  # type: ignore[attr-defined]
    root.forward = forward
    return root.eval()


def _parameters(signature: Signature) -> inspect.Signature:
    """What torch.export names the inputs by."""
    kinds = inspect.Parameter
    positions = [kinds(name, kinds.POSITIONAL_OR_KEYWORD) for name in _positions(signature)]
    return inspect.Signature(
        [*positions, *(kinds(name, kinds.KEYWORD_ONLY) for name in signature.kwargs.keys)]
    )


def _positions(signature: Signature) -> list[str]:
    """Names of the positional arguments; those behind the last parameter are of a ``*args``."""
    names, count = signature.parameter_names, len(signature.args.children)
    return [names[i] if i < len(names) else f"argument_{i + 1}" for i in range(count)]


__all__ = ["called_program", "exported_program", "write_onnx", "write_pt2"]
