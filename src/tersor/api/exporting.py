"""Files for other runtimes, each read back and compared with the graph."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from tersor.build.build import parity, shapes_of
from tersor.build.export import write_onnx, write_pt2
from tersor.core import registry
from tersor.core.errors import ConfigError, ParityError
from tersor.core.records import BuildChoice
from tersor.graph.contracts import Graph

SUFFIXES = (".xml", ".onnx", ".pt2")
_XML = "openvino"  # whose format it is
_PARITY = 1e-2  # normalised squared error: a value between two codes may fall to either side


def export_graph(graph: Graph, choice: BuildChoice, path: Path, flat: Sequence[Tensor]) -> float:
    """Write a graph by the path's suffix and check the file; returns its difference.

    Raises:
        ConfigError: Another suffix than .xml, .onnx or .pt2.
        ParityError: The written file computes something else; it is removed.
    """
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"{path}: wanted a name that ends in {', '.join(SUFFIXES)}")
    if path.suffix == ".pt2":
        write_pt2(graph, path)
        return 0.0
    if path.suffix == ".xml" and choice.backend != _XML:
        choice = BuildChoice(backend=_XML, threads=choice.threads, batch=choice.batch)
    backend: Any = registry.resolve(registry.BACKENDS, choice.backend)()
    if path.suffix == ".onnx":
        write_onnx(graph, path)
    else:
        backend.export_ir(graph, {}, choice, path)
    executable = backend.read_file(path, shapes_of(graph.signature, choice.batch), choice)
    difference = parity(graph, executable, choice.batch, flat)
    if not difference <= _PARITY:
        for written in (path, path.with_suffix(".bin")) if path.suffix == ".xml" else (path,):
            written.unlink(missing_ok=True)
        raise ParityError(
            f"{path}: the file differs from the graph, normalised squared error {difference:.2e}, "
            f"wanted at most {_PARITY:g}; it was removed"
        )
    return difference
