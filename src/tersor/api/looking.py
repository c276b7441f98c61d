"""What the plan's search sees of a plan: its loss and how much it changes the outputs.

Everything that was seen is in the store, with the seconds that it took: a run that goes on after an
interruption sees the same, in no time, and its clock shows what it showed before.
"""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from tersor.api.proposing import Offers
from tersor.api.quality import Quality
from tersor.api.session import Session
from tersor.api.stages import stitched
from tersor.core.jsonable import digest
from tersor.core.records import Level
from tersor.graph.contracts import Graph
from tersor.graph.geometry import output_error

Assignment = Mapping[str, Level]
Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Evaluated:
    loss: float
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Looked:
    batches: int  # of the search part, in the order of the looks
    seconds: float  # of all of them


@dataclass
class Looks:
    """Losses and changes of plans on the search part.

    Args:
        session, offered: Where plans come from.
        quality: The target's losses.
        stamp: What losses depend on beside the session: the target and the metric.
    """

    session: Session
    offered: Offers
    quality: Quality
    stamp: str
    seconds: float = 0.0  # that all of this search's own would take without a store
    _marks: dict[str, Array] = field(default_factory=dict)
    _seen: dict[str, tuple[_Looked, Array]] = field(default_factory=dict)

    def evaluate(self, plan: Assignment) -> float:
        """The loss of a plan."""
        self.session.progress.advance()
        key = digest(self.session.key, self.stamp, sorted(plan.items()))
        kept = self.session.store.get(_Evaluated, "evaluated", key)
        if kept is None:
            start = time.perf_counter()
            loss, marks = self.quality.seen(self._graph(plan))
            kept = _Evaluated(loss=loss, seconds=time.perf_counter() - start)
            arrays = {} if marks is None else {"marks": marks}
            self.session.store.put("evaluated", key, kept, arrays)
        arrays = self.session.store.arrays("evaluated", key)
        if "marks" in arrays:
            self._marks[_name(plan)] = arrays["marks"]
        self.seconds += kept.seconds
        return kept.loss

    def noise(self, one: Assignment, other: Assignment) -> float:
        """Standard error of the difference of two evaluated losses; 0 where it is not known."""
        marks = [self._marks.get(_name(plan)) for plan in (one, other)]
        if marks[0] is None or marks[1] is None or len(marks[0]) != len(marks[1]):
            return 0.0
        return self.quality.noise(marks[0], marks[1])

    def changes(self, plan: Assignment, share: float) -> Array:
        """Change of the outputs of each sample of the first batches, in a fixed random order."""
        batches = self.quality.batches()
        wanted = max(1, math.ceil(share * len(batches)))
        name = _name(plan)
        key = digest(self.session.key, name)
        if name not in self._seen:
            kept = self.session.store.get(_Looked, "looked", key)
            known = self.session.store.arrays("looked", key).get("changes", np.zeros(0))
            self._seen[name] = (kept or _Looked(batches=0, seconds=0.0), known)
            self.seconds += self._seen[name][0].seconds
        record, found = self._seen[name]
        if record.batches < wanted:
            self.session.progress.advance()
            start = time.perf_counter()
            order = np.random.default_rng(self.session.settings.seed).permutation(len(batches))
            fresh = self._changes(plan, order[record.batches : wanted].tolist())
            took = time.perf_counter() - start
            record = _Looked(batches=wanted, seconds=record.seconds + took)
            found = np.concatenate([found, fresh])
            self._seen[name] = record, found
            self.session.store.put("looked", key, record, {"changes": found})
            self.seconds += took
        sizes = [len(flat[0]) for flat in batches]
        order = np.random.default_rng(self.session.settings.seed).permutation(len(batches))
        return found[: sum(sizes[i] for i in order[:wanted])]

    def clock(self) -> float:
        """Seconds that the search has taken, or would have without the store."""
        return self.seconds

    def _graph(self, plan: Assignment) -> Graph:
        return stitched(self.session, self.offered, plan)

    def _changes(self, plan: Assignment, places: list[int]) -> Array:
        graph, batches = self._graph(plan), self.quality.batches()
        rows = [
            output_error(graph.run(batches[i]), self.quality.wanted(i), self.session.kind)
            for i in places
        ]
        found: Array = torch.cat([row.double().reshape(-1) for row in rows]).numpy()
        return found


def _name(plan: Assignment) -> str:
    return digest(sorted(plan.items()))
