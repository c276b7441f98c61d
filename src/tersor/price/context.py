"""What a node's time depends on beside its own sizes: what ran before it, and what reads its result.

A kernel that has run before in a call is warm. A residual addition is computed by the first layer in front
of it that is of its format, and stands alone where none is. A result that a layer in another format reads
is written in another layout.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from tersor.core.records import Format, Site
from tersor.price.facts import WidthFacts
from tersor.price.laws import Context, Laws, NodeTime
from tersor.price.node_costs import is_any
from tersor.price.observation import Observation
from tersor.price.ways import Ways


def in_context(
    rows: Sequence[NodeTime],
    owners: Mapping[str, Site],
    after: Mapping[str, str],
    fitted: Sequence[Observation],
) -> list[NodeTime]:
    """Node times with what else of their builds they depend on.

    Args:
        rows: Build by build, in graph order.
        owners: Node -> the format site that it belongs to.
        after: Format site -> the free site that first reads what it writes (``ways.followers``).
        fitted: The builds.
    """
    additions = {site.name for site in owners.values() if site.op_kind == "add"}
    seen: set[object] = set()
    found: list[NodeTime] = []
    for row in rows:
        key = (row.build, row.facts, row.format)
        site = owners.get(row.node)
        context = Context(is_again=key in seen)
        if site is not None and site.name in after and site.name not in additions:
            assignment, follower = fitted[row.build].assignment, after[site.name]
            is_same = is_any((follower,), row.format, assignment)
            taken = is_any(rivals(site.name, after), row.format, assignment)
            context = replace(
                context,
                is_added=is_same and follower in additions and not taken,
                is_changed=not is_same and follower not in additions,
            )
        seen.add(key)
        found.append(replace(row, context=context))
    return found


def writers(after: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """Site -> those whose result it reads first, in graph order."""
    found: dict[str, tuple[str, ...]] = {}
    for site, follower in after.items():
        found[follower] = (*found.get(follower, ()), site)
    return found


def rivals(site: str, after: Mapping[str, str]) -> tuple[str, ...]:
    """The sites in front of one whose result goes to the same place."""
    same = writers(after).get(after.get(site, ""), ())
    return same[: same.index(site)] if site in same else ()


def alone(
    sites: Sequence[Site],
    after: Mapping[str, str],
    fitted: Sequence[Observation],
    facts: WidthFacts,
    ways: Ways,
) -> dict[tuple[str, Format, bool], float]:
    """Addition's node, its format, whether a layer in front has the same -> how often it stood alone.

    Each has few builds of every kind: what all additions do counts as one more.
    """
    in_front = writers(after)
    nodes = [(s.name, n) for s in sites if s.op_kind == "add" and s.name in in_front for n in s.ops]
    seen: dict[tuple[str, Format, bool], list[float]] = {}
    pooled: dict[tuple[Format, bool], list[float]] = {}
    for site, node in nodes:
        for o in fitted:
            if node in facts.nodes and facts.at(node, o.assignment).out_elements > 0:
                level = ways.format(site, o.assignment)
                kind = (level, is_any(in_front[site], level, o.assignment))
                is_alone = float(o.node_ms.get(node, 0.0) > 0)
                seen.setdefault((node, *kind), []).append(is_alone)
                pooled.setdefault(kind, []).append(is_alone)
    return {
        (node, *kind): (sum(own := seen.get((node, *kind), [])) + float(np.mean(row)))
        / (len(own) + 1)
        for _, node in nodes
        for kind, row in pooled.items()
    }


def with_additions(laws: Laws, sites: Sequence[Site], facts: WidthFacts) -> Laws:
    """Laws that know every addition in each format in which others of its kind stood alone."""
    nodes = [n for s in sites if s.op_kind == "add" for n in s.ops if n in facts.nodes]
    found = dict(laws.levels)
    for kind, level in laws.laws:
        own = [
            v
            for (n, f), v in laws.levels.items()
            if f == level and n in facts.nodes and facts.nodes[n].kind == kind
        ]
        for node in nodes if own else ():
            if facts.nodes[node].kind == kind:
                found.setdefault((node, level), float(np.median(own)))
    return replace(laws, levels=found)
