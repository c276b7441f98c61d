"""torch.export with a batch, and other dimensions, of any size; what it refuses, said by name."""

import inspect
import io
import re
import traceback
from collections.abc import Collection
from contextlib import redirect_stderr
from typing import Any

import torch
from torch import Tensor, fx, nn

from tersor.core.errors import CaptureError
from tersor.graph.recurrence import opaque

_MAX_BATCH = 1 << 16
_LOCATION = re.compile(r'File "([^"]+)", line (\d+), in (\S+)\n\s*(.+)')
_OF_SIZES = re.compile(r"constraint|dynamic.shapes?|as dynamic|specialized|Dim\(", re.IGNORECASE)
# What a graph may consist of: everything else has no meaning outside of the caller's process.
_NAMESPACES = ("aten", "prims", "torchvision", "quantized_decomposed")
_WRAPPERS = ("wrap_with_set_grad_enabled", "wrap_with_autocast")  # inlined later
Place = tuple[int, int]  # flat input, dimension


def export(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic: Collection[Place] = ()
) -> torch.export.ExportedProgram:
    """The program, with dimension 0 of every input and the named ones of any size.

    Args:
        model: In evaluation mode.
        args: Positional inputs, batch >= 2.
        kwargs: Inputs by name.
        dynamic: Dimensions beyond the batch.

    Raises:
        CaptureError: Not exportable, or only for one size of a dimension; names op, line,
            dimension and the way out.
    """
    failure: Exception | None = None
    batch = torch.export.Dim("batch", min=1, max=_MAX_BATCH)
    for dim in (batch, torch.export.Dim.AUTO):
        shapes = _dynamic_shapes(model, args, kwargs, dim, dynamic)
        try:
            with (
                redirect_stderr(io.StringIO()),
                opaque(),
            ):  # torch prints the part of the graph that it has
                program = torch.export.export(
                    model, args, kwargs, dynamic_shapes=shapes, strict=False
                )
        except Exception as error:  # noqa: BLE001 - torch raises dozens of types; all are re-raised by name
            failure = failure or error
            continue
        fixed = _fixed(program, dynamic)
        if not fixed:
            _check_ops(model, program.graph_module)
            return program
        failure = failure or _fixed_error(model, program, fixed)
    assert failure is not None
    if isinstance(failure, CaptureError):
        raise failure
    raise CaptureError(_explain(model, failure)) from failure


def autocast_type(module: fx.GraphModule) -> torch.dtype | None:
    """The type in which a part of an exported module computes by its own autocast; None: none does."""
    for node in module.graph.nodes:
        kind = getattr(node.target, "__name__", "")
        if kind == _WRAPPERS[1] and node.args[2]:
            dtype = node.args[1] or torch.get_autocast_dtype(str(node.args[0]))
            return dtype if isinstance(dtype, torch.dtype) else None
        if kind in _WRAPPERS:
            found = autocast_type(_body(module, node))
            if found is not None:
                return found
    return None


def input_nodes(program: torch.export.ExportedProgram) -> list[fx.Node]:
    """The placeholders of the flat inputs; their fake tensors have numbers or symbols as sizes."""
    user = set(program.graph_signature.user_inputs)
    return [
        n
        for n in program.graph.nodes
        if n.op == "placeholder" and n.name in user and isinstance(n.meta.get("val"), Tensor)
    ]


def input_values(program: torch.export.ExportedProgram) -> list[Tensor]:
    """Their fake tensors."""
    return [n.meta["val"] for n in input_nodes(program)]


def is_dynamic(size: Any) -> bool:
    """Whether a size is open; a symbol that the code turned into a number keeps its type."""
    return isinstance(size, torch.SymInt) and size.node.maybe_as_int() is None


def _dynamic_shapes(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    batch: Any,
    dynamic: Collection[Place],
) -> dict[str, Any]:
    positions = _Positions(batch, dynamic)
    # Inputs are numbered in the order of the call, which keyword arguments may change in binding.
    marked_args = [positions.mark(value) for value in args]
    marked_kwargs = {name: positions.mark(value) for name, value in kwargs.items()}
    bound = inspect.signature(model.forward).bind(*marked_args, **marked_kwargs)
    marked: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = bound.signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            marked.update(value)
        else:
            marked[name] = value
    return marked


