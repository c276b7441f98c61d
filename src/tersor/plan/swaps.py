"""Single moves and pairs of moves around the best plan, judged by real evaluations.

The program takes errors as a sum; where they are not, a neighbour may be better than its
predicted error says. Neighbours are tried in the order of the error that they are predicted to
cost for what they gain.
"""

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator

import numpy as np

from tersor.core.records import Level
from tersor.plan.ledger import Ledger, draft_of
from tersor.plan.problem import Problem, Totals
from tersor.plan.proposals import SPEED_MARGIN
from tersor.plan.task import Draft

# Real evaluations that are spent on neighbours, at most.
MAX_TRIES = 8
# A pair costs one prediction; beyond this many a seeded sample stands for all.
MAX_PAIRS = 1_000
# A gain that no measurement could tell from noise is not worth an evaluation (FINDINGS 1).
SMALLEST_GAIN = 0.005

Move = tuple[str, Level]


def improve(ledger: Ledger, incumbent: Draft) -> list[Draft]:
    """Neighbours that are better than the incumbent by a real evaluation, best last.

    Better: with a quality budget, predicted faster while the real loss holds; without one, a
    lower real loss within the time and the size. Each one found is the next incumbent.
    """
    found: list[Draft] = []
    limits = ledger.task.limits
    if ledger.unreachable and limits.max_ms is None and limits.max_loss is None:
        return []  # the smallest plan is the answer, and every milder one is larger
    tries = min(MAX_TRIES, ledger.evaluations_left)
    while tries > 0:
        better = None
        for draft in neighbours(ledger, incumbent):
            if ledger.is_evaluated(draft):
                continue
            if tries <= 0:
                break
            tries -= 1
            if _is_better(ledger, draft, incumbent):
                better = draft
                break
        if better is None:
            break
        incumbent = better
        found.append(better)
    return found


def neighbours(ledger: Ledger, incumbent: Draft) -> list[Draft]:
    """Feasible plans one or two sites away, the most promising first.

    Those that soften the same site take turns with the others: where one site is to blame for a
    loss that no prediction knows, it is let go within a few tries.
    """
    problem, limits = ledger.problem(incumbent.table), ledger.task.limits
    here, assignment = ledger.totals(incumbent), incumbent.assignment
    max_ms = _latency_cap(ledger, incumbent, here)
    ranked = []
    for moves in _moves(problem, incumbent, ledger.task.seed):
        totals, softened = _after(problem, assignment, here, moves)
        fits = problem.max_bytes is None or totals.size_bytes <= problem.max_bytes
        if totals.ms > max_ms or not fits:
            continue
        cost = totals.error - here.error
        if limits.max_loss is not None:
            cost /= here.ms - totals.ms
        draft = draft_of(incumbent.table, problem.settled(assignment | dict(moves)))
        ranked.append((cost, totals, draft, softened))
    ranked.sort()
    seen: Counter[tuple[str, ...]] = Counter()
    turns = []
    for rank, (_, _, draft, softened) in enumerate(ranked):
        turns.append((seen[softened], rank, draft))
        if softened:
            seen[softened] += 1
    return [draft for _, _, draft in sorted(turns)]


def _after(
    problem: Problem, assignment: dict[str, Level], here: Totals, moves: tuple[Move, ...]
) -> tuple[Totals, tuple[str, ...]]:
    """Totals after some moves, and the sites whose error they lessen."""
    levels = problem.levels()
    error, softened = here.error, []
    for site, level in moves:
        old, new = levels[site][assignment[site]], levels[site][level]
        error += new.error - old.error
        if new.error < old.error:
            softened.append(site)
    after = problem.totals(assignment | dict(moves))
    return after._replace(error=error), tuple(softened)


def _latency_cap(ledger: Ledger, incumbent: Draft, here: Totals) -> float:
    limits = ledger.task.limits
    if limits.max_loss is not None:
        return here.ms * (1 - SMALLEST_GAIN)
    if limits.max_ms is not None:
        return max(limits.max_ms * (1 - SPEED_MARGIN), here.ms)
    return max(here.ms, ledger.native_ms(incumbent.table))


def _is_better(ledger: Ledger, draft: Draft, incumbent: Draft) -> bool:
    limit = ledger.task.limits.max_loss
    if limit is not None:
        return ledger.loss(draft) <= limit
    return ledger.loss(draft) < ledger.loss(incumbent)


def _moves(problem: Problem, incumbent: Draft, seed: int) -> Iterator[tuple[Move, ...]]:
    assignment = incumbent.assignment
    singles: list[Move] = [
        (site, level)
        for site, row in problem.levels().items()
        for level in _next_levels(row, assignment[site])
    ]
    yield from ((move,) for move in singles)
    n = len(singles)
    if n * (n - 1) // 2 <= MAX_PAIRS:
        pairs = list(itertools.combinations(range(n), 2))
    else:
        drawn = np.random.default_rng(seed).integers(0, n, size=(MAX_PAIRS, 2))
        pairs = sorted({(int(min(p)), int(max(p))) for p in drawn})
    for i, j in pairs:
        if singles[i][0] != singles[j][0]:
            yield singles[i], singles[j]


def _next_levels(levels: Iterable[Level], here: Level) -> list[Level]:
    """Every other format; of a count the next one below and above."""
    if not isinstance(here, int):
        return [level for level in levels if level != here]
    counts = sorted(level for level in levels if isinstance(level, int))
    place = counts.index(here)
    return [*counts[max(0, place - 1) : place], *counts[place + 1 : place + 2]]
