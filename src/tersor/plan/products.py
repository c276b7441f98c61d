"""What terms of several sites cost, as arrays over the levels that are left to choose.

Terms over the same sites, or over some of another term's, share one block of product variables.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tersor.core.errors import ConfigError
from tersor.core.formats import priced_as
from tersor.core.records import Level, Term
from tersor.plan.problem import Problem

Array = np.ndarray[Any, np.dtype[np.float64]]

# Two widths of 64 levels and four formats; HiGHS takes seconds for a dozen such blocks.
MAX_COMBINATIONS = 16_384


@dataclass(frozen=True, slots=True)
class Reduced:
    """A term over the sites that have a choice, in the order of their names.

    ``values`` has one axis a site, along the site's usable levels; no axis where nothing is left
    to choose.
    """

    sites: tuple[str, ...]
    values: Array


@dataclass(frozen=True, slots=True)
class Block:
    """Variables: one for each combination of the sites' usable levels, the last site fastest."""

    sites: tuple[str, ...]
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """How many variables."""
        return math.prod(self.shape)

    def spread(self, term: Reduced) -> Array:
        """The term's values as coefficients of the variables, flat.

        A site that the term does not have adds nothing: its variables sum to the others' product.
        """
        shape = [n if s in term.sites else 1 for s, n in zip(self.sites, self.shape, strict=True)]
        whole: Array = np.broadcast_to(term.values.reshape(shape), self.shape).ravel()
        return whole


def reduce_terms(problem: Problem, terms: Iterable[Term]) -> list[Reduced]:
    """The terms over the problem's usable levels; sites without a choice stay native.

    Raises:
        ConfigError: A term has more combinations than a plan can take.
    """
    return [_reduce(problem, term) for term in terms]


def _reduce(problem: Problem, term: Term) -> Reduced:
    rows = problem.levels()
    free = [site for site in term.sites if len(rows.get(site, ())) > 1]
    n = math.prod(len(rows[site]) for site in free)
    if len(free) > 1 and n > MAX_COMBINATIONS:
        each = " x ".join(f"{site}: {len(rows[site])}" for site in free)
        raise ConfigError(
            f"{term.name}: found {n} combinations of levels ({each}), wanted at most "
            f"{MAX_COMBINATIONS}; offer fewer levels of these sites"
        )
    picks = [
        _places(levels, list(rows[site]) if site in free else [problem.native_of(site)])
        for site, levels in zip(term.sites, term.levels, strict=True)
    ]
    values = np.array(term.values, dtype=np.float64).reshape([len(row) for row in term.levels])
    values = values[np.ix_(*picks)].reshape([len(rows[site]) for site in free])
    order = sorted(range(len(free)), key=free.__getitem__)
    return Reduced(tuple(sorted(free)), values.transpose(order))


def _places(levels: Sequence[Level], wanted: Sequence[Level]) -> list[int]:
    """Where levels stand in a term; what it does not tell apart is the level that it is priced as."""
    place = {level: i for i, level in enumerate(levels)}
    return [place[level] if level in place else place[priced_as(level)] for level in wanted]


def blocks_of(terms: Iterable[Reduced]) -> tuple[Block, ...]:
    """The fewest blocks that hold every term of two sites or more."""
    shapes = {term.sites: term.values.shape for term in terms if len(term.sites) > 1}
    blocks: list[Block] = []
    for sites in sorted(shapes, key=lambda s: (-len(s), s)):
        if not any(set(sites) <= set(block.sites) for block in blocks):
            blocks.append(Block(sites, shapes[sites]))
    return tuple(blocks)
