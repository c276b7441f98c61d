"""A model becomes a Graph: exported without decompositions, sizes dynamic, normalised.

The caller's module is only read: its mode, its buffers and its config are restored, its tensors
are cloned. The exported graph must reproduce the module on the example, at another batch size and
at other sizes of the data before anything else happens.

A model in half precision is captured as its copy in float32, whose values are the same; the
signature says what the caller passes and gets.
"""

import contextlib
import dataclasses
import inspect
import logging
import math
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tersor.capture.configuration import EXPORTABLE, WITHOUT_CACHE, configured
from tersor.capture.exporting import (
    Place,
    autocast_type,
    export,
    first_line,
    input_values,
)
from tersor.capture.mixing import check_mixing
from tersor.capture.programs import Model, as_module
from tersor.capture.samples import TO_INPUTS, Call, Samples, several_shapes, varying
from tersor.capture.sizes import Names, described, limits
from tersor.capture.structures import describe, plain_outputs
from tersor.capture.weights import (
    check_weights,
    float_type,
    in_float32,
    on_cpu,
    state_restored,
)
from tersor.core.errors import CaptureError, DataError, ParityError
from tersor.core.records import Signature, Structure, TensorSpec
from tersor.core.structure import unflatten
from tersor.graph.contracts import Graph
from tersor.graph.edit import parameters_by_name
from tersor.graph.meta import ensure
from tersor.graph.normalise import normalise
from tersor.graph.shapes import check_limits

# Float32 sums in another order: a few hundred roundings of 2**-24, relative to the output's scale.
PARITY = 1e-4
_SHAPES = 6  # shapes of the data at which the model is run and compared
_RUNTIME = (TypeError, RuntimeError, ValueError, IndexError, KeyError, AttributeError)


@dataclass(frozen=True, slots=True)
class Captured:
    """The graph, and the original as a function of flat inputs."""

    graph: Graph
    original: Callable[..., Any]  # the caller's model in evaluation mode, its own convention
    call: Call


@dataclass(frozen=True, slots=True)
class _Host:
    """The model on the CPU: as given, and in float32 (the same one, where it is float32)."""

    own: nn.Module
    plain: nn.Module
    dtype: torch.dtype  # of the own one
    outputs: list[Tensor] | None  # its own on the example; None where torch can't run its type here

    @property
    def is_half(self) -> bool:
        return self.dtype != torch.float32


def capture(
    model: Model,
    samples: Samples,
    dynamic: Collection[Place] = (),
    *,
    fold: bool = True,
    may_mix: bool = False,
) -> Captured:
    """Export a model and prove that the graph computes the same.

    Args:
        model: A module or an exported program; not changed.
        samples: A few inputs; the first two of the largest shape make the example (one is
            repeated). Dimensions that vary among them are exported as dynamic.
        dynamic: More dimensions that shall be dynamic, as (flat input, dimension): those that
            vary in other parts of the data (``samples.varying``).
        fold: As for ``normalise``; without it stored tensors keep the model's own names, as training
            needs them.
        may_mix: Take a model that mixes the samples of a batch, too, as one that is trained may.

    Raises:
        WeightError: A parameter that is not finite, complex or sparse.
        DataError: The model can't take the inputs.
        CaptureError: Not exportable; names the op or the dimension, the source line and the way
            out.
        ParityError: The exported graph computes something else, or a sample's output depends on the
            batch that it is in.
    """
    module = as_module(model)
    check_weights(module)
    with state_restored(module), configured(module, EXPORTABLE), evaluation_mode(module), _quiet():
        host = _hosted(module, samples)
        with evaluation_mode(host.plain):
            graph, limit = _graph(host, samples, dynamic, fold=fold)
            if fold and not may_mix:  # unfolded it is looked at for training, where losses may mix
                _check_mixing(host, graph, samples, limit)
    return Captured(graph, _original(host), samples.call)


