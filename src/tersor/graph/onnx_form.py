"""An exported program as an ONNX model, in memory; needs the packages onnx and onnxscript."""

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import Any

import torch

from tersor.core.errors import BackendError, MissingDependencyError
from tersor.graph.recurrence import unrolled

NEEDS = ("onnx", "onnxscript")
REMEDY = "pip install 'tersor[onnx]'"
_MISSING = re.compile(r"No ONNX function found for <OpOverload\(op='([^']+)'")


def to_onnx(
    program: torch.export.ExportedProgram, inputs: Sequence[str], outputs: Sequence[str]
) -> Any:
    """The ``onnx.ModelProto`` of a program, with its inputs and outputs named in order.

    Raises:
        MissingDependencyError: onnx or onnxscript is not installed.
        BackendError: An op that ONNX has no form for.
    """
    missing = [name for name in NEEDS if find_spec(name) is None]
    if missing:
        raise MissingDependencyError(f"writing ONNX needs {missing[0]}; {REMEDY}")
    with _quiet(), unrolled():
        try:
            converted = torch.onnx.export(
                program,
                dynamo=True,
                verbose=False,
                input_names=list(inputs),
                output_names=list(outputs),
            )
        except (torch.onnx.errors.OnnxExporterError, RuntimeError) as error:
            raise BackendError(_reason(program, str(error))) from error
    assert converted is not None
    return converted.model_proto


def _reason(program: torch.export.ExportedProgram, text: str) -> str:
    """The ops without a form, by the names that the program has for them."""
    found = sorted(set(_MISSING.findall(text)))
    if not found:
        return f"the graph has no ONNX form ({text.strip().splitlines()[0]})"
    leaves = tuple(name.rpartition(".")[2] for name in found)
    targets = {str(n.target) for n in program.graph.nodes if n.op == "call_function"}
    ops = sorted(t for t in targets if any(leaf in t for leaf in leaves)) or found
    return f"no ONNX form for {', '.join(ops)}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
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
