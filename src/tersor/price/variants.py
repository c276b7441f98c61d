"""Which whole builds make a price table: the extremes, then random mixtures in context.

A layer's price depends on its neighbours' formats (a boundary costs a quantiser, a fusion saves
one), so that mixtures are drawn in two ways: coin flips with several shares of int8, which show
many boundaries, and contiguous blocks, which show few. With widths, the extremes of both are
crossed, and each mixture keeps a share of the widths full and draws the others' counts. Some lie
between the counts on offer: what a count off the device's tiles costs is seen, not assumed.

Layers that offer ranks have some in each mixture, in the format that was drawn for the layer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from tersor.core.errors import ConfigError
from tersor.core.rank_levels import EIGHT_BITS, RankLevel, is_eight_bit
from tersor.core.records import Level, Precision, Site

SHARES = (0.25, 0.5, 0.75)
# Attempts for each assignment that is wanted, as small models run out of distinct ones.
ATTEMPTS = 20
_HELD_OUT_STREAM, _FIT_STREAM, _BETWEEN_STREAM, _RANK_STREAM = 0, 1, 2, 3
# With widths, this share of the mixtures is all native, and as many are all int8: plans often are.
PURE = 0.15
OFF_GRID = 0.5  # of the counts that are drawn for the fit lie between those on offer, about
# One mixture in so many has narrow widths everywhere, as plans of high speed have: what small ops cost
# is seen among others of other sizes, not only where all are the least alike.
NARROW = 3
BETWEEN = 4  # such counts a width, half of them whole blocks
BLOCK = 8  # values of a vector register of the smallest kind that counts are padded to

_Joint = tuple[frozenset[str], tuple[int, ...]]  # int8 sites; kept counts in the widths' order


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One assignment to build; a held-out one tests the table and makes no part of it."""

    assignment: Mapping[str, Level]
    held_out: bool = False


def quantizable(sites: Sequence[Site], levels: Mapping[str, Sequence[Level]]) -> dict[str, Level]:
    """The sites that may be in 8 bits, in graph order, and in which format; pinned ones may not."""
    return {
        s.name: next(level for level in EIGHT_BITS if level in levels[s.name])
        for s in sites
        if s.pinned is None and not {*EIGHT_BITS}.isdisjoint(levels.get(s.name, ()))
    }


def native_assignment(sites: Sequence[Site], precision: Precision) -> dict[str, Level]:
    """Every site left alone."""
    return {site.name: native_level(site, precision) for site in sites}


def native_level(site: Site, precision: Precision) -> Level:
    """The level of a site that is left alone: all units of a width, the highest of a branch."""
    return precision if site.kind == "format" else site.units


def counted(
    sites: Sequence[Site], levels: Mapping[str, Sequence[Level]]
) -> dict[str, tuple[int, ...]]:
    """Widths and branches that have a choice -> their kept counts, the full one first.

    Raises:
        ConfigError: A level that is no count up to the full one, or the full one is missing.
    """
    found: dict[str, tuple[int, ...]] = {}
    for site in sites:
        if site.kind == "format" or site.pinned is not None:
            continue
        full = native_level(site, "f32")
        counts = [n for n in levels.get(site.name, (full,)) if isinstance(n, int)]
        rest = len(levels.get(site.name, (full,))) - len(counts)
        if rest or full not in counts or max(counts) != full or min(counts) < 0:
            raise ConfigError(
                f"{site.name}: found the levels {list(levels[site.name])}, wanted kept counts, "
                f"among them the full one, {full}, as the largest"
            )
        if len(set(counts)) > 1:
            found[site.name] = tuple(sorted(set(counts), reverse=True))
    return found


def full_assignment(
    sites: Sequence[Site], levels: Mapping[str, Sequence[Level]], precision: Precision
) -> dict[str, Level]:
    """Every site that may be in 8 bits is."""
    return {**native_assignment(sites, precision), **quantizable(sites, levels)}


