"""What a graph node computes, and how that follows the kept counts of the widths.

Sizes are affine in a count and a node's numbers are products of sizes, so that each number is a
polynomial of degree two in one width: the full, the middle and the least count give it at every
other. Several widths multiply (rows and columns of a weight) or add (parts of a concatenation);
one graph with all of them at their least tells which, number by number. A branch that is gone
takes its nodes with it whatever their widths are: its ratios always multiply.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from tersor.core.errors import ConfigError
from tersor.core.records import Level, Precision, Site
from tersor.graph.facts import NodeFacts
from tersor.price.chains import Chain, learn_chains, middle, ranked
from tersor.price.variants import counted, native_assignment

SIZES = ("macs", "weight_elements", "in_elements", "out_elements", "inputs", "outputs")
_EQUAL = 1e-9  # of a ratio, interpolated
_INPUTS, _OUTPUTS = SIZES.index("inputs"), SIZES.index("outputs")

Facts = Callable[[Mapping[str, Level]], Mapping[str, NodeFacts]]
Rule = Literal["product", "sum", "sides"]  # sides: what moves inputs times what moves outputs
_PRODUCTS: tuple[Rule, ...] = tuple("product" for _ in SIZES)
_SIDES: tuple[Rule, ...] = tuple("sides" for _ in SIZES[:_INPUTS])


@dataclass(frozen=True, slots=True, kw_only=True)
class WidthFacts:
    """Facts of every node at any kept counts.

    Attributes:
        nodes: Native facts, in graph order.
        full: Width or branch -> its count, or level, when left alone.
        levels: Width or branch -> the counts, or levels, that it may have.
        branches: Those of ``full`` that are branches.
        ratios: Node -> width that moves it -> count -> each size over the native one.
        rules: Node that several widths move -> how each size follows them.
        chains: Site that offers ranks -> its layer as a chain.
    """

    nodes: Mapping[str, NodeFacts]
    full: Mapping[str, int]
    levels: Mapping[str, tuple[int, ...]]
    branches: frozenset[str]
    ratios: Mapping[str, Mapping[str, Mapping[int, tuple[float, ...]]]]
    rules: Mapping[str, tuple[Rule, ...]]
    chains: Mapping[str, Chain] = field(default_factory=dict)

    def widths(self, nodes: Sequence[str], of: str | None = None) -> tuple[str, ...]:
        """The widths that move any of some nodes, in the order of ``full``.

        ``of`` asks for one of ``SIZES`` only.
        """
        place = slice(None) if of is None else slice(SIZES.index(of), SIZES.index(of) + 1)
        moving = {
            w
            for node in nodes
            for w, row in self.ratios.get(node, {}).items()
            if any(abs(ratio - 1) > _EQUAL for sizes in row.values() for ratio in sizes[place])
        }
        return tuple(w for w in self.full if w in moving)

    def at(self, node: str, assignment: Mapping[str, Level]) -> NodeFacts:
        """Facts of a node; widths that are not listed are full.

        Raises:
            ConfigError: A count that is no level of its width.
        """
        native = self.nodes[node]
        moving: list[tuple[float, ...]] = []
        whole: list[tuple[float, ...]] = []
        for width in self.ratios.get(node, {}):
            ratio = self._ratio(node, width, assignment.get(width, self.full[width]))
            (whole if width in self.branches else moving).append(ratio)
        if not moving and not whole:
            return native
        own = combined(moving, self.rules.get(node, _PRODUCTS))
        ratios = combined([own, *whole], _PRODUCTS)
        sizes = zip(native.sizes(), ratios, strict=True)
        return NodeFacts(
            kind=native.kind,
            window=native.window,
            **{name: round(size * r) for name, (size, r) in zip(SIZES, sizes, strict=True)},
        )

    def layers(self, assignment: Mapping[str, Level]) -> dict[str, tuple[NodeFacts, NodeFacts]]:
        """Site that offers ranks -> facts of its layer itself, as assigned and at full counts."""
        return {site: self.layer(site, assignment) for site in self.chains}

    def layer(self, site: str, assignment: Mapping[str, Level]) -> tuple[NodeFacts, NodeFacts]:
        """Facts of the layer of one of ``chains``, as assigned and at full counts."""
        op = self.chains[site].op
        return self.at(op, assignment), self.nodes[op]

    def pivot(self, nodes: Sequence[str]) -> str:
        """The width that multiplies what the others add up to: one that moves outputs alone."""
        widths = [w for w in self.widths(nodes) if w not in self.branches]
        for width in widths:
            least = [r[width][min(r[width])] for n in nodes if width in (r := self.ratios[n])]
            if all(r[_OUTPUTS] != 1 and r[_INPUTS] == 1 for r in least):
                return width
        return widths[0]

    def _ratio(self, node: str, width: str, level: Level) -> tuple[float, ...]:
        row = self.ratios[node][width]
        if not isinstance(level, int) or level not in row:
            raise ConfigError(
                f"{node}: width {width} at {level!r} has no facts; there are "
                f"{', '.join(map(str, row))}"
            )
        return row[level]


def learn_facts(
    facts: Facts, sites: Sequence[Site], levels: Mapping[str, Sequence[Level]], precision: Precision
) -> WidthFacts:
    """Ask for the facts of a few graphs: native, each width at two counts, all at their least.

    And of one with all layers that offer ranks as chains.

    Raises:
        ConfigError: A width whose levels do not hold its full count.
    """
    widths = counted(sites, levels)
    native_levels = native_assignment(sites, precision)
    native = facts(native_levels)
    ratios: dict[str, dict[str, dict[int, tuple[float, ...]]]] = {}
    for width, counts in widths.items():
        known = {counts[0]: native}
        for count in sorted({counts[len(counts) // 2], counts[-1]} - {counts[0]}):
            known[count] = facts({**native_levels, width: count})
        for node, rows in _moved(native, known).items():
            ratios.setdefault(node, {})[width] = {c: _interpolated(rows, c) for c in counts}
    offers = ranked(sites, levels)
    chosen = {s: v for s, row in offers.items() if (v := middle(row, int8=False)) is not None}
    chains = facts({**native_levels, **chosen}) if chosen else {}
    branches = frozenset(s.name for s in sites if s.kind == "branch" and s.name in widths)
    cut = {w: counts[-1] for w, counts in widths.items() if w not in branches}
    least = facts({**native_levels, **cut}) if cut else native
    several = {
        node: moving
        for node, found in ratios.items()
        if len(moving := [row[cut[w]] for w, row in found.items() if w in cut]) > 1
    }
    return WidthFacts(
        nodes=native,
        full={w: counts[0] for w, counts in widths.items()},
        levels=widths,
        branches=branches,
        ratios=ratios,
        rules={
            node: _rules(moving, _relative(least.get(node), native[node]))
            for node, moving in several.items()
        },
        chains=learn_chains(sites, offers, chosen, chains),
    )


def combined(moving: Sequence[tuple[float, ...]], rules: Sequence[Rule]) -> tuple[float, ...]:
    """One ratio a size from the ratios of several widths."""
    inputs = _by_rule([r[_INPUTS] for r in moving], rules[_INPUTS])
    outputs = _by_rule([r[_OUTPUTS] for r in moving], rules[_OUTPUTS])
    return tuple(
        inputs * outputs if rule == "sides" else _by_rule([r[i] for r in moving], rule)
        for i, rule in enumerate(rules)
    )


def _by_rule(ratios: Sequence[float], rule: Rule) -> float:
    if rule == "sum":
        return max(0.0, 1.0 + sum(r - 1.0 for r in ratios))
    product = 1.0
    for ratio in ratios:
        product *= ratio
    return product


def _rules(moving: Sequence[tuple[float, ...]], actual: tuple[float, ...]) -> tuple[Rule, ...]:
    """The rule of each size that comes nearest to the graph with all widths at their least."""
    kinds: tuple[Rule, ...] = ("product", "sum")
    found: list[Rule] = [
        min(kinds, key=lambda k: abs(_by_rule([r[i] for r in moving], k) - actual[i]))
        for i in range(len(SIZES))
    ]
    sides = combined(moving, (*_SIDES, *found[_INPUTS:]))
    for i in range(_INPUTS):
        if abs(sides[i] - actual[i]) < abs(_by_rule([r[i] for r in moving], found[i]) - actual[i]):
            found[i] = "sides"
    return tuple(found)


def _moved(
    native: Mapping[str, NodeFacts], known: Mapping[int, Mapping[str, NodeFacts]]
) -> dict[str, dict[int, tuple[float, ...]]]:
    """Ratios at the known counts of the nodes that change; a node that is gone has only zeros."""
    rows = {
        node: {count: _relative(found.get(node), own) for count, found in known.items()}
        for node, own in native.items()
    }
    return {node: row for node, row in rows.items() if len(set(row.values())) > 1}


def _relative(facts: NodeFacts | None, native: NodeFacts) -> tuple[float, ...]:
    if facts is None:
        return (0.0,) * len(SIZES)
    pairs = zip(facts.sizes(), native.sizes(), strict=True)
    return tuple(size / of if of else 1.0 for size, of in pairs)


def _interpolated(rows: Mapping[int, tuple[float, ...]], count: int) -> tuple[float, ...]:
    """Lagrange's polynomial through the known counts: at most three, so of degree two."""
    total = [0.0] * len(SIZES)
    for at, row in rows.items():
        weight = 1.0
        for other in rows:
            if other != at:
                weight *= (count - other) / (at - other)
        total = [t + weight * r for t, r in zip(total, row, strict=True)]
    return tuple(total)
