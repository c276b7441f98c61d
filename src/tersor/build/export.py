"""Writes a graph for other runtimes: ONNX and torch.export's own format."""

import contextlib
import io
import logging
import tempfile
import warnings
from pathlib import Path

import torch

from tersor.core.errors import BackendError, MissingDependencyError
from tersor.core.store import write_atomic
from tersor.graph.contracts import Graph

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
    with warnings.catch_warnings(), torch.no_grad():
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
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            f"writing ONNX needs {error.name}; pip install 'tersor[onnx]'"
        ) from error
    program = exported_program(graph)
    names_in = [spec.name for spec in graph.signature.inputs]
    names_out = [spec.name for spec in graph.signature.outputs]
    with _quiet():
        try:
            converted = torch.onnx.export(
                program, dynamo=True, verbose=False, input_names=names_in, output_names=names_out
            )
        except (torch.onnx.errors.OnnxExporterError, RuntimeError) as error:
            raise BackendError(
                f"{path}: the graph has no ONNX form ({str(error).splitlines()[0]}); "
                "export .xml or .pt2 instead"
            ) from error
    assert converted is not None
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "model.onnx"
        converted.save(str(whole), external_data=False)
        write_atomic(path, whole.read_bytes())


def write_pt2(graph: Graph, path: Path) -> None:
    """Write a ``torch.export`` archive of the module with the original's calling convention."""
    buffer = io.BytesIO()
    torch.export.save(exported_program(graph), buffer)
    write_atomic(path, buffer.getvalue())


@contextlib.contextmanager
def _quiet():  # type: ignore[no-untyped-def]  # noqa: ANN202 - a context manager
    levels = {name: logging.getLogger(name).level for name in ("torch.onnx", "onnxscript")}
    for name in levels:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


__all__ = ["exported_program", "write_onnx", "write_pt2"]
