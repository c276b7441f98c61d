"""Changes as plain records and arrays, so that a finished stage can be kept and read again."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tersor.core.packing import Packing
from tersor.core.records import Level, Site
from tersor.graph.contracts import Factor, GridKind, Quantizer, SiteChange
from tersor.graph.operators import Window
from tersor.ops.float8 import FLOAT8
from tersor.ops.packed import Packed

Arrays = dict[str, NDArray[Any]]
_TENSORS = ("codes", "scale", "weight", "bias", "kept")
_FACTOR_TENSORS = ("codes", "scale", "weight", "bias")
_PACKED = "packed"
_TURN = "turn:"


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizerRecord:
    """A quantiser without its channel scale."""

    step: float
    low: int
    high: int
    channel_dim: int
    shift: float
    kind: GridKind = "integers"


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowRecord:
    """How a convolution of a chain moves over its input."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FactorRecord:
    """One op of a chain without its tensors."""

    quantizer: QuantizerRecord | None = None
    window: WindowRecord | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ChangeRecord:
    """A change without its tensors; a packed weight is kept as its bits."""

    site: str
    level: Level
    packing: Packing | None = None
    quantizer: QuantizerRecord | None = None
    factors: tuple[FactorRecord, ...] = ()
    factor: float = 1.0
    turned: tuple[str, ...] = ()  # tensors that have maps
    operands: Mapping[str, QuantizerRecord] = field(default_factory=dict)
    report: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChangeRecords:
    """Changes in order."""

    changes: tuple[ChangeRecord, ...]


def pack(changes: Sequence[SiteChange]) -> tuple[ChangeRecords, Arrays]:
    """Records, and the arrays by ``<position>.<name>``."""
    arrays: Arrays = {}
    records = []
    for i, change in enumerate(changes):
        for name in _TENSORS:
            value: Tensor | None = getattr(change, name)
            if value is not None:
                arrays[f"{i}.{name}"] = _array(value)
        if change.packed is not None:
            arrays[f"{i}.{_PACKED}"] = np.frombuffer(change.packed.data, dtype=np.uint8)
        for tensor, maps in change.turn.items():
            arrays[f"{i}.{_TURN}{tensor}"] = maps.detach().contiguous().numpy()
        arrays |= _factor_arrays(i, change)
        records.append(_record(i, change, arrays))
    return ChangeRecords(changes=tuple(records)), arrays


def _array(tensor: Tensor) -> NDArray[Any]:
    """A tensor as NumPy has it; 8-bit floats, which it lacks, as their bits."""
    plain = tensor.detach().contiguous()
    array: NDArray[Any] = (plain.view(torch.uint8) if plain.dtype == FLOAT8 else plain).numpy()
    return array


def _codes(found: Tensor | None) -> Tensor | None:
    """Integer codes are signed: unsigned ones are the bits of floats."""
    is_bits = found is not None and found.dtype == torch.uint8
    return found.view(FLOAT8) if found is not None and is_bits else found


def _factor_arrays(position: int, change: SiteChange) -> Arrays:
    found: Arrays = {}
    for j, factor in enumerate(change.factors):
        for name in _FACTOR_TENSORS:
            own: Tensor | None = getattr(factor, name)
            if own is not None:
                found[f"{position}.factor{j}.{name}"] = own.detach().contiguous().numpy()
    return found


def _record(position: int, change: SiteChange, arrays: Arrays) -> ChangeRecord:
    quantizers = {_scale_name(position, name): q for name, q in change.operands.items()}
    if change.quantizer is not None:
        quantizers[_scale_name(position)] = change.quantizer
    for name, quantizer in quantizers.items():
        if quantizer.inverse_scale is not None:
            arrays[name] = quantizer.inverse_scale.contiguous().numpy()
    return ChangeRecord(
        site=change.site.name,
        level=change.level,
        packing=None if change.packed is None else change.packed.packing,
        quantizer=None if change.quantizer is None else _quantizer_record(change.quantizer),
        factors=tuple(map(_factor_record, change.factors)),
        factor=change.factor,
        turned=tuple(change.turn),
        operands={tensor: _quantizer_record(q) for tensor, q in change.operands.items()},
        report=dict(change.report),
    )


def _factor_record(factor: Factor) -> FactorRecord:
    window = factor.window
    return FactorRecord(
        quantizer=None if factor.quantizer is None else _quantizer_record(factor.quantizer),
        window=None
        if window is None
        else WindowRecord(
            kernel=window.kernel,
            stride=window.stride,
            padding=window.padding,
            dilation=window.dilation,
            groups=window.groups,
        ),
    )


def _factor(record: FactorRecord, tensors: Mapping[str, Tensor | None]) -> Factor:
    window = record.window
    return Factor(
        **tensors,
        quantizer=None if record.quantizer is None else _quantizer(record.quantizer, None),
        window=None
        if window is None
        else Window(window.kernel, window.stride, window.padding, window.dilation, window.groups),
    )


def _scale_name(position: int, tensor: str = "") -> str:
    """The array of a quantiser's channel scale; of an operand's it names the tensor."""
    return f"{position}.{tensor}.inverse_scale" if tensor else f"{position}.inverse_scale"


def _quantizer_record(quantizer: Quantizer) -> QuantizerRecord:
    return QuantizerRecord(
        step=quantizer.step,
        low=quantizer.low,
        high=quantizer.high,
        channel_dim=quantizer.channel_dim,
        shift=quantizer.shift,
        kind=quantizer.kind,
    )


def unpack(
    records: ChangeRecords, arrays: Mapping[str, Any], sites: Mapping[str, Site]
) -> list[SiteChange]:
    """The changes again; ``sites`` by name."""

    def tensor(position: int, name: str) -> Tensor | None:
        array = arrays.get(f"{position}.{name}")
        return None if array is None else torch.from_numpy(array)

    return [
        SiteChange(
            site=sites[record.site],
            level=record.level,
            codes=_codes(tensor(i, "codes")),
            scale=tensor(i, "scale"),
            weight=tensor(i, "weight"),
            packed=_packed(record, arrays.get(f"{i}.{_PACKED}")),
            bias=tensor(i, "bias"),
            kept=tensor(i, "kept"),
            turn={name: torch.from_numpy(arrays[f"{i}.{_TURN}{name}"]) for name in record.turned},
            quantizer=None
            if record.quantizer is None
            else _quantizer(record.quantizer, tensor(i, "inverse_scale")),
            factors=tuple(
                _factor(own, {n: tensor(i, f"factor{j}.{n}") for n in _FACTOR_TENSORS})
                for j, own in enumerate(record.factors)
            ),
            factor=record.factor,
            operands={
                name: _quantizer(found, tensor(i, f"{name}.inverse_scale"))
                for name, found in record.operands.items()
            },
            report=record.report,
        )
        for i, record in enumerate(records.changes)
    ]


def _packed(record: ChangeRecord, array: NDArray[Any] | None) -> Packed | None:
    if record.packing is None or array is None:
        return None
    return Packed(record.packing, array.tobytes())


def _quantizer(record: QuantizerRecord, inverse_scale: Tensor | None) -> Quantizer:
    return Quantizer(
        step=record.step,
        low=record.low,
        high=record.high,
        channel_dim=record.channel_dim,
        shift=record.shift,
        kind=record.kind,
        inverse_scale=inverse_scale,
    )
