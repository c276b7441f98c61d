"""The caller's own data for recovery: read once, early, so that what is wrong with it is said early."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tersor.capture.samples import Call, Samples, as_carried, flatten_item, inputs_of
from tersor.core.data import Data
from tersor.core.errors import DataError
from tersor.core.jsonable import digest
from tersor.core.records import Signature
from tersor.core.recovery import Recover
from tersor.graph.contracts import Graph

MOST_SAMPLES = 16_384  # that are kept; a stream may be endless


@dataclass(frozen=True, slots=True)
class Taught:
    """Batches as they came.

    Attributes:
        batches: Flat inputs.
        items: The items that they are from, for the loss; empty without one.
        key: Of all of it; a loss counts by its name.
    """

    batches: Sequence[tuple[Tensor, ...]]
    items: Sequence[Any]
    loss: Callable[[Any, Any], Any] | None
    key: str


def read_taught(
    recover: Recover | None, graph: Graph, call: Call, hash_of: Callable[[Samples], str]
) -> Taught | None:
    """The batches of ``recover.data``; None where there is none.

    Raises:
        DataError: Fewer than two batches, or inputs that the model is not given so.
    """
    if recover is None or recover.data is None:
        return None
    given = recover.data
    data = given if isinstance(given, Data) else Data(given)
    if data.iterable is None:
        raise DataError(
            "recover: found data in three parts, wanted one: tersor.Data(iterable, ...)"
        )
    batches: list[tuple[Tensor, ...]] = []
    items: list[Any] = []
    count = 0
    for position, item in enumerate(data.iterable):
        flat = _flat(item, data, graph.signature, call, f"recover, item {position}")
        batches.append(flat)
        if recover.loss is not None:
            items.append(item)
        count += int(flat[0].shape[0])
        if count >= MOST_SAMPLES:
            break
    if len(batches) < 2:
        raise DataError(
            f"recover: found {len(batches)} batches of data, wanted at least 2: one to train on and one to "
            "check on"
        )
    name = (
        None if recover.loss is None else f"{recover.loss.__module__}.{recover.loss.__qualname__}"
    )
    hashes = [hash_of(Samples(call, flat)) for flat in batches]
    return Taught(batches, items, recover.loss, digest(hashes, name))


def _flat(
    item: Any, data: Data, signature: Signature, call: Call, where: str
) -> tuple[Tensor, ...]:
    found, tensors = flatten_item(inputs_of(item, data, where), where)
    shapes = [tuple(t.shape[1:]) for t in tensors]
    wanted = [s.shape[1:] for s in signature.inputs]
    fits = len(shapes) == len(wanted) and all(
        len(s) == len(w) and all(b is None or a == b for a, b in zip(s, w, strict=True))
        for s, w in zip(shapes, wanted, strict=True)
    )
    if found != call or not fits:
        raise DataError(
            f"{where}: found inputs of shapes {[tuple(t.shape) for t in tensors]}, wanted what the model is "
            f"given in data; for a loader that yields labels, too, give recover=tersor.Recover("
            "data=tersor.Data(loader, to_inputs=lambda batch: batch[0]), loss=...)"
        )
    return as_carried(Samples(call, tensors), signature).tensors
