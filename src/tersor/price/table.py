"""A price table from whole builds: node times in context, and one scale.

Each entry is the mean time of a site's own nodes over the builds in which it had that format;
regressing end-to-end times instead is twice as wrong from ten builds (FINDINGS 1). What no site
owns is glue. It grows with the number of quantised tensors and of int8 sites, so those slopes go
to the quantisers and to the int8 entries; the constant stays. What widths decide costs by terms
(costs.py). At the end the sums are scaled to the measured latencies.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
from scipy.optimize import nnls
from scipy.stats import spearmanr

from tersor.core.errors import ConfigError
from tersor.core.rank_levels import is_eight_bit, rank_of
from tersor.core.records import BuildChoice, Level, PricedBuild, PriceTable, Site, Term
from tersor.price.costs import WidthCosts, width_costs
from tersor.price.facts import WidthFacts
from tersor.price.glue import glue_of, steadied, with_glue
from tersor.price.node_costs import NodeCost
from tersor.price.observation import Observation
from tersor.price.uncertainty import uncertain, with_entries

Vector = np.ndarray[Any, np.dtype[np.float64]]
QuantizeNodes = Callable[[str], Sequence[str]]  # tensor -> profile names of its quantiser

# How strongly the parts of a price are held to one common scale. Their times add up to what was measured,
# so that a part is off by what its laws are; held loosely, it takes up what another one is off by.
BALANCE = 0.7
MIN_FOR_RANKS = 4  # a rank correlation of fewer builds says nothing


@dataclass(frozen=True, slots=True, kw_only=True)
class FitError:
    """How far a table is off on builds that no fit saw."""

    n: int
    median: float  # of |predicted / measured - 1|
    p90: float
    spearman: float | None  # None for fewer than four builds, or equal predictions


def fit_table(
    choice: BuildChoice,
    sites: Sequence[Site],
    observations: Sequence[Observation],
    quantize_nodes: QuantizeNodes,
    facts: WidthFacts | None = None,
) -> PriceTable:
    """Fit a table on the observations that are not held out; predict them all.

    Args:
        choice: How all of them were built.
        sites: Every site, pinned ones included; a site's ``ops`` name its nodes.
        observations: At least one that is not held out.
        quantize_nodes: Names of the nodes that quantise a tensor; a fused one has no entry in
            the profile and costs nothing.
        facts: Of the widths and ranks that the builds varied; None without any.

    Returns:
        Entries >= 0; a format that no fitted build showed is absent, except that weight-only
        int8 costs what the native format does.

    Raises:
        ConfigError: Nothing to fit on, or a latency that is not positive.
    """
    fitted = _fitted(choice, observations)
    formats = [s for s in sites if s.kind == "format"]
    tensors = {s.name: s.tensor for s in formats if s.tensor is not None}

    def fit(seen: Sequence[Observation]) -> tuple[PriceTable, list[tuple[NodeCost, Term]]]:
        return _fit(choice, formats, seen, quantize_nodes, facts)

    table, owners = fit(fitted)
    builds = tuple(
        PricedBuild(
            assignment=o.assignment,
            measured_ms=o.measured_ms,
            predicted_ms=table.predict_ms(o.assignment, tensors),
            held_out=o.held_out,
        )
        for o in observations
    )
    uncertainty = uncertain(table, observations, tensors, lambda seen: fit(seen)[0])
    if uncertainty is not None:
        ops = _with_chains({s.name: s.ops for s in formats}, facts)
        uncertainty = with_entries(uncertainty, table, owners, ops, steadied(fitted))
    return replace(table, builds=builds, uncertainty=uncertainty)


def _fit(
    choice: BuildChoice,
    formats: Sequence[Site],
    fitted: Sequence[Observation],
    quantize_nodes: QuantizeNodes,
    facts: WidthFacts | None,
) -> tuple[PriceTable, list[tuple[NodeCost, Term]]]:
    """A table, and whose costs its terms are."""
    fitted = steadied(fitted)
    tensors = {s.name: s.tensor for s in formats if s.tensor is not None}
    costs = _costs(choice, formats, fitted, tensors, quantize_nodes, facts)
    moved = costs.sites() if costs else set[str]()
    table = PriceTable(
        choice=choice,
        ops=_site_prices(choice, [s for s in formats if s.name not in moved], fitted, costs),
        quantizers=_quantizer_prices(
            tensors, fitted, lambda t: () if costs and t in costs.written() else quantize_nodes(t)
        ),
        glue_ms=0.0,
        native={} if facts is None else facts.full,
    )
    written = set[str]() if costs is None else costs.written()
    glue = [
        glue_of(
            o,
            formats,
            {t: () if t in written else quantize_nodes(t) for t in _quantized(o, tensors)},
            costs,
        )
        for o in fitted
    ]
    additions = {s.name: s.tensor for s in formats if s.op_kind == "add"}
    table, slopes = with_glue(table, glue, additions)
    terms = [] if costs is None else list(costs.terms(slopes))
    table = replace(table, terms=tuple(term for _, term in terms))
    table = _balanced(table, tensors, fitted, [cost for cost, _ in terms])
    ratios = [o.measured_ms / table.predict_ms(o.assignment, tensors) for o in fitted]
    return replace(table, scale=float(np.median(ratios))), terms


def fit_error(table: PriceTable) -> FitError | None:
    """The error on the held-out builds; None without any."""
    pairs = [(b.predicted_ms, b.measured_ms) for b in table.builds if b.held_out]
    if not pairs:
        return None
    predicted, measured = np.array(pairs, dtype=np.float64).T
    off = np.abs(predicted / measured - 1)
    ranked = len(pairs) >= MIN_FOR_RANKS and np.ptp(predicted) > 0 and np.ptp(measured) > 0
    return FitError(
        n=len(pairs),
        median=float(np.median(off)),
        p90=float(np.percentile(off, 90)),
        spearman=float(spearmanr(predicted, measured).statistic) if ranked else None,
    )


def correct_table(
    table: PriceTable,
    assignment: Mapping[str, Level],
    tensors: Mapping[str, str],
    measured_ms: float,
) -> PriceTable:
    """Move the scale by one measured plan.

    After n calls the scale is the fitted one times the geometric mean of measured / predicted
    over all n plans: each ratio counts the same, whatever the order.

    Raises:
        ConfigError: The measured latency is not positive.
    """
    if not measured_ms > 0:
        raise ConfigError(f"{table.choice.describe()}: found a latency of {measured_ms} ms")
    n = table.corrections + 1
    ratio = measured_ms / table.predict_ms(assignment, tensors)
    return replace(table, scale=table.scale * ratio ** (1 / n), corrections=n)


def _fitted(choice: BuildChoice, observations: Sequence[Observation]) -> list[Observation]:
    """The builds that the fit may see, of a checked list."""
    fitted = [o for o in observations if not o.held_out]
    if not fitted:
        raise ConfigError(
            f"{choice.describe()}: found no build to fit prices on, wanted at least one that is "
            "not held out"
        )
    for o in observations:
        if not o.measured_ms > 0:
            raise ConfigError(f"{choice.describe()}: found a latency of {o.measured_ms} ms")
    return fitted


def _is_eight_bit(observation: Observation, site: str) -> bool:
    return is_eight_bit(observation.assignment.get(site))


def _nodes_ms(observation: Observation, names: Sequence[str]) -> float:
    return sum((observation.node_ms.get(name, 0.0) for name in names), 0.0)


def _quantized(observation: Observation, tensors: Mapping[str, str]) -> list[str]:
    return sorted({t for site, t in tensors.items() if _is_eight_bit(observation, site)})


def _with_chains(
    ops: Mapping[str, Sequence[str]], facts: WidthFacts | None
) -> dict[str, tuple[str, ...]]:
    """Site -> its nodes, those of a chain in its layer's place included."""
    chains = {} if facts is None else facts.chains
    return {
        site: tuple(dict.fromkeys((*own, *(chains[site].nodes if site in chains else ()))))
        for site, own in ops.items()
    }


