"""Writes a graph for other runtimes: ONNX and torch.export's own format."""

import io
import warnings
from pathlib import Path

import torch

from tersor.core.errors import BackendError
from tersor.core.store import write_atomic
from tersor.graph.contracts import Graph
from tersor.graph.onnx_form import to_onnx
from tersor.graph.recurrence import opaque

_MAX_BATCH = 1 << 16


def exported_program(graph: Graph) -> torch.export.ExportedProgram:
    """The graph exported again: fresh shapes and guards, batch and open sizes dynamic."""
    batch = torch.export.Dim("batch", min=1, max=_MAX_BATCH)
    shapes = [
        {
            dim: batch if size is None else torch.export.Dim.AUTO
            for dim, size in enumerate(spec.shape)
            if size is None or spec.symbol(dim)
        }
        or None
        for spec in graph.signature.inputs
    ]
    with warnings.catch_warnings(), torch.no_grad(), opaque():
        warnings.simplefilter("ignore")
        return torch.export.export(
            graph.module, graph.example, dynamic_shapes=tuple(shapes), strict=False
        )


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
    """Write a ``torch.export`` archive of the module with the original's calling convention."""
    buffer = io.BytesIO()
    torch.export.save(exported_program(graph), buffer)
    write_atomic(path, buffer.getvalue())


__all__ = ["exported_program", "write_onnx", "write_pt2"]
