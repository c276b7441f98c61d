"""The loading half: compile, run, profile, write and read. Needs OpenVINO and NumPy only.

Two models are kept apart. The *stored* model is what ``serialize`` writes: integer weights stay
integers. The *compiled* one has weight-only integers expanded to float32, so that a smaller file
costs no time where a device's own decompression is slower than float32 arithmetic.
"""

import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray
from openvino import opset13 as op

from tersor.backends.openvino.failures import compilation_failed, reason
from tersor.backends.openvino.nodes import source_name
from tersor.core.errors import ArtifactError, BackendError, ConfigError, DataError, ShapeError
from tersor.core.jsonable import dumps
from tersor.core.records import BuildChoice

Arrays = Mapping[str, NDArray[Any]]

WEIGHT_ONLY = "weight_only"  # last part of the name of a product codes * scale to be expanded
_DEVICES = {"cpu": "CPU"}
_WARM_RUNS = 9  # of the profile: left out of its averages
_PROFILE_RUNS = 14  # counted after them
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
    """A compiled model; holds one request, so calls must not overlap."""

    def __init__(self, stored: Any, choice: BuildChoice) -> None:
        check_choice(choice)
        if stored.is_dynamic():
            raise ShapeError(
                f"openvino: inputs {[str(i.get_partial_shape()) for i in stored.inputs]} have open "
                "sizes; wanted concrete ones: call model.reshape first"
            )
        self._stored = stored
        self._choice = choice
        self._inputs = {
            p.get_friendly_name(): (i, tuple(p.get_output_shape(0)), _dtype(p))
            for i, p in enumerate(stored.get_parameters())
        }
        self._outputs = tuple(r.get_friendly_name() for r in stored.get_results())
        self._request = _compile(stored, choice).create_infer_request()
        self._last: dict[int, NDArray[Any]] | None = None

    def run(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        """One call; the outputs are the caller's own.

        Raises:
            DataError: A missing or unknown name, or another dtype.
            ShapeError: Another shape than the built one.
        """
        arrays = self._checked(inputs)
        with failing_as("running the model"):
            results = self._request.infer(arrays, share_inputs=True, share_outputs=False)
        self._last = arrays
        return {name: results[i] for i, name in enumerate(self._outputs)}

    def profile(self) -> dict[str, float]:
        """Milliseconds a warm call by graph node; glue by kind (Reorder, Transpose, ...).

        Compiles the model a second time with counters on. It runs on the inputs of the last call
        to ``run``, or on ones. A counter is a cumulative average over all runs, cut to whole
        microseconds: the cold runs are subtracted.
        """
        arrays = self._last or {
            index: np.ones(shape, dtype) for index, shape, dtype in self._inputs.values()
        }
        with failing_as("profiling the model"):
            compiled = _compile(self._stored, self._choice, {"PERF_COUNT": True})
            request = compiled.create_infer_request()
            cold = _counters(request, arrays, _WARM_RUNS)
            warm = _counters(request, arrays, _PROFILE_RUNS)
        names = _runtime_names(compiled)
        times: dict[str, float] = {}
        total = _WARM_RUNS + _PROFILE_RUNS
        for node, average in warm.items():
            spent = (average * total - cold.get(node, 0.0) * _WARM_RUNS) / _PROFILE_RUNS
            name = names.get(node, node)
            times[name] = times.get(name, 0.0) + max(spent, 0.0)
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

    def _checked(self, inputs: Arrays) -> dict[int, NDArray[Any]]:
        if inputs.keys() != self._inputs.keys():
            raise DataError(
                f"openvino: found inputs {sorted(inputs)}, wanted {sorted(self._inputs)}"
            )
        arrays = {}
        for name, (index, shape, dtype) in self._inputs.items():
            array = inputs[name]
            if array.shape != shape:
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
    options = {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "INFERENCE_NUM_THREADS": choice.threads,
        "INFERENCE_PRECISION_HINT": choice.precision,
        **(extra or {}),
    }
    with failing_as("compiling the model"):
        return core().compile_model(_expanded(stored), _DEVICES[choice.device], options)


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


def _dtype(parameter: Any) -> "np.dtype[Any]":
    dtype: np.dtype[Any] = np.dtype(parameter.get_output_element_type(0).to_dtype())
    return dtype


def _counters(request: Any, arrays: Mapping[int, Any], runs: int) -> dict[str, float]:
    """Average milliseconds by runtime node since the request was made."""
    for _ in range(runs):
        request.infer(arrays, share_inputs=True, share_outputs=True)
    return {
        info.node_name: info.real_time.total_seconds() * 1e3
        for info in request.get_profiling_info()
        if info.status == info.Status.EXECUTED
    }


def _runtime_names(compiled: Any) -> dict[str, str]:
    """Runtime node -> graph node, from the names of the layers that were fused into it.

    What comes from no graph node (reorders, what OpenVINO's own passes made) goes by its kind:
    its own name counts what the process has built so far.
    """
    names = {}
    for node in compiled.get_runtime_model().get_ordered_ops():
        info = node.get_rt_info()
        source = source_name(_text(info, "originalLayersNames"))
        kind = _text(info, "layerType") or str(node.get_type_name())
        names[node.get_friendly_name()] = kind if source is None else source
    return names


def _text(info: Any, key: str) -> str:
    value = info[key] if key in info else ""  # noqa: SIM401 - an RTMap has no get
    return str(getattr(value, "value", value))
