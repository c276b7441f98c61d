"""The caller's inputs as flat, stacked tensors, split into parts that do not overlap.

Samples of several shapes (sentence lengths, image sizes) are grouped by shape, so that a batch is
always rectangular.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tersor.core.data import FRACTIONS, MOST_READ, RESERVOIR, SPLITS, Data, Split
from tersor.core.errors import DataError, TersorError
from tersor.core.records import Signature, Structure

TO_INPUTS = "tersor.Data(loader, to_inputs=lambda batch: batch[0])"


@dataclass(frozen=True, slots=True)
class Call:
    """How one batch is passed: where tensors nest in the arguments."""

    args: Structure
    kwargs: Structure


@dataclass(frozen=True, slots=True)
class Samples:
    """Inputs of many samples: flat tensors whose first dimension is the sample.

    Attributes:
        tensors: The samples of the largest shape; of the only one, where there is one.
        others: The samples of every other shape, one entry a shape. Samples are numbered through:
            first those of ``tensors``.
    """

    call: Call
    tensors: tuple[Tensor, ...]
    others: tuple[tuple[Tensor, ...], ...] = ()

    def __len__(self) -> int:
        return sum(int(flat[0].shape[0]) for flat in self.groups)

    @property
    def groups(self) -> tuple[tuple[Tensor, ...], ...]:
        """Flat tensors by shape, the largest first."""
        return (self.tensors, *self.others)

    def take(self, index: Tensor | slice) -> "Samples":
        """Some of the samples, at least one; of several shapes, each shape keeps its order."""
        if not self.others:
            return replace(self, tensors=tuple(t[index] for t in self.tensors))
        wanted = torch.arange(len(self))[index]
        parts, start = [], 0
        for flat in self.groups:
            stop = start + int(flat[0].shape[0])
            rows = wanted[(wanted >= start) & (wanted < stop)] - start
            if len(rows):
                parts.append(tuple(t[rows] for t in flat))
            start = stop
        return Samples(self.call, parts[0], tuple(parts[1:]))

    def limited(self, count: int) -> "Samples":
        """About ``count`` samples at most, evenly over all the samples: shapes keep their shares."""
        if not self.others or len(self) <= count:
            return self.take(slice(0, count))
        return self.take(torch.linspace(0, len(self) - 1, count).round().long().unique())

    def drawn(self, count: int, batch: int) -> list[tuple[Tensor, ...]]:
        """Flat inputs of ``count`` calls, at the middles of equal shares of all the samples.

        A call holds that sample and those behind it of the same shape, again from the first where
        they run out.
        """
        middles = ((torch.arange(count) + 0.5) / count * len(self)).long()
        calls, start = [], 0
        for flat in self.groups:
            rows = int(flat[0].shape[0])
            for first in middles[(middles >= start) & (middles < start + rows)] - start:
                index = (first + torch.arange(batch)) % rows
                calls.append(tuple(t[index] for t in flat))
            start += rows
        return calls

    def batches(self, size: int) -> Iterator[tuple[Tensor, ...]]:
        """Flat inputs of at most ``size`` samples of one shape at a time, in order."""
        for flat in self.groups:
            for start in range(0, int(flat[0].shape[0]), size):
                yield tuple(t[start : start + size] for t in flat)

    def cast(self, dtypes: Iterable[torch.dtype]) -> "Samples":
        """Float inputs in these types, one an input; integers stay what they are."""
        wanted = tuple(dtypes)
        groups = [
            tuple(
                t.to(d) if t.is_floating_point() else t for t, d in zip(flat, wanted, strict=True)
            )
            for flat in self.groups
        ]
        return replace(self, tensors=groups[0], others=tuple(groups[1:]))


def as_carried(samples: Samples, signature: Signature) -> Samples:
    """Samples in the types that the graph itself takes."""
    return samples.cast(getattr(torch, spec.carrier) for spec in signature.inputs)


def varying(parts: Iterable[Samples]) -> frozenset[tuple[int, int]]:
    """(flat input, dimension) of everything beyond the sample that has several sizes."""
    seen: dict[tuple[int, int], set[int]] = {}
    for part in parts:
        for flat in part.groups:
            for column, tensor in enumerate(flat):
                for dim in range(1, tensor.dim()):
                    seen.setdefault((column, dim), set()).add(int(tensor.shape[dim]))
    return frozenset(place for place, sizes in seen.items() if len(sizes) > 1)


def collect(data: Data, seed: int, *, ragged: bool = False) -> dict[Split, Samples]:
    """Read the caller's inputs and split them.

    Args:
        data: Whole (then split 60/20/20 by sample) or in three parts.
        seed: Of the reservoir and of the split.
        ragged: Take samples of several shapes; else they are refused.

    Raises:
        DataError: Nothing to read, too few samples, tensors that do not fit together, or values
            that are not finite; says which item and which tensor.
    """
    if data.iterable is None:
        parts = {name: _read(getattr(data, name), data, name, seed) for name in SPLITS}
        for name in SPLITS[1:]:
            _check_alike(parts["calibration"], parts[name], name)
        _check_shapes(parts, ragged=ragged)
        return parts
    samples = _read(data.iterable, data, "data", seed)
    _check_shapes({"data": samples}, ragged=ragged)
    return _split(samples, seed)


def _check_alike(calibration: Samples, part: Samples, name: str) -> None:
    if part.call != calibration.call:
        raise DataError(
            f"data: the {name} part is passed in another form than the calibration part"
        )
    for column, (a, b) in enumerate(zip(calibration.tensors, part.tensors, strict=True)):
        if a.dtype != b.dtype or a.dim() != b.dim():
            raise DataError(
                f"{name}: input {column} is {b.dtype} with {b.dim()} dimensions, in the "
                f"calibration part {a.dtype} with {a.dim()}; wanted the same in all parts"
            )


def _check_shapes(parts: Mapping[Any, Samples], *, ragged: bool) -> None:
    if ragged or not varying(parts.values()):
        return
    column = min(varying(parts.values()))[0]
    raise DataError(f"{next(iter(parts))}: {several_shapes(parts.values(), column)}")


def several_shapes(parts: Iterable[Samples], column: int) -> str:
    """What is said of an input whose shapes can't all be taken, with the way out."""
    shapes = sorted({tuple(f[column].shape[1:]) for part in parts for f in part.groups})
    return (
        f"input {column} comes in {len(shapes)} shapes a sample, such as {shapes[:2]}; "
        "wanted one: pad or crop to one shape, with tersor.Data(..., to_inputs=...)"
    )


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
    """Read a stream of batches, keeping at most RESERVOIR of its first MOST_READ samples (algorithm R)."""
    rng = np.random.default_rng(seed)
    call: Call | None = None
    kept: list[tuple[Tensor, ...]] = []
    seen = 0
    for position, item in enumerate(_items(items)):
        where = f"{part}, item {position}"
        found, tensors = flatten_item(inputs_of(item, data, where), where)
        if call is not None and found != call:
            raise DataError(f"{where}: passed in another form than the items before it")
        call = found
        for row in _rows(tensors, where):
            slot = seen if seen < RESERVOIR else int(rng.integers(0, seen + 1))
            if slot < RESERVOIR:  # a copy: loaders reuse their buffers, and a view keeps its batch
                kept[slot : slot + 1] = [tuple(t.clone() for t in row)]
            seen += 1
        if seen >= MOST_READ:
            break
    if call is None or not kept:
        raise DataError(
            f"{part}: found no samples, wanted a few dozen representative inputs; "
            "an iterator that was already used up is empty, too"
        )
    return _grouped(call, kept, part)


