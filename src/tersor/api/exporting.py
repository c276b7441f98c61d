"""Files for other runtimes, each read back and compared with the graph."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from tersor.api.drafts import draft
from tersor.build.build import parity, shapes_of
from tersor.build.export import write_onnx, write_pt2
from tersor.core import registry
from tersor.core.errors import BackendError, ConfigError, MissingDependencyError, ParityError
from tersor.core.records import BuildChoice
from tersor.graph.contracts import Graph

SUFFIXES = (".xml", ".onnx", ".pt2")
_XML = "openvino"  # whose format it is
# The first that is installed reads an .onnx back. ONNX Runtime is the format's reference;
# OpenVINO's reader refuses some valid files and computes some quantised ones wrongly.
_ONNX = ("onnxruntime", "openvino")
_PARITY = 1e-2  # normalised squared error: a value between two codes may fall to either side


def export_graph(graph: Graph, choice: BuildChoice, path: Path, flat: Sequence[Tensor]) -> float:
    """Write a graph by the path's suffix and check the file; returns its difference.

    What was at the path stays until the new file has been read back and compared. A .pt2 is torch's
    own form of the graph and is not compared.

    Raises:
        ConfigError: Another suffix than .xml, .onnx or .pt2.
        MissingDependencyError: What writes the file, or reads it back, is not installed.
        ParityError: The written file computes something else; it is not kept.
        BackendError: An op that the format has no form for, or a file that the runtime that checks
            can't read or run; it is not kept.
        StoreError: The path's folder can't be written.
    """
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"{path}: wanted a name that ends in {', '.join(SUFFIXES)}")
    is_xml = path.suffix == ".xml"
    with draft(path, beside=(".bin",) if is_xml else ()) as part:
        if path.suffix == ".pt2":
            write_pt2(graph, part)
            return 0.0
        if is_xml:
            choice = _of(choice, _XML)
            _backend(_XML).export_ir(graph, {}, choice, part)
            return _checked(graph, choice, part, flat)
        write_onnx(graph, part)
        return _checked_onnx(graph, choice, part, flat)


def _backend(name: str) -> Any:
    return registry.resolve(registry.BACKENDS, name)()


def _of(choice: BuildChoice, backend: str) -> BuildChoice:
    """The choice as it is for its own backend, else the plain one of another."""
    if choice.backend == backend:
        return choice
    return BuildChoice(backend=backend, threads=choice.threads, batch=choice.batch)


def _checked_onnx(graph: Graph, choice: BuildChoice, path: Path, flat: Sequence[Tensor]) -> float:
    """As ``_checked``, in the first runtime that is installed."""
    for name in _ONNX:
        try:
            return _checked(graph, _of(choice, name), path, flat)
        except MissingDependencyError:
            continue
    raise MissingDependencyError(
        f"{path}: found neither {' nor '.join(_ONNX)} to check the file with, wanted one of them; "
        "pip install 'tersor[onnx]'"
    )


def _checked(graph: Graph, choice: BuildChoice, path: Path, flat: Sequence[Tensor]) -> float:
    """How far a written file is from the graph, run by the backend of a choice."""
    reader = choice.backend
    others = " or ".join(suffix for suffix in SUFFIXES if suffix != path.suffix)
    way_out = f"export {others} instead"
    if path.suffix == ".onnx" and reader != _ONNX[0]:
        way_out = f"install {_ONNX[0]}, which then checks it instead, or export {others}"
    try:
        shapes = shapes_of(graph.signature, choice.batch)
        executable = _backend(reader).read_file(path, shapes, choice)
        difference = parity(graph, executable, choice.batch, flat)
    except BackendError as error:
        raise BackendError(
            f"{path}: {reader}, which checks the file, can't run it ({error}); it was not kept; "
            f"{way_out}"
        ) from error
    if not difference <= _PARITY:
        raise ParityError(
            f"{path}: the file, as {reader} runs it, differs from the graph, normalised squared "
            f"error {difference:.2e}, wanted at most {_PARITY:g}; it was not kept; {way_out}"
        )
    return difference
