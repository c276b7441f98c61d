"""Costs over levels of several sites, written out as the terms of a plan; bytes are such costs.

A term has at most two widths and a format: a product of more has too many binaries. Where more
widths meet (a concatenation), one of them, the pivot, is in every term, and the others add up to
first order. A branch around an op has few levels and decides about all of it, so that it is in every
term as well.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import product

from tersor.core.errors import ConfigError
from tersor.core.formats import PACKED
from tersor.core.rank_levels import is_eight_bit, rank_of
from tersor.core.records import Level, Site, Term
from tersor.price.facts import WidthFacts

MAX_WIDTHS = 2  # in one term
_EQUAL = 1e-9  # of two pivots' errors, or of a cost at full counts
_FLOAT_BYTES = 4  # of a scale, and of the bias of a quantised op

Cost = Callable[[Mapping[str, Level]], float]
PackedBytes = Callable[[str, Level, int, int], int]  # site, level, rows, elements -> bytes


def no_packed_levels(site: str, level: Level, rows: int, elements: int) -> int:
    """Where nothing is packed: no level has such bytes."""
    raise ConfigError(f"{site}: found level {level!r} of {rows} rows and {elements} weights, "
                      "wanted to be told what it takes; give packed_bytes")  # fmt: skip


def spread(
    name: str,
    nodes: Sequence[str],
    formats: Mapping[str, Sequence[Level]],
    facts: WidthFacts,
    cost: Cost,
    of: str | None = None,
) -> tuple[Term, ...]:
    """The terms whose sum is a cost at every combination of levels.

    With more than two widths the sum is exact where at most the pivot and one other are below
    full; full, it is always exact. The pivot is the width with which it is off the least where all
    are below: heads of attention multiply what their queries' and their values' sizes add up to.

    Args:
        name: Of the op or weight.
        nodes: Nodes behind the cost; at least one is moved by a width.
        formats: The format sites that the cost depends on, with their levels; may be empty.
        facts: Which widths move the nodes.
        cost: Takes an assignment; widths that it does not list are full.
        of: The only size of the nodes that the cost depends on; None for all of them.
    """
    moving = facts.widths(nodes, of)
    branches = [w for w in moving if w in facts.branches]
    widths = [w for w in moving if w not in branches]
    levels = {**{w: facts.levels[w] for w in moving}, **formats}
    if len(widths) <= MAX_WIDTHS:
        return (_term(name, (*widths, *branches, *formats), levels, cost),)
    first = facts.pivot(nodes)
    pivot = _pivot(sorted(widths, key=lambda w: w != first), levels, cost)
    others = [w for w in widths if w != pivot]
    return tuple(
        _term(f"{name}, {w}", (w, pivot, *branches, *formats), levels, _part(cost, w, len(others)))
        for w in others
    )


def size_terms(
    facts: WidthFacts,
    sites: Sequence[Site],
    levels: Mapping[str, Sequence[Level]],
    stored: Mapping[str, int] | None = None,
    packed_bytes: PackedBytes = no_packed_levels,
) -> tuple[Term, ...]:
    """Bytes of each weight and bias that a width moves, by kept counts and format.

    They agree with the candidates at full counts: f32 and bf16 as given, int8 a byte an element, a
    scale an output and, except for embeddings, a bias; at a rank the same of both factors; a packed
    weight its bytes and such a bias.

    Args:
        facts: Of all widths.
        sites: All sites; a format site's first op holds its weight.
        levels: Format site -> formats that it offers.
        stored: Node -> bytes of what else it reads: tensors that no format site counts.
        packed_bytes: Bytes of a site's weight, without bias, at a packed level.

    Returns:
        None for sites whose bytes no width changes: their candidates say them.
    """
    found: list[Term] = []
    for site in sites:
        if not site.has_weight or not facts.widths(site.ops[:1]):
            continue
        offered = levels.get(site.name, ()) if site.pinned is None else ()
        formats = {site.name: tuple(dict.fromkeys(offered))} if offered else {}
        found += spread(
            site.name, site.ops[:1], formats, facts, _bytes_of(site, facts, packed_bytes)
        )
    for node, size in (stored or {}).items():
        if facts.widths([node]):
            found += spread(node, [node], {}, facts, _stored_bytes(node, size, facts))
    return tuple(found)


def _stored_bytes(node: str, size: int, facts: WidthFacts) -> Cost:
    whole = max(1, facts.nodes[node].weight_elements)
    return lambda assignment: round(size * facts.at(node, assignment).weight_elements / whole)


def _bytes_of(site: Site, facts: WidthFacts, packed_bytes: PackedBytes) -> Cost:
    node = site.ops[0]
    native = facts.nodes[node]
    elements, rows = native.weight_elements, site.shape[0]
    width = (
        _FLOAT_BYTES if site.size_bytes >= _FLOAT_BYTES * elements else site.size_bytes // elements
    )
    bias = site.size_bytes - width * elements

    def cost(assignment: Mapping[str, Level]) -> float:
        now = facts.at(node, assignment)
        if not now.out_elements:  # the branch around it is gone
            return 0.0
        level = assignment.get(site.name)
        if level is not None and rank_of(level):
            return _chain_bytes(site, level, assignment, facts, width)
        is_embedding = site.op_kind == "embedding"
        kept = rows if is_embedding else rows * now.outputs / native.outputs
        if level is not None and level in PACKED:
            own = packed_bytes(site.name, level, round(kept), now.weight_elements)
            return own + (0 if is_embedding else round(_FLOAT_BYTES * kept))
        if level == "int8_weight" or is_eight_bit(level):
            return round(now.weight_elements + _FLOAT_BYTES * kept * (1 if is_embedding else 2))
        return round(now.weight_elements * width + bias * kept / rows)

    return cost


def _chain_bytes(
    site: Site, level: Level, assignment: Mapping[str, Level], facts: WidthFacts, width: int
) -> float:
    """Of both factors, their steps and biases; ``width``: bytes of a float as given."""
    chain = facts.chains[site.name]
    first, last = chain.at(rank_of(level), *facts.layer(site.name, assignment))
    elements = first.inputs * first.outputs + last.inputs * last.outputs
    if not is_eight_bit(level):
        return width * (elements + last.outputs)
    rows = 2 * last.outputs + first.outputs * (2 if chain.is_centred else 1)
    return elements + _FLOAT_BYTES * rows


def _pivot(widths: Sequence[str], levels: Mapping[str, Sequence[Level]], cost: Cost) -> str:
    """The width to be in every term; the first of equals."""

    def off(pivot: str) -> float:
        total = 0.0
        for at in (least, middle):
            held = {pivot: at[pivot]}
            others = [w for w in widths if w != pivot]
            parts = sum(cost({**held, w: at[w]}) for w in others) - (len(others) - 1) * cost(held)
            total += abs(parts - cost(at))
        return total

    least = {w: levels[w][-1] for w in widths}
    middle = {w: levels[w][len(levels[w]) // 2] for w in widths}
    errors = {w: off(w) for w in widths}
    limit = min(errors.values()) * (1 + _EQUAL) + _EQUAL * abs(cost({}))
    return next(w for w in widths if errors[w] <= limit)


def _part(cost: Cost, width: str, n: int) -> Cost:
    """A width's own change, and an equal share of what the cost is with it full."""

    def part(assignment: Mapping[str, Level]) -> float:
        full = cost({site: level for site, level in assignment.items() if site != width})
        return cost(assignment) - (1 - 1 / n) * full

    return part


def _term(
    name: str, sites: tuple[str, ...], levels: Mapping[str, Sequence[Level]], cost: Cost
) -> Term:
    rows = tuple(tuple(levels[site]) for site in sites)
    values = tuple(
        float(cost(dict(zip(sites, combination, strict=True)))) for combination in product(*rows)
    )
    return Term(name=name, sites=sites, levels=rows, values=values)
