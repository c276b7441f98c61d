"""A built graph on a CPU or a CUDA device: parameters stay there, calls go through fixed buffers."""

import warnings
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tersor.backends.inductor.compiling import (
    Call,
    Compiled,
    compile_module,
    open_package,
)
from tersor.backends.inductor.host import check_device, family, mismatch, read_host
from tersor.backends.inductor.lowering import lower
from tersor.backends.inductor.options import Options, read_options
from tersor.backends.inductor.profiling import (
    eager_ms,
    launched_ms,
    launches,
    marked_kernels_ms,
    traced_names,
)
from tersor.backends.inductor.running import (
    Recorded,
    ResidentCall,
    Staging,
    failing_as,
    median_ms,
    on_cpu,
    release,
    set_up,
)
from tersor.backends.inductor.sections import Native, read, written
from tersor.backends.inductor.trust import BuildCache
from tersor.backends.inductor.work import Form
from tersor.core.errors import BackendError, DataError, ShapeError
from tersor.core.records import OUTSIDE, BuildChoice
from tersor.graph.contracts import Graph, Shapes
from tersor.graph.operators import weighted_ops
from tersor.graph.shapes import OPEN, sizes_of

Arrays = Mapping[str, NDArray[Any]]
_MIX = 8  # calls of different sizes that a profile runs again
_PROFILE_RUNS, _PROFILE_WARM = 15, 3
_HALF = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True, kw_only=True)
class NativeReport:
    """What became of the native section of a file.

    Attributes:
        used: Its code runs.
        reason: Why it does not; empty where there is none or it runs.
    """

    used: bool
    reason: str = ""


class RefusedNativeWarning(UserWarning):
    """Native code of a file does not run here; its graph was built again."""


