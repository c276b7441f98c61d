"""From a chosen plan to final weights that hold the target, over other plans where they don't.

Searches see weights that were rounded one layer at a time and fitted on few samples; what the final ones lose, and how many
bytes their file takes, is known once they are there.
"""

import math
from dataclasses import dataclass, field, replace

from tersor.api.choosing import (
    ChoiceRecord,
    Scope,
    budget_bytes,
    choose_plan,
    limits_for,
    plan_key,
)
from tersor.api.files import artifact_size, carried_size
from tersor.api.final import Made, make_final
from tersor.api.proposing import Offers
from tersor.api.quality import Quality, Vector
from tersor.api.session import Session
from tersor.api.stages import build_for
from tersor.core.errors import BackendError, ParityError
from tersor.core.jsonable import digest
from tersor.core.records import Plan, Prices
from tersor.core.target import Target

_STEPS_BACK = 2  # milder plans that are tried where the final weights lose too much
_STEPS_ON = 2  # faster plans that are tried where they lose little
_CAUTION = 0.9  # of what a plan that loses just enough would take
_NEARLY = 0.9  # of a size budget, from where the file itself is looked at
_MARGIN = 0.002  # of a size that is left free, where a plan turned out too large: the next one is off, too
_WORTH = 0.02  # of a size budget that a file leaves free, from where a larger plan is tried
_SURE = 2.0  # standard errors between two losses, from which the metric tells them apart
_ROOMY = 0.75  # of a loss allowed: what loses less leaves room for a faster plan
_FURTHEST = 2.0  # times the loss allowed, that a search may spend where final weights lose less
_FASTER = 0.98  # of a measured latency, from where a plan is worth its own final weights


def final_key(session: Session, prices: Prices, target: Target, plan: Plan) -> str:
    """The key of everything after a plan: the plan's own content."""
    unmeasured = replace(plan, measured_ms=None, measured_error=None)
    return digest(plan_key(session, prices, target), unmeasured)


