"""How sure a share of right answers is, from the answers themselves."""

import math
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torch import Tensor

from tersor.api.quality import Quality, Watched
from tersor.api.session import Session
from tersor.core.data import Metric
from tersor.core.target import Target


def logits(classes: list[int]) -> Tensor:
    return torch.nn.functional.one_hot(torch.tensor(classes), 5).float()


def asked(outputs: list[Any]) -> Watched:
    stream = iter(outputs)
    watched = Watched(lambda _: next(stream))
    for _ in outputs:
        watched(None)
    return watched


def test_error_of_a_difference_by_hand() -> None:
    """Two of eight samples differ: sqrt(0.25 / 8)."""
    first = asked([logits([0, 1, 2, 3]), logits([4, 0, 1, 2])])
    second = asked([logits([0, 1, 2, 4]), logits([4, 0, 1, 3])])
    assert second.error(first.answers) == pytest.approx(math.sqrt(0.25 / 8))
    assert first.error(first.answers) == 0


def test_it_bounds_what_chance_does() -> None:
    """The spread of the drop over many draws of 400 samples, one answer in ten flipped."""
    generator = torch.Generator().manual_seed(0)
    drops, errors = [], []
    for _ in range(200):
        right = torch.rand(400, generator=generator) < 0.9
        flipped = torch.rand(400, generator=generator) < 0.1
        now = right ^ flipped
        drops.append(float(right.double().mean() - now.double().mean()))
        errors.append(asked([logits(now.int().tolist())]).error([right.int()]))
    spread = float(np.std(drops))
    assert spread <= np.mean(errors) < 1.5 * spread


def test_containers_and_arrays_are_looked_into() -> None:
    found = asked([{"logits": logits([3]).numpy(), "more": torch.zeros(1, 9)}, (logits([1]), None)])
    assert [a.tolist() for a in found.answers] == [[3], [1]]


@pytest.mark.parametrize("output", [torch.zeros(2, 3, 4, 4), torch.zeros(6), torch.zeros(6, 1), {}])
def test_what_is_no_row_of_logits_a_sample_says_nothing(output: Any) -> None:
    assert asked([output]).answers == []
    assert asked([output]).error([]) == 0


def test_calls_that_do_not_match_say_nothing() -> None:
    assert asked([logits([0, 1])]).error([torch.tensor([0]), torch.tensor([1])]) == 0


def test_no_answers_differ_by_nothing() -> None:
    assert asked([torch.zeros(0, 5)]).error([torch.zeros(0, dtype=torch.int64)]) == 0


def quality(kind: str, metric: Any = None, **budgets: float) -> Quality:
    session = Mock(spec=Session, kind=kind, settings=Mock(metric=metric))
    return Quality(session, Target(**budgets))


def test_losses_are_told_in_points() -> None:
    """Losses are in the target's units, and sums of layers' errors go beyond what can be lost."""
    share = quality("logits", min_agreement=0.99)
    assert [share.points(x) for x in (0.004, 3.0)] == [pytest.approx(0.4), 100]
    assert quality("embedding", min_agreement=0.9).points(1.5) == pytest.approx(150)
    assert quality("embedding", speedup=2.0).points(0.01) == pytest.approx(1)
    agreed = quality("logits", drop_points=0.5)
    assert [agreed.points(x) for x in (0.3, 130.0)] == [pytest.approx(0.3), 100]
    scored = quality("logits", Metric(lambda _: 0.5), drop_points=0.5)
    assert [scored.points(x) for x in (0.3, 130.0)] == [pytest.approx(0.3), 100]
    assert quality("logits", Metric(lambda _: 0.5), speedup=2.0).points(0.3) == pytest.approx(0.3)
    wide = quality("logits", Metric(lambda _: 0.5, points=2.0), drop_points=0.5)
    assert wide.points(130.0) == pytest.approx(130)
    both = quality("logits", drop_points=0.5, min_agreement=0.99)
    assert both.points(0.8) == pytest.approx(0.4)


def test_units_tell_which_losses_can_be_converted() -> None:
    """Without a metric both words are of agreement; a metric is another quantity."""
    wholes = {
        "points": quality("logits", drop_points=0.5),
        "agreement": quality("logits", min_agreement=0.99),
        "none": quality("logits", speedup=2.0),
    }
    assert {name: q.unit for name, q in wholes.items()} == {
        "points": ("agreement", 100.0),
        "agreement": ("agreement", 1.0),
        "none": ("agreement", 1.0),
    }
    # The larger of a loss of 0.004 in budgets of half a point and of 0.01.
    both = quality("logits", drop_points=0.5, min_agreement=0.99)
    assert both.unit == ("agreement", pytest.approx(200.0))
    zero = quality("logits", drop_points=0.0, min_agreement=0.5)
    assert zero.points(0.3 * zero.unit[1]) == pytest.approx(30)
    metric = Metric(lambda _: 0.5)
    assert quality("logits", metric, drop_points=0.5).unit == ("the metric", 100.0)
    assert quality("logits", metric, speedup=2.0).unit == ("the metric", 100.0)
    assert quality("logits", metric, min_agreement=0.9).unit == ("agreement", 1.0)
    mixed = [
        quality("logits", metric, drop_points=d, min_agreement=0.9).unit[0] for d in (0.5, 0.7)
    ]
    assert mixed[0] != mixed[1]
    assert "the metric" not in mixed