def draw_variants(  # noqa: PLR0913 - one draw, and what it is free to draw from
    sites: Sequence[Site],
    levels: Mapping[str, Sequence[Level]],
    precision: Precision,
    *,
    k: int,
    held_out: int,
    seed: int,
    between: Mapping[str, Sequence[int]] | None = None,
) -> tuple[Variant, ...]:
    """Distinct assignments: all native, all int8, random mixtures; then the held-out ones.

    With widths: those two at full counts, then with all widths at their least and at their
    middle, as far as ``k`` goes; mixtures are joint.

    Args:
        sites: All sites, in graph order; pinned ones stay native.
        levels: Site -> the levels that it offers. Weight-only levels run as native and are not
            drawn.
        precision: Of the whole build.
        k: Assignments that the fit sees, at least 2.
        held_out: Assignments that no fit sees. They depend on the seed only, not on ``k``.
        seed: Of the draw.
        between: Width -> counts that are not on offer, for some builds of the fit.

    Returns:
        Fewer than asked for where there are not as many: one if no site may be int8.
    """
    if counted(sites, levels):
        return _joint_variants(sites, levels, precision, (k, held_out, seed), between or {})
    own = quantizable(sites, levels)
    names = tuple(own)
    native = native_assignment(sites, precision)
    extremes = [frozenset[str](), frozenset(names)]
    taken = set(extremes)
    tests = _draw(names, held_out, np.random.default_rng([seed, _HELD_OUT_STREAM]), taken)
    fits = _draw(names, max(0, k - 2), np.random.default_rng([seed, _FIT_STREAM]), taken)
    rows = [(chosen, False) for chosen in dict.fromkeys([*extremes, *fits])]
    rows += [(chosen, True) for chosen in tests]
    return tuple(
        Variant(
            assignment={**native, **{s: own[s] for s in names if s in chosen}},
            held_out=is_held_out,
        )
        for chosen, is_held_out in rows
    )


def _draw(
    names: Sequence[str], n: int, rng: np.random.Generator, taken: set[frozenset[str]]
) -> list[frozenset[str]]:
    found: list[frozenset[str]] = []
    for attempt in range(ATTEMPTS * n):
        if len(found) == n:
            break
        chosen = _flips(names, rng) if attempt % 3 else _block(names, rng)
        if chosen not in taken:
            taken.add(chosen)
            found.append(chosen)
    return found


def _flips(names: Sequence[str], rng: np.random.Generator) -> frozenset[str]:
    share = rng.choice(SHARES)
    return frozenset(s for s, x in zip(names, rng.random(len(names)), strict=True) if x < share)


def _block(names: Sequence[str], rng: np.random.Generator) -> frozenset[str]:
    """A run of neighbours, or all but a run."""
    first, last = sorted(rng.integers(0, len(names) + 1, size=2))
    inside = frozenset(names[first:last])
    return inside if rng.random() < 0.5 else frozenset(names) - inside


def _joint_variants(
    sites: Sequence[Site],
    levels: Mapping[str, Sequence[Level]],
    precision: Precision,
    numbers: tuple[int, int, int],
    between: Mapping[str, Sequence[int]],
) -> tuple[Variant, ...]:
    k, held_out, seed = numbers
    own, widths = quantizable(sites, levels), counted(sites, levels)
    names = tuple(own)
    branches = {s.name for s in sites if s.kind == "branch"}
    extremes = _joint_extremes(names, widths, branches)
    taken = set(extremes)
    tests = _draw_joint(
        names, widths, held_out, np.random.default_rng([seed, _HELD_OUT_STREAM]), taken
    )
    extremes = extremes[:k]
    fits = _draw_joint(
        names,
        widths,
        k - len(extremes),
        np.random.default_rng([seed, _FIT_STREAM]),
        taken,
        {w: between.get(w, ()) for w in widths if w not in branches},
    )
    native = native_assignment(sites, precision)
    rows = [(joint, False) for joint in (*extremes, *fits)] + [(joint, True) for joint in tests]
    return tuple(
        Variant(
            assignment={
                **native,
                **{s: own[s] for s in names if s in int8},
                **dict(zip(widths, counts, strict=True)),
            },
            held_out=is_held_out,
        )
        for (int8, counts), is_held_out in rows
    )