@dataclass
class Settling:
    """Final weights of a choice, and the choice that they belong to in the end.

    Attributes:
        choice: The first one; once ``made`` was asked, that of the graph, the best uncompressed build's
            where no other plan holds.
        scope: Of the next search.
    """

    session: Session
    offered: Offers
    prices: Prices
    quality: Quality
    choice: ChoiceRecord
    scope: Scope = field(default_factory=Scope)

    def made(self) -> Made:
        """The final graph; where it loses more or is larger than was allowed, that of another plan."""
        first, limit = self.choice, self.quality.limit()
        made, steps = self._make(), _STEPS_BACK
        while steps and not self.choice.is_baseline:
            over = 0
            if limit is not None and made.loss > limit:
                self.session.progress.note(
                    f"the final weights lose {made.loss:.4g} on the search part, allowed were "
                    f"{limit:.4g}: a milder plan is chosen"
                )
                if (known := self._milder()) is not None:  # each errs less than the one before
                    self.choice = replace(self.choice, plan=known)
                    made = self._make()
                    continue
                share = self.scope.share * _CAUTION * limit / made.loss
                self.scope = replace(self.scope, share=share)
            elif self.is_to_fit and (over := self.bytes_over(made)) > 0:
                self.session.progress.note(
                    f"the file would take about {over} bytes more than asked for: a smaller plan is chosen"
                )
                spare = (
                    self.scope.spare_bytes + over + int(_MARGIN * self.choice.plan.predicted_bytes)
                )
                self.scope = replace(self.scope, spare_bytes=spare)
            elif limit is None:
                return self._larger(made, free=-over)
            else:
                return self._faster(made, limit) if self.choice is first else made
            steps -= 1
            self.choice = self.chosen()
            made = self._make()
        return made

    def _make(self) -> Made:
        plan, target = self.choice.plan, self.quality.target
        key = final_key(self.session, self.prices, target, plan)
        return make_final(self.session, self.offered, plan, self.quality, key)

    def chosen(self) -> ChoiceRecord:
        """A plan that leaves so much of the target, knowing what was evaluated for the one before."""
        known = self.choice.evaluations
        return choose_plan(
            self.session, self.offered, self.prices, self.quality, scope=self.scope, known=known
        )

    def _milder(self) -> Plan | None:
        """The fastest finalist that errs less than the plan in hand, and holds the target.

        Sharper cuts lose more in their final weights than looks at them say; what was measured beside them,
        such as all in 8 bits, mostly does not.
        """
        here = self.choice.plan.predicted_error * _CAUTION
        holding = standing(self.session, self.prices, self.quality, self.choice)
        return next((p for p in holding if p.predicted_error < here), None)

    def _faster(self, made: Made, limit: float) -> Made:
        """The final graph of a faster plan, where final weights leave much of the loss allowed; or the same.

        Only where losses are means with their errors: accuracies of a few hundred samples are met by luck once
        many plans are tried.
        """
        if not self.quality.has_errors:
            return made
        best, kept = made, self.choice
        for _ in range(_STEPS_ON):
            if not 0 < best.loss <= _ROOMY * limit:
                break
            share = min(self.scope.share * _CAUTION * limit / best.loss, _FURTHEST)
            if share <= self.scope.share:
                break
            self.scope = replace(self.scope, share=share)
            self.session.progress.note(
                f"the final weights lose {best.loss:.4g} on the search part, allowed were {limit:.4g}: "
                "a faster plan is tried"
            )
            self.choice = self.chosen()
            if self.choice.is_baseline or not _is_faster(self.choice.plan, kept.plan):
                break
            tried = self._make()
            if tried.loss > limit or self.bytes_over(tried) > 0:
                break
            best, kept = tried, self.choice
        self.choice = kept
        return best

    def _larger(self, made: Made, free: int) -> Made:
        """The final graph of a larger plan, where the file leaves bytes free and that one is nearer; or the same."""
        kept, scope = self.choice, self.scope
        most = budget_bytes(self.quality.target, self.session.original_bytes)
        if most is None or free < _WORTH * most:
            return made
        self.session.progress.note(
            f"the file would leave {free} bytes of those allowed: a larger plan is tried"
        )
        self.scope = replace(scope, spare_bytes=scope.spare_bytes - int(free * _CAUTION))
        self.choice = self.chosen()
        if not self.choice.is_baseline:
            larger = self._make()
            if self.bytes_over(larger) <= 0:
                its, own = seen(self.quality, larger), seen(self.quality, made)
                if its.is_nearer(own, self.quality):
                    return larger
        self.choice, self.scope = kept, scope
        return made

    @property
    def is_to_fit(self) -> bool:
        """Whether the plan's file was to be as small as was asked for, by prediction and by what it was found to be off."""
        most = budget_bytes(self.quality.target, self.session.original_bytes)
        if most is None:
            return False
        return self.choice.plan.predicted_bytes <= most - min(0, self.scope.spare_bytes)

    def bytes_over(self, made: Made) -> int:
        """By how much the file is larger than was asked for, less than 0: smaller; 0 where that is not at stake."""
        plan = self.choice.plan
        most = budget_bytes(self.quality.target, self.session.original_bytes)
        if most is None or plan.predicted_bytes <= _NEARLY * most:
            return 0
        try:
            built = build_for(self.session, made.graph, plan.choice)
        except (BackendError, ParityError):  # said where it is built for good
            return 0
        size = artifact_size(self.session, made.graph, built)
        size += carried_size(
            self.offered, self.prices, self.session.sites, most, assignment=plan.assignment
        )
        return math.ceil(size - most)


def standing(
    session: Session, prices: Prices, quality: Quality, choice: ChoiceRecord
) -> list[Plan]:
    """Finalists beside the plan in hand that hold the target by what was measured, the fastest first."""
    limits = limits_for(quality.target, prices, quality, session.original_bytes)
    most = min(limits.max_ms or math.inf, prices.baseline.timing.median_ms)
    found = [
        (p.measured_ms, i, p)
        for i, p in enumerate(choice.finalists)
        if p != choice.plan
        if p.measured_ms is not None and p.measured_ms < most
        if p.predicted_bytes <= (limits.max_bytes or math.inf)
        if limits.max_loss is None
        or (p.measured_error is not None and p.measured_error <= limits.max_loss)
    ]
    return [p for _, _, p in sorted(found, key=lambda row: row[:2])]


@dataclass(frozen=True, slots=True)
class Seen:
    """A final graph on the search part: its loss, what tells that one's noise, and how much it changes the outputs."""

    loss: float
    marks: Vector | None
    error: float

    def is_nearer(self, other: "Seen", quality: Quality) -> bool:
        """Whether it loses less; or neither loses more, as far as the search part tells, and it changes the outputs less."""
        noise = 0.0
        if self.marks is not None and other.marks is not None:
            noise = quality.noise(self.marks, other.marks)
        more = self.loss - other.loss
        return more < 0 if abs(more) > _SURE * noise else self.error < other.error


def seen(quality: Quality, made: Made) -> Seen:
    """Run a final graph on the search part."""
    return Seen(made.loss, quality.seen(made.graph)[1], quality.error(made.graph))


def _is_faster(plan: Plan, other: Plan) -> bool:
    """Whether a plan was measured faster than another by what is worth final weights of its own."""
    if plan.measured_ms is None or other.measured_ms is None:
        return False
    return plan.measured_ms <= other.measured_ms * _FASTER
