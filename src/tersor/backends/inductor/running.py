"""How a built module is called: plain or recorded on a device, and the buffers around it."""

import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tersor.backends.inductor.host import family
from tersor.core.errors import BackendError, TersorError
from tersor.graph import tf32 as switches

Call = Callable[..., Sequence[Tensor]]
_WARM = 3  # calls before a recording: libraries allocate their workspaces, kernels are chosen
_SHOWN = 400  # characters of an error


@contextmanager
def failing_as(doing: str, device: str) -> Iterator[None]:
    """Torch and its compiler raise many types; name what was being done, leave the card clean.

    Raises:
        BackendError: Whatever happened.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        traceback.clear_frames(error.__traceback__)  # they hold what was computed so far
        release(device)
        raise BackendError(
            f"inductor: {doing} ran out of memory on {device}: {_short(error)}; use a smaller batch, "
            "or free the device"
        ) from None
    except TersorError:
        raise
    except Exception as error:  # the compiler's have no common type
        release(device)
        raise BackendError(
            f"inductor: {doing} failed on {device}: {_short(error)}. Try another mode or backend"
        ) from error


def _short(error: BaseException) -> str:
    """Beginning and end: a compiler in a process of its own says the cause last."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN // 2]} ... {text[-_SHOWN // 2 :]}"


def release(device: str) -> None:
    """Give memory that nothing uses back to the device."""
    if family(device) == "cuda" and torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def set_up(device: str, threads: int, *, tf32: bool) -> Iterator[None]:
    """Torch's own switches for one call or build, put back afterwards."""
    if family(device) == "cpu":
        before = torch.get_num_threads()
        if before == threads:
            yield
            return
        torch.set_num_threads(threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)
        return
    with switches.tf32(enabled=tf32), torch.cuda.device(device):
        yield


class Recorded:
    """A call recorded as a CUDA graph: fixed inputs and outputs, memory of its own.

    The pool belongs to this recording alone, so that builds for other batches never write into it.
    """

    def __init__(self, call: Call, example: Sequence[Tensor], device: str) -> None:
        self.inputs = [torch.empty_like(t).copy_(t) for t in example]
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(_WARM):
                call(*self.inputs)
        torch.cuda.current_stream(device).wait_stream(stream)
        torch.cuda.synchronize(device)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=torch.cuda.graph_pool_handle()):
            self._outputs = [t.contiguous() for t in call(*self.inputs)]

    def __call__(self, *inputs: Tensor) -> Sequence[Tensor]:
        """Replays; the outputs are overwritten by the next call."""
        for fixed, given in zip(self.inputs, inputs, strict=True):
            if given is not fixed:
                fixed.copy_(given, non_blocking=True)
        self._graph.replay()
        return self._outputs


@dataclass(slots=True)
class _Slot:
    """Pinned buffers of one call in flight, by shape."""

    inputs: dict[tuple[int, tuple[int, ...]], Tensor]
    outputs: dict[tuple[int, tuple[int, ...]], Tensor]


class Staging:
    """Arrays to a device and back through pinned buffers, asynchronously; two sets take turns.

    A set is free again when the call that used it has been waited for, which ``fetch`` does.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self._slots = (_Slot({}, {}), _Slot({}, {}))
        self._turn = 0

    def upload(self, arrays: Sequence[NDArray[Any]]) -> list[Tensor]:
        """The arrays on the device; the copies may still be under way on its stream."""
        self._turn = 1 - self._turn
        slot, found = self._slots[self._turn], []
        for i, array in enumerate(arrays):
            source = torch.from_numpy(_readable(array))
            pinned = self._buffer(slot.inputs, i, source)
            pinned.copy_(source)
            found.append(pinned.to(self.device, non_blocking=True))
        return found

    def fetch(self, tensors: Sequence[Tensor]) -> list[NDArray[Any]]:
        """Arrays of the caller's own; waits for the device."""
        slot, found = self._slots[self._turn], []
        for i, tensor in enumerate(tensors):
            pinned = self._buffer(slot.outputs, i, tensor)
            found.append(pinned.copy_(tensor, non_blocking=True))
        torch.cuda.current_stream(self.device).synchronize()
        return [np.array(t.numpy()) for t in found]

    def _buffer(
        self, known: dict[tuple[int, tuple[int, ...]], Tensor], index: int, like: Tensor
    ) -> Tensor:
        key = index, tuple(like.shape)
        if key not in known:
            known[key] = torch.empty(like.shape, dtype=like.dtype, pin_memory=True)
        return known[key]


class ResidentCall:
    """A call whose inputs lie on the device (``timing.device.SelfTimed``)."""

    def __init__(self, call: Call, inputs: Sequence[Tensor], device: str) -> None:
        self._call, self._inputs, self._device = call, tuple(inputs), device

    def __call__(self) -> object:
        """One call, waited for."""
        outputs = self._call(*self._inputs)
        torch.cuda.current_stream(self._device).synchronize()
        return outputs

    def timed_ms(self) -> float:
        """Between two events on the device's stream."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        stream = torch.cuda.current_stream(self._device)
        start.record(stream)
        self._call(*self._inputs)
        end.record(stream)
        end.synchronize()
        return float(start.elapsed_time(end))


def on_cpu(arrays: Sequence[NDArray[Any]]) -> list[Tensor]:
    """Arrays as tensors; they share memory where they can."""
    return [torch.from_numpy(_readable(array)) for array in arrays]


def _readable(array: NDArray[Any]) -> NDArray[Any]:
    """Torch wants arrays in C order that may be written to, though nothing here does."""
    plain = np.ascontiguousarray(array).reshape(array.shape)
    return plain if plain.flags.writeable else plain.copy()


def median_ms(call: Callable[[], object], device: str, runs: int) -> float:
    """Median time of one call, by events on a GPU and by the clock elsewhere."""
    times = []
    for _ in range(runs):
        if family(device) == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            end.synchronize()
            times.append(float(start.elapsed_time(end)))
        else:
            before = time.perf_counter_ns()
            call()
            times.append((time.perf_counter_ns() - before) / 1e6)
    return float(np.median(times))


__all__ = [
    "Recorded",
    "ResidentCall",
    "Staging",
    "failing_as",
    "median_ms",
    "on_cpu",
    "set_up",
]
