"""The loading half: compile, run, profile, write and read. Needs OpenVINO and NumPy only.

Two models are kept apart. The *stored* model is what ``serialize`` writes: integer weights stay
integers. The *compiled* one has weight-only integers expanded to float32, so that a smaller file
costs no time where a device's own decompression is slower than float32 arithmetic.
"""

import re
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray
from openvino import opset13 as op

from tersor.backends.openvino.failures import compilation_failed, reason
from tersor.backends.openvino.faults import options_around
from tersor.backends.openvino.nodes import source_name
from tersor.core.errors import ArtifactError, BackendError, ConfigError, DataError, ShapeError
from tersor.core.jsonable import dumps
from tersor.core.records import OUTSIDE, BuildChoice
from tersor.timing.profiles import BLOCKS, FEWEST_WARM, block_runs, warm_runs

Arrays = Mapping[str, NDArray[Any]]

CODES = "/codes"  # behind a graph node's name: its stored integers
WEIGHT_ONLY = "weight_only"  # last part of the name of a product codes * scale to be expanded
_DEVICES = {"cpu": "CPU"}
_MICROSECOND = 1e-3  # in milliseconds: counters are cut to whole ones
_OPEN = -1  # a size that differs from call to call
_MIX = 8  # calls of different sizes that a profile runs again
_SEGMENT = re.compile(r'<data [^>]*\boffset="(\d+)"[^>]*\bsize="(\d+)"')


@lru_cache(maxsize=1)
def core() -> Any:
    """OpenVINO's plug-in registry, one for each process."""
    return ov.Core()


def capabilities(device: str = "cpu") -> tuple[str, ...]:
    """What the device says it computes in: FP32, BF16, INT8, ..."""
    return tuple(core().get_property(_DEVICES[device], "OPTIMIZATION_CAPABILITIES"))


@contextmanager
def failing_as(doing: str) -> Iterator[None]:
    """OpenVINO raises RuntimeError for everything; name what was being done."""
    try:
        yield
    except RuntimeError as error:
        raise compilation_failed(error, doing) from error


