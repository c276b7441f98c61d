"""From whole builds on the backend to price tables.

Builds are made, profiled and measured a few at a time, for memory; every batch has the reference
build in it, and its latencies are divided by the reference's drift, so that all tables speak of
the session in which the baseline was measured.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

from tersor.core.errors import BackendError, ConfigError
from tersor.core.formats import priced_as
from tersor.core.records import BuildChoice, Level, Precision, PriceTable, Site, Term
from tersor.price.activations import with_activations
from tersor.price.baseline import Call
from tersor.price.chains import ranked
from tersor.price.facts import WidthFacts, learn_facts
from tersor.price.memory import KeptTable, covers, drift, narrowed
from tersor.price.observation import Observation
from tersor.price.observing import measure_builds, measure_interleaved, observe_builds
from tersor.price.table import fit_table
from tersor.price.terms import size_terms
from tersor.price.tools import PriceTools
from tersor.price.variants import (
    Variant,
    counted,
    counts_between,
    draw_variants,
    full_assignment,
    quantizable,
    with_ranks,
)

# A choice whose all-int8 build is slower than the best one's of its backend by more is not priced
# further; nor is a backend whose fastest build, native ones included, is so against all others.
PROBE_MARGIN = 0.05
_SINGLE_UNITS = ("channels", "neurons")  # kinds of widths whose units are one element


@dataclass(frozen=True, slots=True, kw_only=True)
class PriceConfig:
    """How many builds make a table.

    Args:
        k: Builds that the fit sees.
        k_mixed: The same where widths and formats both vary, or ranks do (FINDINGS 1).
        held_out: Builds that only test it.
        batch: Builds that are alive at once, besides the reference.
        seed: Of the draw.
    """

    k: int = 12
    k_mixed: int = 26
    held_out: int = 4
    batch: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        if self.k < 2 or self.held_out < 0 or self.batch < 1:
            raise ConfigError(
                f"found k={self.k}, held_out={self.held_out}, batch={self.batch}; wanted k >= 2 "
                "(all native and all int8), held_out >= 0 and batch >= 1"
            )

    def fitted(self, sites: Sequence[Site], levels: Mapping[str, Sequence[Level]]) -> int:
        """Builds that the fit of one table sees, at most."""
        both = bool(counted(sites, levels)) and bool(quantizable(sites, levels))
        is_mixed = both or bool(ranked(sites, levels))
        return max(self.k, self.k_mixed) if is_mixed else self.k


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """The all-int8 build of a choice; None where it could not be built."""

    choice: BuildChoice
    measured_ms: float | None
    priced: bool
    reason: str = ""  # why it was not priced


@dataclass(frozen=True, slots=True, kw_only=True)
class Priced:
    """Tables of the choices that stay in the race, and how all of them were probed."""

    tables: tuple[PriceTable, ...]
    probes: tuple[Probe, ...]
    size_terms: tuple[Term, ...] = ()  # bytes that the widths decide


def price_all(
    choices: Sequence[BuildChoice],
    sites: Sequence[Site],
    levels: Mapping[str, Sequence[Level]],
    tools: PriceTools,
    config: PriceConfig,
) -> Priced:
    """Probe every choice by its all-int8 build, price those that may win.

    Args:
        choices: The ways to build, such as the baseline's with each option set of the backend.
        sites: Every site, pinned ones included, in graph order.
        levels: Site -> levels that method and backend offer; of a width the kept counts.
        tools: What is called.
        config: How many builds.

    Returns:
        At least one table. Where no site offers int8: of native entries, for the first choice
        and those of other backends that are about as fast.

    Raises:
        BackendError: No choice could be built.
    """
    facts = width_facts(sites, levels, tools, choices[0].precision, config.seed)
    terms = () if facts is None else _size_terms(offered(facts, levels), sites, levels, tools)
    if not quantizable(sites, levels):
        ways = _first_ways(choices, tools.native_ms)
        tables = tuple(price_choice(c, sites, levels, tools, config, facts) for c in ways)
        return Priced(tables=tables, probes=(), size_terms=terms)
    probes = _probe(choices, sites, levels, tools)
    tables = tuple(
        price_choice(p.choice, sites, levels, tools, config, facts) for p in probes if p.priced
    )
    return Priced(tables=tables, probes=probes, size_terms=terms)


def _size_terms(
    facts: WidthFacts,
    sites: Sequence[Site],
    levels: Mapping[str, Sequence[Level]],
    tools: PriceTools,
) -> tuple[Term, ...]:
    return size_terms(facts, sites, levels, tools.stored, tools.packed_bytes)


def price_choice(
    choice: BuildChoice,
    sites: Sequence[Site],
    levels: Mapping[str, Sequence[Level]],
    tools: PriceTools,
    config: PriceConfig,
    facts: WidthFacts | None = None,
) -> PriceTable:
    """The table of one way to build, fitted on whole builds and tested on held-out ones.

    ``facts`` are those of ``width_facts``, which all tables share; asked for where not given.
    """
    facts = facts or width_facts(sites, levels, tools, choice.precision, config.seed)
    levels = _taken(choice, levels, tools)
    drawn = draw_variants(
        sites,
        levels,
        choice.precision,
        k=config.fitted(sites, levels),
        held_out=config.held_out,
        seed=config.seed,
        between=between_offers(sites, levels, config.seed),
    )
    drawn = with_ranks(
        drawn,
        ranked(sites, levels),
        k=config.fitted(sites, levels),
        held_out=config.held_out,
        seed=config.seed,
    )
    variants = _settled(drawn, tools)
    known = _known_table(choice, sites, levels, variants, tools)
    if known is not None:
        return known
    observations = observe_builds(choice, variants, tools, config.batch)
    layers = [site for site in sites if site.op_kind != "activation"]
    table = fit_table(choice, layers, observations, tools.quantize_nodes, facts)
    table = with_activations(table, sites, levels, tools)
    table = replace(table, terms=tuple(_offered_term(term, levels) for term in table.terms))
    _keep_table(table, sites, levels, variants, observations, tools)
    return table


def free_levels(
    sites: Sequence[Site], levels: Mapping[str, Sequence[Level]]
) -> dict[str, tuple[Level, ...]]:
    """The levels of the sites that are not pinned, as far as their times differ."""
    return {
        s.name: tuple(dict.fromkeys(priced_as(v) for v in levels[s.name]))
        for s in sites
        if s.pinned is None and s.name in levels
    }


def _known_table(
    choice: BuildChoice,
    sites: Sequence[Site],
    levels: Mapping[str, Sequence[Level]],
    variants: Sequence[Variant],
    tools: PriceTools,
) -> PriceTable | None:
    """The table of an earlier session in which more was free: nothing has to be built for fewer.

    None where it had the same levels: then its builds are at hand, and are fitted anew.
    """
    free = free_levels(sites, levels)
    kept = None if tools.memory is None else tools.memory.table(choice)
    if tools.memory is None or kept is None or not covers(kept, free):
        return None
    reference = tools.memory.key(choice, variants[0].assignment)
    is_same = {s: set(own) for s, own in kept.levels.items()} == {
        s: set(n) for s, n in free.items()
    }
    if is_same or kept.reference != reference:
        return None
    now = measure_builds(choice, {0: variants[0]}, tools)
    factor = drift(now[0], kept.reference_ms) if now else None
    if factor is None:
        return None
    tools.note(f"{choice.describe()}: the table of an earlier run with more choices holds here")
    table = narrowed(kept.table, sites, free)
    builds = tuple(
        replace(b, measured_ms=b.measured_ms * factor, predicted_ms=b.predicted_ms * factor)
        for b in table.builds
    )
    return replace(table, scale=table.scale * factor, builds=builds)


def _keep_table(
    table: PriceTable,
    sites: Sequence[Site],
    levels: Mapping[str, Sequence[Level]],
    variants: Sequence[Variant],
    observations: Sequence[Observation],
    tools: PriceTools,
) -> None:
    native = [o.measured_ms for o in observations if o.assignment == variants[0].assignment]
    if tools.memory is None or not native:
        return
    kept = KeptTable(
        table=table,
        levels=free_levels(sites, levels),
        reference=tools.memory.key(table.choice, variants[0].assignment),
        reference_ms=native[0],
    )
    before = tools.memory.table(table.choice)
    if (
        before is None
        or before.reference != kept.reference
        or dict(before.levels) != kept.levels
        or drift(native[0], before.reference_ms) is None
    ):
        tools.memory.keep_table(table.choice, kept)


def _taken(
    choice: BuildChoice, levels: Mapping[str, Sequence[Level]], tools: PriceTools
) -> dict[str, tuple[Level, ...]]:
    """The levels that a way to build takes."""
    return {s: tuple(v for v in row if tools.runs(choice, s, v)) for s, row in levels.items()}


def between_offers(
    sites: Sequence[Site], levels: Mapping[str, Sequence[Level]], seed: int
) -> dict[str, tuple[int, ...]]:
    """Counts that are not on offer and yet built, to see what they cost; of widths of single units."""
    widths = counted(sites, levels)
    names = [s.name for s in sites if s.name in widths and s.unit_kind in _SINGLE_UNITS]
    return counts_between(widths, names, seed)


def offered(facts: WidthFacts, levels: Mapping[str, Sequence[Level]]) -> WidthFacts:
    """The facts with the levels that are on offer only."""
    kept = {w: tuple(n for n in own if n in levels[w]) for w, own in facts.levels.items()}
    return replace(facts, levels=kept)


def _offered_term(term: Term, levels: Mapping[str, Sequence[Level]]) -> Term:
    """The term without counts that are not on offer."""
    rows = [
        tuple(n for n in own if not isinstance(n, int) or n in levels[site])
        for site, own in zip(term.sites, term.levels, strict=True)
    ]
    if rows == list(term.levels):
        return term
    values = tuple(term.at(dict(zip(term.sites, at, strict=True))) for at in product(*rows))
    return replace(term, levels=tuple(rows), values=values)


def _settled(drawn: Sequence[Variant], tools: PriceTools) -> list[Variant]:
    """What is really built, each once: no fit may see what a held-out build is the same as."""
    found: dict[frozenset[tuple[str, Level]], Variant] = {}
    for variant in drawn:  # the held-out ones come last
        assignment = tools.settle(variant.assignment)
        found.setdefault(frozenset(assignment.items()), replace(variant, assignment=assignment))
    return list(found.values())


def width_facts(
    sites: Sequence[Site],
    levels: Mapping[str, Sequence[Level]],
    tools: PriceTools,
    precision: Precision,
    seed: int = 0,
) -> WidthFacts | None:
    """Sizes of all nodes at any kept counts and ranks; None where there are neither.

    Raises:
        ConfigError: There are widths or ranks, and no ``tools.facts`` to ask.
    """
    widths = counted(sites, levels)
    ranks = ranked(sites, levels)
    if not widths and not ranks:
        return None
    if tools.facts is None:
        raise ConfigError(
            f"found {len(widths)} widths and {len(ranks)} layers with ranks to price and no facts of their graphs; give "
            "PriceTools(facts=...)"
        )
    more = between_offers(sites, levels, seed)
    every = {**levels, **{w: sorted({*widths[w], *more[w]}, reverse=True) for w in more}}
    return learn_facts(tools.facts, sites, every, precision)


def _first_ways(
    choices: Sequence[BuildChoice], native_ms: Mapping[str, float]
) -> list[BuildChoice]:
    """The first choice of each backend whose native build is about as fast as the first one's."""
    firsts: dict[str, BuildChoice] = {}
    for choice in choices:
        firsts.setdefault(choice.backend, choice)
    limit = native_ms.get(choices[0].backend, math.inf) * (1 + PROBE_MARGIN)
    return [
        choice
        for choice in firsts.values()
        if choice is choices[0] or native_ms.get(choice.backend, math.inf) <= limit
    ]