class InductorExecutable:
    """A built model; calls must not overlap.

    Attributes:
        is_dynamic: Sizes beyond the batch differ from call to call.
        is_resident: Inputs can lie on the device between calls (``resident``).
        native: What became of the file's native code, for one that was loaded.
    """

    def __init__(
        self,
        graph: Graph,
        shapes: Shapes,
        choice: BuildChoice,
        *,
        native: Native | None = None,
        cache: BuildCache | None = None,
    ) -> None:
        self._options = read_options(choice)
        check_device(choice.device)
        self._graph, self._choice, self._cache = graph, choice, cache or BuildCache()
        self._shapes = _full(graph, shapes)
        self.is_dynamic = any(OPEN in s for s in self._shapes.values())
        self.is_resident = family(choice.device) == "cuda"
        self.native = NativeReport(used=native is not None)
        self._staging = Staging(choice.device) if self.is_resident else None
        self._recent: deque[list[Tensor]] = deque(maxlen=_MIX if self.is_dynamic else 1)
        try:
            with failing_as("building the model", choice.device), self._set_up(), torch.no_grad():
                form = _form(
                    choice,
                    self._options,
                    self._has_images(graph),
                    is_open=self.is_dynamic,
                )
                self._lowered = lower(graph, form, None if native is None else native.sizes)
                self._example = self._ones()
                self._compiled = self._made(native)
                self._call = self._recorded()
        except BackendError:  # whoever keeps the error must not keep the device's memory
            vars(self).clear()
            release(choice.device)
            raise

    def _has_images(self, graph: Graph) -> bool:
        """Whether the layout of images makes a difference.

        Raises:
            BackendError: It was asked for and makes none.
        """
        if self._options.layout != "channels_last":
            return False
        if not any("conv2d" in str(node.target) for node in graph.module.graph.nodes):
            raise BackendError("inductor: layout channels_last, but there are no 2d convolutions")
        return True

    def _made(self, native: Native | None) -> Compiled:
        if native is not None:
            constants = dict(self._lowered.module.named_buffers())
            constants |= dict(self._lowered.module.named_parameters())
            call = open_package(native.package, constants)
            call(*self._example)
            return Compiled(call=call, package=native.package)
        made = compile_module(
            self._lowered.module, self._example, self._options, is_open=self.is_dynamic
        )
        if made.package:
            self._cache.note(made.package)
        made.call(*self._example)  # what can't run is better known now
        return made

    def _recorded(self) -> Call:
        if not self._options.graph or self.is_dynamic:
            return self._compiled.call
        return Recorded(self._compiled.call, self._example, self._choice.device)

    def _set_up(self) -> Any:
        return set_up(self._choice.device, self._choice.threads, tf32=self._options.tf32)

    def run(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        """One call; the outputs are the caller's own.

        Raises:
            BackendError: The device failed or has no memory left.
            DataError: A missing or unknown name, or another dtype.
            ShapeError: Another shape than the built one.
        """
        arrays = self._checked(inputs)
        device = self._choice.device
        # A recording holds how it was set up; setting torch's switches takes as long as a small launch.
        is_recorded = isinstance(self._call, Recorded)
        switches = torch.cuda.device(device) if is_recorded else self._set_up()
        with failing_as("running the model", device), switches, torch.no_grad():
            if self._staging is None:
                tensors = on_cpu(arrays)
                found = [np.array(t.numpy()) for t in self._call(*tensors)]
            else:
                tensors = self._staging.upload(arrays)
                found = self._staging.fetch(self._call(*tensors))
        self._recent.append(tensors)
        specs = self._graph.signature.outputs
        return {spec.name: array for spec, array in zip(specs, found, strict=True)}

    def resident(self, inputs: Arrays) -> ResidentCall:
        """A call of these inputs, uploaded once; it is timed by the device's own events."""
        arrays = self._checked(inputs)
        with failing_as("uploading inputs", self._choice.device):
            tensors = [t.to(self._choice.device) for t in on_cpu(arrays)]
        if isinstance(self._call, Recorded):
            for fixed, given in zip(self._call.inputs, tensors, strict=True):
                fixed.copy_(given)
            tensors = self._call.inputs
        self._recent.append(tensors)
        return ResidentCall(self._switched, tensors, self._choice.device)

    def _switched(self, *inputs: Tensor) -> Sequence[Tensor]:
        if isinstance(self._call, Recorded):  # the recording holds how it was set up
            return self._call(*inputs)
        with self._set_up(), torch.no_grad():
            return self._call(*inputs)

    def at(self, shapes: Shapes) -> "InductorExecutable":
        """The same model built for one shape an input.

        Raises:
            BackendError: It can't be built for the shapes.
            ShapeError: One size that is two.
        """
        try:
            sizes_of(self._graph.signature, dict(shapes))
        except DataError as error:
            raise ShapeError(str(error)) from error
        return InductorExecutable(self._graph, shapes, self._choice, cache=self._cache)

    def profile(self) -> dict[str, float]:
        """Milliseconds a warm call by graph node; kernels of no node by their kind.

        On a GPU nodes are the kernels' own times, and ``OUTSIDE`` is what is between them: launch
        gaps. It runs on the inputs of the last call, or on drawn ones; where sizes are open, in turn on
        those of the last few calls.

        Raises:
            DataError: Sizes are open, and nothing was run yet.
        """
        if self.is_dynamic and not self._recent:
            raise DataError("inductor: sizes are open; run the model once before its profile")
        calls = list(self._recent) or [self._example]
        total: dict[str, float] = {}
        device = self._choice.device
        with failing_as("profiling the model", device), self._set_up(), torch.no_grad():
            for inputs in calls:
                for name, ms in self._profiled(inputs).items():
                    total[name] = total.get(name, 0.0) + ms / len(calls)
        return total

    def _profiled(self, inputs: Sequence[Tensor]) -> dict[str, float]:
        for _ in range(_PROFILE_WARM):
            self._call(*inputs)
        call_ms = median_ms(lambda: self._call(*inputs), self._choice.device, _PROFILE_RUNS)
        found: dict[str, float] = {}
        for name, ms in self._node_ms(inputs).items():
            source = self._lowered.sources.get(name, name)
            found[source] = found.get(source, 0.0) + ms
        for op in weighted_ops(self._graph.module):
            found.setdefault(op.node.name, 0.0)  # computed as a part of another one's kernel
        found[OUTSIDE] = max(0.0, call_ms - sum(found.values()))
        return found

    def _node_ms(self, inputs: Sequence[Tensor]) -> dict[str, float]:
        module, made = self._lowered.module, self._compiled
        if self._options.mode == "eager":
            if self.is_resident:
                return marked_kernels_ms(module, inputs, _PROFILE_RUNS)
            return eager_ms(module, inputs, _PROFILE_RUNS, _PROFILE_WARM)
        if not made.sources:  # a package has no program to read; its twin has the same kernels
            twin = Options(mode="compile", half=self._options.half, layout=self._options.layout)
            made = compile_module(module, inputs, twin, is_open=self.is_dynamic)
        order = [launch for text in made.sources for launch in launches(text)]
        named = traced_names(module, made.traced)
        times = launched_ms(
            lambda: made.call(*inputs), order, _PROFILE_RUNS, on_gpu=self.is_resident
        )
        found: dict[str, float] = {}
        for source, ms in times.items():
            name = named.get(source, source)
            found[name] = found.get(name, 0.0) + ms
        return found

    def serialize(self) -> dict[str, bytes]:
        """The graph, its constants and where they lie; of a package also its native code."""
        native = None
        if self._compiled.package:
            native = Native(
                package=self._compiled.package,
                host=read_host(self._choice.device),
                sizes=self._lowered.sizes,
            )
        graph = self._graph
        if self._options.weights != "codes":  # whoever loads it needs the floats alone
            graph = replace(graph, packed={})
        return written(graph, self._shapes, native)

    def _ones(self) -> list[Tensor]:
        """Inputs of the built shapes; open sizes are those of the graph's example."""
        device = self._choice.device
        generator = torch.Generator(device).manual_seed(0)
        found = []
        for spec, like in zip(self._graph.signature.inputs, self._graph.example, strict=True):
            shape = [
                like.shape[d] if size == OPEN else size
                for d, size in enumerate(self._shapes[spec.name])
            ]
            dtype = like.dtype
            if dtype.is_floating_point:
                values = torch.rand(shape, generator=generator, device=device).to(dtype)
            else:
                values = torch.zeros(shape, dtype=dtype, device=device)
            found.append(values)
        return found

    def _checked(self, inputs: Arrays) -> list[NDArray[Any]]:
        if inputs.keys() != self._shapes.keys():
            raise DataError(
                f"inductor: found inputs {sorted(inputs)}, wanted {sorted(self._shapes)}"
            )
        arrays = []
        for spec in self._graph.signature.inputs:
            array, wanted = inputs[spec.name], self._shapes[spec.name]
            fits = len(array.shape) == len(wanted) and all(
                w in (OPEN, f) for f, w in zip(array.shape, wanted, strict=True)
            )
            if not fits:
                raise ShapeError(
                    f"input {spec.name}: found shape {array.shape}, wanted {wanted}, for which this "
                    "model was built; pad, or build for that shape"
                )
            if array.dtype != np.dtype(spec.carrier):
                raise DataError(
                    f"input {spec.name}: found dtype {array.dtype}, wanted {spec.carrier}"
                )
            arrays.append(array)
        return arrays


def _full(graph: Graph, shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """A shape for every input; the graph's example where none is given."""
    specs = zip(graph.signature.inputs, graph.example, strict=True)
    found = {spec.name: tuple(shapes.get(spec.name, tuple(t.shape))) for spec, t in specs}
    for name, shape in found.items():
        if shape[:1] == (OPEN,):
            raise ShapeError(
                f"input {name}: found shape {shape}, open in dimension 0, the batch; wanted a number"
            )
    return found


def _form(choice: BuildChoice, options: Options, channels_last: bool, *, is_open: bool) -> Form:
    dtype = torch.float32 if choice.precision == "f32" else _HALF[options.half]
    on_card = family(choice.device) == "cuda"
    return Form(
        dtype=dtype,
        device=choice.device,
        channels_last=channels_last,
        joins=on_card,
        codes=options.weights == "codes",
        blocks=options.blocks == "fused" and not is_open,  # its kernels are made for one image size
        eights=on_card and dtype != torch.float32,
    )


def load(
    sections: Mapping[str, bytes], choice: BuildChoice, cache: BuildCache | None = None
) -> InductorExecutable:
    """Build what ``serialize`` gave; native code only where this user built it for such a host.

    Otherwise the graph is built again, with a ``RefusedNativeWarning`` that says what was found and what
    was wanted, also in ``native``.

    Raises:
        ArtifactError: A section is missing or damaged.
        BackendError: The device is not here, or the graph can't be built on it.
    """
    graph, shapes, native = read(sections)
    check_device(choice.device)
    known = cache or BuildCache()
    if native is None:
        return InductorExecutable(graph, shapes, choice, cache=known)
    reason = mismatch(read_host(choice.device), native.host)
    if not reason and not known.knows(native.package):
        reason = "found no record that this user built it, wanted one in the build cache"
    if not reason:
        return InductorExecutable(graph, shapes, choice, native=native, cache=known)
    warnings.warn(
        f"inductor: the native code of this file does not run here: {reason}; its graph is built "
        "again, which takes longer",
        RefusedNativeWarning,
        stacklevel=3,
    )
    built = InductorExecutable(graph, shapes, choice, cache=known)
    built.native = NativeReport(used=False, reason=reason)
    return built


__all__ = ["InductorExecutable", "NativeReport", "RefusedNativeWarning", "load"]
