"""An exported program as an ONNX model, in memory; needs the packages onnx and onnxscript."""

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Collection, Iterator, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch._decomp import decomposition_table

from tersor.core.errors import BackendError, MissingDependencyError
from tersor.graph.recurrence import RECURRENT, native_ops, opaque, unrolled

NEEDS = ("onnx", "onnxscript")
REMEDY = "pip install 'tersor[onnx]'"
# What has an ONNX op; torch's own form of a layer with a projection of its states is wrong.
_SEQUENCES = {
    torch.ops.aten.lstm.input: "LSTM",
    torch.ops.aten.gru.input: "GRU",
    torch.ops.aten.rnn_tanh.input: "RNN",
    torch.ops.aten.rnn_relu.input: "RNN",
}
_TALKERS = ("torch.onnx", "onnxscript", "onnx_ir")
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
    native = native_ops(program.graph_module) & _SEQUENCES.keys()
    model = _converted(program, inputs, outputs, native)
    made = {node.op_type for node in model.graph.node}
    if any(_SEQUENCES[op] not in made for op in native):  # an onnxscript that has no form for it
        return _converted(program, inputs, outputs, frozenset())
    return model


def _converted(
    program: torch.export.ExportedProgram,
    inputs: Sequence[str],
    outputs: Sequence[str],
    native: Collection[Any],
) -> Any:
    """The model, with some recurrent ops as ONNX's own and the others unrolled."""
    present = {n.target for n in program.graph.nodes if n.op == "call_function"}
    others = (RECURRENT & present) - frozenset(native)
    with _quiet(), unrolled():
        try:
            if others:
                program = program.run_decompositions({op: decomposition_table[op] for op in others})
            with opaque(native):
                converted = torch.onnx.export(
                    program,
                    dynamo=True,
                    verbose=False,
                    input_names=list(inputs),
                    output_names=list(outputs),
                    custom_translation_table=_translations(native),
                )
        except (torch.onnx.errors.OnnxExporterError, RuntimeError) as error:
            raise BackendError(_reason(program, str(error))) from error
    assert converted is not None
    return converted.model_proto


def _translations(native: Collection[Any]) -> dict[Any, Any]:
    from tersor.graph.onnx_recurrence import translations  # needs onnxscript

    return {op: how for op, how in translations().items() if op in native}


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
    levels = {name: logging.getLogger(name).level for name in _TALKERS}
    for name in levels:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