class _Positions:
    """Numbers tensors as they are met, and marks their open dimensions."""

    def __init__(self, batch: Any, dynamic: Collection[Place]) -> None:
        self._batch = batch
        self._dynamic = dynamic
        self._met = 0

    def mark(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            dims = sorted(dim for column, dim in self._dynamic if column == self._met)
            self._met += 1
            # AUTO: equal sizes and bounds are found by torch, and read from the program after.
            return {0: self._batch, **dict.fromkeys(dims, torch.export.Dim.AUTO)}
        if isinstance(value, dict):
            return {k: self.mark(v) for k, v in value.items()}
        if isinstance(value, tuple | list):
            return type(value)(self.mark(v) for v in value)
        return None


def _fixed(program: torch.export.ExportedProgram, dynamic: Collection[Place]) -> list[Place]:
    """What became static in silence, as ``Dim.AUTO`` lets it; [(0, 0)] for the batch."""
    values = input_values(program)
    if not any(is_dynamic(value.shape[0]) for value in values if value.dim()):
        return [(0, 0)]
    return [(c, d) for c, d in sorted(dynamic) if not is_dynamic(values[c].shape[d])]


def _fixed_error(
    model: nn.Module, program: torch.export.ExportedProgram, fixed: list[Place]
) -> CaptureError:
    name = type(model).__name__
    column, dim = fixed[0]
    if not dim:
        return CaptureError(_one_batch(model, ""))
    size = int(input_values(program)[column].shape[dim])
    return CaptureError(
        f"{name} can't be exported for several sizes: dimension {dim} of input {column} "
        f"({input_nodes(program)[column].name}) varies in the data, but the model's own "
        f"code fixes it to {size}; pad all inputs to one size with tersor.Data(..., "
        "to_inputs=...), or take that size from x.shape in forward()"
    )


def _one_batch(model: nn.Module, place: str) -> str:
    name = type(model).__name__
    if isinstance(model, fx.GraphModule):
        return (
            f"{name}: the program was exported for one batch size; export the original module "
            "again with dynamic_shapes={input: {0: torch.export.Dim('batch')}} for every input and "
            "an example of at least 2 samples, or pass the nn.Module itself"
        )
    return (
        f"{name} can't be exported: the batch size is fixed by the code{place}; take sizes from "
        "x.shape[0] or use -1 in view() and reshape()"
    )


def _check_ops(model: nn.Module, module: fx.GraphModule) -> None:
    for node in module.graph.nodes:
        if node.op != "call_function":
            continue
        target = node.target
        name = str(target)
        if isinstance(target, torch._ops.HigherOrderOperator):  # noqa: SLF001
            if target.name() in _WRAPPERS:
                _check_ops(model, _body(module, node))
                continue
            what, way_out = "has no plain form", "write it without control flow (torch.where)"
        elif isinstance(target, torch._ops.OpOverload):  # noqa: SLF001
            if target.namespace in _NAMESPACES:
                continue
            what = "is a custom op that no backend knows"
            way_out = "replace it by ops of torch while the model is compressed"
        else:
            continue
        path = list((node.meta.get("nn_module_stack") or {"": ("",)}).values())[-1][0]
        raise CaptureError(
            f"{type(model).__name__} can't be captured: {name} {what}"
            f"{f'; in module {path}' if path else ''}; {way_out}"
        )


def _body(module: fx.GraphModule, node: fx.Node) -> fx.GraphModule:
    holder = next(a for a in node.args if isinstance(a, fx.Node) and a.op == "get_attr")
    found = getattr(module, str(holder.target))
    assert isinstance(found, fx.GraphModule)
    return found


def _explain(model: nn.Module, error: Exception) -> str:
    """Op, source line and way out, from torch's own words and the traceback."""
    text = str(error)
    op = next(iter(re.findall(r"aten\.[\w.]+|torch\.ops\.[\w.]+|[\w]+::[\w.]+", text)), "")
    place = _source_line(error, text)
    data_dependent = "data-dependent" in text or "DataDependent" in type(error).__name__
    if data_dependent:
        what = "control flow depends on the values of tensors"
        way_out = "replace the branch by torch.where, or capture the part without it"
    elif _OF_SIZES.search(text):
        return _one_batch(model, f"{f'; op {op}' if op else ''}{place}")
    else:
        what = first_line(error)
        way_out = "replace the op by one that torch.export knows, or pass a part of the model"
    named = f"; op {op}" if op else ""
    return f"{type(model).__name__} can't be exported: {what}{named}{place}; {way_out}"


def _source_line(error: Exception, text: str) -> str:
    found = _LOCATION.findall(text)
    if found:
        file, line, function, code = found[-1]
        return f"; at {file}:{line} in {function}: {code.strip()}"
    frames = traceback.extract_tb(error.__traceback__)
    others = ("/torch/", "/tersor/", "<")  # "<string>": code that a library made
    own = [f for f in frames if not any(part in f.filename for part in others)]
    if own:
        frame = own[-1]
        return f"; at {frame.filename}:{frame.lineno} in {frame.name}: {frame.line}"
    return ""


def first_line(error: BaseException) -> str:
    """The first words of an error that are no blank line."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), repr(error))
