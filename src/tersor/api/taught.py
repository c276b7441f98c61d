"""The caller's own data for recovery: read once, early, so that what is wrong with it is said early."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tersor.capture.samples import Call, Samples, as_carried, flatten_item, inputs_of
from tersor.core.data import Data
from tersor.core.errors import ConfigError, DataError, NumericalError
from tersor.core.jsonable import digest
from tersor.core.records import Signature
from tersor.core.recovery import Recover
from tersor.core.structure import unflatten
from tersor.graph.contracts import Graph
from tersor.recover.goals import one_number

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

    A loss is called once, on what the model itself gives for the first item: its mistakes are found before
    anything is searched.

    Raises:
        DataError: Fewer than two batches, or inputs that the model is not given so.
        ConfigError: The loss raises, or returns no tensor.
        ShapeError: It returns several numbers.
        NumericalError: It is not finite.
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
            if not items:
                _check_loss(recover.loss, graph, flat, item)
            items.append(item)
        count += int(flat[0].shape[0])
        if count >= MOST_SAMPLES:
            break
    if len(batches) < 2:
        raise DataError(
            f"recover: found {len(batches)} batches of data, wanted at least 2: one to train on and one to "
            "check on"
        )
    hashes = [hash_of(Samples(call, flat)) for flat in batches]
    return Taught(batches, items, recover.loss, digest(hashes, _name(recover.loss)))


def _name(loss: Callable[[Any, Any], Any] | None) -> str | None:
    """A loss that is an object (a module, a partial) counts by its class."""
    if loss is None:
        return None
    named = loss if hasattr(loss, "__qualname__") else type(loss)
    return f"{named.__module__}.{named.__qualname__}"


def _check_loss(
    loss: Callable[[Any, Any], Any], graph: Graph, flat: tuple[Tensor, ...], item: Any
) -> None:
    """Call a caller's loss once, with outputs that have gradients as they do in training."""
    with torch.enable_grad():
        own = [
            t.detach().requires_grad_().clone() if t.is_floating_point() else t
            for t in graph.run(flat)
        ]
        try:
            found = loss(unflatten(graph.signature.result, own), item)
        except Exception as error:  # the caller's function may raise anything
            kind, said = type(error).__name__, str(error).partition("\n")[0]
            raise ConfigError(
                f"recover: loss raised {kind}: {said} (on the model's own outputs and item 0 of data); wanted a "
                "function loss(outputs, item), where outputs are what the model returns and item is one of data"
            ) from error
    value = float(one_number(found).detach())
    if not math.isfinite(value):
        raise NumericalError(
            f"recover: loss is {value} on the model's own outputs and item 0 of data, wanted a finite one; check "
            "the item's labels and the loss function"
        )


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
