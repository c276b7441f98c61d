"""A profile as a file for chrome://tracing or Perfetto: one bar an op, laid out in graph order.

Bars are as long as an op takes in a warm call on average. Backends count sums, not starts, so that bars
follow each other in the order of the graph and no gap between two of them is real; the time outside of
all ops stands last.
"""

from collections.abc import Iterable
from typing import Any


def chrome_trace(name: str, rows: Iterable[Any], outside_ms: float) -> dict[str, Any]:
    """Trace events, times in microseconds, of rows as ``analyse.roofline.ProfileRow`` has them."""
    events: list[dict[str, Any]] = [
        {"ph": "M", "pid": 1, "tid": 1, "name": "process_name", "args": {"name": name}},
        {"ph": "M", "pid": 1, "tid": 1, "name": "thread_name", "args": {"name": "ops, mean times"}},
    ]
    start = 0.0
    for row in rows:
        events.append(_bar(row.layer, row.kind, start, row.ms, _facts(row)))
        start += row.ms * 1e3
    events.append(_bar("outside of all ops", "gap", start, outside_ms, {}))
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _facts(row: Any) -> dict[str, Any]:
    return {
        "node": row.node,
        "format": row.format,
        "macs": row.macs,
        "bytes": row.bytes,
        "bound": row.bound,
    }


def _bar(name: str, kind: str, start: float, ms: float, args: dict[str, Any]) -> dict[str, Any]:
    return {
        "ph": "X",
        "pid": 1,
        "tid": 1,
        "name": name,
        "cat": kind,
        "ts": round(start, 3),
        "dur": round(ms * 1e3, 3),
        "args": args,
    }
