"""The caller's inputs as flat, stacked tensors, split into parts that do not overlap."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tersor.core.data import FRACTIONS, RESERVOIR, SPLITS, Data, Split
from tersor.core.errors import DataError
from tersor.core.records import Structure

TO_INPUTS = "tersor.Data(loader, to_inputs=lambda batch: batch[0])"


@dataclass(frozen=True, slots=True)
class Call:
    """How one batch is passed: where tensors nest in the arguments."""

    args: Structure
    kwargs: Structure


@dataclass(frozen=True, slots=True)
class Samples:
    """Inputs of many samples: flat tensors whose first dimension is the sample."""

    call: Call
    tensors: tuple[Tensor, ...]

    def __len__(self) -> int:
        return int(self.tensors[0].shape[0])

    def take(self, index: Tensor | slice) -> "Samples":
        """Some of the samples."""
        return Samples(self.call, tuple(t[index] for t in self.tensors))

    def batches(self, size: int) -> Iterator[tuple[Tensor, ...]]:
        """Flat inputs of at most ``size`` samples at a time, in order."""
        for start in range(0, len(self), size):
            yield tuple(t[start : start + size] for t in self.tensors)


def collect(data: Data, seed: int) -> dict[Split, Samples]:
    """Read the caller's inputs and split them.

    Args:
        data: Whole (then split 60/20/20 by sample) or in three parts.
        seed: Of the reservoir and of the split.

    Raises:
        DataError: Nothing to read, too few samples, tensors that do not fit together, or values
            that are not finite; says which item and which tensor.
    """
    if data.iterable is None:
        parts = {name: _read(getattr(data, name), data, name, seed) for name in SPLITS}
        calls = {name: part.call for name, part in parts.items()}
        for name in SPLITS[1:]:
            if calls[name] != calls["calibration"]:
                raise DataError(
                    f"data: the {name} part is passed in another form than the calibration part"
                )
        return parts
    return _split(_read(data.iterable, data, "data", seed), seed)


def _split(samples: Samples, seed: int) -> dict[Split, Samples]:
    count = len(samples)
    if count < len(SPLITS):
        raise DataError(
            f"data: found {count} sample(s), wanted at least {len(SPLITS)}: one each for "
            f"{', '.join(SPLITS)}; give a few dozen representative inputs"
        )
    order = torch.from_numpy(np.random.default_rng(seed).permutation(count))
    n_test = max(1, round(FRACTIONS[2] * count))
    n_search = max(1, round(FRACTIONS[1] * count))
    bounds = {
        "calibration": order[: count - n_search - n_test],
        "search": order[count - n_search - n_test : count - n_test],
        "test": order[count - n_test :],
    }
    return {name: samples.take(bounds[name].sort().values) for name in SPLITS}


def _read(items: Any, data: Data, part: str, seed: int) -> Samples:
    """Read a stream of batches, keeping at most RESERVOIR samples (algorithm R)."""
    rng = np.random.default_rng(seed)
    call: Call | None = None
    kept: list[tuple[Tensor, ...]] = []
    seen = 0
    for position, item in enumerate(_items(items)):
        where = f"{part}, item {position}"
        found, tensors = flatten_item(data.to_inputs(item) if data.to_inputs else item, where)
        if call is not None and found != call:
            raise DataError(f"{where}: passed in another form than the items before it")
        call = found
        for row in _rows(tensors, where):
            slot = seen if seen < RESERVOIR else int(rng.integers(0, seen + 1))
            if slot < RESERVOIR:  # a copy: loaders reuse their buffers, and a view keeps its batch
                kept[slot : slot + 1] = [tuple(t.clone() for t in row)]
            seen += 1
    if call is None or not kept:
        raise DataError(
            f"{part}: found no samples, wanted a few dozen representative inputs; "
            "an iterator that was already used up is empty, too"
        )
    return Samples(call, _stack(kept, part))


def _items(items: Any) -> Iterator[Any]:
    if isinstance(items, Mapping | Tensor | np.ndarray):  # one batch, not a stream of batches
        yield items
    else:
        yield from items


def flatten_item(item: Any, where: str) -> tuple[Call, tuple[Tensor, ...]]:
    """One batch as (how it is passed, flat tensors on the CPU)."""
    leaves: list[Tensor] = []
    empty = Structure(kind="tuple"), Structure(kind="dict")
    if isinstance(item, Mapping):
        call = Call(empty[0], _nest(dict(item), leaves, where))
    elif isinstance(item, tuple | list):
        call = Call(_nest(tuple(item), leaves, where), empty[1])
    else:
        call = Call(_nest((item,), leaves, where), empty[1])
    if not leaves:
        raise DataError(f"{where}: found {type(item).__name__} without any tensor")
    return call, tuple(leaves)


def _nest(value: Any, leaves: list[Tensor], where: str) -> Structure:
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(np.ascontiguousarray(value))
    if isinstance(value, Tensor):
        leaves.append(_checked(value, where))
        return Structure(kind="tensor")
    if isinstance(value, Mapping):
        keys = tuple(str(k) for k in value)
        children = tuple(_nest(v, leaves, f"{where}, {k!r}") for k, v in value.items())
        return Structure(kind="dict", keys=keys, children=children)
    if isinstance(value, tuple | list):
        children = tuple(_nest(v, leaves, f"{where}, [{i}]") for i, v in enumerate(value))
        kind = "tuple" if isinstance(value, tuple) else "list"
        return Structure(kind=kind, children=children)  # type: ignore[arg-type]
    if value is None:
        return Structure(kind="none")
    if isinstance(value, bool | int | float | str):
        return Structure(kind="constant", value=value)
    raise DataError(
        f"{where}: found {type(value).__name__}, wanted a tensor, a tuple of positional arguments "
        f"or a dict of keyword arguments; turn items into inputs with {TO_INPUTS}"
    )


def _checked(tensor: Tensor, where: str) -> Tensor:
    tensor = tensor.detach().to("cpu")
    if tensor.is_complex() or tensor.is_sparse:
        raise DataError(f"{where}: complex and sparse tensors are not supported; pass dense reals")
    if tensor.dim() == 0:
        raise DataError(f"{where}: found a scalar tensor, wanted dimension 0 to be the sample")
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        bad = int((~torch.isfinite(tensor)).reshape(tensor.shape[0], -1).any(1).nonzero()[0])
        raise DataError(
            f"{where}: sample {bad} holds NaN or infinity; wanted finite inputs: remove that "
            "sample or clean it first"
        )
    return tensor


def _rows(tensors: tuple[Tensor, ...], where: str) -> Iterator[tuple[Tensor, ...]]:
    sizes = [t.shape[0] for t in tensors]
    if len(set(sizes)) > 1:
        raise DataError(
            f"{where}: the tensors hold {sizes} samples in dimension 0, wanted one number; if one "
            f"of them is a label, use {TO_INPUTS}"
        )
    for index in range(sizes[0]):
        yield tuple(t[index] for t in tensors)


def _stack(rows: list[tuple[Tensor, ...]], part: str) -> tuple[Tensor, ...]:
    stacked = []
    for column, values in enumerate(zip(*rows, strict=True)):
        shapes = {tuple(v.shape) for v in values}
        if len(shapes) > 1:
            raise DataError(
                f"{part}: input {column} comes in {len(shapes)} shapes a sample, such as "
                f"{sorted(shapes)[:2]}; wanted one: pad or crop to one shape"
            )
        dtypes = {v.dtype for v in values}
        if len(dtypes) > 1:
            raise DataError(f"{part}: input {column} comes in types {sorted(map(str, dtypes))}")
        stacked.append(torch.stack(values))
    return tuple(stacked)