def _site_prices(
    choice: BuildChoice,
    sites: Sequence[Site],
    fitted: Sequence[Observation],
    costs: WidthCosts | None,
) -> dict[str, dict[str, float]]:
    prices: dict[str, dict[str, float]] = {}
    for site in sites:
        row: dict[str, float] = {} if costs is None else costs.at_ranks(site.name)
        whole = [o for o in fitted if not rank_of(o.assignment.get(site.name))]
        native = [_nodes_ms(o, site.ops) for o in whole if not _is_eight_bit(o, site.name)]
        int8 = [o for o in whole if _is_eight_bit(o, site.name)]
        if native:
            row[choice.precision] = row["int8_weight"] = float(np.mean(native))
        if int8:
            level = str(int8[0].assignment[site.name])
            row[level] = float(np.mean([_nodes_ms(o, site.ops) for o in int8]))
        prices[site.name] = row
    return prices


def _quantizer_prices(
    tensors: Mapping[str, str], fitted: Sequence[Observation], quantize_nodes: QuantizeNodes
) -> dict[str, float]:
    times: dict[str, list[float]] = {}
    for observation in fitted:
        for tensor in _quantized(observation, tensors):
            times.setdefault(tensor, []).append(_nodes_ms(observation, quantize_nodes(tensor)))
    return {tensor: float(np.mean(found)) for tensor, found in sorted(times.items())}


