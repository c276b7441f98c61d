"""What undoing one choice of a plan would change: the plan with and without it, side by side."""

from tersor.api.latency import measure_calls
from tersor.api.proposing import Offers
from tersor.api.quality import Quality
from tersor.api.session import Session
from tersor.api.stages import build_for, stitched
from tersor.core.errors import BackendError, ParityError
from tersor.core.jsonable import digest
from tersor.core.records import Level, Plan
from tersor.report.record import Undone
from tersor.timing.protocol import Protocol

_SIDE_BY_SIDE = Protocol(rounds=7, runs=11, max_seconds=12.0, one_speed=True)


def measure_undone(
    session: Session, offered: Offers, quality: Quality, plan: Plan, change: tuple[str, Level]
) -> Undone | None:
    """Build the plan and the plan without one choice, evaluate both, measure them interleaved.

    Both have the weights of the search, so that only this choice differs. Found again in the store.

    Args:
        session: The run's session.
        offered: Its candidates.
        quality: How losses are measured.
        plan: The plan.
        change: The site, and its level when it is left alone.

    Returns:
        None where the other plan can't be built.
    """
    site, level = change
    chosen = dict(plan.assignment)
    key = digest(session.key, plan.choice, sorted(chosen.items()), quality.target.budgets(), site)
    kept = session.store.get(Undone, "undone", key)
    if kept is not None:
        return kept
    session.progress.note(f"{site}: measured without its change")
    graphs = [stitched(session, offered, a) for a in (chosen, {**chosen, site: level})]
    try:
        builds = [build_for(session, graph, plan.choice) for graph in graphs]
    except (BackendError, ParityError) as error:
        session.progress.note(f"{site}: could not be measured: {error}")
        return None
    calls = {
        name: session.caller(built.executable, plan.choice.batch)
        for name, built in zip(("with", "without"), builds, strict=True)
    }
    times = measure_calls(session, calls, _SIDE_BY_SIDE)
    losses = [quality.loss(graph) for graph in graphs]
    errors = [quality.error(graph) for graph in graphs]
    found = Undone(
        site=site,
        level=level,
        latency_ms_change=times["without"].median_ms - times["with"].median_ms,
        loss_change=losses[1] - losses[0],
        error_change=errors[1] - errors[0],
    )
    session.store.put("undone", key, found)
    return found
