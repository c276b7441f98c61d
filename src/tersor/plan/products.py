"""What terms of several sites cost, as arrays over the levels that are left to choose.

Terms over the same sites, or over some of another term's, share one block of product variables.
Levels that no term of a block tells apart share variables as well: where an op's time depends on
whether the next one is int8, that one's other formats are all the same to it.
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
APART = 2  # times as large as two blocks, from where one is none


@dataclass(frozen=True, slots=True)
class Reduced:
    """A term over the sites that have a choice which changes it, in the order of their names.

    ``values`` has one axis a site, along the site's usable levels; no axis where nothing is left
    to choose.
    """

    sites: tuple[str, ...]
    values: Array


@dataclass(frozen=True, slots=True)
class Block:
    """Variables: one for each combination of the sites' groups of levels, the last site fastest.

    Attributes:
        groups: Of each site, the group of each of its usable levels: 0, 1 and so on in the order in
            which they begin. No term of the block tells the levels of one group apart.
    """

    sites: tuple[str, ...]
    groups: tuple[tuple[int, ...], ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """How many groups each site has."""
        return tuple(max(row) + 1 for row in self.groups)

    @property
    def size(self) -> int:
        """How many variables."""
        return math.prod(self.shape)

    def spread(self, term: Reduced) -> Array:
        """The term's values as coefficients of the variables, flat.

        A site that the term does not have adds nothing: its variables sum to the others' product.
        """
        own = [row for s, row in zip(self.sites, self.groups, strict=True) if s in term.sites]
        values = term.values[np.ix_(*([row.index(g) for g in range(max(row) + 1)] for row in own))]
        shape = [n if s in term.sites else 1 for s, n in zip(self.sites, self.shape, strict=True)]
        whole: Array = np.broadcast_to(values.reshape(shape), self.shape).ravel()
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
    picks = [
        _places(levels, list(rows[site]) if site in free else [problem.native_of(site)])
        for site, levels in zip(term.sites, term.levels, strict=True)
    ]
    values = np.array(term.values, dtype=np.float64).reshape([len(row) for row in term.levels])
    values = values[np.ix_(*picks)].reshape([len(rows[site]) for site in free])
    counts = [max(row) + 1 for row in _groups(values)]
    moving = [axis for axis, n in enumerate(counts) if n > 1]
    values = np.asarray(values[tuple(slice(None) if n > 1 else 0 for n in counts)])
    free, counts = [free[axis] for axis in moving], [counts[axis] for axis in moving]
    if len(free) > 1 and math.prod(counts) > MAX_COMBINATIONS:
        each = " x ".join(f"{site}: {n}" for site, n in zip(free, counts, strict=True))
        raise ConfigError(
            f"{term.name}: found {math.prod(counts)} combinations of levels ({each}), wanted at most "
            f"{MAX_COMBINATIONS}; offer fewer levels of these sites"
        )
    order = sorted(range(len(free)), key=free.__getitem__)
    return Reduced(tuple(sorted(free)), values.transpose(order))


def _groups(values: Array) -> list[tuple[int, ...]]:
    """Of each axis, the group of each place: those whose values are all the same share one."""
    found: list[tuple[int, ...]] = []
    for axis in range(values.ndim):
        slices = np.moveaxis(values, axis, 0).reshape(values.shape[axis], -1)
        found.append(_numbered([row.tobytes() for row in slices]))
    return found


def _numbered(keys: Sequence[object]) -> tuple[int, ...]:
    """Keys as numbers, in the order in which they come up."""
    numbers: dict[object, int] = {}
    return tuple(numbers.setdefault(key, len(numbers)) for key in keys)


def _places(levels: Sequence[Level], wanted: Sequence[Level]) -> list[int]:
    """Where levels stand in a term; what it does not tell apart is the level that it is priced as."""
    place = {level: i for i, level in enumerate(levels)}
    return [place[level] if level in place else place[priced_as(level)] for level in wanted]


def blocks_of(terms: Iterable[Reduced]) -> tuple[Block, ...]:
    """Few blocks that hold every term of two sites or more.

    A term has one of its own where it would make a larger one more than ``APART`` times as large as both: bytes tell a
    dozen stored levels of a weight apart, its time and that of three layers beside it only whether they are int8.
    """
    joint = sorted((t for t in terms if len(t.sites) > 1), key=lambda t: (-len(t.sites), t.sites))
    near: dict[tuple[str, ...], list[Reduced]] = {}
    for term in joint:
        if not any(set(term.sites) <= set(sites) for sites in near):
            near[term.sites] = []
        home = home_of(list(near), term)
        if home != term.sites:
            apart = _size(home, near[home]) + _size(term.sites, [term])
            if _size(home, [*near[home], term]) > APART * apart:
                home = term.sites
                near[home] = []
        near[home].append(term)
    # A term that came before one of its own sites began a block is in that block, where programs look for it.
    members: dict[tuple[str, ...], list[Reduced]] = {sites: [] for sites in near}
    for term in joint:
        members[home_of(list(near), term)].append(term)
    return tuple(Block(sites, _told_apart(sites, own)) for sites, own in members.items())


def _size(sites: tuple[str, ...], terms: Sequence[Reduced]) -> int:
    return Block(sites, _told_apart(sites, terms)).size


def home_of(blocks: Sequence[tuple[str, ...]], term: Reduced) -> tuple[str, ...]:
    """The sites of the block that a term is in: of those that hold it the last, which are the fewest.

    A larger one would have to tell apart what this term does.
    """
    return next(sites for sites in reversed(blocks) if set(term.sites) <= set(sites))


def _told_apart(sites: Sequence[str], terms: Sequence[Reduced]) -> tuple[tuple[int, ...], ...]:
    """The groups of levels of a block: levels that any of its terms tells apart are in two."""
    seen: dict[str, list[tuple[int, ...]]] = {site: [] for site in sites}
    for term in terms:
        for site, row in zip(term.sites, _groups(term.values), strict=True):
            seen[site].append(row)
    return tuple(_numbered(list(zip(*seen[site], strict=True))) for site in sites)
