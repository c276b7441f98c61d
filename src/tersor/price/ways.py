"""How an op that a plan sets to int8 is really computed: some backends fall back to floats.

ONNX Runtime computes a convolution in integers only where what reads its result quantises it; in
front of a float op, or of a residual addition, which stays float, it takes the float time. Others
write floats from an integer op and take no longer. Which of the two a backend does is seen in the
node times of builds left out, for all ops of a kind together: one op has too few builds to tell.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import numpy as np

from tersor.core.rank_levels import is_eight_bit
from tersor.core.records import Format, Level, Precision, Site
from tersor.price.facts import WidthFacts
from tersor.price.laws import RESOLUTION_MS, Law, Laws, Mask, NodeTime, fit_law, folds

Vector = np.ndarray[Any, np.dtype[np.float64]]
Tiles = tuple[int, int]

# own: in int8, whatever stands behind it. reader: only where what reads it is int8 as well. native:
# as natively, always.
Way = Literal["own", "reader", "native"]
# The other two ways hold for a kind where they leave less than this part of the squared error of its
# own. It was 0.41 for ONNX Runtime's convolutions, 1.0 to 11 for its linear layers and for OpenVINO.
_TELLING = 0.7
_TOGETHER = {"depthwise": "conv"}  # kinds that one kernel's rule is for
# How much larger an op's error may be as native: it has few builds, and one that is computed in
# integers in any of them is off by a factor.
_SLACK = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Ways:
    """How ops at int8 are computed.

    Attributes:
        readers: Format site -> the first site that reads what it gives.
        found: Format site -> its way; those that are not listed have their own.
    """

    precision: Precision
    readers: Mapping[str, str] = field(default_factory=dict)
    found: Mapping[str, Way] = field(default_factory=dict)

    def is_fused(self, site: str) -> bool:
        """Whether the format of what reads its result decides as well how a site is computed."""
        return self.found.get(site) == "reader"

    def format(self, site: str | None, assignment: Mapping[str, Level]) -> Format:
        """What the ops of a site are computed in: int8 or the native format."""
        if site is None or not is_eight_bit(assignment.get(site)):
            return self.precision
        way = self.found.get(site, "own")
        fused = way == "own" or (
            way == "reader" and is_eight_bit(assignment.get(self.readers[site]))
        )
        return "int8" if fused else self.precision


def first_readers(sites: Sequence[Site], facts: WidthFacts) -> dict[str, str]:
    """Site -> the first layer that reads the next tensor that is written at or behind its op.

    None for sites behind which no layer is free: nothing that a plan may choose decides there.
    """
    place = {name: i for i, name in enumerate(facts.nodes)}
    layers = [s for s in sites if s.op_kind != "add" and s.ops]
    readers = [s for s in layers if s.tensor in place]
    found: dict[str, str] = {}
    for site in layers:
        first = _reader(place.get(site.ops[0], -1), readers, place)
        if first is not None and first.pinned is None:
            found[site.name] = first.name
    return found


def followers(sites: Sequence[Site], facts: WidthFacts) -> dict[str, str]:
    """Site -> the free site that first reads what its ops write: a residual addition, else a layer.

    A layer's result goes into the first addition in front of the tensor that its reader reads.
    """
    place = {name: i for i, name in enumerate(facts.nodes)}
    additions = [s for s in sites if s.op_kind == "add" and s.ops]
    readers = [s for s in sites if s.op_kind != "add" and s.ops and s.tensor in place]
    found: dict[str, str] = {}
    for site in sites:
        if not site.ops:
            continue
        here = place.get(site.ops[0], -1)
        reader = _reader(here, readers, place)
        last = len(place) if reader is None else place[str(reader.tensor)]
        between = [a for a in additions if here < place.get(a.ops[0], -1) <= last]
        after = min(between, key=lambda a: place[a.ops[0]], default=reader)
        if after is not None and after.pinned is None:
            found[site.name] = after.name
    return found


def _reader(here: int, readers: Sequence[Site], place: Mapping[str, int]) -> Site | None:
    """The first layer that reads the next tensor that is written at a place or behind it."""
    after = [s for s in readers if place[str(s.tensor)] >= here]
    key = lambda s: (place[str(s.tensor)], place.get(s.ops[0], -1))  # noqa: E731
    return min(after, key=key, default=None)


def choose_ways(
    times: Sequence[NodeTime],
    laws: Laws,
    owners: Mapping[str, Site],
    assignments: Sequence[Mapping[str, Level]],
    ways: Ways,
) -> Ways:
    """The ways of all sites, kind by kind: another than their own where errors tell it.

    Depthwise convolutions are taken or left with all others: at aligned counts they are as fast in floats
    as in integers, so that alone they tell little.

    Args:
        times: Of nodes by the formats that builds were set to.
        laws: Fitted on them.
        owners: Node -> the format site that it belongs to.
        assignments: Of each build.
        ways: Who reads what; all ways their own.
    """
    kinds: dict[str, list[NodeTime]] = {}
    for row in times:
        if row.node in owners and row.ms > 0 and row.facts.out_elements > 0:
            kinds.setdefault(row.facts.kind, []).append(row)
    groups: dict[str, list[_Found]] = {}
    for kind, rows in kinds.items():
        int8 = [row for row in rows if row.format == "int8"]
        sites = [owners[row.node].name for row in int8]
        fused = [
            s in ways.readers and is_eight_bit(assignments[row.build].get(ways.readers[s]))
            for s, row in zip(sites, int8, strict=True)
        ]
        if (kind, ways.precision) in laws.laws and any(fused) and not all(fused):
            native = [row for row in rows if row.format != "int8"]
            tiles = (laws.laws[kind, ways.precision].tiles, laws.laws[kind, "int8"].tiles)
            own = _of_kind(_squares(native, int8, np.array(fused), tiles), sites, fused)
            groups.setdefault(_TOGETHER.get(kind, kind), []).append(own)
    told = [row for own in groups.values() if _is_told(own) for row in own]
    return replace(ways, found={site: way for row in told for site, way in row.ways.items()})


def _is_told(kinds: Sequence["_Found"]) -> bool:
    """Whether the other ways do better than their own."""
    return sum(k.least for k in kinds) < _TELLING * sum(k.own for k in kinds)


@dataclass(frozen=True, slots=True)
class _Found:
    """The ways of one kind's sites if not their own, and the squared errors in those and in their own."""

    ways: Mapping[str, Way]
    least: float
    own: float


