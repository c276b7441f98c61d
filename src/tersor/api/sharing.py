"""From candidates to one result on all ranks.

Rank 0 prices, plans, builds and judges; the others get what it found, and build it when they use it.
"""

from collections.abc import Callable
from functools import partial

from tersor.api.choosing import ChoiceRecord
from tersor.api.judging import TestPart
from tersor.api.proposing import Offers
from tersor.api.quality import original_score
from tersor.api.recovering import RECOVER, recover_along
from tersor.api.result import Result, ResultRecord, Run, make_result
from tersor.api.session import Session
from tersor.api.stages import baselines, price
from tersor.core.machine import describe_machine
from tersor.core.records import Plan, Prices
from tersor.core.target import Target
from tersor.observe.ranks import Facts, Parcel


def check_metric(session: Session) -> None:
    """Call the metric once on the original: one that can't be used is better known now."""

    def checked() -> Parcel[Facts]:
        return Parcel(Facts(facts={"metric": repr(original_score(session, "metric"))}))

    session.progress.stage("metric")
    session.ranks.first(Facts, checked, "metric")


def found_result(session: Session, offered: Offers, target: Target) -> Result:
    """Price, choose, transform, build and verify."""
    prices = session.ranks.first(Prices, lambda: Parcel(price(session, offered)), "price").record
    run = Run(session=session, offered=offered, prices=prices, test=TestPart())
    return _shared(run, target, lambda: make_result(run, target))


def given_result(session: Session, offered: Offers, plan: Plan) -> Result:
    """Carry out a plan: transform, build and verify."""

    def bare() -> Parcel[Prices]:
        rows, best = baselines(session)
        machine = describe_machine().fingerprint()
        return Parcel(Prices(machine=machine, baselines=rows, best=best, tables=()))

    prices = session.ranks.first(Prices, bare, "baseline").record
    target = Target.from_mapping(plan.target) if plan.target else Target(speedup=1.0)
    choice = ChoiceRecord(
        plan=plan,
        finalists=(plan,),
        evaluations=(),
        binding="",
        reason="the given plan",
        is_baseline=False,
        tables=(),
    )
    run = Run(session=session, offered=offered, prices=prices, test=TestPart())

    def make() -> Result:
        result = Result(run, target, choice)
        _ = result.verdict
        session.progress.close()
        return result

    return _shared(run, target, make)


def _shared(run: Run, target: Target, make: Callable[[], Result]) -> Result:
    """What rank 0 makes, on all ranks."""
    ranks, made = run.session.ranks, list[Result]()
    if not ranks.is_shared:
        return make()

    def parcel() -> Parcel[ResultRecord]:
        made.append(make())
        return made[0].parcel()

    serve = {RECOVER: partial(recover_along, run.session)}
    found = ranks.first(ResultRecord, parcel, "plan", serve)
    return made[0] if made else Result.of_parcel(run, target, found)
