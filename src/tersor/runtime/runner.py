"""Runs a built model as if it were the original: any batch, the caller's containers and types.

A build has one batch size. The runner cuts the caller's batch into chunks of it, fills the last
one by repeating its last row, and trims what comes back; rows must not influence each other,
which is what a batch means. Other sizes (lengths, heights) must be those of the build, unless the
executable takes any.
"""

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np

from tersor.artifact.manifest import Ranges
from tersor.core.errors import BackendError, ConfigError, DataError, GuardError, ShapeError
from tersor.core.records import Signature, TensorSpec
from tersor.core.structure import bind, places, unflatten
from tersor.graph.shapes import built_sizes, sizes_of
from tersor.runtime.guards import Array, Guards, guard_arrays
from tersor.runtime.nan import spread_nan
from tersor.runtime.tensors import Origin, batch_dim, from_array, origin_of, to_array


@runtime_checkable
class Executable(Protocol):
    """What is run: arrays by name in and out, at the built shapes.

    The part of ``graph.contracts.Executable`` that running needs, without torch. The arrays
    that ``run`` returns are the caller's: the next call does not overwrite them. One that takes
    any size that the signature leaves open has an attribute ``is_dynamic`` that is true.
    """

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """One call."""
        ...


class Runner:
    """Callable like the original model.

    Args:
        executable: The built model.
        signature: The original's calling convention.
        built_batch: Rows that one call of the executable takes.
        guards: What to check beyond shapes and types; None: nothing.
        ranges: Ranges for the guards; and which outputs become NaN by which inputs, with guards or
            without.
        clock: Nanoseconds, for the counters.

    Calls may come from several threads; they run one after the other.

    Raises:
        DataError: Arguments that do not fit the signature, batches or other sizes that disagree,
            or a size that the model was not built for.
        GuardError: A guard with policy ``reject`` found something.
        ShapeError: An output without a batch dimension differs between chunks.
        BackendError: The executable gave other outputs than the signature declares.
    """

    def __init__(
        self,
        executable: Executable,
        signature: Signature,
        built_batch: int,
        guards: Guards | None = None,
        ranges: Ranges | None = None,
        *,
        clock: Callable[[], int] = time.perf_counter_ns,
    ) -> None:
        if built_batch < 1:
            raise ConfigError(f"built_batch: found {built_batch}, wanted at least 1")
        for spec in (*signature.inputs, *signature.outputs):
            if spec.shape.count(None) > 1:
                raise ConfigError(
                    f"tensor {spec.name!r}: shape {spec.shape} has more than one batch dimension, "
                    "so its rows are no samples of their own; return only outputs of one row a "
                    "sample from forward()"
                )
        self.executable = executable
        self.signature = signature
        self.built_batch = built_batch
        self.guards = guards
        self.ranges = ranges or Ranges()
        self._clock = clock
        self._lock = threading.Lock()
        self._places = places(signature)
        self._counts = dict.fromkeys(
            ("calls", "samples", "chunks", "rejected", "clamped", "padded_rows"), 0
        )
        self._total_ns = 0
        self._last_ns = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model on a batch of any size; the result is nested as the original's."""
        with self._lock:
            start = self._clock()
            leaves = bind(self.signature, args, kwargs)
            origin = origin_of(leaves)
            specs = self.signature.inputs
            given = zip(specs, leaves, self._places, strict=True)
            inputs = {spec.name: to_array(leaf, spec, place) for spec, leaf, place in given}
            n = _batch_size(inputs, specs)
            self._check_sizes(inputs)
            outputs = self._run_guarded(inputs, n)
            result = self._pack(outputs, origin)
            self._last_ns = self._clock() - start
            self._total_ns += self._last_ns
            self._counts["calls"] += 1
            self._counts["samples"] += 1 if n is None else n
        return result

    def stats(self) -> dict[str, int | float]:
        """Counters since the runner was made.

        ``calls`` that gave a result, their ``samples``, ``chunks`` that the executable ran,
        calls ``rejected`` by a guard, values ``clamped``, ``padded_rows``, ``total_ms`` and
        ``last_ms`` of the calls that gave a result.
        """
        with self._lock:
            return {
                **self._counts,
                "total_ms": self._total_ns / 1e6,
                "last_ms": self._last_ns / 1e6,
            }

    @property
    def _is_dynamic(self) -> bool:
        return bool(getattr(self.executable, "is_dynamic", False))

    def _check_sizes(self, inputs: Mapping[str, Array]) -> None:
        """One symbol is one size, and the built one where the build has only that."""
        found = sizes_of(self.signature, {name: a.shape for name, a in inputs.items()})
        if self._is_dynamic:
            return
        for symbol, built in built_sizes(self.signature).items():
            if found[symbol] != built:
                spec = next(s for s in self.signature.inputs if symbol in s.dynamic)
                raise DataError(
                    f"input {spec.name!r}: found size {found[symbol]} in dimension "
                    f"{spec.dynamic.index(symbol)} ({symbol}), but this build has {built}; pad or "
                    f"crop to {built}, or build for that size"
                )

    def _run_guarded(self, inputs: dict[str, Array], n: int | None) -> dict[str, Array]:
        try:
            inputs = self._guard(inputs, "input")
            outputs = self._none(inputs) if n == 0 else self._run(inputs, n)
            outputs = spread_nan(inputs, outputs, self.signature, self.ranges.spreads)
            return self._guard(outputs, "output")
        except GuardError:
            self._counts["rejected"] += 1
            raise

    def _guard(self, arrays: dict[str, Array], where: str) -> dict[str, Array]:
        if self.guards is None:
            return arrays
        ranges = self.ranges.inputs if where == "input" else self.ranges.outputs
        arrays, changed = guard_arrays(arrays, ranges, self.guards, where)
        self._counts["clamped"] += changed
        return arrays

    def _run(self, inputs: dict[str, Array], n: int | None) -> dict[str, Array]:
        if n is None:
            return self._call(inputs, self.built_batch)
        parts: list[dict[str, Array]] = []
        for start in range(0, n, self.built_batch):
            kept = min(self.built_batch, n - start)
            chunk = {
                spec.name: _chunk(inputs[spec.name], spec, start, self.built_batch)
                for spec in self.signature.inputs
            }
            parts.append(self._call(chunk, kept))
            self._counts["padded_rows"] += self.built_batch - kept
        return {
            spec.name: _join([part[spec.name] for part in parts], spec)
            for spec in self.signature.outputs
        }

    def _none(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs of an empty batch; their open sizes are known from a run on zeros."""
        empty = _empty(self.signature.outputs)
        if not any(spec.dynamic for spec in self.signature.outputs):
            return empty
        rows = {}
        for spec in self.signature.inputs:
            shape = list(inputs[spec.name].shape)
            shape[batch_dim(spec) or 0] = self.built_batch
            rows[spec.name] = np.zeros(shape, spec.carrier)
        return self._call(rows, 0)

    def _call(self, inputs: Mapping[str, Array], kept: int) -> dict[str, Array]:
        """One call of the executable; the first ``kept`` rows of each output."""
        raw = self.executable.run(inputs)
        self._counts["chunks"] += 1
        outputs = {}
        for spec in self.signature.outputs:
            if spec.name not in raw:
                raise BackendError(
                    f"the build gave outputs {sorted(raw)}, wanted {spec.name!r} among them; "
                    "it does not belong to this model"
                )
            array = np.asarray(raw[spec.name])
            shape = tuple(self.built_batch if s is None else s for s in spec.shape)
            if self._is_dynamic and len(array.shape) == len(shape):
                shape = tuple(
                    found if spec.symbol(dim) else size
                    for dim, (found, size) in enumerate(zip(array.shape, shape, strict=True))
                )
            if array.shape != shape:
                raise BackendError(
                    f"output {spec.name!r}: the build gave shape {array.shape}, wanted {shape}; "
                    "it does not belong to this model"
                )
            outputs[spec.name] = _rows(array, batch_dim(spec), 0, kept)
        return outputs

    def _pack(self, outputs: Mapping[str, Array], origin: Origin) -> Any:
        leaves = [from_array(outputs[s.name], s, origin) for s in self.signature.outputs]
        return unflatten(self.signature.result, leaves)


def _batch_size(inputs: Mapping[str, Array], specs: tuple[TensorSpec, ...]) -> int | None:
    dims = {spec.name: batch_dim(spec) for spec in specs}
    sizes = {name: inputs[name].shape[dim] for name, dim in dims.items() if dim is not None}
    if len(set(sizes.values())) > 1:
        raise DataError(f"the inputs have different batch sizes {sizes}, wanted one size")
    return next(iter(sizes.values()), None)


def _rows(array: Array, dim: int | None, start: int, stop: int) -> Array:
    if dim is None:
        return array
    index = (slice(None),) * dim + (slice(start, stop),)
    return array[index]


def _chunk(array: Array, spec: TensorSpec, start: int, rows: int) -> Array:
    dim = batch_dim(spec)
    if dim is None:
        return array
    part = _rows(array, dim, start, start + rows)
    missing = rows - part.shape[dim]
    if missing:
        last = part.shape[dim] - 1
        fill = np.repeat(_rows(part, dim, last, last + 1), missing, axis=dim)
        part = np.concatenate([part, fill], axis=dim)
    return np.ascontiguousarray(part)


def _join(parts: list[Array], spec: TensorSpec) -> Array:
    dim = batch_dim(spec)
    if dim is not None:
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=dim)
    for part in parts[1:]:
        if not np.array_equal(parts[0], part, equal_nan=part.dtype.kind == "f"):
            raise ShapeError(
                f"output {spec.name!r} has no batch dimension and differs between the chunks of "
                "this batch; call with at most the built batch, or build for a larger one"
            )
    return parts[0]


def _empty(specs: tuple[TensorSpec, ...]) -> dict[str, Array]:
    for spec in specs:
        if batch_dim(spec) is None:
            raise DataError(
                f"a batch of 0 samples has no output {spec.name!r}, which has no batch dimension; "
                "pass at least one sample"
            )
    return {
        spec.name: np.empty([size or 0 for size in spec.shape], dtype=spec.carrier)
        for spec in specs
    }
