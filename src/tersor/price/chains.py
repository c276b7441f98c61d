"""What a layer costs as a chain of two thinner ones: by the laws of the kinds of its ops.

The first op does what its layer did for ``rank`` outputs, the last one reads ``rank`` channels: sizes
are proportional to the rank, so that one graph with every chain in it tells them at every rank, and at
every kept count of the widths around the layer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from tersor.core.rank_levels import RankLevel, is_eight_bit, rank_of
from tersor.core.records import Format, Level, Precision, Site
from tersor.graph.apply import quantize_node_name
from tersor.graph.factors import chain_names
from tersor.graph.facts import NodeFacts
from tersor.price.laws import Laws, NodeTime
from tersor.price.observation import Observation

_LENGTH = 2  # ops of a chain whose rank is one number


@dataclass(frozen=True, slots=True, kw_only=True)
class Chain:
    """One layer as two ops.

    Attributes:
        op: The layer's node, which the last op keeps.
        rank: At which the facts were taken.
        levels: What is on offer, the native format first.
        first, last: Facts at full counts of all widths.
    """

    op: str
    rank: int
    levels: tuple[RankLevel, ...]
    first: NodeFacts
    last: NodeFacts

    @property
    def nodes(self) -> tuple[str, ...]:
        """Names that profiles may show: both ops, and what rounds the tensor between them."""
        first, last = chain_names(self.op, _LENGTH)
        return first, quantize_node_name(first), last

    @property
    def is_centred(self) -> bool:
        """Whether the first op has a bias in int8: nothing behind it adds zeros."""
        return self.last.window == 1

    def at(self, rank: int, dense: NodeFacts, full: NodeFacts) -> tuple[NodeFacts, NodeFacts]:
        """Facts of both ops at a rank, in a layer of other sizes.

        Args:
            rank: Channels between them.
            dense: Facts of the layer itself at the kept counts in question.
            full: The same at full counts.
        """
        own = rank / self.rank
        read, written = _ratio(dense.inputs, full.inputs), _ratio(dense.outputs, full.outputs)
        before = _ratio(dense.in_elements, full.in_elements)
        after = _ratio(dense.out_elements, full.out_elements)
        rows = after / written if written else 0.0  # positions stay, unless a branch is gone
        return (
            _scaled(self.first, (own * read, before, own * rows, read, own)),
            _scaled(self.last, (own * written, own * rows, after, own, written)),
        )


def _ratio(now: int, of: int) -> float:
    return now / of if of else 1.0


def _scaled(facts: NodeFacts, ratios: tuple[float, float, float, float, float]) -> NodeFacts:
    """Facts times what becomes of products, of what is read and written, and of both sides."""
    products, read, written, inputs, outputs = ratios
    return replace(
        facts,
        macs=round(facts.macs * products),
        weight_elements=round(facts.weight_elements * products),
        in_elements=round(facts.in_elements * read),
        out_elements=round(facts.out_elements * written),
        inputs=round(facts.inputs * inputs),
        outputs=round(facts.outputs * outputs),
    )


def ranked(
    sites: Sequence[Site], levels: Mapping[str, Sequence[Level]]
) -> dict[str, tuple[RankLevel, ...]]:
    """Sites that offer ranks -> those levels; pinned ones offer none."""
    found: dict[str, tuple[RankLevel, ...]] = {}
    for site in sites:
        own = tuple(v for v in levels.get(site.name, ()) if isinstance(v, RankLevel))
        if own and site.pinned is None and site.kind == "format":
            found[site.name] = own
    return found


def middle(levels: Sequence[RankLevel], *, int8: bool) -> RankLevel | None:
    """The middle one of a site's ranks in floats or in int8; None where there is none."""
    own = sorted((v for v in levels if is_eight_bit(v) == int8), key=rank_of)
    return own[len(own) // 2] if own else None


def learn_chains(
    sites: Sequence[Site],
    levels: Mapping[str, tuple[RankLevel, ...]],
    chosen: Mapping[str, RankLevel],
    facts: Mapping[str, NodeFacts],
) -> dict[str, Chain]:
    """Site -> its chain, from the facts of one graph in which all sites of ``chosen`` are chains."""
    found: dict[str, Chain] = {}
    for site in sites:
        level = chosen.get(site.name)
        if level is None:
            continue
        first, last = chain_names(site.ops[0], _LENGTH)
        if first in facts and last in facts:
            found[site.name] = Chain(
                op=site.ops[0],
                rank=rank_of(level),
                levels=tuple(
                    sorted(levels[site.name], key=lambda v: (is_eight_bit(v), -rank_of(v)))
                ),
                first=facts[first],
                last=facts[last],
            )
    return found


@dataclass(frozen=True, slots=True)
class _Part:
    """One op of a chain: the name of its own level of the law, of its node, its format and facts."""

    name: str
    node: str
    format: Format
    facts: NodeFacts


def chain_parts(
    chain: Chain, level: Level, sizes: tuple[NodeFacts, NodeFacts], precision: Precision
) -> tuple[_Part, ...]:
    """The ops of a chain at a level; ``sizes`` of the layer itself, now and at full counts.

    As a chain's ops differ from the layer whose node the last one keeps, their levels of the laws
    have names of their own.
    """
    dense, full = sizes
    if not dense.out_elements:  # the branch around it is gone
        return ()
    first, last = chain.at(rank_of(level), dense, full)
    way: Format = "int8" if is_eight_bit(level) else precision
    nodes = chain.nodes
    parts = [_Part(nodes[0], nodes[0], way, first), _Part(f"{nodes[0]}_last", nodes[2], way, last)]
    if way == "int8":
        written = first.out_elements
        rounding = NodeFacts(
            kind="elementwise",
            in_elements=written,
            out_elements=written,
            inputs=first.outputs,
            outputs=first.outputs,
        )
        parts.append(_Part(nodes[1], nodes[1], precision, rounding))
    return tuple(parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChainCosts:
    """What chains cost, once laws are fitted.

    Attributes:
        shares: (name, whether int8) of an op -> in what part of the builds with such a chain it
            stood alone; absent where no build had one.
    """

    chains: Mapping[str, Chain] = field(default_factory=dict)
    shares: Mapping[tuple[str, bool], float] = field(default_factory=dict)
    precision: Precision = "f32"

    def known(self, site: str) -> tuple[RankLevel, ...]:
        """The levels of a site that builds have shown, in their format at some rank."""
        chain = self.chains.get(site)
        if chain is None:
            return ()
        return tuple(v for v in chain.levels if (chain.nodes[0], is_eight_bit(v)) in self.shares)

    def ms(self, site: str, level: Level, sizes: tuple[NodeFacts, NodeFacts], laws: Laws) -> float:
        """Time of a chain at a known level; ``sizes`` as for ``chain_parts``."""
        return sum(
            (laws.ms(part.name, part.format, part.facts) or 0.0)
            * self.shares.get((part.name, is_eight_bit(level)), 0.0)
            for part in chain_parts(self.chains[site], level, sizes, self.precision)
        )


def chain_times(
    chains: Mapping[str, Chain],
    build: tuple[int, Observation],
    sizes: Mapping[str, tuple[NodeFacts, NodeFacts]],
    precision: Precision,
) -> list[NodeTime]:
    """The times of the chains of one build; ``sizes`` of each layer, now and at full counts."""
    i, seen = build
    return [
        NodeTime(
            node=part.name,
            format=part.format,
            build=i,
            facts=part.facts,
            ms=seen.node_ms[part.node],
        )
        for site, chain in chains.items()
        if rank_of(seen.assignment.get(site))
        for part in chain_parts(chain, seen.assignment[site], sizes[site], precision)
        if part.node in seen.node_ms
    ]


def chain_shares(
    chains: Mapping[str, Chain],
    fitted: Sequence[Observation],
    sizes: Sequence[Mapping[str, tuple[NodeFacts, NodeFacts]]],
    precision: Precision,
) -> dict[tuple[str, bool], float]:
    """The shares of ``ChainCosts``; ``sizes`` of each build."""
    shown: dict[tuple[str, bool], list[bool]] = {}
    for seen, own in zip(fitted, sizes, strict=True):
        for site, chain in chains.items():
            level = seen.assignment.get(site)
            if level is None or not rank_of(level):
                continue
            for part in chain_parts(chain, level, own[site], precision):
                alone = seen.node_ms.get(part.node, 0.0) > 0
                shown.setdefault((part.name, is_eight_bit(level)), []).append(alone)
    return {key: sum(row) / len(row) for key, row in shown.items()}