def _costs(
    choice: BuildChoice,
    formats: Sequence[Site],
    fitted: Sequence[Observation],
    tensors: Mapping[str, str],
    quantize_nodes: QuantizeNodes,
    facts: WidthFacts | None,
) -> WidthCosts | None:
    if facts is None:
        return None
    quantizers = {name for tensor in tensors.values() for name in quantize_nodes(tensor)}
    return width_costs(choice.precision, formats, fitted, facts, quantizers)


def _balanced(
    table: PriceTable,
    tensors: Mapping[str, str],
    fitted: Sequence[Observation],
    owners: Sequence[NodeCost],
) -> PriceTable:
    """Scale native entries, int8 entries, quantisers and glue against each other, a little.

    Non-negative least squares on relative errors of the end-to-end times, held to one common
    scale by a ridge, so that a part which no build shows keeps that scale.
    """
    parts = np.array([_parts(table, o, tensors, owners) for o in fitted])
    measured = np.array([o.measured_ms for o in fitted])
    sums = parts.sum(axis=1)
    if not (sums > 0).all():
        raise ConfigError(
            f"{table.choice.describe()}: the profile of a build holds no time at all; "
            "the backend's profile() must return milliseconds by node"
        )
    common = float(np.median(measured / sums))
    rows = np.vstack([parts * common / measured[:, None], BALANCE * np.eye(parts.shape[1])])
    held = np.full(parts.shape[1], BALANCE)
    factors, _ = nnls(rows, np.concatenate([np.ones(len(fitted)), held]))
    native, int8, quantizer, glue = (float(f) for f in factors)
    return replace(
        table,
        ops={
            site: {
                level: ms * (int8 if is_eight_bit(level) else native) for level, ms in row.items()
            }
            for site, row in table.ops.items()
        },
        quantizers={t: ms * quantizer for t, ms in table.quantizers.items()},
        glue_ms=table.glue_ms * glue,
        terms=tuple(
            _scaled(term, *((glue, glue) if owner.is_glue else (native, int8)))
            for term, owner in zip(table.terms, owners, strict=True)
        ),
    )


def _scaled(term: Term, native: float, int8: float) -> Term:
    """A term with its values at int8 and all others scaled."""
    rows = [dict(zip(term.sites, row, strict=True)) for row in product(*term.levels)]
    factors = [int8 if term.is_eight_bit(row) else native for row in rows]
    values = tuple(v * f for v, f in zip(term.values, factors, strict=True))
    return replace(term, values=values)


def _parts(
    table: PriceTable,
    observation: Observation,
    tensors: Mapping[str, str],
    owners: Sequence[NodeCost],
) -> tuple[float, float, float, float]:
    native = int8 = 0.0
    for site, row in table.ops.items():
        # A fit on part of the builds may have seen a site in no native one.
        alone = row.get(table.choice.precision, 0.0)
        ms = row.get(str(observation.assignment.get(site)), alone)
        native, int8 = (
            (native, int8 + ms) if _is_eight_bit(observation, site) else (native + ms, int8)
        )
    quantizers = sum((table.quantizers[t] for t in _quantized(observation, tensors)), 0.0)
    glue = table.glue_ms
    levels = table.complete(observation.assignment)
    for term, owner in zip(table.terms, owners, strict=True):
        ms = term.at(levels)
        if owner.is_glue:
            glue += ms
        elif owner.site is not None and _is_eight_bit(observation, owner.site):
            int8 += ms
        else:
            native += ms
    return native, int8, quantizers, glue
