"""Whose cost a node is: the op of a format site, or one node of glue, and what decides about it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from tersor.core.rank_levels import is_eight_bit, rank_of
from tersor.core.records import Format, Level, Precision, Site
from tersor.price.chains import ChainCosts
from tersor.price.facts import WidthFacts
from tersor.price.observation import Observation
from tersor.price.ways import Ways


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeCost:
    """An op of a format site, or one node of glue, that some width moves.

    Attributes:
        site: The format site whose level decides too; None where none does.
        formats: Its levels, the native one first.
        shares: (node, what it is computed in) -> in what part of such builds it stood alone.
        is_addition: The format is that of an addition's operands.
        reader: The format site that first reads what it writes; None where none is free.
        is_fused: It computes in int8 only where the reader is int8 as well.
        follower: The same with residual additions: what the result is read by first.
        writers: Of an addition the layers in front: it is fused into the first that is of its format.
        rivals: Layers in front whose result goes to the same addition.
        alone: Addition's node, what it is computed in, whether a writer is of the same format -> in
            what part of the builds it stood alone.
        known: Each of these format sites -> its levels, the native one first.
        spread: Relative deviation of the cost in one build, of what has no nodes to show it.
    """

    name: str
    nodes: tuple[str, ...]
    is_glue: bool
    site: str | None
    formats: tuple[Level, ...]
    shares: Mapping[tuple[str, Format], float]
    is_addition: bool = False
    reader: str | None = None
    is_fused: bool = False
    follower: str | None = None
    writers: tuple[str, ...] = ()
    rivals: tuple[str, ...] = ()
    alone: Mapping[tuple[str, Format, bool], float] = field(default_factory=dict)
    known: Mapping[str, tuple[Level, ...]] = field(default_factory=dict)
    spread: float | None = None

    def choices(self, others: Sequence[str]) -> dict[str, tuple[Level, ...]]:
        """The format sites that decide, the op's own first, and their levels."""
        found = {} if self.site is None else {self.site: self.formats}
        return {**found, **{site: self.known[site] for site in others}}

    @property
    def partners(self) -> tuple[str, ...]:
        """The other sites whose formats decide about the op itself."""
        if self.is_fused and self.reader is not None:
            return (self.reader,)
        return self.writers

    def share(self, node: str, level: Format, assignment: Mapping[str, Level]) -> float:
        """In what part of the builds with these formats a node stands alone."""
        if not self.writers:
            return self.shares.get((node, level), 0.0)
        return self.alone.get((node, level, is_any(self.writers, level, assignment)), 0.0)

    def is_changed(self, assignment: Mapping[str, Level]) -> bool:
        """Whether what the op writes is read in another format: int8 or not."""
        if self.follower is None:
            return False
        return is_eight_bit(assignment.get(self.name)) != is_eight_bit(
            assignment.get(self.follower)
        )


def is_any(sites: Sequence[str], level: Format, assignment: Mapping[str, Level]) -> bool:
    """Whether any of some sites is in a format: int8 or not."""
    return any(is_eight_bit(assignment.get(site)) == (level == "int8") for site in sites)


@dataclass(frozen=True, slots=True, kw_only=True)
class Slopes:
    """Glue that ops cause, in milliseconds: an int8 op, and all elements at full counts.

    ``boundary``: of a quantised tensor that an addition reads as floats. ``odd``: of elements that are read and
    written by floats of depthwise layers whose counts are no fours. ``changed``: of elements that
    are written in one format and read in the other, by who writes and reads; ``changed_spread`` is the
    relative deviation of these. ``moved``: of elements that are only moved.
    """

    int8_op: float = 0.0
    boundary: float = 0.0
    elements: float = 0.0
    int8_elements: float = 0.0
    odd: float = 0.0
    changed: tuple[float, ...] = ()
    moved: float = 0.0
    changed_spread: float = 0.0