def _graph(
    host: _Host, samples: Samples, dynamic: Collection[Place], *, fold: bool = True
) -> tuple[Graph, float]:
    """The graph, and what it may differ by."""
    call = samples.call
    samples = _cast(samples, host.dtype)
    _check_shapes(host, samples)
    example = _example(_cast(samples, torch.float32).tensors, 2)
    leaves: list[Tensor] = []
    returned = _run(host.plain, call, example)
    result = describe(returned, leaves)
    seen = _seen(samples, dynamic)
    args, kwargs = _arguments(call, example)
    with plain_outputs(host.plain, returned):
        program = export(host.plain, args, kwargs, seen)
    module = normalise(program.module(check_guards=False), fold=fold)
    _check_constants(module)
    holders = [n.name for n in module.graph.nodes if n.op == "placeholder"]
    if len(holders) != len(example):
        raise CaptureError(
            f"the model takes {len(example)} tensors, its export {len(holders)}; pass each tensor "
            "once, and leave out what forward() does not read"
        )
    signature = Signature(
        inputs=_input_specs(program, holders, _example(samples.tensors, 2), seen),
        outputs=_output_specs(program, module, leaves, result, seen),
        args=call.args,
        kwargs=call.kwargs,
        result=result,
        parameter_names=tuple(inspect.signature(host.own.forward).parameters),
    )
    _check_limits(host, signature, samples)
    graph = Graph(module, signature, example)
    ensure(graph)
    lower = autocast_type(program.graph_module)
    limit = PARITY if lower is None else half_parity(lower)
    return _with_parity(host, graph, samples, limit), limit


def _check_constants(module: torch.fx.GraphModule) -> None:
    """Tensors that are no parameter and no buffer are seen only here."""
    for name, tensor in parameters_by_name(module).items():
        if tensor.is_complex() or tensor.layout != torch.strided:
            raise CaptureError(
                f"tensor {name} is {_dtype(tensor)}, {tensor.layout}, and has no place in a file; "
                "store it dense and real, and use torch.view_as_complex in forward()"
            )


def _hosted(module: nn.Module, samples: Samples) -> _Host:
    own = on_cpu(module)
    dtype = float_type(own)
    if dtype == torch.float32:
        return _Host(own, own, dtype, None)
    leaves: list[Tensor] = []
    try:
        example = _example(_cast(samples, dtype).tensors, 2)
        describe(_run(own, samples.call, example), leaves)
    except _RUNTIME:  # said with its cause when the float32 copy fails, too
        return _Host(own, in_float32(own), dtype, None)
    return _Host(own, in_float32(own), dtype, leaves)


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
    loggers += [logging.getLogger("torch.__trace")]  # its first records land on standard error
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


def _cast(samples: Samples, dtype: torch.dtype) -> Samples:
    """Float inputs in the model's float type; never between float and integer."""
    return samples.cast([dtype] * len(samples.tensors))


def _seen(samples: Samples, dynamic: Collection[Place]) -> dict[Place, tuple[int, ...]]:
    """Each dimension that shall be dynamic, with its size in every group of samples."""
    places = sorted(varying([samples]) | set(dynamic))
    return {(c, d): tuple(int(g[c].shape[d]) for g in samples.groups) for c, d in places}


def _example(flat: Sequence[Tensor], size: int) -> tuple[Tensor, ...]:
    """The first samples, repeated where there are fewer: export makes a batch of 1 static."""
    index = torch.arange(size) % int(flat[0].shape[0])
    return tuple(t[index].clone() for t in flat)