def _probe(
    choices: Sequence[BuildChoice],
    sites: Sequence[Site],
    levels: Mapping[str, Sequence[Level]],
    tools: PriceTools,
) -> tuple[Probe, ...]:
    calls: dict[str, Call] = {}
    failures: dict[str, str] = {}
    for i, choice in enumerate(choices):
        try:
            own = _taken(choice, levels, tools)
            build = tools.build(choice, full_assignment(sites, own, choice.precision))
            calls[str(i)] = tools.caller(build)
        except BackendError as error:
            failures[str(i)] = str(error)
    if not calls:
        raise BackendError(
            f"found no int8 build among {len(choices)} choices, wanted at least one "
            f"({'; '.join(failures.values())}); leave int8 out with methods="
        )
    times = measure_interleaved(calls, tools)
    bests: dict[str, float] = {}
    for i, choice in enumerate(choices):
        ms = times.get(str(i), math.inf)
        bests[choice.backend] = min(bests.get(choice.backend, math.inf), ms)
    native = tools.native_ms
    reached = {name: min(ms, native.get(name, math.inf)) for name, ms in bests.items()}
    return tuple(
        _probed(choice, times.get(str(i)), bests, reached, failures.get(str(i), ""))
        for i, choice in enumerate(choices)
    )


def _probed(
    choice: BuildChoice,
    ms: float | None,
    bests: Mapping[str, float],
    reached: Mapping[str, float],
    failure: str,
) -> Probe:
    if ms is None:
        return Probe(choice=choice, measured_ms=None, priced=False, reason=failure)
    best, fastest = bests[choice.backend], min(reached.values())
    reason = ""
    if ms > best * (1 + PROBE_MARGIN):
        reason = f"its all-int8 build takes {ms / best - 1:.0%} more than the fastest"
    elif reached[choice.backend] > fastest * (1 + PROBE_MARGIN):
        more = reached[choice.backend] / fastest - 1
        reason = f"the best build of {choice.backend} takes {more:.0%} more than the fastest"
    return Probe(choice=choice, measured_ms=ms, priced=not reason, reason=reason)
