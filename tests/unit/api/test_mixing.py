"""Which mixes of methods are carried out for a size, and which of their final weights are taken."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest

from tersor.api import mixing
from tersor.api.choosing import ChoiceRecord, Scope
from tersor.api.final import Made
from tersor.api.proposing import Offers
from tersor.api.quality import Quality
from tersor.api.session import Session
from tersor.api.settling import Seen, Settling
from tersor.core.records import BuildChoice, Level, Plan, Prices
from tersor.plan.task import Evaluation, Limits

METHODS = ("codebook", "prune", "quantize")
SURE = np.array([1.0, 2.0])


def noisy(error: float) -> Any:
    quality = Mock(Quality)
    quality.noise.return_value, quality.target = error, None
    return quality


@pytest.mark.parametrize(
    ("one", "other", "noise", "is_nearer"),
    [
        ((0.1, 0.5), (0.4, 0.1), 0.1, True),  # three standard errors between the losses
        ((0.1, 0.5), (0.4, 0.1), 0.2, False),  # one and a half: the change decides
        ((0.4, 0.1), (0.1, 0.5), 0.2, True),
        ((0.4, 0.1), (0.1, 0.5), 0.1, False),
        ((0.2, 0.1), (0.2, 0.1), 0.0, False),  # equal ones are not taken
    ],
)
def test_losses_decide_where_they_can_be_told_apart(
    one: tuple[float, float], other: tuple[float, float], noise: float, is_nearer: bool
) -> None:
    mine, its = (Seen(loss, SURE, error) for loss, error in (one, other))
    assert mine.is_nearer(its, noisy(noise)) is is_nearer


def test_without_marks_any_difference_of_losses_counts() -> None:
    one, other = Seen(0.1, None, 0.9), Seen(0.2, SURE, 0.1)
    assert one.is_nearer(other, noisy(99.0))


def plan_of(**levels: tuple[Level, str]) -> Plan:
    return Plan(
        assignment={site: level for site, (level, _) in levels.items()},
        methods={site: method for site, (_, method) in levels.items()},
        choice=BuildChoice(backend="openvino", precision="f32"),
        predicted_ms=1.0,
        predicted_bytes=10,
        predicted_error=0.1,
        target={"size_ratio": 8.0},
    )


MIXED = plan_of(a=("int4_weight", "quantize"), b=("int2_weight", "quantize"), c=("lut4_weight", "codebook"),
                width=(6, "prune"))  # fmt: skip


UNCUT, QUANTIZE, ALL = ("codebook", "quantize"), ("quantize",), ("all",)
NUMBERS = {ALL: 1, UNCUT: 2, QUANTIZE: 3}  # what was evaluated on the way to each


def record(plan: Plan, mix: tuple[str, ...]) -> ChoiceRecord:
    evaluation = Evaluation(assignment={"a": NUMBERS[mix]}, error=0.0, loss=0.0)
    return ChoiceRecord(
        plan=plan, finalists=(plan,), evaluations=(evaluation,), binding="size", reason="+".join(mix),
        is_baseline=False, tables=(),
    )  # fmt: skip


def made_of(mix: tuple[str, ...]) -> Any:
    made = Mock(Made)
    made.mix = mix
    return made


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Settling, Any, list[Scope]]]:
    """Settle, where each mix ends in an error of its own; what is made in the end, and which were carried out."""

    def run(
        errors: dict[tuple[str, ...], float],
        plan: Plan = MIXED,
        over: tuple[str, ...] = (),
        recover: object = None,
        **limits: Any,
    ) -> tuple[Settling, Any, list[Scope]]:
        scopes: list[Scope] = []
        session = Mock(Session)
        session.original_bytes, session.settings, session.progress = 80, Mock(), Mock()
        session.settings.recover = recover
        session.methods = dict.fromkeys(METHODS)
        found = Limits(**{"max_bytes": 10.0, **limits})
        monkeypatch.setattr(mixing, "limits_for", lambda *_: found)
        monkeypatch.setattr(mixing, "seen", lambda _, made: Seen(0.0, None, errors[made.mix]))
        monkeypatch.setattr(Settling, "is_to_fit", property(lambda _: True))
        monkeypatch.setattr(Settling, "bytes_over", lambda s, _: int(s.scope.methods == over))

        def chosen(settling: Settling) -> ChoiceRecord:
            scopes.append(settling.scope)
            return record(plan, settling.scope.methods)

        monkeypatch.setattr(Settling, "chosen", chosen)
        monkeypatch.setattr(Settling, "made", lambda s: made_of(s.scope.methods or ALL))
        settling = Settling(session, Mock(Offers), Mock(Prices), noisy(0.0), record(plan, ALL))
        return settling, mixing.settle(settling), scopes

    return run


def test_the_nearest_of_all_and_of_two_mixes_is_taken(settled: Any) -> None:
    settling, made, scopes = settled({ALL: 3.0, UNCUT: 1.0, QUANTIZE: 2.0})
    assert scopes == [Scope(methods=UNCUT), Scope(methods=QUANTIZE)]
    assert made.mix == UNCUT
    assert settling.choice.reason == "codebook+quantize"
    # What was evaluated on the way to the other plan is known afterwards.
    assert [e.assignment["a"] for e in settling.choice.evaluations] == [
        NUMBERS[UNCUT], NUMBERS[ALL],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("errors", "over", "wanted"),
    [
        ({ALL: 1.0, UNCUT: 2.0, QUANTIZE: 3.0}, (), ALL),
        ({ALL: 1.0, UNCUT: 1.0, QUANTIZE: 1.0}, (), ALL),
        ({ALL: 3.0, UNCUT: 2.0, QUANTIZE: 1.0}, (), QUANTIZE),
        ({ALL: 3.0, UNCUT: 2.0, QUANTIZE: 1.0}, QUANTIZE, UNCUT),
    ],
)
def test_what_is_no_nearer_or_too_large_is_left(
    settled: Any, errors: Any, over: tuple[str, ...], wanted: tuple[str, ...]
) -> None:
    settling, made, _ = settled(errors, over=over)
    assert made.mix == wanted
    assert settling.choice.reason == "+".join(wanted)


@pytest.mark.parametrize(
    "changes",
    [{"max_ms": 1.0}, {"max_loss": 0.1}, {"max_bytes": None, "max_ms": 1.0}, {"recover": True},
     {"plan": plan_of(a=("int4_weight", "quantize"))}],
)  # fmt: skip
def test_other_targets_and_plans_of_one_method_are_carried_out_once(
    settled: Any, changes: dict[str, Any]
) -> None:
    _, made, scopes = settled({ALL: 1.0}, **changes)
    assert made.mix == ALL
    assert scopes == []


def test_a_mix_whose_answer_is_the_baseline_is_left(settled: Any, monkeypatch: Any) -> None:
    settling, _, _ = settled({ALL: 3.0, UNCUT: 2.0, QUANTIZE: 1.0})
    settling.choice = record(MIXED, ALL)
    monkeypatch.setattr(
        Settling, "chosen", lambda _: replace(record(MIXED, QUANTIZE), is_baseline=True)
    )
    made: Any = mixing.settle(settling)
    assert made.mix == ALL
