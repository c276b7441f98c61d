"""Which whole builds make a price table: the extremes, then random mixtures in context.

A layer's price depends on its neighbours' formats (a boundary costs a quantiser, a fusion saves
one), so that mixtures are drawn in two ways: coin flips with several shares of int8, which show
many boundaries, and contiguous blocks, which show few.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tersor.core.records import Format, Precision, Site

SHARES = (0.25, 0.5, 0.75)
# Attempts for each assignment that is wanted, as small models run out of distinct ones.
ATTEMPTS = 20
_HELD_OUT_STREAM, _FIT_STREAM = 0, 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One assignment to build; a held-out one tests the table and makes no part of it."""

    assignment: Mapping[str, Format]
    held_out: bool = False


def quantizable(sites: Sequence[Site], levels: Mapping[str, Sequence[Format]]) -> tuple[str, ...]:
    """The sites that may become int8, in graph order; pinned ones may not."""
    return tuple(s.name for s in sites if s.pinned is None and "int8" in levels.get(s.name, ()))


def native_assignment(sites: Sequence[Site], precision: Precision) -> dict[str, Format]:
    """Every site left alone."""
    return {site.name: precision for site in sites}


def full_assignment(
    sites: Sequence[Site], levels: Mapping[str, Sequence[Format]], precision: Precision
) -> dict[str, Format]:
    """Every site that may be int8 is."""
    chosen = set(quantizable(sites, levels))
    return {s.name: "int8" if s.name in chosen else precision for s in sites}


def draw_variants(
    sites: Sequence[Site],
    levels: Mapping[str, Sequence[Format]],
    precision: Precision,
    *,
    k: int,
    held_out: int,
    seed: int,
) -> tuple[Variant, ...]:
    """Distinct assignments: all native, all int8, random mixtures; then the held-out ones.

    Args:
        sites: All sites, in graph order; pinned ones stay native.
        levels: Site -> the levels that it offers. Weight-only levels run as native and are not
            drawn.
        precision: Of the whole build.
        k: Assignments that the fit sees, at least 2.
        held_out: Assignments that no fit sees. They depend on the seed only, not on ``k``.
        seed: Of the draw.

    Returns:
        Fewer than asked for where there are not as many: one if no site may be int8.
    """
    names = quantizable(sites, levels)
    native = native_assignment(sites, precision)
    extremes = [frozenset[str](), frozenset(names)]
    taken = set(extremes)
    tests = _draw(names, held_out, np.random.default_rng([seed, _HELD_OUT_STREAM]), taken)
    fits = _draw(names, max(0, k - 2), np.random.default_rng([seed, _FIT_STREAM]), taken)
    rows = [(chosen, False) for chosen in dict.fromkeys([*extremes, *fits])]
    rows += [(chosen, True) for chosen in tests]
    return tuple(
        Variant(
            assignment={s: "int8" if s in chosen else level for s, level in native.items()},
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
