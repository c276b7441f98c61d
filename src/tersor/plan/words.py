"""What stopped a plan, in words that name layers."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tersor.core.formats import priced_as
from tersor.core.records import Level, Term
from tersor.plan.ledger import Ledger
from tersor.plan.problem import Binding, Problem
from tersor.plan.task import Draft

NAMED = 3  # sites in one sentence
MEGABYTE = 1e6
KEPT = "kept"  # how the reason of a site begins that the caller asked to leave alone


def binding_words(ledger: Ledger, draft: Draft, binding: Binding | None) -> str:
    """One line for ``Plan.binding``: the constraint by name, and what it is made of."""
    if binding == "latency":
        return f"latency: {_where_time_goes(ledger, draft)}"
    if binding == "size":
        return f"size: {_where_bytes_go(ledger, draft)}"
    if binding == "drop":
        return f"drop: {_next_loss(ledger, draft)}"
    if binding == "memory":
        return f"memory: {_peak_words(ledger, draft)}"
    return f"nothing: {_exhausted(ledger, draft)}"


def _where_time_goes(ledger: Ledger, draft: Draft) -> str:
    """The largest part of the time: what was left alone, is at its fastest level, or is between."""
    table = ledger.tables[draft.table]
    total = table.predict_ms(draft.assignment, ledger.task.tensors)
    times = _op_times(ledger, draft)
    groups: dict[str, dict[str, float]] = {"stays": {}, "fastest": {}, "between": {}}
    for op, time in times.items():
        groups[time.state][op] = time.ms * table.scale / total
    state = max(groups, key=lambda name: _sum(groups[name]))
    share, named = _sum(groups[state]), _largest(groups[state])
    glue = table.glue_ms * table.scale / total
    if not named or glue >= share:
        return (
            f"{glue:.0%} of the predicted time is outside the sites (attention, normalisation, "
            "element-wise ops), which no format changes"
        )
    text = f"{share:.0%} of the predicted time is in {_and(named)}, which "
    if state == "stays":
        return text + _left_alone(ledger, draft, named, any(times[op].has_width for op in named))
    if state == "between":
        return f"{text}could be faster at a larger error"
    verb = "are already at their" if len(named) > 1 else "is already at its"
    return f"{text}{verb} fastest level on offer"


def _left_alone(ledger: Ledger, draft: Draft, named: Sequence[str], has_width: bool) -> str:
    """What to say of ops at their native level: the caller kept them, they are pinned, or stay."""
    table, pinned = ledger.tables[draft.table], ledger.task.pinned
    sites = _sites_of(table.terms, named)
    reasons = [pinned[site] for site in sites if site in pinned]
    if len(reasons) == len(sites) and all(r.startswith(KEPT) for r in reasons):
        patterns = dict.fromkeys(r.removeprefix(KEPT).strip(": ") for r in reasons)
        return f"you kept ({'; '.join(patterns)})"
    verb = "stay" if len(named) > 1 else "stays"
    return f"{verb} {'as given' if has_width else table.choice.precision}" + _why(sites, pinned)


def _sum(shares: Mapping[str, float]) -> float:
    """Of those that a sentence names."""
    return sum(shares[op] for op in _largest(shares))


@dataclass(frozen=True, slots=True)
class _OpTime:
    ms: float  # before the table's scale
    stays: bool  # every site of it is at its native level
    is_fastest: bool  # changed, and no other level of any of its sites is faster
    has_width: bool

    @property
    def state(self) -> str:
        """Of three."""
        return "stays" if self.stays else "fastest" if self.is_fastest else "between"


def _op_times(ledger: Ledger, draft: Draft) -> dict[str, _OpTime]:
    """What each op takes, and whether its sites could make it faster."""
    table, problem = ledger.tables[draft.table], ledger.problem(draft.table)
    assignment, precision = draft.assignment, table.choice.precision
    found: dict[str, _OpTime] = {}
    for site, row in table.ops.items():
        level = str(assignment.get(site, precision))
        ms = row.get(level, row.get(precision, 0.0))
        others = [row[str(v)] for v in problem.levels().get(site, ()) if str(v) in row]
        stays = level == precision
        found[site] = _OpTime(ms, stays, not stays and ms <= min(others, default=ms), False)
    levels = table.complete(assignment)
    for term in table.terms:
        stays = all(levels[site] == problem.native_of(site) for site in term.sites)
        has_width = any(isinstance(levels[s], int) for s in term.sites)
        fastest = not stays and _is_fastest(problem, term, levels)
        ms = term.at(levels)
        old = found.get(term.name)
        if old is not None:  # an op of several terms
            ms, stays = ms + old.ms, stays and old.stays
            fastest, has_width = fastest and old.is_fastest, has_width or old.has_width
        found[term.name] = _OpTime(ms, stays, fastest, has_width)
    return found


def _is_fastest(problem: Problem, term: Term, levels: Mapping[str, Level]) -> bool:
    """Whether no single other level of the term's sites makes it faster."""
    here = term.at(levels)
    return all(
        term.at({**levels, site: priced_as(level)}) >= here * (1 - 1e-9)
        for site in term.sites
        for level in problem.levels().get(site, ())
    )


def _peak_words(ledger: Ledger, draft: Draft) -> str:
    limit, peak = ledger.task.limits.max_peak, ledger.peak(draft)
    if limit is None or peak is None:
        return "this system does not account for peak memory"
    text = f"a call takes {peak / MEGABYTE:.2f} of {limit / MEGABYTE:.2f} MB at its peak"
    if peak > limit:
        return text + ", the least of the plans that were built"
    return text + "; a plan that was faster at no more loss takes more"


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
