"""How far a table's predictions may be off: seen on builds that a fit did not see.

The table is fitted again without a part of its builds, each part once; what is measured of those and of
the held-out ones is compared with what is predicted. An error has two sources: what any one build is off
by, and what is not known about the parts of a price (native, int8, quantisers, glue), which counts where
a plan is made of other parts than the builds were. The second is the covariance of a linear model of
the relative error on the parts' shares, held by the ridge that holds the parts together (``table``).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from statistics import median

import numpy as np
from numpy.typing import NDArray

from tersor.core.rank_levels import format_of, rank_of
from tersor.core.records import PriceTable, Term, Uncertainty
from tersor.price.node_costs import NodeCost
from tersor.price.observation import Observation

FOLDS = 4  # fits of the table without a part of its builds
FEWEST = 6  # builds: fewer leave too little to fit on
# How strongly the parts of a price are held to one common scale, in units of one build's relative
# error: profiling may slow many short nodes more than a few long ones, but no part moves freely.
RIDGE = 0.3

Matrix = NDArray[np.float64]
Fit = Callable[[Sequence[Observation]], PriceTable]


def uncertain(
    table: PriceTable,
    observations: Sequence[Observation],
    tensors: Mapping[str, str],
    fit: Fit,
) -> Uncertainty | None:
    """The uncertainty of a table's predictions.

    Args:
        table: As fitted on the observations that are not held out.
        observations: All of them.
        tensors: Site -> the tensor that it reads.
        fit: Fits a table on some observations.

    Returns:
        None for fewer than six builds, or where they show none of each other's levels.
    """
    fitted = [o for o in observations if not o.held_out]
    if len(fitted) < FEWEST:
        return None
    shares = _shares(table, fitted, tensors)
    held_out = [o for o in observations if o.held_out]
    squares = _squares(table, held_out, shares, fitted, tensors)
    places = np.random.default_rng(len(fitted)).permutation(len(fitted)) % FOLDS
    for fold in range(FOLDS):
        seen = [o for o, place in zip(fitted, places, strict=True) if place != fold]
        rest = [o for o, place in zip(fitted, places, strict=True) if place == fold]
        squares += _squares(fit(seen), rest, shares[places != fold], seen, tensors)
    if len(squares) < FEWEST:
        return None
    variance = float(np.mean(squares))
    covariance = variance * _inverse(shares)
    return Uncertainty(
        deviation=math.sqrt(variance),
        covariance=tuple(tuple(float(v) for v in row) for row in covariance),
    )


def with_entries(
    uncertainty: Uncertainty,
    table: PriceTable,
    owners: Sequence[tuple[NodeCost, Term]],
    ops: Mapping[str, Sequence[str]],
    fitted: Sequence[Observation],
) -> Uncertainty:
    """The uncertainty with that of single entries: how an op varies around its price.

    Args:
        uncertainty: Of the whole.
        table: Its terms are those of ``owners``, in order.
        owners: Whose costs the terms are.
        ops: Format site -> its nodes.
        fitted: Builds that the fit saw.
    """
    names: dict[str, tuple[NodeCost, list[Term]]] = {}
    for (owner, _), term in zip(owners, table.terms, strict=True):
        names.setdefault(owner.name, (owner, []))[1].append(term)
    found: dict[str, float] = {}
    for owner, terms in names.values():
        spread = owner.spread
        if spread is None:
            spread = _spread(owner.nodes, fitted, lambda o, terms=terms: _term_ms(table, terms, o))  # type: ignore[misc]
        found |= {term.name: spread for term in terms if spread is not None}
    native = table.choice.precision
    for site, row in table.ops.items():
        spread = _spread(
            ops[site],
            fitted,
            lambda o, site=site, row=row: row.get(str(o.assignment.get(site, native)), 0.0),  # type: ignore[misc]
        )
        if spread is not None:
            found[site] = spread
    return replace(uncertainty, entries=found)


def _term_ms(table: PriceTable, terms: Sequence[Term], observation: Observation) -> float:
    levels = table.complete(observation.assignment)
    return sum(term.at(levels) for term in terms)


def _spread(
    nodes: Sequence[str], fitted: Sequence[Observation], price: Callable[[Observation], float]
) -> float | None:
    """Relative deviation of the nodes' time from their price, beside what all builds are off by."""
    pairs = [(sum(o.node_ms.get(n, 0.0) for n in nodes), price(o)) for o in fitted]
    ratios = [ms / of for ms, of in pairs if ms > 0 and of > 0]
    if len(ratios) < 2:
        return None
    middle = median(ratios)
    squares = [(r / middle - 1) ** 2 for r in ratios]
    return math.sqrt(sum(squares) / (len(squares) - 1))


def _squares(
    table: PriceTable,
    unseen: Sequence[Observation],
    shares: Matrix,
    seen: Sequence[Observation],
    tensors: Mapping[str, str],
) -> list[float]:
    """Squared relative errors, each over how much more than a usual build's its variance is."""
    inverse = _inverse(shares)
    found: list[float] = []
    for o in unseen:
        if not _is_known(o, seen):
            continue
        own = _shares(table, [o], tensors)[0]
        error = o.measured_ms / table.predict_ms(o.assignment, tensors) - 1
        found.append(error**2 / (1 + float(own @ inverse @ own)))
    return found


def _is_known(observation: Observation, seen: Sequence[Observation]) -> bool:
    """Whether every format of a build is in one that the fit saw: else it has no price for it."""
    known = {kind for o in seen for kind in _kinds(o)}
    return all(kind in known for kind in _kinds(observation))


def _kinds(observation: Observation) -> list[tuple[str, str, bool]]:
    """Of each site its format, and whether it has a rank: one rank tells of the others."""
    return [
        (site, format_of(level), rank_of(level) > 0)
        for site, level in observation.assignment.items()
        if not isinstance(level, int)
    ]


def _shares(
    table: PriceTable, observations: Sequence[Observation], tensors: Mapping[str, str]
) -> Matrix:
    parts = np.array([table.parts(o.assignment, tensors) for o in observations], dtype=np.float64)
    shares: Matrix = parts / parts.sum(axis=1, keepdims=True)
    return shares


def _inverse(shares: Matrix) -> Matrix:
    held = shares.T @ shares + RIDGE**2 * np.eye(shares.shape[1])
    return np.asarray(np.linalg.inv(held), dtype=np.float64)
