"""Where a fit may begin: behind all that it has in common with an earlier one.

The plans of a search differ in a few widths, and fits go front to back: in front of the first difference the values
of both graphs and the fitted weights are the same. A few states of each run are kept, under keys that are made of
everything that was read on the way there, and a later run goes on from the last one that it shares.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Values = Mapping[str, Any]  # node name -> value

SEGMENTS = 12  # of a run, each with one state
MOST_BYTES = 1 << 30  # of all states together


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitted:
    """One fit: the calls of a weight, what was found for it, and its share of lost variance."""

    calls: tuple[str, ...]
    weight: Tensor
    bias: Tensor
    loss: float


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """A run behind one of its steps.

    Attributes:
        original, new: Of each batch the values that something needs later, without stored tensors, which
            belong to a run.
        dirty: Other nodes of the new graph whose values differ from the original's.
        fitted: All fits so far.
    """

    original: tuple[Values, ...]
    new: tuple[Values, ...]
    dirty: frozenset[str]
    fitted: tuple[Fitted, ...]

    def tensors(self) -> Iterator[Tensor]:
        """Everything that it holds."""
        for values in (*self.original, *self.new):
            yield from _tensors(values)
        for found in self.fitted:
            yield from (found.weight, found.bias)


def held_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors, each storage once."""
    found = (t.untyped_storage() for t in tensors)
    return sum({s.data_ptr(): s.nbytes() for s in found}.values())


def _tensors(values: Values) -> Iterator[Tensor]:
    for value in values.values():
        parts = value if isinstance(value, tuple | list) else (value,)
        yield from (part for part in parts if isinstance(part, Tensor))


@dataclass
class Prefixes:
    """States of the fits of one model on one set of batches; the least used go first.

    Args:
        most_bytes: Of all states together, at most.
    """

    most_bytes: int = MOST_BYTES
    _kept: OrderedDict[str, State] = field(default_factory=OrderedDict)

    def __len__(self) -> int:
        return len(self._kept)

    def clear(self) -> None:
        """Let go of all of them."""
        self._kept.clear()

    def latest(
        self, keys: Sequence[str], suits: Callable[[int, State], bool]
    ) -> tuple[int, State] | None:
        """The last step whose state is kept and has all that the steps behind it read."""
        for i in range(len(keys) - 1, -1, -1):
            state = self._kept.get(keys[i])
            if state is not None and suits(i, state):
                self._kept.move_to_end(keys[i])
                return i, state
        return None

    def keep(self, key: str, state: State) -> None:
        """Keep a state, unless it takes more than a twelfth of what all may take."""
        if key in self._kept or held_bytes(state.tensors()) > self.most_bytes // SEGMENTS:
            return
        self._kept[key] = state
        while held_bytes(t for s in self._kept.values() for t in s.tensors()) > self.most_bytes:
            self._kept.popitem(last=False)


@dataclass
class Segments:
    """Of each segment of a run the state that holds the least."""

    prefixes: Prefixes
    keys: Sequence[str]
    _best: tuple[int, int, State] | None = None  # bytes, step

    def offer(self, step: int, live: Iterable[Values], state: Callable[[], State]) -> None:
        """A state behind a step; kept at the end of its segment if no other one holds less."""
        size = held_bytes(t for values in live for t in _tensors(values))
        if self._best is None or size < self._best[0]:
            self._best = size, step, state()
        steps = len(self.keys)
        if (step + 1) * SEGMENTS // steps > step * SEGMENTS // steps:
            _, place, found = self._best
            self.prefixes.keep(self.keys[place], found)
            self._best = None


class Chain:
    """Keys of the steps of a run: each of everything that was read up to there."""

    def __init__(self, *start: object) -> None:
        self._running = hashlib.sha1(repr(start).encode(), usedforsecurity=False)
        # With the tensor: while it is there nothing else can stand at its address.
        self._known: dict[tuple[Any, ...], tuple[bytes, Tensor]] = {}
        self.keys: list[str] = []

    def add(self, *read: object) -> None:
        """One step, with what it reads: tensors by their values, all else as it is written."""
        for part in read:
            self._running.update(
                self._of_tensor(part) if isinstance(part, Tensor) else repr(part).encode()
            )
        self.keys.append(self._running.hexdigest())

    def _of_tensor(self, tensor: Tensor) -> bytes:
        key = tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()
        if key not in self._known:
            data: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            found = hashlib.sha1(data, usedforsecurity=False)
            found.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
            self._known[key] = found.digest(), tensor
        return self._known[key][0]