def _arguments(call: Call, flat: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    both = Structure(kind="tuple", children=(call.args, call.kwargs))
    args, kwargs = unflatten(both, list(flat))
    return tuple(args), dict(kwargs)


def _run(model: nn.Module, call: Call, flat: Sequence[Tensor]) -> Any:
    """One call; the model may write to its inputs."""
    args, kwargs = _arguments(call, [t.clone() for t in flat])
    return model(*args, **kwargs)


def _shapes(samples: Samples) -> list[tuple[Tensor, ...]]:
    """Groups to try: the largest, the smallest, and some between."""
    groups = samples.groups
    index = torch.linspace(0, len(groups) - 1, min(len(groups), _SHAPES)).round().long().unique()
    return [groups[int(i)] for i in index]


def _check_shapes(host: _Host, samples: Samples) -> None:
    """Run the model at several shapes: what it can't take is a matter of the data."""
    call = samples.call
    _check_arguments(host.plain, *_arguments(call, _example(samples.tensors, 2)))
    for number, flat in enumerate(_shapes(_cast(samples, torch.float32))):
        example = _example(flat, 2)
        try:
            _run(host.plain, call, example)
        except _RUNTIME as error:
            if number:
                column = min(varying([samples]))[0]
                raise DataError(
                    f"data: {several_shapes([samples], column)}; the model failed on "
                    f"{_kinds(example)}: {first_line(error)}"
                ) from error
            raise DataError(_failed(error, example, call)) from error


def _failed(error: Exception, example: Sequence[Tensor], call: Call) -> str:
    hint = f"; if the items hold labels, use {TO_INPUTS}" if len(call.args.children) > 1 else ""
    if any(t.dim() == 1 for t in example):
        hint += "; an item is a batch with its samples in dimension 0: one sample alone is x[None]"
    return (
        f"data: the model failed on the first inputs {_kinds(example)}: "
        f"{first_line(error)}; wanted inputs that the model itself accepts (a float model "
        f"needs float inputs){hint}"
    )


def _kinds(flat: Sequence[Tensor]) -> str:
    return ", ".join(f"{t.dtype}{tuple(t.shape)}".removeprefix("torch.") for t in flat)


def _check_arguments(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    signature = inspect.signature(model.forward)
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        labelled = f"if items are (inputs, labels), use {TO_INPUTS}"
        if kwargs and not args:
            labelled = (
                "names of items are names of arguments; else say which are inputs with "
                f"tersor.Data(loader, to_inputs=lambda batch: batch[{next(iter(kwargs))!r}])"
            )
        raise DataError(
            f"data: items hold {len(args)} positional input(s) and the names {sorted(kwargs)}, but "
            f"{type(model).__name__}.forward{signature} does not take them ({error}); {labelled}"
        ) from error


def _input_specs(
    program: torch.export.ExportedProgram,
    holders: Sequence[str],
    example: Sequence[Tensor],
    seen: dict[Place, tuple[int, ...]],
) -> tuple[TensorSpec, ...]:
    values = input_values(program)
    names = Names(values, seen)
    specs = []
    for name, tensor, value in zip(holders, example, values, strict=True):
        spec = described(name, _dtype(tensor), tensor.shape, value, names)
        # Dimension 0 is the sample, whatever the export made of an input that nothing reads.
        shape = (None, *spec.shape[1:])
        bounds = limits(program, value, spec)
        specs.append(dataclasses.replace(spec, shape=shape, limits=bounds))
    return tuple(specs)


def _check_limits(host: _Host, signature: Signature, samples: Samples) -> None:
    """Refuse data of which the exported branches of the code cover only some sizes."""
    for flat in samples.groups:
        for spec, tensor in zip(signature.inputs, flat, strict=True):
            try:
                check_limits(spec, tuple(tensor.shape))
            except DataError as error:
                raise CaptureError(
                    f"{type(host.own).__name__} computes otherwise at other sizes, and one graph "
                    f"holds one way: {error}; or pad all inputs to one size with "
                    "tersor.Data(..., to_inputs=...)"
                ) from error


def _output_specs(
    program: torch.export.ExportedProgram,
    module: torch.fx.GraphModule,
    leaves: Sequence[Tensor],
    result: Structure,
    seen: dict[Place, tuple[int, ...]],
) -> tuple[TensorSpec, ...]:
    values = _output_values(module)
    if len(values) != len(leaves):
        raise CaptureError(
            f"the model returns {len(leaves)} tensors, its export {len(values)}; return tensors "
            "that forward() computes from its inputs"
        )
    names = Names(input_values(program), seen)
    specs = []
    for name, leaf, value in zip(_output_names(result), leaves, values, strict=True):
        if leaf.is_complex() or leaf.layout != torch.strided:
            raise CaptureError(
                f"output {name!r} is {_dtype(leaf)}, {leaf.layout}; wanted dense real numbers: "
                "return torch.view_as_real(...) or to_dense()"
            )
        specs.append(described(name, _dtype(leaf), leaf.shape, value, names))
    return tuple(specs)


def _output_values(module: torch.fx.GraphModule) -> list[Any]:
    output = next(n for n in module.graph.nodes if n.op == "output")
    values = output.args[0]
    assert isinstance(values, tuple)
    return [n.meta.get("val") if isinstance(n, torch.fx.Node) else None for n in values]


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


def _with_parity(host: _Host, graph: Graph, samples: Samples, limit: float) -> Graph:
    """The graph with the outputs' own types, once it was compared with the model.

    Where the model's code rounds by an autocast of its own, it may differ by that: the graph is float32.
    """
    plain = _cast(samples, torch.float32)
    for flat in _shapes(plain):
        for size in (2, 3):
            _compare(host.plain, graph, _example(flat, size), samples.call, limit)
    if not host.is_half:
        return graph
    if host.outputs is not None:
        for found, wanted in zip(graph.run(graph.example), host.outputs, strict=True):
            _judge(host.own, found, wanted, 2, half_parity(host.dtype))
    return dataclasses.replace(graph, signature=_typed(graph.signature, host))


def _check_mixing(host: _Host, graph: Graph, samples: Samples, limit: float) -> None:
    def run(flat: Sequence[Tensor]) -> list[Tensor]:
        leaves: list[Tensor] = []
        describe(_run(host.plain, samples.call, flat), leaves)
        return leaves

    groups = _cast(samples, torch.float32).groups
    check_mixing(host.plain, run, groups, graph.signature.outputs, limit)


def half_parity(dtype: torch.dtype) -> float:
    """As many roundings as PARITY allows; those of random sign add up as their root."""
    count = PARITY / torch.finfo(torch.float32).eps
    return math.sqrt(count) * torch.finfo(dtype).eps


def _typed(signature: Signature, host: _Host) -> Signature:
    """The outputs in the types that the model itself gives, or would."""
    half = str(host.dtype).removeprefix("torch.")
    if host.outputs is None:
        kinds = [half if spec.dtype == "float32" else spec.dtype for spec in signature.outputs]
    else:
        kinds = [_dtype(leaf) for leaf in host.outputs]
    outputs = tuple(
        dataclasses.replace(spec, dtype=kind)
        for spec, kind in zip(signature.outputs, kinds, strict=True)
    )
    return dataclasses.replace(signature, outputs=outputs)


def _compare(
    model: nn.Module, graph: Graph, flat: tuple[Tensor, ...], call: Call, limit: float
) -> None:
    leaves: list[Tensor] = []
    describe(_run(model, call, flat), leaves)
    for found, wanted in zip(graph.run(flat), leaves, strict=True):
        _judge(model, found, wanted, int(flat[0].shape[0]), limit)


def _judge(model: nn.Module, found: Tensor, wanted: Tensor, size: int, limit: float) -> None:
    difference = relative_difference(found, wanted)
    if not difference <= limit:
        raise ParityError(
            f"{type(model).__name__}: its export differs by {difference:.2e} of the "
            f"output's scale at batch {size}, wanted at most {limit:g}; a model that is "
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


def _original(host: _Host) -> Callable[..., Any]:
    """The model as given where torch runs its type here, else its copy in float32."""
    model = host.plain if host.outputs is None else host.own
    dtype = torch.float32 if host.outputs is None else host.dtype

    writes: bool | None = None  # to its own buffers; not known yet

    def predict(*args: Any, **kwargs: Any) -> Any:
        nonlocal writes
        if host.is_half:
            args, kwargs = _floats((args, kwargs), dtype)
        # The caller's model never changes; copies are for models that do write, as calls are timed.
        kept = contextlib.nullcontext() if writes is False else state_restored(model)
        before = _versions(model) if writes is None else ()
        with kept, evaluation_mode(model), configured(model, WITHOUT_CACHE), torch.no_grad():
            found = model(*args, **kwargs)
            writes = before != _versions(model) if writes is None else writes
            return found

    return predict


def _versions(model: nn.Module) -> tuple[tuple[int, int], ...]:
    """Which tensors a model keeps beside its parameters, and how often each was written to."""
    return tuple(
        (id(value), value._version)  # noqa: SLF001 - as torch's own checks read it
        for module in model.modules()
        for value in (*module._buffers.values(), *vars(module).values())  # noqa: SLF001
        if isinstance(value, Tensor) and not value.is_inference()
    )


def _floats(value: Any, dtype: torch.dtype) -> Any:
    """The same nested arguments with float tensors in that type."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {k: _floats(v, dtype) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_floats(v, dtype) for v in value)
    return value
