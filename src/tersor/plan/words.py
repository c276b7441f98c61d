"""What stopped a plan, in words that name layers."""

from collections.abc import Mapping, Sequence

from tersor.plan.ledger import Ledger
from tersor.plan.problem import Constraint
from tersor.plan.task import Draft

NAMED = 3  # sites in one sentence
MEGABYTE = 1e6


def binding_words(ledger: Ledger, draft: Draft, binding: Constraint | None) -> str:
    """One line for ``Plan.binding``: the constraint by name, and what it is made of."""
    if binding == "latency":
        return f"latency: {_where_time_goes(ledger, draft)}"
    if binding == "size":
        return f"size: {_where_bytes_go(ledger, draft)}"
    if binding == "drop":
        return f"drop: {_next_loss(ledger, draft)}"
    return f"nothing: {_exhausted(ledger, draft)}"


def _where_time_goes(ledger: Ledger, draft: Draft) -> str:
    table = ledger.tables[draft.table]
    native = table.choice.precision
    total = table.predict_ms(draft.assignment, ledger.task.tensors)
    stays = {
        site: row.get(native, 0.0) * table.scale / total
        for site, row in table.ops.items()
        if draft.assignment.get(site, native) == native
    }
    glue = table.glue_ms * table.scale / total
    named = _largest(stays)
    share = sum(stays[site] for site in named)
    if not named or glue >= share:
        return (
            f"{glue:.0%} of the predicted time is outside the sites (attention, normalisation, "
            "element-wise ops), which no format changes"
        )
    which = ", which stay" if len(named) > 1 else ", which stays"
    return f"{share:.0%} of the predicted time is in {_and(named)}{which} {native}" + _why(
        named, ledger.task.pinned
    )


def _why(named: Sequence[str], pinned: Mapping[str, str]) -> str:
    reasons = list(dict.fromkeys(pinned[site] for site in named if site in pinned))
    if not reasons:
        return ""
    which = "pinned" if all(site in pinned for site in named) else "some pinned"
    return f" ({which}: {'; '.join(reasons)})"


def _where_bytes_go(ledger: Ledger, draft: Draft) -> str:
    levels = ledger.problem(draft.table).levels()
    sizes = {site: float(levels[site][level].size_bytes) for site, level in draft.levels}
    total = ledger.totals(draft).size_bytes
    limit = ledger.task.limits.max_bytes
    budget = "" if limit is None else f" of {limit / MEGABYTE:.2f}"
    text = f"{total / MEGABYTE:.2f}{budget} MB are used"
    named = _largest(sizes)
    if named and total > 0:
        text += f"; {sum(sizes[s] for s in named) / total:.0%} of them in {_and(named)}"
    return text + f"; {ledger.task.fixed_bytes / MEGABYTE:.2f} MB are in no site"


def _next_loss(ledger: Ledger, draft: Draft) -> str:
    limit = ledger.task.limits.max_loss
    here = ledger.loss(draft)
    if limit is None:
        return f"the loss is {here:.4g}"
    if here > limit:
        return f"the mildest plan loses {here:.4g}, the limit is {limit:.4g}"
    error = ledger.totals(draft).error
    worse = [e for e in ledger.evaluations if e.loss > limit and e.error > error]
    text = f"the plan loses {here:.4g} of {limit:.4g}"
    if worse:
        text += f"; the next faster one tried loses {min(e.loss for e in worse):.4g}"
    return text


def _exhausted(ledger: Ledger, draft: Draft) -> str:
    native = ledger.tables[draft.table].choice.precision
    n = sum(level != native for _, level in draft.levels)
    return f"{n} of {len(draft.levels)} sites left {native}, and no other change is faster"


def _largest(shares: Mapping[str, float]) -> list[str]:
    """The few largest, leaving out what is small beside the first."""
    ranked = sorted(shares, key=lambda site: (-shares[site], site))[:NAMED]
    return [site for site in ranked if shares[site] > 0 and shares[site] >= shares[ranked[0]] / 4]


def _and(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
