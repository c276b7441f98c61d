"""What cheaper activations save: whole builds with all of them against whole builds with none.

An activation is part of the kernel in front of it wherever a backend fuses the two, so that no node
of a profile shows what it takes. What a whole build gains is shared out by elements. It is measured
twice, all native and all int8, and the smaller gain is believed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from tersor.core.formats import ACTIVATIONS
from tersor.core.records import Level, PriceTable, Site
from tersor.price.observing import measure_builds
from tersor.price.tools import PriceTools
from tersor.price.variants import Variant, full_assignment, native_assignment

# Gains within this share of a build's time are its noise (docs/measuring.md).
NOISE = 0.01


def with_activations(
    table: PriceTable,
    sites: Sequence[Site],
    levels: Mapping[str, Sequence[Level]],
    tools: PriceTools,
) -> PriceTable:
    """A table that knows what replaced activations save; as given where none is on offer.

    A level that does not gain more than the noise gets no gain, and is refused for it
    (``price.refuse``); one that could not be built has no entry.

    Args:
        table: Fitted without them.
        sites: All sites.
        levels: Site -> levels on offer.
        tools: What is called.
    """
    free = [s for s in sites if s.op_kind == "activation" and s.pinned is None and s.name in levels]
    if not free:
        return table
    native, total = table.choice.precision, sum(site.units for site in free)
    rows: dict[str, dict[str, float]] = {site.name: {native: 0.0} for site in free}
    for level, gain in _gains(table, sites, levels, [s.name for s in free], tools).items():
        for site in free:
            if level in levels[site.name]:
                rows[site.name][level] = -gain * site.units / total / table.scale
    return replace(table, ops={**table.ops, **rows})


def _gains(
    table: PriceTable,
    sites: Sequence[Site],
    levels: Mapping[str, Sequence[Level]],
    names: Sequence[str],
    tools: PriceTools,
) -> dict[str, float]:
    """Level -> milliseconds that a build saves with all activations so."""
    choice = table.choice
    bases = [
        native_assignment(sites, choice.precision),
        full_assignment(sites, levels, choice.precision),
    ]
    found: dict[str, list[float]] = {}
    for base in [b for i, b in enumerate(bases) if b not in bases[:i]]:
        variants = {0: Variant(assignment=base)}
        for i, level in enumerate(ACTIVATIONS, 1):
            own = dict.fromkeys((n for n in names if level in levels[n]), level)
            if own:
                variants[i] = Variant(assignment={**base, **own})
        times = measure_builds(choice, variants, tools)
        for i, level in enumerate(ACTIVATIONS, 1):
            if i in times and 0 in times:
                gain = times[0] - times[i]
                found.setdefault(level, []).append(gain if gain > NOISE * times[0] else 0.0)
    return {level: min(gains) for level, gains in found.items()}
