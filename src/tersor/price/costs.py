"""What the nodes cost whose sizes widths decide: an op's own level times the law of its kind.

Ops of format sites cost by widths and format. So does glue that comes and goes with a format, as
a residual add does that is fused in one and stands alone in the other; all other glue costs by
widths alone. What grows with the elements of all these ops without being any node of theirs
(reorders, conversions) is a slope.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from math import prod

from tersor.core.rank_levels import is_int8, rank_of
from tersor.core.records import Format, Level, Precision, Site, Term
from tersor.graph.facts import NodeFacts
from tersor.price.chains import ChainCosts, chain_shares, chain_times
from tersor.price.facts import WidthFacts
from tersor.price.laws import Laws, NodeTime, fit_laws, grouped_error
from tersor.price.observation import Observation
from tersor.price.terms import spread

# A gate must tell at least this part of the variance of a node's presence, or of the squared error
# of its time.
GATE_SHARE = 0.5
_GATED_SHARE = (
    2e-3  # of a build's latency that a node takes in some build, else its format is no matter
)
_FEWEST_GATED = 4  # builds of each format that a law of its own needs
_MOST_ROWS = (
    4096  # of a node that are worked out at once: more widths than two are seldom asked for
)


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeCost:
    """An op of a format site, or one node of glue, that some width moves.

    Attributes:
        site: The format site whose level decides too; None where none does.
        formats: Its levels, the native one first.
        shares: (node, native or int8) -> in what part of such builds it stood alone.
        is_addition: The format is that of an addition's operands.
    """

    name: str
    nodes: tuple[str, ...]
    is_glue: bool
    site: str | None
    formats: tuple[Level, ...]
    shares: Mapping[tuple[str, Format], float]
    is_addition: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Slopes:
    """Glue that ops cause, in milliseconds: an int8 op, and all elements at full counts.

    ``boundary``: of a quantised tensor that an addition reads as floats.
    """

    int8_op: float = 0.0
    boundary: float = 0.0
    elements: float = 0.0
    int8_elements: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class WidthCosts:
    """All costs that widths decide, before they are written out as terms.

    Attributes:
        full_elements: What the covered ops of format sites write at full counts.
        chains: What layers cost at their ranks, those included that no width moves.
    """

    costs: tuple[NodeCost, ...]
    facts: WidthFacts
    laws: Laws
    precision: Precision
    full_elements: int
    chains: ChainCosts = field(default_factory=ChainCosts)

    def nodes(self) -> set[str]:
        """The nodes that these costs cover."""
        own = {node for cost in self.costs for node in cost.nodes}
        return own | {node for chain in self.chains.chains.values() for node in chain.nodes}

    def at_ranks(self, site: str) -> dict[str, float]:
        """Level -> time of a layer that no width moves, at each rank that builds have shown."""
        sizes = self.facts.layer(site, {}) if site in self.facts.chains else None
        if sizes is None:
            return {}
        known = self.chains.known(site)
        return {str(v): self.chains.ms(site, v, sizes, self.laws) for v in known}

    def sites(self) -> set[str]:
        """The format sites that these costs cover."""
        return {cost.name for cost in self.costs if not cost.is_glue}

    def elements(self, assignment: Mapping[str, Level]) -> tuple[float, float]:
        """What all covered ops, and those in int8, write: shares of what all write at full."""
        total = int8 = 0.0
        for cost in self.costs:
            if not cost.is_glue and not cost.is_addition:
                share = self._elements(cost, assignment)
                total += share
                int8 += share * is_int8(assignment.get(cost.name))
        return total, int8

    def terms(self, slopes: Slopes) -> tuple[tuple[NodeCost, Term], ...]:
        """Every cost written out, with the glue that it causes."""
        known = _Known(self.facts, self.laws)
        return tuple(
            (cost, term)
            for cost in self.costs
            for term in spread(
                cost.name,
                cost.nodes,
                {} if cost.site is None else {cost.site: cost.formats},
                self.facts,
                lambda assignment, cost=cost: self._ms(cost, assignment, slopes, known),  # type: ignore[misc]
            )
        )

    def _ms(
        self, cost: NodeCost, assignment: Mapping[str, Level], slopes: Slopes, known: "_Known"
    ) -> float:
        chosen = None if cost.site is None else assignment.get(cost.site)
        rounds = is_int8(chosen)
        level: Format = "int8" if rounds else self.precision
        total = elements = 0.0
        for node in cost.nodes:
            ms, written = known.at(node, level, assignment)
            total += ms * cost.shares.get((node, level), 0.0)
            elements += written / self.full_elements
        if cost.is_glue:
            return total
        if cost.is_addition:
            return total - rounds * slopes.boundary
        if chosen is not None and rank_of(chosen):
            sizes = self.facts.layer(cost.name, assignment)
            total = self.chains.ms(cost.name, chosen, sizes, self.laws)
        total += slopes.elements * elements
        return total + rounds * (slopes.int8_op + slopes.int8_elements * elements)

    def _elements(self, cost: NodeCost, assignment: Mapping[str, Level]) -> float:
        own = sum(self.facts.at(node, assignment).out_elements for node in cost.nodes)
        return own / self.full_elements


class _Known:
    """Times and written elements of nodes at all counts of their widths: a law at a time."""

    def __init__(self, facts: WidthFacts, laws: Laws) -> None:
        self._facts, self._laws = facts, laws
        self._nodes: dict[str, dict[tuple[Level, ...], NodeFacts]] = {}
        self._times: dict[tuple[str, Format], dict[tuple[Level, ...], float]] = {}

    def at(self, node: str, level: Format, assignment: Mapping[str, Level]) -> tuple[float, int]:
        """Milliseconds in a format, nothing where no build showed it; and elements written."""
        widths = tuple(self._facts.ratios.get(node, {}))
        counts = tuple(assignment.get(w, self._facts.full[w]) for w in widths)
        rows = self._rows(node, widths)
        if counts not in rows:
            found = self._facts.at(node, assignment)
            return self._laws.ms(node, level, found) or 0.0, found.out_elements
        if (node, level) not in self._times:
            times = self._laws.times(node, level, list(rows.values()))
            self._times[node, level] = dict(zip(rows, times, strict=True))
        return self._times[node, level][counts], rows[counts].out_elements

    def _rows(self, node: str, widths: Sequence[str]) -> dict[tuple[Level, ...], NodeFacts]:
        if node not in self._nodes:
            levels = [self._facts.levels[w] for w in widths]
            every = product(*levels) if prod(map(len, levels)) <= _MOST_ROWS else ()
            self._nodes[node] = {
                counts: self._facts.at(node, dict(zip(widths, counts, strict=True)))
                for counts in every
            }
        return self._nodes[node]


def width_costs(
    precision: Precision,
    sites: Sequence[Site],
    fitted: Sequence[Observation],
    facts: WidthFacts,
    quantizers: set[str],
) -> WidthCosts:
    """Fit the laws on all nodes with facts, and find what the moved ones cost by.

    Args:
        precision: Of the builds.
        sites: All sites.
        fitted: Builds that the fit may see.
        facts: Of all widths.
        quantizers: Names of the nodes that quantise tensors: priced by tensor.
    """
    formats = [s for s in sites if s.kind == "format"]
    owners = {node: site for site in formats for node in site.ops}
    sizes = [facts.layers(o.assignment) for o in fitted]
    shown = {node for o in fitted for node, ms in o.node_ms.items() if ms > 0}
    glue = [n for n in facts.ratios if n in shown and n not in owners and n not in quantizers]
    gates = _gates(glue, formats, fitted, facts)
    times = [
        NodeTime(
            node=node,
            format=_format(owners.get(node) or gates.get(node), o, precision),
            build=i,
            facts=facts.at(node, o.assignment),
            ms=o.node_ms[node],
        )
        for i, o in enumerate(fitted)
        for node in facts.nodes
        if node in o.node_ms and node not in quantizers and not _is_chain(owners.get(node), o)
    ]
    for i, (o, own) in enumerate(zip(fitted, sizes, strict=True)):
        times += chain_times(facts.chains, (i, o), own, precision)
    laws = fit_laws(times)
    chains = ChainCosts(
        chains=facts.chains,
        shares=chain_shares(facts.chains, fitted, sizes, precision),
        precision=precision,
    )
    costs = [_site_cost(s, fitted, facts, chains) for s in formats if facts.widths(s.ops)]
    costs += [_glue_cost(node, gates[node], fitted, facts, chains) for node in glue]
    written = sum(
        facts.nodes[node].out_elements
        for c in costs
        if not c.is_glue and not c.is_addition
        for node in c.nodes
    )
    return WidthCosts(
        costs=tuple(costs),
        facts=facts,
        laws=laws,
        precision=precision,
        full_elements=max(1, written),
        chains=chains,
    )


def _format(site: Site | None, observation: Observation, precision: Precision) -> Format:
    rounds = site is not None and is_int8(observation.assignment.get(site.name))
    return "int8" if rounds else precision


def _is_chain(site: Site | None, observation: Observation) -> bool:
    return site is not None and rank_of(observation.assignment.get(site.name)) > 0


def _site_cost(
    site: Site, fitted: Sequence[Observation], facts: WidthFacts, chains: ChainCosts
) -> NodeCost:
    whole = [o for o in fitted if not _is_chain(site, o)]
    precision = chains.precision
    shares, has_int8 = _shares(site.ops, site, whole, facts, precision)
    formats: tuple[Level, ...] = (precision, "int8_weight", *(("int8",) if has_int8 else ()))
    return NodeCost(
        name=site.name,
        nodes=site.ops,
        is_glue=False,
        site=site.name if site.pinned is None else None,
        formats=(*formats, *chains.known(site.name)),
        shares=shares,
        is_addition=site.op_kind == "add",
    )


def _glue_cost(
    node: str,
    gate: Site | None,
    fitted: Sequence[Observation],
    facts: WidthFacts,
    chains: ChainCosts,
) -> NodeCost:
    precision = chains.precision
    shares, _ = _shares((node,), gate, fitted, facts, precision)
    ranks = () if gate is None else chains.known(gate.name)
    return NodeCost(
        name=node,
        nodes=(node,),
        is_glue=True,
        site=None if gate is None else gate.name,
        formats=(precision, "int8_weight", "int8", *ranks),
        shares=shares,
    )


def _gates(
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
    int8 = [site is not None and is_int8(o.assignment.get(site.name)) for o in alive]
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
        int8 = [is_int8(o.assignment.get(site.name)) for o in alive]
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


def _shares(
    nodes: Sequence[str],
    site: Site | None,
    fitted: Sequence[Observation],
    facts: WidthFacts,
    precision: Precision,
) -> tuple[dict[tuple[str, Format], float], bool]:
    """(node, format of a site) -> share of builds that show it; whether any build had int8."""
    shares: dict[tuple[str, Format], float] = {}
    levels = [_format(site, o, precision) for o in fitted]
    for node in nodes:
        for level in dict.fromkeys(levels):
            shown = [
                o.node_ms.get(node, 0.0) > 0
                for o, at in zip(fitted, levels, strict=True)
                if at == level and facts.at(node, o.assignment).out_elements > 0
            ]
            if shown:
                shares[node, level] = sum(shown) / len(shown)
    return shares, "int8" in levels
