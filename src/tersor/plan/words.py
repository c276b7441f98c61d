"""What stopped a plan, in words that name layers."""

from collections import defaultdict
from collections.abc import Mapping, Sequence

from tersor.core.records import Term
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
    total = table.predict_ms(draft.assignment, ledger.task.tensors)
    stays, widths = _native_ms(ledger, draft)
    shares = {name: ms * table.scale / total for name, ms in stays.items()}
    glue = table.glue_ms * table.scale / total
    named = _largest(shares)
    share = sum(shares[name] for name in named)
    if not named or glue >= share:
        return (
            f"{glue:.0%} of the predicted time is outside the sites (attention, normalisation, "
            "element-wise ops), which no format changes"
        )
    verb = "stay" if len(named) > 1 else "stays"
    how = "as given" if any(name in widths for name in named) else table.choice.precision
    return f"{share:.0%} of the predicted time is in {_and(named)}, which {verb} {how}" + _why(
        _sites_of(table.terms, named), ledger.task.pinned
    )


def _native_ms(ledger: Ledger, draft: Draft) -> tuple[dict[str, float], set[str]]:
    """Op -> milliseconds before the scale, of what the plan leaves alone; which meet a width."""
    table, problem = ledger.tables[draft.table], ledger.problem(draft.table)
    assignment, precision = draft.assignment, table.choice.precision
    stays: defaultdict[str, float] = defaultdict(float)
    for site, row in table.ops.items():
        if assignment.get(site, precision) == precision:
            stays[site] += row.get(precision, 0.0)
    widths = set()
    levels = table.complete(assignment)
    for term in table.terms:
        if all(levels[site] == problem.native_of(site) for site in term.sites):
            stays[term.name] += term.at(levels)
            widths |= {term.name} if any(isinstance(levels[s], int) for s in term.sites) else set()
    return dict(stays), widths


def _sites_of(terms: Sequence[Term], names: Sequence[str]) -> list[str]:
    """The sites of the terms of those names; a name without a term is a site."""
    found: dict[str, None] = {}
    for name in names:
        sites = [site for term in terms if term.name == name for site in term.sites]
        found |= dict.fromkeys(sites or [name])
    return list(found)


def _why(sites: Sequence[str], pinned: Mapping[str, str]) -> str:
    reasons = list(dict.fromkeys(pinned[site] for site in sites if site in pinned))
    if not reasons:
        return ""
    which = "pinned" if all(site in pinned for site in sites) else "some pinned"
    return f" ({which}: {'; '.join(reasons)})"


def _where_bytes_go(ledger: Ledger, draft: Draft) -> str:
    sizes = _bytes(ledger, draft)
    total = ledger.totals(draft).size_bytes
    limit = ledger.task.limits.max_bytes
    budget = "" if limit is None else f" of {limit / MEGABYTE:.2f}"
    text = f"{total / MEGABYTE:.2f}{budget} MB are used"
    named = _largest(sizes)
    if named and total > 0:
        text += f"; {sum(sizes[s] for s in named) / total:.0%} of them in {_and(named)}"
    return text + f"; {ledger.task.fixed_bytes / MEGABYTE:.2f} MB are in no site"


def _bytes(ledger: Ledger, draft: Draft) -> dict[str, float]:
    """Site, or weight of a size term -> bytes."""
    problem, assignment = ledger.problem(draft.table), draft.assignment
    sizes: defaultdict[str, float] = defaultdict(float)
    for site, level in draft.levels:
        sizes[site] += problem.bytes_of(problem.levels()[site][level])
    for term in problem.size_terms:
        levels = {site: assignment.get(site, problem.native_of(site)) for site in term.sites}
        sizes[term.name] += round(term.at(levels))
    return dict(sizes)


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
    native = ledger.problem(draft.table).native
    n = sum(level != native[site] for site, level in draft.levels)
    counts = any(isinstance(level, int) for level in native.values())
    what = "their native level" if counts else ledger.tables[draft.table].choice.precision
    return f"{n} of {len(draft.levels)} sites left {what}, and no other change is faster"


def _largest(shares: Mapping[str, float]) -> list[str]:
    """The few largest, leaving out what is small beside the first."""
    ranked = sorted(shares, key=lambda site: (-shares[site], site))[:NAMED]
    return [site for site in ranked if shares[site] > 0 and shares[site] >= shares[ranked[0]] / 4]


def _and(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
