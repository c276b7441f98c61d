"""An ``nn.Module`` becomes a Graph: exported without decompositions, batch dynamic, normalised.

The caller's module is only read: its mode is restored, its tensors are cloned. The exported graph
must reproduce the module on the example and at another batch size before anything else happens.
"""

import contextlib
import copy
import inspect
import logging
import re
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tersor.capture.samples import TO_INPUTS, Call, Samples
from tersor.capture.structures import describe
from tersor.core.errors import CaptureError, DataError, ParityError, WeightError
from tersor.core.records import Signature, Structure, TensorSpec
from tersor.core.structure import unflatten
from tersor.graph.contracts import Graph
from tersor.graph.normalise import normalise

_MAX_BATCH = 1 << 16
# Float32 sums in another order: a few hundred roundings of 2**-24, relative to the output's scale.
PARITY = 1e-4
_LOCATION = re.compile(r'File "([^"]+)", line (\d+), in (\S+)\n\s*(.+)')


@dataclass(frozen=True, slots=True)
class Captured:
    """The graph, and the original as a function of flat inputs."""

    graph: Graph
    original: Callable[..., Any]  # the caller's module in evaluation mode, its own convention
    call: Call


def capture(model: nn.Module, samples: Samples) -> Captured:
    """Export a module and prove that the graph computes the same.

    Args:
        model: Any module; not changed.
        samples: A few inputs; the first two make the example (one is repeated).

    Raises:
        WeightError: A parameter that is not finite, complex or sparse.
        DataError: The module can't take the inputs.
        CaptureError: Not exportable; names the op, the source line and the way out.
        ParityError: The exported graph computes something else.
    """
    _check_weights(model)
    host = _on_cpu(model)
    with evaluation_mode(host), _quiet():
        samples = _cast(host, samples)
        example = _example(samples, 2)
        args, kwargs = _arguments(samples.call, example)
        expected = _first_call(host, *_arguments(samples.call, _clones(example)), samples.call)
        program = _export(host, args, kwargs)
        module = normalise(program.module(check_guards=False))
        leaves: list[Tensor] = []
        result = describe(expected, leaves)
        signature = _signature(host, samples.call, example, leaves, result, module)
        graph = Graph(module, signature, example)
        _check_parity(host, graph, samples)
    return Captured(graph, _original(host), samples.call)


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; every submodule's own mode after."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """torch.export's own warnings and logs say nothing that our errors do not say better."""
    loggers = [logging.getLogger(name) for name in ("torch", "torch.export", "torch._dynamo")]
    loggers += [logging.getLogger("torch.fx.experimental.symbolic_shapes")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    # The fused kernel of nn.TransformerEncoderLayer fixes the batch size and has no plain ops.
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _check_weights(model: nn.Module) -> None:
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_complex() or tensor.is_sparse:
            raise WeightError(
                f"{name}: complex and sparse weights are not supported; make it dense"
            )
        if tensor.is_meta:
            raise WeightError(f"{name} has no values (meta device); load the weights first")
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            bad = int((~torch.isfinite(tensor)).sum())
            raise WeightError(
                f"{name}: {bad} of {tensor.numel()} values are NaN or infinite; wanted finite "
                "weights: load a sound checkpoint"
            )


def _on_cpu(model: nn.Module) -> nn.Module:
    tensors = [*model.parameters(), *model.buffers()]
    if all(t.device.type == "cpu" for t in tensors):
        return model
    return copy.deepcopy(model).to("cpu")


def _cast(model: nn.Module, samples: Samples) -> Samples:
    """Float inputs in the model's float type; never between float and integer."""
    wanted = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    if wanted not in (torch.float32, torch.float64):
        raise WeightError(
            f"the model's weights are {wanted}; wanted float32: call model.float() on a copy"
        )
    if wanted is torch.float64:
        raise WeightError("the model's weights are float64; wanted float32: use model.float()")
    cast = tuple(t.to(wanted) if t.is_floating_point() else t for t in samples.tensors)
    return Samples(samples.call, cast)


