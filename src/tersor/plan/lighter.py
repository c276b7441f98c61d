"""What takes no time in fewer bytes: the last step of a plan with a quality budget.

The fastest plan that holds the quality leaves alone what is no faster in another format, such as the table of an
embedding. Stored in fewer bytes it makes the file smaller at the same speed, as long as the quality holds.
"""

from tersor.core.formats import STORED
from tersor.core.records import Level
from tersor.plan.ledger import Ledger, draft_of
from tersor.plan.solve import TOLERANCE
from tersor.plan.task import Draft

LEAST_SHARE = 0.01  # of the file: a layer that saves less is not looked at alone
LOOKS = 4  # at single layers, where all of them together lose too much


def lighter(ledger: Ledger, best: Draft) -> Draft:
    """The draft with layers stored in fewer bytes at the same predicted time, by real losses; itself where none holds.

    All of them at once; where that loses more than the budget, those that save most, one after the other.
    """
    limit = ledger.task.limits.max_loss
    swaps = _swaps(ledger, best)
    if limit is None or not swaps:
        return best

    def holds(draft: Draft) -> bool:
        may_look = ledger.is_evaluated(draft) or ledger.evaluations_left > 0
        return may_look and ledger.loss(draft) <= limit

    everything = _changed(ledger, best, {site: level for site, level, _ in swaps})
    if holds(everything):
        return everything
    found, least = best, LEAST_SHARE * ledger.totals(best).size_bytes
    for site, level, saved in swaps[:LOOKS]:
        draft = _changed(ledger, found, {site: level})
        if saved >= least and holds(draft):
            found = draft
    return found


def _swaps(ledger: Ledger, best: Draft) -> list[tuple[str, Level, float]]:
    """(site, stored level, bytes saved): the smallest one of each site that takes no longer; most saved first."""
    here, rows = ledger.totals(best), ledger.problem(best.table).levels()
    found = []
    for site, now in best.levels:
        options = []
        for level in rows[site]:
            if level == now or level not in STORED:
                continue
            totals = ledger.totals(_changed(ledger, best, {site: level}))
            if totals.ms <= here.ms * (1 + TOLERANCE) and totals.size_bytes < here.size_bytes:
                options.append((totals.size_bytes, totals.error, str(level), level))
        if options:
            size, _, _, level = min(options)
            found.append((site, level, here.size_bytes - size))
    return sorted(found, key=lambda row: (-row[2], row[0]))


def _changed(ledger: Ledger, draft: Draft, levels: dict[str, Level]) -> Draft:
    problem = ledger.problem(draft.table)
    return draft_of(draft.table, problem.settled({**draft.assignment, **levels}))
