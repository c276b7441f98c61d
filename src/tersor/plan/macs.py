"""Plans at a number of multiply-accumulates: what benchmarks at equal MACs compare.

The plan itself knows only measured prices (DESIGN, law 1); here a table counts instead, on a grid
of one unit.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tersor.core.errors import ConfigError
from tersor.core.records import BuildChoice, Candidate, PriceTable, Term
from tersor.plan.problem import Problem
from tersor.plan.solve import Solution, solve


@dataclass(frozen=True, slots=True, kw_only=True)
class Product:
    """The MACs of an op: ``factor`` times the kept units of every width that it meets.

    A depthwise convolution meets one width; a branch multiplies by its level, here 0 or 1.
    """

    op: str
    factor: float
    sites: tuple[str, ...] = ()


def macs_table(
    products: Sequence[Product],
    candidates: Mapping[str, Sequence[Candidate]],
    native: Mapping[str, int],
) -> PriceTable:
    """A table whose milliseconds are MACs.

    Args:
        products: One or more an op.
        candidates: Width -> the kept counts that it offers.
        native: Every width of the products -> its full count.

    Raises:
        ConfigError: A width without a full count.
    """
    fixed, terms = 0.0, []
    for product in products:
        if not product.sites:
            fixed += product.factor
            continue
        levels = tuple(_counts(product.op, s, candidates, native) for s in product.sites)
        values = tuple(product.factor * math.prod(kept) for kept in itertools.product(*levels))
        terms.append(Term(name=product.op, sites=product.sites, levels=levels, values=values))
    return PriceTable(
        choice=BuildChoice(backend="macs"),
        ops={},
        quantizers={},
        glue_ms=fixed,
        terms=tuple(terms),
        native=native,
    )


def _counts(
    op: str, site: str, candidates: Mapping[str, Sequence[Candidate]], native: Mapping[str, int]
) -> tuple[int, ...]:
    if site not in native:
        raise ConfigError(
            f"{op}: width {site} has no full count among {sorted(native)}; list it in native"
        )
    offered = {c.level for c in candidates.get(site, ()) if isinstance(c.level, int)}
    return tuple(sorted({native[site], *offered}, reverse=True))


def least_error(
    candidates: Mapping[str, Sequence[Candidate]], table: PriceTable, max_macs: float
) -> Solution:
    """The least sum of errors within a number of MACs, to the program's relative gap.

    A format site has no price here, so that it stays native.

    Raises:
        ConfigError: As ``Problem``; a term with too many combinations.
        NumericalError: The solver gave up.
    """
    return solve(
        Problem(candidates=candidates, table=table, tensors={}, objective="error", max_ms=max_macs)
    )
