"""Batches: what they hold, how they get to a device, and data sets that stay there.

A batch is what the caller's loader gives: a tensor, or tuples, lists, mappings and dataclasses of
them, nested; objects with a ``to`` method are moved by it.
"""

import copy
import dataclasses
from collections import Counter
from collections.abc import (
    Callable,
    Iterable,
    Iterator,
    Mapping,
    MutableMapping,
    Sequence,
)
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    RandomSampler,
    SequentialSampler,
    Subset,
    TensorDataset,
    default_collate,
)

from tersor.core.errors import DataError
from tersor.core.units import format_bytes

Signature = (
    object  # of a batch, to be compared: structure, shapes, types, and values that are no tensors
)
SAMPLERS = (SequentialSampler, RandomSampler)  # these draw an epoch's order at its start
_IMAGE_DIMS = 4
_PLAIN = (bool, int, float, str, bytes, type(None))


def map_leaves(batch: Any, change: Callable[[Any], Any]) -> Any:
    """The same structure, every leaf (what is no container) replaced by ``change(leaf)``."""
    if isinstance(batch, Tensor):
        return change(batch)
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(map_leaves(v, change) for v in batch))
    if isinstance(batch, tuple | list):
        return type(batch)(map_leaves(v, change) for v in batch)
    if isinstance(batch, Mapping):
        return _map_mapping(batch, change)
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        values = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch) if f.init}
        changed = {name: map_leaves(v, change) for name, v in values.items()}
        return dataclasses.replace(batch, **changed)
    return change(batch)


def _map_mapping(batch: Mapping[Any, Any], change: Callable[[Any], Any]) -> Any:
    changed = {key: map_leaves(value, change) for key, value in batch.items()}
    if type(batch) is dict or not isinstance(batch, MutableMapping):
        return changed
    kept = copy.copy(batch)  # a class of its own, as a tokenizer's output
    kept.update(changed)
    return kept


def leaves(batch: Any) -> list[Any]:
    """All leaves, in order."""
    found: list[Any] = []
    map_leaves(batch, found.append)
    return found


def tensors(batch: Any) -> list[Tensor]:
    """All tensors, in order."""
    return [leaf for leaf in leaves(batch) if isinstance(leaf, Tensor)]