def _example(samples: Samples, size: int) -> tuple[Tensor, ...]:
    """The first samples, repeated where there are fewer: export makes a batch of 1 static."""
    index = torch.arange(size) % len(samples)
    return tuple(t[index].clone() for t in samples.tensors)


def _clones(flat: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """What a model that writes to its inputs may have."""
    return tuple(t.clone() for t in flat)


def _arguments(call: Call, flat: tuple[Tensor, ...]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    both = Structure(kind="tuple", children=(call.args, call.kwargs))
    args, kwargs = unflatten(both, list(flat))
    return tuple(args), dict(kwargs)


def _first_call(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], call: Call) -> Any:
    _check_arguments(model, args, kwargs)
    try:
        return model(*args, **kwargs)
    except (TypeError, RuntimeError, ValueError, IndexError, KeyError, AttributeError) as error:
        kinds = [
            f"{t.dtype}{tuple(t.shape)}".removeprefix("torch.") for t in _tensors(args, kwargs)
        ]
        hint = f"; if the items hold labels, use {TO_INPUTS}" if len(call.args.children) > 1 else ""
        raise DataError(
            f"data: the model failed on the first inputs {', '.join(kinds)}: "
            f"{_first_line(error)}; wanted inputs that the model itself accepts (a float model "
            f"needs float inputs){hint}"
        ) from error


def _tensors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    leaves: list[Tensor] = []
    describe((args, kwargs), leaves)
    return leaves


def _check_arguments(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    signature = inspect.signature(model.forward)
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise DataError(
            f"data: items hold {len(args)} positional input(s) and the names {sorted(kwargs)}, but "
            f"{type(model).__name__}.forward{signature} does not take them ({error}); if items are "
            f"(inputs, labels), use {TO_INPUTS}"
        ) from error


def _export(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> torch.export.ExportedProgram:
    failure: Exception | None = None
    batch = torch.export.Dim("batch", min=1, max=_MAX_BATCH)
    for dim in (batch, torch.export.Dim.AUTO):
        shapes = _dynamic_shapes(model, args, kwargs, dim)
        try:
            program = torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
        except Exception as error:  # noqa: BLE001 - torch raises dozens of types; all are re-raised by name
            failure = failure or error
            continue
        if _batch_is_dynamic(program):
            return program
        failure = failure or CaptureError("the batch size is fixed by the model's own code")
    assert failure is not None
    raise CaptureError(_explain(model, failure)) from failure


def _dynamic_shapes(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dim: Any
) -> dict[str, Any]:
    def mark(value: Any) -> Any:
        if isinstance(value, Tensor):
            return {0: dim}
        if isinstance(value, dict):
            return {k: mark(v) for k, v in value.items()}
        if isinstance(value, tuple | list):
            return type(value)(mark(v) for v in value)
        return None

    bound = inspect.signature(model.forward).bind(*args, **kwargs)
    marked: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = bound.signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            marked.update({k: mark(v) for k, v in value.items()})
        else:
            marked[name] = mark(value)
    return marked


def _batch_is_dynamic(program: torch.export.ExportedProgram) -> bool:
    """``Dim.AUTO`` silently makes the batch static: look."""
    user = set(program.graph_signature.user_inputs)
    values = [
        n.meta.get("val") for n in program.graph.nodes if n.op == "placeholder" and n.name in user
    ]
    sizes = [v.shape[0] for v in values if isinstance(v, Tensor)]
    return any(_is_dynamic(size) for size in sizes)


def _is_dynamic(size: Any) -> bool:
    """A symbol that the code turned into a number keeps its type."""
    return isinstance(size, torch.SymInt) and size.node.maybe_as_int() is None


def _explain(model: nn.Module, error: Exception) -> str:
    """Op, source line and way out, from torch's own words and the traceback."""
    text = str(error)
    op = next(iter(re.findall(r"aten\.[\w.]+|torch\.ops\.[\w.]+|[\w]+::[\w.]+", text)), "")
    place = _source_line(error, text)
    data_dependent = "data-dependent" in text or "DataDependent" in type(error).__name__
    if data_dependent:
        what = "control flow depends on the values of tensors"
        way_out = "replace the branch by torch.where or torch.cond, or capture the part without it"
    elif "dynamic" in text.lower() or "constraint" in text.lower() or "fixed by" in text:
        what = "the batch size is fixed by the code"
        way_out = "take sizes from x.shape[0] or use -1 in view() and reshape()"
    else:
        what = _first_line(error)
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


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), repr(error))


def _signature(
    model: nn.Module,
    call: Call,
    example: tuple[Tensor, ...],
    leaves: list[Tensor],
    result: Structure,
    module: torch.fx.GraphModule,
) -> Signature:
    holders = [n.name for n in module.graph.nodes if n.op == "placeholder"]
    inputs = tuple(
        TensorSpec(name=name, dtype=_dtype(t), shape=(None, *t.shape[1:]))
        for name, t in zip(holders, example, strict=True)
    )
    values = _output_values(module)
    if len(values) != len(leaves):
        raise CaptureError(
            f"the model returns {len(leaves)} tensors, its export {len(values)}; return tensors "
            "that forward() computes from its inputs"
        )
    names = _output_names(result)
    outputs = tuple(
        TensorSpec(name=name, dtype=_dtype(leaf), shape=_output_shape(leaf, value))
        for name, leaf, value in zip(names, leaves, values, strict=True)
    )
    return Signature(
        inputs=inputs,
        outputs=outputs,
        args=call.args,
        kwargs=call.kwargs,
        result=result,
        parameter_names=tuple(inspect.signature(model.forward).parameters),
    )


def _output_values(module: torch.fx.GraphModule) -> list[Any]:
    output = next(n for n in module.graph.nodes if n.op == "output")
    values = output.args[0]
    assert isinstance(values, tuple)
    return [n.meta.get("val") if isinstance(n, torch.fx.Node) else None for n in values]


def _output_shape(leaf: Tensor, value: Any) -> tuple[int | None, ...]:
    if value is None:
        return (None, *leaf.shape[1:])
    return tuple(
        None if _is_dynamic(size) else int(known)
        for size, known in zip(value.shape, leaf.shape, strict=True)
    )


def _output_names(structure: Structure, prefix: str = "") -> list[str]:
    if structure.kind == "tensor":
        return [prefix or "output"]
    labels = structure.keys or tuple(f"output_{i}" for i in range(len(structure.children)))
    names = []
    for label, child in zip(labels, structure.children, strict=True):
        names += _output_names(child, f"{prefix}.{label}" if prefix else label)
    return names


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _check_parity(model: nn.Module, graph: Graph, samples: Samples) -> None:
    for size in (2, 3):
        flat = _example(samples, size)
        leaves: list[Tensor] = []
        args, kwargs = _arguments(samples.call, _clones(flat))
        describe(model(*args, **kwargs), leaves)
        for found, wanted in zip(graph.run(flat), leaves, strict=True):
            difference = relative_difference(found, wanted)
            if not difference <= PARITY:
                raise ParityError(
                    f"{type(model).__name__}: its export differs by {difference:.2e} of the "
                    f"output's scale at batch {size}, wanted at most {PARITY:g}; a model that is "
                    "random or keeps state between calls can't be captured"
                )


def relative_difference(found: Tensor, wanted: Tensor) -> float:
    """Largest absolute difference, relative to the largest absolute value that was wanted."""
    if found.shape != wanted.shape:
        return float("inf")
    if not wanted.numel():
        return 0.0
    scale = max(float(wanted.double().abs().max()), 1e-12)
    return float((found.double() - wanted.double()).abs().max()) / scale


def _original(model: nn.Module) -> Callable[..., Any]:
    def predict(*args: Any, **kwargs: Any) -> Any:
        with evaluation_mode(model), torch.no_grad():
            return model(*args, **kwargs)

    return predict
