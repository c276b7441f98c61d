"""What the nodes cost whose sizes widths decide: an op's own level times the law of its kind.

Ops of format sites cost by widths and format. So does glue that comes and goes with a format, as
a residual add does that is fused in one and stands alone in the other; all other glue costs by
widths alone. What grows with the elements of all these ops without being any node of theirs
(reorders, conversions) is a slope.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from math import prod

from tersor.core.rank_levels import is_eight_bit, rank_of
from tersor.core.records import Format, Level, Precision, Site, Term
from tersor.graph.facts import NodeFacts
from tersor.price.chains import ChainCosts, chain_shares, chain_times
from tersor.price.context import alone, in_context, with_additions
from tersor.price.facts import WidthFacts
from tersor.price.gates import find_gates
from tersor.price.laws import DEPTH_SIDE, Laws, NodeTime, fit_laws, warm_nodes
from tersor.price.node_costs import (
    Builds,
    NodeCost,
    Slopes,
    gated_format,
    glue_cost,
    is_any,
    is_chain,
    site_cost,
)
from tersor.price.observation import Observation
from tersor.price.terms import MAX_WIDTHS, Cost, spread
from tersor.price.ways import Ways, choose_ways, first_readers, followers

# Who writes and who reads what changes its format: places in ``Slopes.changed``.
CHANGES = ("layers", "to addition", "from addition")
_MOST_ROWS = (
    4096  # of a node that are worked out at once: more widths than two are seldom asked for
)


@dataclass(frozen=True, slots=True, kw_only=True)
class WidthCosts:
    """All costs that widths decide, before they are written out as terms.

    Attributes:
        full_elements: What the covered ops of format sites write at full counts.
        ways: How ops at int8 are computed.
        chains: What layers cost at their ranks, those included that no width moves.
    """

    costs: tuple[NodeCost, ...]
    facts: WidthFacts
    laws: Laws
    precision: Precision
    full_elements: int
    moved_elements: int
    additions: frozenset[str]
    tensors: Mapping[str, str]
    ways: Ways
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

    def elements(self, assignment: Mapping[str, Level]) -> tuple[float, ...]:
        """What ops write: all layers, those in int8, what is read in the other format, what is moved.

        Behind those in int8 what floats of depthwise layers read and write whose counts are no fours. As shares
        of what all layers write at full counts, and of what is moved then.
        """
        total = int8 = odd = moved = 0.0
        changed = [0.0] * (2 * len(CHANGES))
        for cost in self.costs:
            if cost.is_glue:
                moved += self._moved(cost, assignment)
                continue
            share = self._elements(cost, assignment)
            if not cost.is_addition:
                total += share
                int8 += share * is_eight_bit(assignment.get(cost.name))
                odd += self._odd(cost, assignment)
            if cost.is_changed(assignment):
                changed[self._change(cost, assignment)] += share
        return total, int8, odd, *changed, moved

    def _change(self, cost: NodeCost, assignment: Mapping[str, Level]) -> int:
        """Who writes and who reads, and whether in int8: a place in ``Slopes.changed``."""
        kind = "layers" if cost.follower not in self.additions else "to addition"
        place = CHANGES.index("from addition" if cost.is_addition else kind)
        return 2 * place + is_eight_bit(assignment.get(cost.name))

    def written(self) -> set[str]:
        """Tensors whose quantisers cost by the formats of who writes and who reads them."""
        readers = (c.follower for c in self.costs if c.follower is not None)
        return {self.tensors[site] for site in readers if site in self.tensors}

    def _moved(self, cost: NodeCost, assignment: Mapping[str, Level]) -> float:
        moves = [n for n in cost.nodes if self.facts.nodes[n].kind == "move"]
        own = sum(self.facts.at(node, assignment).out_elements for node in moves)
        return own / self.moved_elements

    def terms(self, slopes: Slopes) -> tuple[tuple[NodeCost, Term], ...]:
        """Every cost written out, with the glue that it causes.

        What changes format is apart: it depends on fewer widths than the op.
        """
        known = _Known(self.facts, self.laws)
        rows = [
            (cost, term)
            for cost in self.costs
            for term in spread(
                cost.name,
                cost.nodes,
                cost.choices(cost.partners),
                self.facts,
                self._each_once(cost, slopes, known),
            )
        ]
        return (*rows, *self._changes(slopes))

    def _each_once(self, cost: NodeCost, slopes: Slopes, known: "_Known") -> Cost:
        """A cost that is worked out once for all levels that are the same to it.

        Stored formats are native ones, and of what reads an op only int8 counts.
        """
        found: dict[tuple[object, ...], float] = {}

        def ms(assignment: Mapping[str, Level]) -> float:
            key = tuple(
                (site, is_eight_bit(level) if site in cost.partners else _CLASS.get(level, level))
                for site, level in assignment.items()
            )
            if key not in found:
                found[key] = self._ms(cost, assignment, slopes, known)
            return found[key]

        return ms

    def _changes(self, slopes: Slopes) -> Iterator[tuple[NodeCost, Term]]:
        """What it costs that a result is read in another format than it is written in."""
        for cost in self.costs:
            if cost.is_glue or cost.follower is None:
                continue
            ms = self._after(cost, slopes.changed)
            owner = replace(
                cost, name=f"{cost.name}, format", nodes=(), spread=slopes.changed_spread
            )
            sites = self._few(cost, cost.follower)
            for term in spread(owner.name, cost.nodes, sites, self.facts, ms, of="out_elements"):
                if any(term.values):
                    yield owner, term

    def _few(self, cost: NodeCost, follower: str) -> dict[str, tuple[Level, ...]]:
        """The formats that say whether a result changes its own: as many as can be written out.

        The layers beside it come last, and are taken for floats where their levels are too many: with ranks of
        queries, keys, values and their reader and two widths there are a million combinations.
        """
        widths = self.facts.widths(cost.nodes, "out_elements")
        counts = prod(len(self.facts.levels[w]) for w in widths[:MAX_WIDTHS])
        sites = cost.choices((follower,))
        for rival in cost.rivals:
            more = {**sites, **cost.choices((rival,))}
            if counts * prod(map(len, more.values())) <= _MOST_COMBINATIONS:
                sites = more
        return sites

    def _after(self, cost: NodeCost, slopes: Sequence[float]) -> Cost:
        """What it costs that a result is read in the same format or in another."""

        def ms(assignment: Mapping[str, Level]) -> float:
            changed = cost.is_changed(assignment)
            slope = slopes[self._change(cost, assignment)] if changed and slopes else 0.0
            total = slope * self._elements(cost, assignment) if slope else 0.0
            is_added = cost.follower in self.additions
            level = self.ways.format(cost.site, assignment)
            if (
                cost.is_addition
                or changed is is_added
                or (is_added and is_any(cost.rivals, level, assignment))
            ):
                return total
            for node in cost.nodes:
                law = self.laws.laws.get((self.facts.nodes[node].kind, level))
                own = self.laws.levels.get((node, level), 0.0)
                if law is not None:
                    written = self.facts.at(node, assignment).out_elements
                    total += own * law.per_written()[0 if is_added else 1] * written
            return total

        return ms

    def _ms(
        self, cost: NodeCost, assignment: Mapping[str, Level], slopes: Slopes, known: "_Known"
    ) -> float:
        chosen = None if cost.site is None else assignment.get(cost.site)
        rounds = is_eight_bit(chosen)
        plain: Format = "int8" if rounds else self.precision
        level = plain if cost.is_glue else self.ways.format(cost.site, assignment)
        total = elements = 0.0
        for node in cost.nodes:
            ms, written = known.at(node, level, assignment)
            total += ms * cost.share(node, level, assignment)
            elements += written / self.full_elements
        if cost.is_glue:
            return total + slopes.moved * self._moved(cost, assignment)
        if cost.is_addition:
            return total - rounds * slopes.boundary
        if chosen is not None and rank_of(chosen):
            sizes = self.facts.layer(cost.name, assignment)
            total = self.chains.ms(cost.name, chosen, sizes, self.laws)
        total += slopes.elements * elements
        if slopes.odd:
            total += slopes.odd * self._odd(cost, assignment)
        return total + rounds * (slopes.int8_op + slopes.int8_elements * elements)

    def _odd(self, cost: NodeCost, assignment: Mapping[str, Level]) -> float:
        """What floats of a depthwise layer read and write that leaves the blocked layout around it."""
        if self.ways.format(cost.site, assignment) == "int8":
            return 0.0
        single = [n for n in cost.nodes if self.facts.nodes[n].kind == "depthwise"]
        sizes = [self.facts.at(node, assignment) for node in single]
        own = sum(f.in_elements + f.out_elements for f in sizes if f.outputs % DEPTH_SIDE)
        return own / self.full_elements

    def _elements(self, cost: NodeCost, assignment: Mapping[str, Level]) -> float:
        own = sum(self.facts.at(node, assignment).out_elements for node in cost.nodes)
        return own / self.full_elements


# Of widths and formats in a term of what changes format: seconds to write out, a megabyte to keep.
_MOST_COMBINATIONS = 65_536
# Levels whose time is that of the native format.
_CLASS: Mapping[Level, str] = {"f32": "native", "bf16": "native", "int8_weight": "native"}


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


@dataclass(frozen=True, slots=True)
class _Read:
    """Builds, and whose each of their nodes is."""

    fitted: Sequence[Observation]
    facts: WidthFacts
    owners: Mapping[str, Site]
    gates: Mapping[str, Site | None]
    after: Mapping[str, str]
    quantizers: set[str]

    def times(self, ways: Ways) -> list[NodeTime]:
        """Node times in the formats that they are computed in."""
        owners = self.owners
        rows = [
            NodeTime(
                node=node,
                format=ways.format(owners[node].name, o.assignment)
                if node in owners
                else gated_format(self.gates.get(node), o, ways.precision),
                build=i,
                facts=self.facts.at(node, o.assignment),
                ms=o.node_ms[node],
            )
            for i, o in enumerate(self.fitted)
            for node in self.facts.nodes
            if node in o.node_ms
            and node not in self.quantizers
            and not is_chain(owners.get(node), o)
        ]
        return in_context(rows, owners, self.after, self.fitted)


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
    shown = {node for o in fitted for node, ms in o.node_ms.items() if ms > 0}
    glue = [n for n in facts.ratios if n in shown and n not in owners and n not in quantizers]
    gates = find_gates(glue, formats, fitted, facts)
    sizes = [facts.layers(o.assignment) for o in fitted]
    chained = [
        row
        for i, (o, own) in enumerate(zip(fitted, sizes, strict=True))
        for row in chain_times(facts.chains, (i, o), own, precision)
    ]
    after = followers(formats, facts)
    read = _Read(fitted, facts, owners, gates, after, quantizers)
    ways = Ways(precision=precision, readers=first_readers(formats, facts))
    rows = read.times(ways)
    laws = fit_laws([*rows, *chained])
    ways = choose_ways(rows, laws, owners, [o.assignment for o in fitted], ways)
    if ways.found:
        rows = read.times(ways)
        laws = fit_laws([*rows, *chained])
    laws = replace(laws, warm=warm_nodes(rows, facts.nodes))
    chains = ChainCosts(
        chains=facts.chains,
        shares=chain_shares(facts.chains, fitted, sizes, precision),
        precision=precision,
    )
    laws = with_additions(laws, formats, facts)
    known = Builds(fitted, facts, chains, ways, after, alone(formats, after, fitted, facts, ways))
    costs = [site_cost(s, known) for s in formats if _is_covered(s, facts)]
    costs += [glue_cost(node, gates[node], known) for node in glue]
    written = [n for c in costs if not c.is_glue and not c.is_addition for n in c.nodes]
    moves = [n for n in glue if facts.nodes[n].kind == "move"]
    return WidthCosts(
        costs=tuple(costs),
        facts=facts,
        laws=laws,
        precision=precision,
        full_elements=max(1, sum(facts.nodes[n].out_elements for n in written)),
        moved_elements=max(1, sum(facts.nodes[n].out_elements for n in moves)),
        additions=frozenset(s.name for s in formats if s.op_kind == "add"),
        tensors={s.name: s.tensor for s in formats if s.op_kind != "add" and s.tensor is not None},
        ways=ways,
        chains=chains,
    )


def _is_covered(site: Site, facts: WidthFacts) -> bool:
    """Whether a site has terms: widths move it, or the format of what is in front of it counts."""
    is_free_addition = site.op_kind == "add" and site.pinned is None
    return bool(facts.widths(site.ops)) or (
        is_free_addition and all(n in facts.nodes for n in site.ops)
    )
