"""What no op owns: the time outside of all nodes, and glue that grows with what a plan chooses.

A runtime inserts conversions of its own (reorders, transposes). They grow with quantised tensors, int8
ops and elements, and with the elements that are written in one format and read in the other, where
that tells them on builds left out.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.optimize import nnls

from tersor.core.rank_levels import is_eight_bit
from tersor.core.records import OUTSIDE, PriceTable, Site
from tersor.price.costs import WidthCosts
from tersor.price.node_costs import Slopes
from tersor.price.observation import Observation

Vector = np.ndarray[Any, np.dtype[np.float64]]

_CHANGED = slice(
    6, -1
)  # of ``Glue.counts``: the elements that are read in another layout or format
_NOTHING = 1e-3  # of a build's latency, in the one that has most of it


@dataclass(frozen=True, slots=True, kw_only=True)
class Glue:
    """What is there of glue in one build.

    Attributes:
        counts: What it grows with: a call, quantised tensors, int8 layers, quantised tensors that an
            addition reads as floats; and with widths elements written, those in int8, those around
            depthwise layers of odd counts, those that are read in another format by who writes and reads, as shares of all at full counts, and those
            that are only moved, as a share of theirs.
        ms: Of the nodes that nothing else owns.
        outside_ms: Outside of all nodes.
        of_ms: The build's latency.
    """

    counts: tuple[float, ...]
    ms: float
    outside_ms: float
    of_ms: float = 1.0


def steadied(builds: Sequence[Observation]) -> list[Observation]:
    """Builds whose time outside of all nodes is one constant, and whose nodes take the rest.

    A profile's time outside is the small difference of two large numbers, and varies by several
    hundredths of a call from profile to profile. As the rest is scaled to what was measured, all
    nodes of a build would be off by as much. What grows with the call is spread over its nodes.
    """
    outside = np.array([o.node_ms.get(OUTSIDE, 0.0) for o in builds])
    total = np.array([sum(o.node_ms.values()) for o in builds])
    if not outside.any() or not (total > outside).all():
        return list(builds)
    (constant, _), _ = nnls(np.stack([1 / total, np.ones(len(total))], axis=1), outside / total)
    constant = min(float(constant), float(np.min(total - outside)))
    found: list[Observation] = []
    for o, all_ms, out_ms in zip(builds, total, outside, strict=True):
        factor = float((all_ms - constant) / (all_ms - out_ms))
        nodes = {name: ms * factor for name, ms in o.node_ms.items()}
        found.append(replace(o, node_ms={**nodes, OUTSIDE: constant}))
    return found


def glue_of(
    observation: Observation,
    sites: Sequence[Site],
    quantizers: Mapping[str, Sequence[str]],
    costs: WidthCosts | None,
) -> Glue:
    """The glue of one build.

    Args:
        observation: The build.
        sites: Format sites.
        quantizers: Quantised tensor of that build -> profile names of its quantiser.
        costs: What widths decide.
    """
    owned = {name for site in sites for name in site.ops} | {OUTSIDE}
    owned |= {name for names in quantizers.values() for name in names}
    owned |= costs.nodes() if costs else set()
    chosen = {s.name for s in sites if is_eight_bit(observation.assignment.get(s.name))}
    int8 = [s for s in sites if s.name in chosen and s.op_kind != "add"]
    # With widths, what changes format is told by who writes and who reads it.
    boundaries = [
        s
        for s in sites
        if s.op_kind == "add" and s.tensor in quantizers and s.name not in chosen and costs is None
    ]
    counts = (1.0, float(len(quantizers)), float(len(int8)), float(len(boundaries)))
    return Glue(
        counts=(*counts, *(costs.elements(observation.assignment) if costs else ())),
        ms=sum((ms for name, ms in observation.node_ms.items() if name not in owned), 0.0),
        outside_ms=observation.node_ms.get(OUTSIDE, 0.0),
        of_ms=observation.measured_ms,
    )


def with_glue(
    table: PriceTable, glue: Sequence[Glue], additions: Mapping[str, str | None]
) -> tuple[PriceTable, Slopes]:
    """The table with the slopes of its own parts, and the slopes of what widths decide.

    What it costs that an addition reads a quantised tensor as floats goes to the quantiser, and
    comes back with the addition's own int8: no other term sees both.

    Args:
        table: Without glue.
        glue: Of each build.
        additions: Sites of additions -> the tensor that each reads.
    """
    counts, rest = np.array([g.counts for g in glue]), np.array([g.ms for g in glue])
    found, off = _slopes(counts, rest, np.array([g.of_ms for g in glue]))
    constant, per_tensor, per_site, boundary, *by_elements = found
    readers = Counter(tensor for tensor in additions.values())

    def caused(site: str) -> float:
        if site not in additions:
            return per_site
        return -boundary if additions[site] is not None else 0.0

    table = replace(
        table,
        ops={
            site: {level: ms + caused(site) * is_eight_bit(level) for level, ms in row.items()}
            for site, row in table.ops.items()
        },
        quantizers={
            t: ms + per_tensor + readers[t] * boundary for t, ms in table.quantizers.items()
        },
        glue_ms=constant + float(np.mean([g.outside_ms for g in glue])),
    )
    per_element, per_int8_element, odd, *changed, moved = by_elements or (0.0,) * 4
    slopes = Slopes(
        int8_op=per_site,
        boundary=boundary,
        elements=per_element,
        int8_elements=per_int8_element,
        odd=odd,
        changed=tuple(changed),
        moved=moved,
        changed_spread=off,
    )
    return table, slopes


def _slopes(counts: Vector, rest: Vector, of_ms: Vector) -> tuple[list[float], float]:
    """Non-negative slopes of what the glue is of each build's latency: narrow builds count like others.

    Elements that change formats have some where those tell the glue of builds left out. And the error on builds left out over what they have of glue, both as root mean squares.
    """
    rows, wanted = counts / of_ms[:, None], rest / of_ms
    # What is nothing beside a build makes no term of two formats.
    least = nnls(rows, wanted)[0] * rows.max(axis=0) < _NOTHING
    least[: _CHANGED.start] = least[_CHANGED.stop :] = False
    rows[:, least] = 0.0
    error = _unseen_error(rows, wanted)
    whole = float(np.sum(np.square(wanted)))
    slopes = [float(v) for v in nnls(rows, wanted)[0]]
    return slopes, math.sqrt(error / whole) if whole > 0 else 0.0


def _unseen_error(counts: Vector, rest: Vector) -> float:
    """Sum of squared errors of the glue of builds, each left out of the fit."""
    total = 0.0
    for i in range(len(rest)):
        seen = np.arange(len(rest)) != i
        total += float(counts[i] @ nnls(counts[seen], rest[seen])[0] - rest[i]) ** 2
    return total