def place(batch: Any, device: torch.device, *, channels_last: bool = False) -> Any:
    """A batch on a device; its images (4-D tensors) with channels last if asked for.

    Tensors that are there already stay the same objects. Pinned memory is copied in the background.
    """

    def move(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            moved = leaf if leaf.device == device else leaf.to(device, non_blocking=True)
            if channels_last and moved.dim() == _IMAGE_DIMS:
                return moved.contiguous(memory_format=torch.channels_last)
            return moved
        return leaf.to(device) if callable(getattr(leaf, "to", None)) else leaf

    return map_leaves(batch, move)


def signature(batch: Any) -> Signature:
    """What has to be equal for compiled or recorded work to fit another batch."""
    if isinstance(batch, Tensor):
        return tuple(batch.shape), batch.dtype
    if isinstance(batch, tuple | list):
        return type(batch), tuple(signature(v) for v in batch)
    if isinstance(batch, Mapping):
        return type(batch), tuple((key, signature(v)) for key, v in batch.items())
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        names = [f.name for f in dataclasses.fields(batch)]
        return type(batch), tuple((n, signature(getattr(batch, n))) for n in names)
    if isinstance(batch, _PLAIN):
        return type(batch), batch
    return type(batch)


def describe(batch: Any) -> str:
    """Shapes and types for people, as ``[128, 1, 28, 28] float32, [128] int64``."""
    parts = [f"{list(t.shape)} {str(t.dtype).removeprefix('torch.')}" for t in tensors(batch)]
    return ", ".join(parts) or type(batch).__name__


def size_bytes(batch: Any) -> int:
    """Bytes of its tensors."""
    return sum(t.numel() * t.element_size() for t in tensors(batch))


def equal(one: Any, other: Any) -> bool:
    """Whether two batches hold the same tensors, bit for bit, wherever they are."""
    left, right = tensors(one), tensors(other)
    return len(left) == len(right) and all(
        a.dtype == b.dtype and torch.equal(a.cpu(), b.cpu())
        for a, b in zip(left, right, strict=True)
    )


@dataclass(frozen=True, slots=True)
class Pool:
    """Some batches for the runs that are compared.

    Attributes:
        batches: As they were drawn.
        kinds: How many different signatures were met among them.
        is_static: All are alike, but for at most one (the last of an epoch, which is left out here).
    """

    batches: tuple[Any, ...]
    kinds: int
    is_static: bool


def draw_pool(source: Any, count: int, limit_bytes: float) -> Pool:
    """The first batches of a source: ``count``, or fewer where there are no more or memory ends.

    Raises:
        DataError: No iterable, one that gives its batches only once, an empty one, or batches without
            a tensor.
    """
    if not isinstance(source, Iterable) or isinstance(source, Tensor | Mapping | str):
        raise DataError(
            f"batches: found {type(source).__name__}, wanted a DataLoader or a list of batches"
        )
    if isinstance(source, Iterator):
        raise DataError(
            f"batches: found {type(source).__name__}, which gives every batch only once, so that "
            "training would miss those that tuning drew; pass the loader itself, or a list"
        )
    drawn: list[Any] = []
    used = 0
    for batch in source:
        drawn.append(batch)
        used += size_bytes(batch)
        if len(drawn) >= count or used >= limit_bytes:
            break
    if not drawn:
        raise DataError("batches: found none, wanted at least one batch")
    if not tensors(drawn[0]):
        raise DataError(
            f"batches: the first is a {type(drawn[0]).__name__} without a tensor, wanted tensors, or "
            "tuples, lists or dictionaries of them"
        )
    return _sorted_out(drawn)


def _sorted_out(drawn: Sequence[Any]) -> Pool:
    signatures = [signature(batch) for batch in drawn]
    counts = Counter(signatures)
    common, most = counts.most_common(1)[0]
    is_static = most == len(drawn) or (most == len(drawn) - 1 and most > 1)
    if is_static:
        drawn = [b for b, s in zip(drawn, signatures, strict=True) if s == common]
    return Pool(tuple(drawn), len(counts), is_static)


class Endless:
    """The batches of a source, over and over."""

    def __init__(self, source: Iterable[Any]) -> None:
        self._source = source
        self._iterator: Iterator[Any] | None = None

    def __next__(self) -> Any:
        """The next batch, or the first again behind the last."""
        if self._iterator is not None:
            batch = next(self._iterator, None)
            if batch is not None:
                return batch
        self._iterator = iter(self._source)
        return next(self._iterator)


@dataclass(frozen=True, slots=True)
class Resident:
    """Batches that are on the device, or why there are none."""

    batches: Iterable[Any] | None
    reason: str = ""


def resident(source: Iterable[Any], device: torch.device, limit_bytes: float) -> Resident:
    """The same batches, in the same order, from memory of the device.

    A list of batches is moved as it is. A DataLoader is replaced by its own sampler over the whole
    data set on the device: its data set has to be a ``TensorDataset`` (or a ``Subset`` of one), as any
    other may give another item each time (augmentation), and its collate function the default.

    Args:
        source: A list of batches, or a DataLoader.
        device: Where they should be.
        limit_bytes: What may be copied there.
    """
    if isinstance(source, Sequence):
        return _resident_list(source, device, limit_bytes)
    if not isinstance(source, DataLoader):
        return Resident(None, f"{type(source).__name__} is no DataLoader and no list of batches")
    found = _stored(source)
    if isinstance(found, str):
        return Resident(None, found)
    needed = _bytes_elsewhere(found, device)
    if needed > limit_bytes:
        return Resident(None, _too_large(needed, limit_bytes))
    return Resident(ResidentLoader(source, tuple(t.to(device) for t in found), device))


def _resident_list(source: Sequence[Any], device: torch.device, limit_bytes: float) -> Resident:
    needed = sum(_bytes_elsewhere(tensors(batch), device) for batch in source)
    if needed == 0:
        return Resident(None, f"the batches are a list and on {device} already")
    if needed > limit_bytes:
        return Resident(None, _too_large(needed, limit_bytes))
    return Resident([place(batch, device) for batch in source])


def _too_large(needed: int, limit_bytes: float) -> str:
    return f"the data takes {format_bytes(needed)}, more than the {format_bytes(limit_bytes)} that it may"


def _bytes_elsewhere(values: Iterable[Tensor], device: torch.device) -> int:
    return sum(t.numel() * t.element_size() for t in values if t.device != device)


def _stored(loader: DataLoader[Any]) -> tuple[Tensor, ...] | str:
    """The tensors of a loader's data set, or why its batches can't be made of them."""
    if loader.batch_sampler is None:
        return "the loader makes no batches (batch_size=None)"
    if loader.collate_fn is not default_collate:
        return "the loader has a collate function of its own"
    dataset: Any = loader.dataset
    picks: list[Tensor] = []
    while type(dataset) is Subset:
        picks.append(torch.as_tensor(dataset.indices))
        dataset = dataset.dataset
    if type(dataset) is not TensorDataset:
        return (
            f"the data set is a {type(dataset).__name__}, whose items may differ from one time to the "
            "next; a TensorDataset can be kept on the device"
        )
    found = tuple(dataset.tensors)
    for pick in reversed(picks):
        found = tuple(t[pick.to(t.device)] for t in found)
    return found


class ResidentLoader:
    """A DataLoader's batches, gathered on the device from the whole data set.

    The order is the loader's: its sampler is asked as the loader would ask it, with the same draws from
    the same generators.
    """

    def __init__(
        self, loader: DataLoader[Any], values: tuple[Tensor, ...], device: torch.device
    ) -> None:
        self._loader = loader
        self._values = values
        self._device = device

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[list[Tensor]]:
        # A DataLoader draws a seed for its workers before its sampler draws anything.
        torch.empty((), dtype=torch.int64).random_(generator=self._loader.generator)
        for index in self._indices():
            yield [value.index_select(0, index) for value in self._values]

    def _indices(self) -> Iterator[Tensor]:
        sampler: Any = self._loader.batch_sampler
        if type(getattr(sampler, "sampler", None)) not in SAMPLERS:
            for rows in sampler:
                yield torch.as_tensor(rows, device=self._device)
            return
        epoch = [torch.as_tensor(rows) for rows in sampler]  # one copy to the device for all
        if epoch:
            yield from torch.cat(epoch).to(self._device).split([len(rows) for rows in epoch])


class Moved:
    """A source's batches, each moved when its turn comes."""

    def __init__(self, source: Iterable[Any], device: torch.device) -> None:
        self._source = source
        self._device = device

    def __len__(self) -> int:
        return len(self._source)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        for batch in self._source:
            yield place(batch, self._device)