def inputs_of(item: Any, data: Data, where: str) -> Any:
    """What the caller's ``to_inputs`` makes of an item.

    Raises:
        DataError: It raised.
    """
    if data.to_inputs is None:
        return item
    try:
        return data.to_inputs(item)
    except TersorError:
        raise
    except Exception as error:  # the caller's own code, whatever it raises
        raise DataError(
            f"{where}: to_inputs raised {type(error).__name__}: {error}; it was given a "
            f"{type(item).__name__}, as the data yields it, and has to return the model's inputs"
        ) from error


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
    if tensor.shape[0] and not tensor.numel():
        raise DataError(
            f"{where}: found shape {tuple(tensor.shape)}, which holds no value; wanted every size "
            "to be at least 1: leave that input out, or give it values"
        )
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


def _grouped(call: Call, rows: list[tuple[Tensor, ...]], part: str) -> Samples:
    """Samples stacked by shape; the shape with most values first, because builds are made for it."""
    _check_columns(rows, part)
    groups: dict[tuple[tuple[int, ...], ...], list[tuple[Tensor, ...]]] = {}
    for row in rows:
        groups.setdefault(tuple(tuple(t.shape) for t in row), []).append(row)
    order = sorted(groups, key=lambda shapes: (-sum(_numel(s) for s in shapes), shapes))
    stacked = [tuple(torch.stack(c) for c in zip(*groups[k], strict=True)) for k in order]
    return Samples(call, stacked[0], tuple(stacked[1:]))


def _numel(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape, dtype=np.int64))


def _check_columns(rows: list[tuple[Tensor, ...]], part: str) -> None:
    for column, values in enumerate(zip(*rows, strict=True)):
        dtypes = {v.dtype for v in values}
        if len(dtypes) > 1:
            raise DataError(f"{part}: input {column} comes in types {sorted(map(str, dtypes))}")
        ranks = sorted({v.dim() + 1 for v in values})
        if len(ranks) > 1:
            raise DataError(
                f"{part}: input {column} comes with {ranks} dimensions; wanted one number of them"
            )
