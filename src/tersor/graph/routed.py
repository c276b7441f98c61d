"""One model, compiled for a few sizes and for all others: each call goes to the build that fits.

Plain Python and NumPy: what runs an artifact needs it, too.

A size that is padded to a bucket is filled with zeros at its end, in every input that has the
symbol: ids become id 0, a mask becomes "not there", values become 0. Outputs are cut back where a
dimension follows the symbol. That this changes nothing was proven where the choice was made
(``build.padding``), and every bucket is compared with the graph when it is built.
"""

from collections import Counter, deque
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tersor.core.errors import ConfigError
from tersor.core.records import Bucket, BuildChoice, Signature, TensorSpec
from tersor.graph.shapes import Sizes, built_sizes, input_shapes, sizes_of

Arrays = Mapping[str, NDArray[Any]]
_RECENT = 24  # calls whose mix of sizes a profile is of


def unpaddable(signature: Signature) -> str:
    """Why inputs of a model can't be padded and its outputs cut back; "" where they can."""
    symbols = built_sizes(signature)
    if len(symbols) != 1:
        return f"{len(symbols)} sizes vary ({', '.join(sorted(symbols))}), wanted one"
    for spec in signature.outputs:
        for dim, symbol in enumerate(spec.dynamic):
            if symbol and symbol not in symbols:
                return (
                    f"dimension {dim} of output {spec.name!r} is {symbol}, wanted a size that is "
                    f"fixed or {next(iter(symbols))} itself"
                )
    return ""


def routed(open_build: Any, signature: Signature, choice: BuildChoice) -> Any:
    """The executable of a choice, from the one with open sizes; itself where the choice is open.

    Raises:
        ConfigError: Buckets that do not fit the signature, or a backend without single sizes.
        DataError: A bucket's size that the graph can't take.
        BackendError: A bucket that the backend can't compile.
    """
    return open_build if choice.shapes == "open" else Routed(open_build, signature, choice)


class Routed:
    """Builds for some sizes beside one for all (``graph.contracts.Reshapable``, here without torch).

    Calls must not overlap.

    All are compiled at once, so that no later call waits for a compiler; each keeps packed weights
    of its own in memory. A file holds the model once.

    Attributes:
        is_dynamic: Any size that the signature leaves open is taken.
    """

    is_dynamic = True

    def __init__(self, open_build: Any, signature: Signature, choice: BuildChoice) -> None:
        _check(open_build, signature, choice)
        self._signature = signature
        self._buckets = choice.buckets
        self._open = open_build
        self._builds = [
            open_build.at(input_shapes(signature, choice.batch, bucket.sizes))
            for bucket in choice.buckets
        ]
        self._recent: deque[int] = deque(maxlen=_RECENT)

    def run(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        """One call; the outputs are the caller's own."""
        sizes = sizes_of(self._signature, {name: a.shape for name, a in inputs.items()})
        index = self.route(sizes)
        self._recent.append(index)
        if index < 0:
            return dict(self._open.run(inputs))
        bucket = self._buckets[index]
        if all(sizes[s] == size for s, size in bucket.sizes.items()):
            return dict(self._builds[index].run(inputs))
        padded = {s.name: _padded(inputs[s.name], s, bucket) for s in self._signature.inputs}
        outputs = self._builds[index].run(padded)
        return {s.name: _cut(outputs[s.name], s, sizes) for s in self._signature.outputs}

    def route(self, sizes: Sizes) -> int:
        """Position of the bucket that a call of these sizes goes to; -1: the open build."""
        takers = (i for i, bucket in enumerate(self._buckets) if bucket.takes(sizes))
        return next(takers, -1)

    def profile(self) -> dict[str, float]:
        """Milliseconds a call by graph node, in the mix of the last few calls.

        Raises:
            DataError: Nothing was run yet.
        """
        counts = Counter(self._recent) or Counter({-1: 1})
        times: dict[str, float] = {}
        for index, count in sorted(counts.items()):
            build = self._open if index < 0 else self._builds[index]
            for node, ms in build.profile().items():
                times[node] = times.get(node, 0.0) + ms * count / counts.total()
        return times

    def serialize(self) -> dict[str, bytes]:
        """The sections of the open build: a reader compiles the others from it."""
        return dict(self._open.serialize())


def _check(open_build: Any, signature: Signature, choice: BuildChoice) -> None:
    symbols = set(built_sizes(signature))
    for bucket in choice.buckets:
        if set(bucket.sizes) != symbols:
            raise ConfigError(
                f"{choice.describe()}: found a bucket of {dict(bucket.sizes)}, wanted a size for "
                f"each of {sorted(symbols)}, which the model leaves open; choose shapes=open, or "
                "compress this model again"
            )
    reason = unpaddable(signature) if any(b.pads for b in choice.buckets) else ""
    if reason:
        raise ConfigError(f"{choice.describe()}: {reason}; choose shapes=exact or open")
    if not hasattr(open_build, "at"):
        raise ConfigError(
            f"{choice.describe()}: {choice.backend} makes no builds of single sizes; choose "
            "shapes=open"
        )


def _padded(array: NDArray[Any], spec: TensorSpec, bucket: Bucket) -> NDArray[Any]:
    """Zeros at the end of every dimension with a symbol, up to the bucket's sizes."""
    shape = tuple(bucket.sizes.get(spec.symbol(dim), n) for dim, n in enumerate(array.shape))
    if shape == array.shape:
        return array
    filled = np.zeros(shape, array.dtype)
    filled[tuple(slice(n) for n in array.shape)] = array
    return filled


def _cut(array: NDArray[Any], spec: TensorSpec, sizes: Sizes) -> NDArray[Any]:
    """The part of an output that the call's own sizes have."""
    if not spec.dynamic:
        return array
    kept = (slice(sizes.get(symbol)) for symbol in spec.dynamic)
    return np.ascontiguousarray(array[tuple(kept)])
