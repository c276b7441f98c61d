"""Verdicts: every budget passes, fails or is unknown, and the reasons for the last."""

import gc
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tersor.core.records import Check, Timing
from tersor.core.target import Target
from tersor.timing.protocol import Ratio, ratio
from tersor.verify.memory import peak_bytes
from tersor.verify.verify import BUSY, Measured, agreement, drop_points, is_slower, verdict
from tests.unit.capturing import random

MB = 1_000_000


def timing(*rounds: float) -> Timing:
    """Latency of one call, a number a round."""
    ordered = sorted(rounds)
    return Timing(
        median_ms=ordered[len(ordered) // 2],
        low_ms=ordered[0],
        high_ms=ordered[-1],
        rounds_ms=rounds,
        runs=10 * len(rounds),
    )


STEADY = timing(*[10.0] * 7)
HALF = timing(*[5.0] * 7)
# Twice as fast in half of the rounds, equally fast in the others: the bounds straddle 1.5.
WAVERING = timing(5.0, 10.0, 5.0, 10.0, 5.0, 10.0, 7.0)


def measured(**fields: Any) -> Measured:
    base: dict[str, Any] = {
        "result": HALF,
        "baseline": STEADY,
        "original": None,
        "size_bytes": 2 * MB,
        "original_bytes": 8 * MB,
        "peak_bytes": 3 * MB,
        "agreement": torch.full((100,), 0.99),
        "kind": "logits",
    }
    return Measured(**base | fields)


def check(target: Target, **fields: Any) -> Check:
    found = verdict(target, measured(**fields))
    (one,) = found.checks
    assert found.status == one.status
    return one


@pytest.mark.parametrize(
    ("target", "fields", "status", "value"),
    [
        ({"speedup": 1.9}, {}, "pass", 2.0),
        ({"speedup": 2.0}, {}, "pass", 2.0),
        ({"speedup": 2.1}, {}, "fail", 2.0),
        ({"speedup": 1.5}, {"result": WAVERING}, "unknown", 10 / 7),
        ({"latency_ms": 5.0}, {}, "pass", 5.0),
        ({"latency_ms": 4.9}, {}, "fail", 5.0),
        ({"latency_ms": 8.0}, {"result": WAVERING}, "unknown", 7.0),
        ({"size_mb": 2.0}, {}, "pass", 2.0),
        ({"size_mb": 1.9}, {}, "fail", 2.0),
        ({"size_ratio": 4.0}, {}, "pass", 4.0),
        ({"size_ratio": 4.1}, {}, "fail", 4.0),
        ({"peak_mb": 3.0}, {}, "pass", 3.0),
        ({"peak_mb": 2.9}, {}, "fail", 3.0),
        ({"drop_points": 1.1}, {}, "pass", 1.0),
        ({"drop_points": 0.9}, {}, "fail", 1.0),
        ({"min_agreement": 0.98}, {}, "pass", 0.99),
        ({"min_agreement": 0.995}, {}, "fail", 0.99),
        ({"drop_points": 1.1}, {"agreement": torch.full((29,), 0.99)}, "unknown", 1.0),
        ({"drop_points": 1.1}, {"agreement": torch.full((30,), 0.99)}, "pass", 1.0),
        ({"min_agreement": 0.995}, {"agreement": torch.full((29,), 0.99)}, "unknown", 0.99),
        ({"drop_points": 0.5}, {"metric_original": 0.9, "metric_result": 0.897}, "pass", 0.3),
        ({"drop_points": 0.2}, {"metric_original": 0.9, "metric_result": 0.897}, "fail", 0.3),
        ({"drop_points": 0.0}, {"metric_original": 0.9, "metric_result": 0.91}, "pass", -1.0),
    ],
)
def test_each_budget(
    target: dict[str, float], fields: dict[str, Any], status: str, value: float
) -> None:
    found = check(Target(**target), **fields)
    assert (found.name, found.wanted) == next(iter(target.items()))
    assert found.status == status
    assert found.found == pytest.approx(value, rel=1e-6)


def test_reasons_for_unknown() -> None:
    assert "95 % bounds" in check(Target(speedup=1.5), result=WAVERING).note
    few = check(Target(drop_points=1), agreement=torch.ones(12))
    assert few.note == "12 test samples; wanted at least 30"
    peak = check(Target(peak_mb=3), peak_bytes=None)
    assert peak.status == "unknown"
    assert math.isnan(peak.found)
    assert peak.note == "this system does not account for peak memory"


def test_a_busy_machine_certifies_no_speed() -> None:
    rounds = timing(4.0, 9.0, 4.0, 8.0, 4.0, 9.0, 5.0)
    for target in (Target(speedup=1.05), Target(latency_ms=50)):
        found = verdict(target, measured(result=rounds))
        assert found.noise > BUSY
        assert [c.status for c in found.checks] == ["unknown"]
        assert "the machine is busy: rounds of one" in found.checks[0].note
    slow = verdict(Target(speedup=50), measured(result=rounds))
    assert slow.status == "fail"  # by its bounds, however wide
    small = verdict(Target(size_mb=3), measured(result=rounds))
    assert small.status == "pass"  # a size is what it is


def test_calls_that_were_interrupted_and_count_are_said() -> None:
    quiet = replace(STEADY, runs=20, disturbed=9)
    assert not any(
        "interrupted" in n for n in verdict(Target(size_mb=3), measured(result=quiet)).notes
    )
    busy = replace(STEADY, runs=20, disturbed=20)
    found = verdict(Target(size_mb=3), measured(result=busy, baseline=replace(busy, disturbed=15)))
    assert any("interrupted 35 of the 40 timed calls" in note for note in found.notes)


def test_values_that_are_not_finite_do_not_pass() -> None:
    fields = {"metric_original": 0.9, "metric_result": float("nan")}
    assert check(Target(drop_points=1), **fields).status == "fail"
    assert check(Target(min_agreement=0.5), agreement=torch.full((50,), math.nan)).status == "fail"


@pytest.mark.parametrize(
    ("target", "status"),
    [
        (Target(speedup=1.5, size_mb=3), "pass"),
        (Target(speedup=1.5, size_mb=1), "fail"),
        (Target(speedup=1.5, peak_mb=3), "unknown"),
        (Target(size_mb=1, peak_mb=3), "fail"),  # one failure decides, whatever is unknown
    ],
)
def test_the_status_of_the_whole(target: Target, status: str) -> None:
    found = verdict(target, measured(peak_bytes=None))
    assert found.status == status
    assert [c.name for c in found.checks] == list(target.budgets())


def test_drop_is_in_points() -> None:
    assert drop_points(measured()) == pytest.approx(1.0, rel=1e-6)
    scores = {"metric_original": 80.0, "metric_result": 79.0}
    assert drop_points(measured(**scores, points=1.0)) == 1.0  # a metric in percent
    assert drop_points(measured(**scores, points=0.5)) == 2.0


@pytest.mark.parametrize(
    ("fields", "held_out"),
    [
        ({}, True),  # agreement on the test part
        ({"test_uses": 2}, False),
        ({"metric_original": 0.9, "metric_result": 0.9}, False),  # the metric guided the search
        ({"metric_original": 0.9, "metric_result": 0.9, "metric_is_held_out": True}, True),
        ({"metric_original": 0.9, "metric_result": 0.9, "metric_is_held_out": True, "test_uses": 2}, False),
    ],
)  # fmt: skip
def test_held_out(fields: dict[str, Any], held_out: bool) -> None:
    assert verdict(Target(size_mb=9), measured(**fields)).held_out == held_out


def test_what_is_measured_is_in_the_record() -> None:
    scores = torch.linspace(0, 1, 101)
    found = verdict(
        Target(speedup=3),
        measured(agreement=scores, original=STEADY, difference=1e-3),
        binding="speedup",
        returned_baseline=True,
        reason="nothing is faster",
        notes=["a", "b"],
    )
    assert (found.latency, found.baseline_latency, found.original_latency) == (HALF, STEADY, STEADY)
    assert (found.speedup, found.speedup_low, found.speedup_high) == (2, 2, 2)
    assert found.agreement == pytest.approx(0.5)
    assert found.agreement_p5 == pytest.approx(0.05)
    assert (found.test_samples, found.output_kind) == (101, "logits")
    assert (found.binding, found.returned_baseline) == ("speedup", True)
    assert (found.reason, found.notes) == ("nothing is faster", ("a", "b"))
    assert found.largest_difference == 1e-3
    assert (found.size_bytes, found.original_bytes, found.peak_bytes) == (2 * MB, 8 * MB, 3 * MB)


@pytest.mark.parametrize(
    ("value", "low", "high", "slower"),
    [
        (0.9, 0.85, 0.95, True),
        (0.9, 0.8, 1.01, False),  # the bounds allow that it is faster
        (0.985, 0.981, 0.99, False),  # surely slower, but by less than interleaving repeats to
        (1.1, 1.05, 1.2, False),
    ],
)
def test_is_slower(value: float, low: float, high: float, slower: bool) -> None:
    assert is_slower(Ratio(value=value, low=low, high=high)) == slower


def test_is_slower_on_real_rounds() -> None:
    assert is_slower(ratio(HALF, STEADY))
    assert not is_slower(ratio(STEADY, HALF))


def test_agreement_over_batches() -> None:
    wanted = [(random(4, 5, seed=i), torch.zeros(4, dtype=torch.long)) for i in range(3)]
    found = [(y.clone(), i) for y, i in wanted]
    found[1][0][2] = -found[1][0][2]
    scores = agreement(found, wanted, "logits")
    assert scores.tolist() == [1.0] * 6 + [0.0] + [1.0] * 5
    cosine = agreement(found, wanted, "embedding")
    assert cosine[6] == pytest.approx(-1)
    assert cosine[0] == pytest.approx(1)


def test_agreement_of_values_is_one_minus_the_normalised_error() -> None:
    wanted = random(50, 3)
    found = wanted + 0.1
    (scores,) = [agreement([(found,)], [(wanted,)], "values")]
    spread = (wanted.double() - wanted.double().mean(0)).square().mean()
    assert torch.allclose(scores, 1 - 0.01 / spread.expand(50), rtol=1e-5)


def test_garbage_that_goes_during_a_call_hides_no_peak() -> None:
    size = 64 * MB
    garbage: list[object] = [torch.ones(size // 2)]
    garbage.append(garbage)
    del garbage
    kept: list[Tensor] = []

    def call() -> None:
        gc.collect()
        kept.append(torch.ones(size // 4))

    peak = peak_bytes(call)
    if peak is None:
        pytest.skip("this system does not account for peak memory")
    assert 0.8 * size < peak < 2 * size


def test_peak_memory_counts_what_a_call_touches() -> None:
    kept: list[Tensor] = []
    size = 64 * MB
    peak = peak_bytes(lambda: kept.append(torch.ones(size // 4)))
    if peak is None:
        pytest.skip("this system does not account for peak memory")
    assert 0.8 * size < peak < 2 * size
    assert (peak_bytes(lambda: None) or 0) < 0.2 * size
