"""Glue that goes by a format: which site decides whether a node stands alone, or how long it takes."""

from collections.abc import Mapping, Sequence

from tersor.core.rank_levels import is_eight_bit
from tersor.core.records import Site
from tersor.price.facts import WidthFacts
from tersor.price.laws import NodeTime, grouped_error
from tersor.price.observation import Observation

# A gate must tell at least this part of the variance of a node's presence, or of the squared error
# of its time.
GATE_SHARE = 0.5
_GATED_SHARE = (
    2e-3  # of a build's latency that a node takes in some build, else its format is no matter
)
_FEWEST_GATED = 4  # builds of each format that a law of its own needs


def find_gates(
    nodes: Sequence[str], sites: Sequence[Site], fitted: Sequence[Observation], facts: WidthFacts
) -> dict[str, Site | None]:
    """The format site that decides whether a node stands alone, or how long it takes.

    A pool in front of an int8 layer works on another layout than in front of a float one, and so it
    is the next layer that is asked; of all of them one would always seem to tell.
    """
    place = {name: i for i, name in enumerate(facts.nodes)}
    found: dict[str, Site | None] = {}
    for node in nodes:
        distance = {s.name: min(abs(place[node] - place.get(op, 0)) for op in s.ops) for s in sites}
        alive = [o for o in fitted if facts.at(node, o.assignment).out_elements > 0]
        shown = [o.node_ms.get(node, 0.0) > 0 for o in alive]
        free = [s for s in sites if s.pinned is None]
        if not all(shown):
            found[node] = _gate(free, distance, shown, alive)
        elif max(o.node_ms[node] / o.measured_ms for o in alive) >= _GATED_SHARE:
            after = [s for s in free if min(place.get(op, 0) for op in s.ops) > place[node]]
            following = min(after, key=lambda s: place.get(s.ops[0], 0), default=None)
            found[node] = following if _needs_laws(node, following, alive, facts) else None
        else:
            found[node] = None
    return found


def _needs_laws(
    node: str, site: Site | None, alive: Sequence[Observation], facts: WidthFacts
) -> bool:
    """Whether a node needs a law for each format of a site: where one law does not do as well."""
    int8 = [site is not None and is_eight_bit(o.assignment.get(site.name)) for o in alive]
    if min(sum(int8), len(int8) - sum(int8)) < _FEWEST_GATED:
        return False
    rows = [
        NodeTime(
            node=node,
            format="f32",
            build=i,
            facts=facts.at(node, o.assignment),
            ms=o.node_ms[node],
        )
        for i, o in enumerate(alive)
    ]
    alone = grouped_error(rows, [False] * len(rows))
    return grouped_error(rows, int8) < (1 - GATE_SHARE) * alone


def _gate(
    sites: Sequence[Site],
    distances: Mapping[str, int],
    shown: Sequence[bool],
    alive: Sequence[Observation],
) -> Site | None:
    """The site that decides whether a node stands alone: the best one, nearest of equals."""
    best: tuple[float, int] = (GATE_SHARE, 0)
    found: Site | None = None
    for site in sites:
        int8 = [is_eight_bit(o.assignment.get(site.name)) for o in alive]
        if all(int8) or not any(int8):
            continue
        distance = distances[site.name]
        told = 1 - _within(shown, int8) / _within(shown, [False] * len(shown))
        if (told, -distance) > best or (found is None and told >= GATE_SHARE):
            best, found = (told, -distance), site
    return found


def _within(shown: Sequence[bool], groups: Sequence[bool]) -> float:
    """Sum of squared deviations from the mean of each of two groups."""
    total = 0.0
    for group in (False, True):
        values = [float(s) for s, g in zip(shown, groups, strict=True) if g is group]
        mean = sum(values) / len(values) if values else 0.0
        total += sum((v - mean) ** 2 for v in values)
    return total
