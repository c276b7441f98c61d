"""The loading half: compile, run, profile, write and read. Needs ONNX Runtime and NumPy only.

A model is kept as its structure and one block of constants beside it, so that an artifact stores
each weight once. Weight-only integers are expanded to float32 by constant folding when a session
starts.
"""

import json
import tempfile
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from tersor.core.errors import ArtifactError, BackendError, DataError, ShapeError
from tersor.core.jsonable import dumps
from tersor.core.records import OUTSIDE, BuildChoice
from tersor.timing.profiles import BLOCKS, FEWEST_WARM, block_runs, warm_runs

Arrays = Mapping[str, NDArray[Any]]

_SECTIONS = ("model.onnx", "model.bin", "tensors.json", "segments.json")
_MIX = 8  # calls of different sizes that a profile runs again
_ERROR = 3  # severity: warnings about what can't be fused fill the screen
_KERNEL = "_kernel_time"
_CONVOLUTIONS = ("Conv", "FusedConv")
_KINDS = "fiub"  # of dtypes: numbers and booleans
# Where tensors are looked for that no constant stands for: nowhere, whatever an artifact says.
_FOLDER, _NOWHERE = "session.model_external_initializers_file_folder_path", "/dev/null/nowhere"
# It rounds float weights to 8 bits, one scale a tensor, wherever their data is quantised.
_DISABLED = ["WeightBiasQuantization"]
_SHOWN = 400  # characters of a foreign message
_DTYPES = {
    "tensor(float)": np.float32, "tensor(double)": np.float64, "tensor(float16)": np.float16,
    "tensor(int64)": np.int64, "tensor(int32)": np.int32, "tensor(int16)": np.int16,
    "tensor(int8)": np.int8, "tensor(uint8)": np.uint8, "tensor(bool)": np.bool_,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Constant:
    """One tensor in the block."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class Stored:
    """A model whose large constants lie in a block.

    Attributes:
        structure: The ONNX model; its large tensors refer to ``model.bin``.
        sources: Name of an output of the model -> the graph node that makes it.
        fused: Activation -> the convolution in front of it, both as graph nodes: fused, they go by the
            activation's name, and nearly all of the time is the convolution's.
    """

    structure: bytes
    block: bytes
    constants: tuple[Constant, ...]
    sources: Mapping[str, str] = field(default_factory=dict)
    fused: Mapping[str, str] = field(default_factory=dict)


class ONNXRuntimeExecutable:
    """A session; calls must not overlap.

    Attributes:
        is_dynamic: Sizes beyond the batch differ from call to call.
    """

    def __init__(
        self,
        stored: Stored,
        choice: BuildChoice,
        *,
        sizes: Mapping[str, int] | None = None,
        values: Sequence[Any] | None = None,
    ) -> None:
        """Start a session.

        Args:
            stored: The model.
            choice: Threads.
            sizes: Name of an open size in the model -> the one that is built.
            values: The constants of another session of the same model, to be shared with it.
        """
        self._stored, self._choice, self._fixed = stored, choice, dict(sizes or {})
        values = _values(stored) if values is None else values
        self._session = _session(stored, choice, values=values, sizes=self._fixed)
        self._inputs = {i.name: (_sizes(i), _dtype(i)) for i in self._session.get_inputs()}
        if any(None in shape[:1] for shape, _ in self._inputs.values()):
            raise ShapeError(
                f"onnxruntime: inputs {[i.shape for i in self._session.get_inputs()]} have open "
                "sizes in dimension 0, the batch; wanted a concrete one"
            )
        self.is_dynamic = any(None in shape for shape, _ in self._inputs.values())
        self._shared = values if self.is_dynamic else None  # by the sessions of single sizes
        self._outputs = [o.name for o in self._session.get_outputs()]
        self._recent: deque[dict[str, NDArray[Any]]] = deque(maxlen=_MIX if self.is_dynamic else 1)

    def run(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        """One call; the outputs are the caller's own.

        Raises:
            DataError: A missing or unknown name, or another dtype.
            ShapeError: Another shape than the built one.
        """
        arrays = self._checked(inputs)
        results = _called(self._session, self._outputs, arrays)
        self._recent.append(arrays)
        return dict(zip(self._outputs, results, strict=True))

    def at(self, shapes: Mapping[str, tuple[int, ...]]) -> "ONNXRuntimeExecutable":
        """The same model in a session for one shape an input; constants are shared.

        Raises:
            BackendError: ONNX Runtime can't take the shapes.
            ShapeError: Two sizes for what the model knows as one.
        """
        sizes: dict[str, int] = {}
        for value in self._session.get_inputs():
            for name, size in zip(value.shape, shapes[value.name], strict=True):
                if isinstance(name, str) and sizes.setdefault(name, size) != size:
                    raise ShapeError(
                        f"onnxruntime: input {value.name}: found size {size} where another input "
                        f"has {sizes[name]}, wanted one size: the model knows both as {name!r}"
                    )
        return ONNXRuntimeExecutable(self._stored, self._choice, sizes=sizes, values=self._shared)

    def profile(self) -> dict[str, float]:
        """Milliseconds a warm call by graph node; glue by kind (Reorder, Transpose, ...).

        What a call takes outside of all nodes is ``OUTSIDE``.

        Starts a second session with the profiler on. It runs on the inputs of the last call to
        ``run``, or on ones; where sizes are open, in turn on those of the last few calls.

        Raises:
            DataError: Sizes are open, and nothing was run yet.
        """
        calls = list(self._recent) or [self._ones()]
        with tempfile.TemporaryDirectory() as folder:
            prefix = str(Path(folder) / "profile")
            session = _session(self._stored, self._choice, prefix, sizes=self._fixed)

            def spent_ms(count: int) -> float:
                start = time.perf_counter()
                for index in range(count * len(calls)):
                    _called(session, self._outputs, calls[index % len(calls)])
                return (time.perf_counter() - start) * 1e3

            warm, warm_ms = FEWEST_WARM, spent_ms(FEWEST_WARM)
            warm_ms /= warm * len(calls)
            if rest := warm_runs(warm_ms) - warm:
                warm, warm_ms = warm + rest, spent_ms(rest) / (rest * len(calls))
            block = block_runs(warm_ms)
            call_ms = median(spent_ms(block) for _ in range(BLOCKS)) / (block * len(calls))
            events = json.loads(Path(session.end_profiling()).read_text())
        share = warm / (warm + BLOCKS * block)
        times: dict[str, float] = {}
        for (name, kind), spent in _by_node(events).items():
            source = self._source(name, kind)
            ms = _warm_ms(spent, share, (warm + BLOCKS * block) * len(calls))
            times[source] = times.get(source, 0.0) + ms
        times[OUTSIDE] = max(0.0, call_ms - sum(times.values()))
        return times

    def serialize(self) -> dict[str, bytes]:
        """The model, its constants, and where they lie in ``model.bin``."""
        stored = self._stored
        rows = [[c.name, c.dtype, list(c.shape), c.offset, c.size] for c in stored.constants]
        index = {"tensors": rows, "sources": dict(stored.sources), "fused": dict(stored.fused)}
        segments = sorted({(c.offset, c.size) for c in stored.constants})
        return {
            "model.onnx": stored.structure,
            "model.bin": stored.block,
            "tensors.json": dumps(index).encode(),
            "segments.json": dumps(segments).encode(),
        }

    def _source(self, name: str, kind: str) -> str:
        """The graph node of a profiled one; what comes from none goes by its kind."""
        plain = name.removeprefix("fused ")
        found, slash, _ = plain.partition("/")
        if not slash:
            outputs = [o for o in self._stored.sources if plain == o or plain.startswith(f"{o}_")]
            found = self._stored.sources[max(outputs, key=len)] if outputs else kind
        return self._stored.fused.get(found, found) if kind in _CONVOLUTIONS else found

    def _ones(self) -> dict[str, NDArray[Any]]:
        if self.is_dynamic:
            raise DataError("onnxruntime: sizes are open; run the model once before its profile")
        return {name: np.ones(shape, dtype) for name, (shape, dtype) in self._inputs.items()}  # type: ignore[arg-type]

    def _checked(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        if inputs.keys() != self._inputs.keys():
            raise DataError(
                f"onnxruntime: found inputs {sorted(inputs)}, wanted {sorted(self._inputs)}"
            )
        for name, (shape, dtype) in self._inputs.items():
            array = inputs[name]
            if not _fits(array.shape, shape):
                wanted = tuple(-1 if size is None else size for size in shape)
                raise ShapeError(
                    f"input {name}: found shape {array.shape}, wanted {wanted}, for which this "
                    "model was built; pad, or build for that shape"
                )
            if array.dtype != dtype:
                raise DataError(f"input {name}: found dtype {array.dtype}, wanted {dtype}")
        return {name: np.ascontiguousarray(array) for name, array in inputs.items()}


def load(sections: Mapping[str, bytes], choice: BuildChoice) -> ONNXRuntimeExecutable:
    """Compile what ``serialize`` gave.

    Raises:
        ArtifactError: A section is missing, or ONNX Runtime can't read it.
    """
    missing = sorted(set(_SECTIONS) - {"segments.json"} - set(sections))
    if missing:
        raise ArtifactError(
            f"onnxruntime: sections {missing} are missing, found {sorted(sections)}; write the "
            "artifact again"
        )
    try:
        index = json.loads(sections["tensors.json"])
        constants = tuple(
            Constant(str(n), str(np.dtype(t)), tuple(map(int, s)), int(o), int(z))
            for n, t, s, o, z in index["tensors"]
        )
        named = (index["sources"], index.get("fused", {}))
        sources, fused = ({str(k): str(v) for k, v in found.items()} for found in named)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ArtifactError(
            f"onnxruntime: tensors.json is no list of constants ({error}); write the artifact again"
        ) from error
    block = bytes(sections["model.bin"])
    stored = Stored(bytes(sections["model.onnx"]), block, constants, sources, fused)
    for constant in constants:
        _check_constant(constant, len(block))
    try:
        return ONNXRuntimeExecutable(stored, choice)
    except BackendError as error:
        raise ArtifactError(
            f"onnxruntime: model.onnx ({len(stored.structure)} bytes) with model.bin "
            f"({len(block)} bytes) is no model: {error}; write the artifact again"
        ) from error


def _check_constant(constant: Constant, size: int) -> None:
    count = int(np.prod(constant.shape, dtype=np.int64))
    inside = 0 <= constant.offset <= constant.offset + constant.size <= size
    dtype = np.dtype(constant.dtype)
    fits = inside and dtype.kind in _KINDS and count * dtype.itemsize == constant.size
    if min(constant.shape, default=0) < 0 or not fits:
        raise ArtifactError(
            f"onnxruntime: constant {constant.name!r} claims {constant.dtype} {constant.shape} at "
            f"[{constant.offset}, {constant.offset + constant.size}] of {size} bytes; write the "
            "artifact again"
        )


def _values(stored: Stored) -> list[Any]:
    """The constants of a model, which several sessions may share."""
    arrays = [
        np.frombuffer(stored.block, c.dtype, c.size // np.dtype(c.dtype).itemsize, c.offset)
        .reshape(c.shape)
        .copy()
        for c in stored.constants
    ]
    return [ort.OrtValue.ortvalue_from_numpy(array) for array in arrays]


def _session(
    stored: Stored,
    choice: BuildChoice,
    profile: str = "",
    *,
    values: Sequence[Any] | None = None,
    sizes: Mapping[str, int] | None = None,
) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = choice.threads
    options.inter_op_num_threads = 1
    options.log_severity_level = _ERROR
    options.add_session_config_entry(_FOLDER, _NOWHERE)
    for name, size in (sizes or {}).items():
        options.add_free_dimension_override_by_name(name, size)
    if profile:
        options.enable_profiling = True
        options.profile_file_prefix = profile
    held = list(_values(stored) if values is None else values)
    try:
        options.add_external_initializers([c.name for c in stored.constants], held)
        return ort.InferenceSession(
            stored.structure, options, ["CPUExecutionProvider"], disabled_optimizers=_DISABLED
        )
    except Exception as error:  # its exceptions have no common type of their own
        raise _failed(error, "compiling the model") from error


def _called(session: Any, outputs: list[str], arrays: Mapping[str, NDArray[Any]]) -> Any:
    try:
        return session.run(outputs, arrays)
    except Exception as error:  # its exceptions have no common type of their own
        raise _failed(error, "running the model") from error


def _failed(error: Exception, doing: str) -> BackendError:
    text = " ".join(str(error).split())[:_SHOWN]
    return BackendError(f"onnxruntime: {doing} failed: {text}. Try another backend")


def _sizes(value: Any) -> tuple[int | None, ...]:
    return tuple(size if isinstance(size, int) else None for size in value.shape)


def _fits(found: tuple[int, ...], wanted: tuple[int | None, ...]) -> bool:
    return len(found) == len(wanted) and all(
        w in (None, f) for f, w in zip(found, wanted, strict=True)
    )


def _dtype(value: Any) -> "np.dtype[Any]":
    return np.dtype(_DTYPES[value.type])


def _by_node(events: list[dict[str, Any]]) -> dict[tuple[str, str], list[float]]:
    """Microseconds of every run of each node, in order, by its name and kind."""
    found: dict[tuple[str, str], list[float]] = {}
    for event in sorted(events, key=lambda e: float(e.get("ts", 0))):
        name = str(event.get("name", ""))
        if event.get("cat") == "Node" and name.endswith(_KERNEL):
            kind = str(event.get("args", {}).get("op_name", "glue"))
            key = name.removesuffix(_KERNEL), kind
            found.setdefault(key, []).append(float(event["dur"]))
    return found


def _warm_ms(spent: list[float], cold: float, runs: int) -> float:
    """Time of one warm run: the mean of the blocks, or their median where one of them was hit.

    Args:
        spent: Microseconds of a node, in order.
        cold: The first share of them does not count.
        runs: Of the model.
    """
    each = len(spent) / runs  # a node of a loop or a branch runs more or less often
    warm = spent[round(cold * len(spent)) :]
    size = max(1, len(warm) // BLOCKS)
    blocks = [mean(warm[i : i + size]) for i in range(0, size * BLOCKS, size) if warm[i : i + size]]
    if not blocks:
        return 0.0
    middle = median(blocks)
    found = min(mean(blocks), 1.1 * middle)
    # Each time is cut to whole microseconds: half of one is lost on average.
    return (found + 0.5) * each * 1e-3 if found > 0 else 0.0