def _joint_extremes(
    names: Sequence[str], widths: Mapping[str, tuple[int, ...]], branches: set[str]
) -> list[_Joint]:
    """Full, least and middle counts, each all native and all int8; branches stay."""
    places = [[0, -1, len(counts) // 2] for counts in widths.values()]
    rows = [
        tuple(
            counts[0 if width in branches else place[i]]
            for (width, counts), place in zip(widths.items(), places, strict=True)
        )
        for i in range(3)
    ]
    return list(
        dict.fromkeys((chosen, row) for row in rows for chosen in (frozenset(), frozenset(names)))
    )


def _draw_joint(
    names: Sequence[str],
    widths: Mapping[str, tuple[int, ...]],
    n: int,
    rng: np.random.Generator,
    taken: set[_Joint],
    between: Mapping[str, Sequence[int]] | None = None,
) -> list[_Joint]:
    """Mixtures; ``between``: of builds that a fit sees, all widths that may be narrow."""
    found: list[_Joint] = []
    for attempt in range(ATTEMPTS * n):
        if len(found) == n:
            break
        formats, counts = _formats(names, attempt, rng), _counts(widths, rng, between or {})
        if between and len(found) % NARROW == NARROW - 1:
            counts = _narrow_counts(widths, counts, rng, between)
        joint = (formats, counts)
        if joint not in taken:
            taken.add(joint)
            found.append(joint)
    return found


def _formats(names: Sequence[str], attempt: int, rng: np.random.Generator) -> frozenset[str]:
    pure = rng.random()
    if pure < 2 * PURE:
        return frozenset(names if pure < PURE else ())
    return _flips(names, rng) if attempt % 3 else _block(names, rng)


def _counts(
    widths: Mapping[str, tuple[int, ...]],
    rng: np.random.Generator,
    between: Mapping[str, Sequence[int]],
) -> tuple[int, ...]:
    share = rng.choice(SHARES)
    found: list[int] = []
    for width, counts in widths.items():
        if rng.random() < share:
            found.append(counts[0])
            continue
        others = between.get(width, ())
        is_between = bool(others) and rng.random() < OFF_GRID
        found.append(int(rng.choice(others if is_between else counts)))
    return tuple(found)


def _narrow_counts(
    widths: Mapping[str, tuple[int, ...]],
    drawn: Sequence[int],
    rng: np.random.Generator,
    between: Mapping[str, Sequence[int]],
) -> tuple[int, ...]:
    """Counts of the lower half, those between the ones on offer included; others stay as drawn."""
    found: list[int] = []
    for (width, counts), count in zip(widths.items(), drawn, strict=True):
        every = sorted({*counts, *between.get(width, ())})
        narrow = every[: (len(every) + 1) // 2]
        found.append(int(rng.choice(narrow)) if width in between else count)
    return tuple(found)


def counts_between(
    widths: Mapping[str, tuple[int, ...]], names: Sequence[str], seed: int
) -> dict[str, tuple[int, ...]]:
    """A few counts of each width that is named, between the least and the full one, not on offer.

    Half of them are whole blocks: an odd number of blocks may cost more than no whole number.
    """
    rng = np.random.default_rng([seed, _BETWEEN_STREAM])
    found: dict[str, tuple[int, ...]] = {}
    for width in names:
        counts = widths[width]
        rest = sorted(set(range(min(counts), max(counts))) - set(counts))
        whole = [n for n in rest if n % BLOCK == 0]
        picked: list[int] = []
        for pool, size in ((whole, BETWEEN // 2), (sorted(set(rest) - set(whole)), BETWEEN)):
            n = min(size - len(picked), len(pool))
            picked += [int(v) for v in rng.choice(pool, n, replace=False)] if n else []
        if picked:
            found[width] = tuple(sorted(picked))
    return found


def with_ranks(
    drawn: Sequence[Variant],
    ranks: Mapping[str, Sequence[RankLevel]],
    *,
    k: int,
    held_out: int,
    seed: int,
) -> tuple[Variant, ...]:
    """The same builds with ranks in them, and two more: every layer that offers ranks has one there.

    The first two, all native and all int8, stay as they are, and are what those two more are made
    of; in the others a share of those layers gets a rank.

    Args:
        drawn: As ``draw_variants`` gives them.
        ranks: Site -> its rank levels; a site that offers none in the format that it has in a build
            stays whole there.
        k: Builds that the fit sees, without the two; drawn anew where ``drawn`` has fewer.
        held_out: The same of those that no fit sees.
        seed: Of the draw.
    """
    if not ranks:
        return tuple(drawn)
    pure = list(drawn[:2])
    mixed, tests = ([v for v in drawn[2:] if v.held_out == is_test] for is_test in (False, True))
    mixed += [pure[i % len(pure)] for i in range(k - len(pure) - len(mixed))]
    tests += [replace(pure[i % len(pure)], held_out=True) for i in range(held_out - len(tests))]
    rng = np.random.default_rng([seed, _RANK_STREAM])
    found = [*pure, *(_ranked(v, ranks, 1.0, rng) for v in pure)]
    rest = (*mixed, *tests)
    found += [_ranked(variant, ranks, float(rng.choice(SHARES)), rng) for variant in rest]
    return tuple(found)


def _ranked(
    variant: Variant,
    ranks: Mapping[str, Sequence[RankLevel]],
    share: float,
    rng: np.random.Generator,
) -> Variant:
    """A build in which a share of the layers has a rank, in the format that the layer has."""
    chosen = dict(variant.assignment)
    for site, own in ranks.items():
        offered = [v for v in own if is_eight_bit(v) == is_eight_bit(chosen.get(site))]
        if offered and rng.random() < share:
            chosen[site] = offered[int(rng.integers(len(offered)))]
    return replace(variant, assignment=chosen)
