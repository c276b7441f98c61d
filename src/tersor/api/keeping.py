"""A final graph as a record and tensors, and back."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tersor.api.final import Made
from tersor.api.proposing import as_arrays, as_tensors
from tersor.api.session import Session
from tersor.core.recovery import Recovery
from tersor.graph.changes import ChangeRecords, pack, unpack
from tersor.graph.meta import read_back
from tersor.graph.serial import graph_from_json, graph_tensors, graph_to_json

_GRAPH, _CHANGES = "graph/", "changes/"


@dataclass(frozen=True, slots=True, kw_only=True)
class MadeRecord:
    """The plain part of a final graph."""

    graph: Mapping[str, Any] | None  # None: the original
    changes: ChangeRecords
    note: str
    loss: float
    recoveries: tuple[Recovery, ...]


def pack_made(session: Session, made: Made) -> tuple[MadeRecord, dict[str, Tensor]]:
    """The record, and the tensors of the graph and of its changes."""
    is_original = made.graph is session.graph
    changes, arrays = pack(made.changes)
    tensors = {f"{_CHANGES}{name}": t for name, t in as_tensors(arrays).items()}
    if not is_original:
        tensors |= {f"{_GRAPH}{name}": t for name, t in graph_tensors(made.graph).items()}
    record = MadeRecord(
        graph=None if is_original else graph_to_json(made.graph),
        changes=changes,
        note=made.note,
        loss=made.loss,
        recoveries=made.recoveries,
    )
    return record, tensors


def unpack_made(session: Session, record: MadeRecord, tensors: Mapping[str, Tensor]) -> Made:
    """The final graph again."""
    graph = session.graph
    if record.graph is not None:
        graph = read_back(graph_from_json(record.graph, _named(tensors, _GRAPH)), session.graph)
    arrays = as_arrays(_named(tensors, _CHANGES))
    return Made(
        graph=graph,
        changes=tuple(unpack(record.changes, arrays, session.site_by_name)),
        note=record.note,
        loss=record.loss,
        recoveries=record.recoveries,
    )


def _named(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