class OpenVINOExecutable:
    """A compiled model; holds one request, so calls must not overlap.

    Attributes:
        is_dynamic: Sizes beyond the batch differ from call to call.
    """

    def __init__(self, stored: Any, choice: BuildChoice) -> None:
        check_choice(choice)
        self._stored = stored
        self._choice = choice
        self._inputs = {
            p.get_friendly_name(): (i, _sizes(p), _dtype(p))
            for i, p in enumerate(stored.get_parameters())
        }
        if any(_OPEN in shape[:1] for _, shape, _ in self._inputs.values()):
            raise ShapeError(
                f"openvino: inputs {[str(i.get_partial_shape()) for i in stored.inputs]} have open "
                "sizes in dimension 0, the batch; wanted a concrete one: call model.reshape first"
            )
        self.is_dynamic = any(_OPEN in shape for _, shape, _ in self._inputs.values())
        self._outputs = tuple(r.get_friendly_name() for r in stored.get_results())
        self._request = _compile(stored, choice).create_infer_request()
        self._recent: deque[dict[int, NDArray[Any]]] = deque(maxlen=_MIX if self.is_dynamic else 1)

    def run(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        """One call; the outputs are the caller's own.

        Raises:
            DataError: A missing or unknown name, or another dtype.
            ShapeError: Another shape than the built one.
        """
        arrays = self._checked(inputs)
        with failing_as("running the model"):
            results = self._request.infer(arrays, share_inputs=True, share_outputs=False)
        self._recent.append(arrays)
        return {name: results[i] for i, name in enumerate(self._outputs)}

    def at(self, shapes: Mapping[str, tuple[int, ...]]) -> "OpenVINOExecutable":
        """The same model compiled for one shape an input; constants are shared until they are packed.

        Raises:
            BackendError: OpenVINO can't take the shapes.
        """
        model = self._stored.clone()
        with failing_as(f"reshaping the model to {dict(shapes)}"):
            model.reshape({self._inputs[name][0]: list(shape) for name, shape in shapes.items()})
        return OpenVINOExecutable(model, self._choice)

    def profile(self) -> dict[str, float]:
        """Milliseconds a warm call by graph node; glue by kind (Reorder, Transpose, ...).

        OpenVINO counts whole microseconds: a node that takes less may read 0.
        What a call takes outside of all nodes is ``OUTSIDE``.

        Compiles the model a second time with counters on. It runs on the inputs of the last call
        to ``run``, or on ones; where sizes are open, in turn on those of the last few calls.

        Raises:
            DataError: Sizes are open, and nothing was run yet.
        """
        calls = list(self._recent) or [self._ones()]
        with failing_as("profiling the model"):
            compiled = _compile(self._stored, self._choice, {"PERF_COUNT": True})
            request = compiled.create_infer_request()
            warm, call_ms = _warmed(request, calls)
            _, first = _node_totals(request, calls, 0, warm)
            block = block_runs(call_ms) * len(calls)
            marks = [warm + block * i for i in range(BLOCKS + 1)]
            rows = [_node_totals(request, calls, block, mark) for mark in marks[1:]]
        totals = [first, *(found for _, found in rows)]
        names = _runtime_names(compiled)
        times: dict[str, float] = {}
        for node in totals[-1]:
            name, is_source = names.get(node, (node, False))
            spent = _warm_ms([total.get(node, 0.0) for total in totals], marks)
            if spent or is_source:
                times[name] = times.get(name, 0.0) + spent
        call_ms = median(spent / block for spent, _ in rows)
        times[OUTSIDE] = max(0.0, call_ms - sum(times.values()))
        return times

    def serialize(self) -> dict[str, bytes]:
        """The stored model as OpenVINO IR, and where its constants lie in ``model.bin``."""
        xml, weights = written(self._stored)
        segments = sorted({(int(o), int(s)) for o, s in _SEGMENT.findall(xml.decode())})
        return {
            "model.xml": xml,
            "model.bin": weights,
            "segments.json": dumps(segments).encode(),
        }

    def _ones(self) -> dict[int, NDArray[Any]]:
        if self.is_dynamic:
            raise DataError("openvino: sizes are open; run the model once before its profile")
        return {index: np.ones(shape, dtype) for index, shape, dtype in self._inputs.values()}

    def _checked(self, inputs: Arrays) -> dict[int, NDArray[Any]]:
        if inputs.keys() != self._inputs.keys():
            raise DataError(
                f"openvino: found inputs {sorted(inputs)}, wanted {sorted(self._inputs)}"
            )
        arrays = {}
        for name, (index, shape, dtype) in self._inputs.items():
            array = inputs[name]
            if not _fits(array.shape, shape):
                raise ShapeError(
                    f"input {name}: found shape {array.shape}, wanted {shape}, for which this "
                    "model was built; pad, or build for that shape"
                )
            if array.dtype != dtype:
                raise DataError(f"input {name}: found dtype {array.dtype}, wanted {dtype}")
            arrays[index] = array
        return arrays


def written(model: Any) -> tuple[bytes, bytes]:
    """A model as IR: the xml and the constants."""
    with tempfile.TemporaryDirectory() as folder, failing_as("writing the model"):
        path = Path(folder) / "model.xml"
        ov.serialize(model, path)
        return path.read_bytes(), path.with_suffix(".bin").read_bytes()


def load(sections: Mapping[str, bytes], choice: BuildChoice) -> OpenVINOExecutable:
    """Compile what ``serialize`` gave.

    Raises:
        ArtifactError: A section is missing, or OpenVINO can't read it.
    """
    missing = sorted({"model.xml", "model.bin"} - set(sections))
    if missing:
        raise ArtifactError(
            f"openvino: sections {missing} are missing, found {sorted(sections)}; write the "
            "artifact again"
        )
    weights = np.frombuffer(sections["model.bin"], np.uint8)
    try:
        stored = core().read_model(
            model=bytes(sections["model.xml"]), weights=ov.Tensor(weights.copy())
        )
    except RuntimeError as error:
        raise ArtifactError(
            f"openvino: model.xml ({len(sections['model.xml'])} bytes) with model.bin "
            f"({len(weights)} bytes) is no model: {reason(error)}; write the artifact again"
        ) from error
    return OpenVINOExecutable(stored, choice)


def read_file(
    path: str | Path, shapes: Mapping[str, tuple[int, ...]], choice: BuildChoice
) -> OpenVINOExecutable:
    """Compile a model file that OpenVINO reads, at the given shapes by input name.

    Raises:
        BackendError: OpenVINO can't read the file or compile the model.
    """
    with failing_as(f"reading {path}"):
        stored = core().read_model(str(path))
        wanted = {}
        for parameter in stored.inputs:
            names = set(parameter.get_names()) & set(shapes)
            if names:
                wanted[parameter] = list(shapes[names.pop()])
        stored.reshape(wanted)
        _name_by_tensors(stored)
    return OpenVINOExecutable(stored, choice)


def _name_by_tensors(model: Any) -> None:
    """Inputs and outputs of foreign files are known by their tensors' names."""
    for node in (*model.get_parameters(), *model.get_results()):
        port = node.output(0) if node.get_type_name() == "Parameter" else node.input_value(0)
        names = sorted(port.get_names(), key=lambda name: (len(name), name))
        if names and node.get_friendly_name() not in names:
            node.set_friendly_name(names[0])


def check_choice(choice: BuildChoice) -> None:
    """Refuse a device or a precision that is not here."""
    if choice.device not in _DEVICES:
        raise ConfigError(
            f"openvino: device {choice.device!r}, wanted one of {sorted(_DEVICES)}; use another "
            "backend for that device"
        )
    if choice.precision == "bf16" and "BF16" not in capabilities(choice.device):
        raise BackendError(
            f"openvino: precision bf16, but this device computes in {capabilities()}; use f32"
        )


def _compile(stored: Any, choice: BuildChoice, extra: Mapping[str, Any] | None = None) -> Any:
    model = _expanded(stored)
    options = {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "INFERENCE_NUM_THREADS": choice.threads,
        "INFERENCE_PRECISION_HINT": choice.precision,
        **options_around(model, choice),
        **(extra or {}),
    }
    with failing_as("compiling the model"):
        return core().compile_model(model, _DEVICES[choice.device], options)


def _expanded(stored: Any) -> Any:
    """The stored model with weight-only integers as float32 constants; itself without any."""
    if not any(_is_weight_only(node) for node in stored.get_ops()):
        return stored
    model = stored.clone()
    for node in model.get_ops():
        if _is_weight_only(node):
            codes = node.input_value(0).get_node().input_value(0).get_node()
            scale = node.input_value(1).get_node()
            values = op.constant(np.multiply(codes.data, scale.data, dtype=np.float32))
            values.set_friendly_name(node.get_friendly_name())
            for reader in list(node.output(0).get_target_inputs()):
                reader.replace_source_output(values.output(0))
    return model


def _is_weight_only(node: Any) -> bool:
    return node.get_type_name() == "Multiply" and bool(
        node.get_friendly_name().endswith(f"/{WEIGHT_ONLY}")
    )


def _sizes(parameter: Any) -> tuple[int, ...]:
    return tuple(
        size.get_length() if size.is_static else _OPEN
        for size in parameter.get_output_partial_shape(0)
    )


def _fits(found: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    return len(found) == len(wanted) and all(
        w in (_OPEN, f) for f, w in zip(found, wanted, strict=True)
    )


def _dtype(parameter: Any) -> "np.dtype[Any]":
    dtype: np.dtype[Any] = np.dtype(parameter.get_output_element_type(0).to_dtype())
    return dtype


def _warmed(request: Any, calls: Sequence[Mapping[int, Any]]) -> tuple[int, float]:
    """Run until caches and clock have settled; how many runs that took, and how long one takes."""
    first = FEWEST_WARM * len(calls)
    spent, _ = _node_totals(request, calls, first, first)
    rest = warm_runs(spent / first) * len(calls) - first
    if rest:
        spent, _ = _node_totals(request, calls, rest, first + rest)
    return first + rest, spent / (rest or first)


def _node_totals(
    request: Any, calls: Sequence[Mapping[int, Any]], more: int, runs: int
) -> tuple[float, dict[str, float]]:
    """Milliseconds that ``more`` runs take, and by runtime node over all ``runs`` so far.

    OpenVINO gives the average over all runs so far, cut to whole microseconds, and calls a node
    whose average is cut to 0 "not run", so that its status tells nothing.
    """
    start = time.perf_counter()
    for index in range(more):
        request.infer(calls[index % len(calls)], share_inputs=True, share_outputs=True)
    spent = (time.perf_counter() - start) * 1e3
    return spent, {
        info.node_name: info.real_time.total_seconds() * 1e3 * runs
        for info in request.get_profiling_info()
    }


def _warm_ms(totals: Sequence[float], marks: Sequence[int]) -> float:
    """Time of one warm run, from a node's totals after ``marks`` runs.

    The mean, unless it is above the median of the blocks by more than the counters' cut explains:
    then something else ran on these cores during a block.
    """
    pairs = zip(pairwise(totals), pairwise(marks), strict=True)
    blocks = [(after - before) / (last - first) for (before, after), (first, last) in pairs]
    mean = (totals[-1] - totals[0]) / (marks[-1] - marks[0])
    middle = median(blocks)
    cut = marks[-1] * _MICROSECOND / (marks[1] - marks[0])
    found = middle if mean - middle > cut else mean
    return found + _MICROSECOND / 2 if found > 0 else 0.0  # what a cut takes away on average


def _runtime_names(compiled: Any) -> dict[str, tuple[str, bool]]:
    """Runtime node -> graph node and True, from the names of the layers that were fused into it.

    What comes from no graph node (reorders, what OpenVINO's own passes made) goes by its kind,
    and False: its own name counts what the process has built so far.
    """
    names = {}
    for node in compiled.get_runtime_model().get_ordered_ops():
        info = node.get_rt_info()
        source = source_name(_text(info, "originalLayersNames")) or _reader_of_codes(node)
        kind = _text(info, "layerType") or str(node.get_type_name())
        names[node.get_friendly_name()] = (source or kind, source is not None)
    return names


def _reader_of_codes(node: Any) -> str | None:
    """The graph node whose stored codes a runtime node reads.

    An int8 product whose bias was moved is called after a multiplication of OpenVINO's own passes.
    """
    sources = (
        node.input_value(i).get_node().get_friendly_name() for i in range(node.get_input_size())
    )
    return next((n.removesuffix(CODES) for n in sources if n.endswith(CODES)), None)


def _text(info: Any, key: str) -> str:
    value = info[key] if key in info else ""  # noqa: SIM401 - an RTMap has no get
    return str(getattr(value, "value", value))