def _of_kind(squares: Mapping[Way, Vector], sites: Sequence[str], fused: Sequence[bool]) -> _Found:
    """The ways of the sites of one kind.

    A kind is computed in one manner or in the other: an op has too few builds to be an exception.

    Args:
        squares: Way -> squared errors, a row at int8 each.
        sites: Of each row.
        fused: Of each row, whether what reads it is int8 as well.
    """
    owner, least = np.array(sites), 0.0
    found: dict[str, Way] = {}
    for site in dict.fromkeys(sites):
        mine = owner == site
        native, reader = (float(np.sum(squares[way][mine])) for way in ("native", "reader"))
        least += min(native, reader)
        # Where it is fused in no build, nothing tells the two ways apart.
        is_native = native <= _SLACK * reader or not np.any(np.array(fused)[mine])
        found[site] = "native" if is_native else "reader"
    return _Found(found, least, float(np.sum(squares["own"])))


def _squares(
    native: Sequence[NodeTime],
    int8: Sequence[NodeTime],
    fused: Mask,
    tiles: tuple[Tiles, Tiles],
) -> dict[Way, Vector]:
    """Squared logs of time over law, in each way, of rows at int8 that the laws did not see.

    They are 0 where no other build tells of the op; where it is fused in no other, what its own way
    says counts for that of its reader.
    """
    found: dict[Way, Vector] = {way: np.zeros(len(int8)) for way in get_args(Way)}
    builds = np.array([row.build for row in int8])
    for seen in folds(builds):
        apart = set(builds[~seen].tolist())
        known = [row for row, is_seen in zip(int8, seen, strict=True) if is_seen]
        closed = [row for row, f in zip(known, fused[seen], strict=True) if f]
        laws = (
            _law([row for row in native if row.build not in apart], tiles[0]),
            _law(known, tiles[1]),
            _law(closed, tiles[1]),
        )
        for i in np.flatnonzero(~seen).tolist():
            as_native, own, whole = (_square(int8[i], law) for law in laws)
            if as_native is None or own is None:
                continue
            found["native"][i], found["own"][i] = as_native, own
            found["reader"][i] = as_native if not fused[i] else own if whole is None else whole
    return found


def _law(rows: Sequence[NodeTime], tiles: Tiles) -> tuple[Law, dict[str, float]] | None:
    return fit_law(rows, tiles) if rows else None


def _square(row: NodeTime, law: tuple[Law, dict[str, float]] | None) -> float | None:
    """Squared log of a row's time over its law; None where that does not know the node."""
    if law is None or row.node not in law[1]:
        return None
    predicted = law[1][row.node] * law[0].ms(row.facts)
    return math.log((row.ms + RESOLUTION_MS) / (predicted + RESOLUTION_MS)) ** 2
