"""Statistics as arrays, so that a finished calibration can be kept and read again."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray

from tersor.graph.contracts import Rows
from tersor.observe.statistics import Observed
from tersor.ops.moments import Moments


@dataclass(frozen=True, slots=True, kw_only=True)
class ObservedRecord:
    """The plain part of what was observed at one op."""

    op: str
    count: int
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ObservedRecords:
    """All ops, and the self-check's largest relative difference."""

    ops: tuple[ObservedRecord, ...]
    self_check: float


def pack(
    observed: Mapping[str, Observed], self_check: float
) -> tuple[ObservedRecords, dict[str, NDArray[Any]]]:
    """Records, and the arrays by ``<op>.<name>``."""
    arrays: dict[str, NDArray[Any]] = {}
    records = []
    for op, seen in observed.items():
        tensors = {
            "xx": seen.moments.xx,
            "x": seen.moments.x,
            "channels": seen.channels,
            "counts": seen.counts,
            "edges": seen.edges,
            "rows": seen.rows.original,
            "outputs": seen.rows.output,
        }
        arrays |= {f"{op}.{name}": t.contiguous().numpy() for name, t in tensors.items()}
        records.append(
            ObservedRecord(op=op, count=seen.moments.count, low=seen.low, high=seen.high)
        )
    return ObservedRecords(ops=tuple(records), self_check=self_check), arrays


def unpack(records: ObservedRecords, arrays: Mapping[str, Any]) -> dict[str, Observed]:
    """What was observed, by op."""
    found: dict[str, Observed] = {}
    for record in records.ops:
        t = {
            name: torch.from_numpy(arrays[f"{record.op}.{name}"])
            for name in ("xx", "x", "channels", "counts", "edges", "rows", "outputs")
        }
        found[record.op] = Observed(
            moments=Moments(count=record.count, xx=t["xx"], x=t["x"]),
            channels=t["channels"],
            counts=t["counts"],
            edges=t["edges"],
            low=record.low,
            high=record.high,
            rows=Rows(original=t["rows"], compressed=t["rows"], output=t["outputs"]),
        )
    return found