def is_chain(site: Site | None, observation: Observation) -> bool:
    """Whether a build has a layer as a chain of two."""
    return site is not None and rank_of(observation.assignment.get(site.name)) > 0


@dataclass(frozen=True, slots=True)
class Builds:
    """The builds that a fit sees, and what was learned of all of them."""

    fitted: Sequence[Observation]
    facts: WidthFacts
    chains: ChainCosts
    ways: Ways
    followers: Mapping[str, str]
    alone: Mapping[tuple[str, Format, bool], float]


def site_cost(site: Site, known: Builds) -> NodeCost:
    """The cost of the op of a format site."""
    whole = [o for o in known.fitted if not is_chain(site, o)]
    name = None if site.pinned is not None else site.name
    reader = known.ways.readers.get(site.name)
    is_addition = site.op_kind == "add"
    follower = known.followers.get(site.name)
    same = [s for s, after in known.followers.items() if after == site.name]
    writers = tuple(same) if is_addition and name is not None else ()
    beside = [s for s, after in known.followers.items() if follower and after == follower]
    rivals = beside[: beside.index(site.name)] if site.name in beside else []
    others = [s for s in (reader, follower, *writers, *rivals) if s is not None]
    return NodeCost(
        name=site.name,
        nodes=site.ops,
        is_glue=False,
        site=name,
        formats=_formats(site.name, known),
        shares=_shares(
            site.ops, [(known.ways.format(site.name, o.assignment), o) for o in whole], known.facts
        ),
        is_addition=is_addition,
        reader=reader,
        is_fused=name is not None and known.ways.is_fused(name),
        follower=follower,
        writers=writers,
        rivals=tuple(rivals),
        alone=known.alone,
        known={s: _formats(s, known) for s in others},
    )


def _formats(site: str, known: Builds) -> tuple[Level, ...]:
    """The levels of a format site that builds have shown, the native one first."""
    precision = known.ways.precision
    return (precision, "int8_weight", *_eight_bits(site, known), *known.chains.known(site))


def _eight_bits(site: str, known: Builds) -> tuple[Level, ...]:
    """The format of 8 bits that builds have shown a site in, if any."""
    levels = (o.assignment.get(site) for o in known.fitted)
    shown = (level for level in levels if level is not None)
    return tuple(dict.fromkeys(v for v in shown if is_eight_bit(v) and not rank_of(v)))


def glue_cost(node: str, gate: Site | None, known: Builds) -> NodeCost:
    """The cost of a node of glue, and the site whose format it goes by, if any."""
    precision = known.ways.precision
    ranks = () if gate is None else known.chains.known(gate.name)
    own = () if gate is None else _eight_bits(gate.name, known)
    return NodeCost(
        name=node,
        nodes=(node,),
        is_glue=True,
        site=None if gate is None else gate.name,
        formats=(precision, "int8_weight", *(own or ("int8",)), *ranks),
        shares=_shares(
            (node,), [(gated_format(gate, o, precision), o) for o in known.fitted], known.facts
        ),
    )


def gated_format(gate: Site | None, observation: Observation, precision: Precision) -> Format:
    """The format that a node of glue goes by."""
    rounds = gate is not None and is_eight_bit(observation.assignment.get(gate.name))
    return "int8" if rounds else precision


def _shares(
    nodes: Sequence[str], builds: Sequence[tuple[Format, Observation]], facts: WidthFacts
) -> dict[tuple[str, Format], float]:
    """(node, format) -> in what part of the builds with that format it stands alone."""
    shares: dict[tuple[str, Format], float] = {}
    for node in nodes:
        for level in dict.fromkeys(level for level, _ in builds):
            shown = [
                o.node_ms.get(node, 0.0) > 0
                for o_level, o in builds
                if o_level == level and facts.at(node, o.assignment).out_elements > 0
            ]
            if shown:
                shares[node, level] = sum(shown) / len(shown)
    return shares
