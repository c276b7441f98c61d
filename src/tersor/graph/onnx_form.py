"""An exported program as an ONNX model, in memory; needs the packages onnx and onnxscript."""

import contextlib
import io
import logging
import math
import re
import warnings
from collections.abc import Collection, Iterator, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
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
_ATTENTION: Any = torch.ops.aten.scaled_dot_product_attention.default
_RANK = 4
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
    plain = {op: decomposition_table[op] for op in (RECURRENT & present) - frozenset(native)}
    if any(_is_odd(node) for node in program.graph.nodes):
        plain[_ATTENTION] = _attention
    with _quiet(), unrolled():
        try:
            if plain:
                program = program.run_decompositions(plain)
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


def _first_cause(text: str) -> str:
    """What went wrong in the words of who found it: torch's own come first, and are in colours."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
    found = re.search(r"## Exception summary\s+<class '[^']*'>: (.*)", plain)
    return found[1] if found else plain.strip().splitlines()[0]


def _is_odd(node: torch.fx.Node) -> bool:
    """Attention over other than [batch, heads, tokens, features], for which torch has no ONNX form."""
    if node.target is not _ATTENTION or node.kwargs.get("enable_gqa"):
        return False
    return any(n.meta["val"].dim() != _RANK for n in node.args[:3])  # type: ignore[union-attr]


def _attention(  # noqa: PLR0913 - the op's own arguments
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attention over any leading dimensions, by its definition."""
    del dropout_p, enable_gqa  # of training; and not decomposed
    factor = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = (query * factor) @ key.transpose(-2, -1)
    if is_causal:
        sizes = (query.shape[-2], key.shape[-2])
        attn_mask = torch.ones(sizes, dtype=torch.bool, device=query.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -math.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    return scores.softmax(-1) @ value


def _translations(native: Collection[Any]) -> dict[Any, Any]:
    from tersor.graph.onnx_recurrence import translations  # needs onnxscript

    return {op: how for op, how in translations().items() if op in native}


def _reason(program: torch.export.ExportedProgram, text: str) -> str:
    """The ops without a form, by the names that the program has for them."""
    found = sorted(set(_MISSING.findall(text)))
    if not found:
        return f"the graph has no ONNX form ({_first_cause(text)})"
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
