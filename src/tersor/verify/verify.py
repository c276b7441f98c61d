"""Original, best uncompressed build and result side by side, against the target."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tersor.core.data import ENOUGH_TEST_SAMPLES
from tersor.core.records import Check, OutputKind, Status, Timing, Verdict
from tersor.core.target import Target
from tersor.core.units import BYTES_PER_MB
from tersor.graph.geometry import sample_agreement
from tersor.timing.protocol import Ratio, paired_noise, ratio

# Two medians of one run that are closer than this are equal: what interleaving repeats to.
_EQUAL = 0.02
# Rounds whose ratio spreads by more than this certify no speed: something else has the machine.
BUSY = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Everything a verdict is made of, measured in one session.

    Attributes:
        result, baseline, original: Latencies, interleaved.
        size_bytes, original_bytes: The saved artifact; the model as given.
        peak_bytes: Extra peak memory of one run, where the system tells.
        agreement: With the original, for each test sample.
        metric_original, metric_result: The caller's metric, if there is one.
        points: What one point of drop is worth in the metric's unit.
        held_out: The metric saw data that nothing else saw, for the first time.
        metric_is_held_out: The caller gave a ``test_metric``.
    """

    result: Timing
    baseline: Timing
    original: Timing | None
    size_bytes: int
    original_bytes: int
    peak_bytes: int | None
    agreement: Tensor
    kind: OutputKind
    metric_original: float | None = None
    metric_result: float | None = None
    points: float = 0.01
    metric_is_held_out: bool = False
    test_uses: int = 1
    difference: float = 0.0


def verdict(  # noqa: PLR0913 - what was asked, what was measured, and what the report quotes
    target: Target,
    measured: Measured,
    *,
    binding: str = "",
    returned_baseline: bool = False,
    reason: str = "",
    notes: Sequence[str] = (),
    seed: int = 0,
) -> Verdict:
    """Judge what was measured.

    A latency passes if the 95 % bound of the ratio meets the target; a quality on fewer than 30
    test samples is unknown.
    """
    speed = ratio(measured.baseline, measured.result, seed)
    drop = drop_points(measured)
    checks = tuple(_checks(target, measured, speed, drop))
    states: set[Status] = {check.status for check in checks}
    status: Status = "fail" if "fail" in states else "unknown" if "unknown" in states else "pass"
    scores = measured.agreement.double()
    return Verdict(
        status=status,
        checks=checks,
        latency=measured.result,
        baseline_latency=measured.baseline,
        original_latency=measured.original,
        speedup=speed.value,
        speedup_low=speed.low,
        speedup_high=speed.high,
        size_bytes=measured.size_bytes,
        original_bytes=measured.original_bytes,
        peak_bytes=measured.peak_bytes,
        drop_points=drop,
        metric_original=measured.metric_original,
        metric_result=measured.metric_result,
        agreement=float(scores.mean()),
        agreement_p5=float(torch.quantile(scores, 0.05)),
        output_kind=measured.kind,
        test_samples=len(scores),
        held_out=_is_held_out(measured),
        test_uses=measured.test_uses,
        binding=binding,
        returned_baseline=returned_baseline,
        reason=reason,
        largest_difference=measured.difference,
        noise=paired_noise(measured.baseline, measured.result),
        notes=(*notes, *_interruptions(measured)),
    )


def _interruptions(measured: Measured) -> list[str]:
    """What to say where most timed calls of the comparison were interrupted and yet count."""
    timings = (measured.baseline, measured.result)
    runs, disturbed = sum(t.runs for t in timings), sum(t.disturbed for t in timings)
    if 2 * disturbed <= runs:
        return []
    said = f"the machine was busy: the system interrupted {disturbed} of the {runs} timed calls"
    return [f"{said}; latencies are those of a busy machine"]


def _is_held_out(measured: Measured) -> bool:
    once = measured.test_uses <= 1
    return once and (measured.metric_original is None or measured.metric_is_held_out)


def drop_points(measured: Measured) -> float:
    """100 x (metric of the original - metric of the result); of the agreement without a metric."""
    if measured.metric_original is not None and measured.metric_result is not None:
        return (measured.metric_original - measured.metric_result) / measured.points
    return 100.0 * (1.0 - float(measured.agreement.double().mean()))


def is_slower(speed: Ratio) -> bool:
    """Whether a result is surely slower than the best uncompressed build."""
    return speed.high < 1.0 and speed.value < 1.0 - _EQUAL


def _checks(target: Target, measured: Measured, speed: Ratio, drop: float) -> list[Check]:
    makers: Mapping[str, Callable[[float], Check]] = {
        "speedup": lambda wanted: _in_quiet(_bounded("speedup", wanted, speed), measured),
        "latency_ms": lambda wanted: _in_quiet(_latency(wanted, measured.result), measured),
        "size_mb": lambda wanted: _at_most("size_mb", wanted, measured.size_bytes / BYTES_PER_MB),
        "size_ratio": lambda wanted: _at_least(
            "size_ratio", wanted, measured.original_bytes / max(1, measured.size_bytes)
        ),
        "peak_mb": lambda wanted: _peak(wanted, measured.peak_bytes),
        "drop_points": lambda wanted: _quality(measured, _at_most("drop_points", wanted, drop)),
        "min_agreement": lambda wanted: _quality(
            measured,
            _at_least("min_agreement", wanted, float(measured.agreement.double().mean())),
        ),
    }
    return [makers[name](wanted) for name, wanted in target.budgets().items()]


def _bounded(name: str, wanted: float, found: Ratio) -> Check:
    status: Status = "pass" if found.low >= wanted else "fail" if found.high < wanted else "unknown"
    note = f"95 % bounds {found.low:.3f} to {found.high:.3f}"
    return Check(name=name, wanted=wanted, found=found.value, status=status, note=note)


def _latency(wanted: float, found: Timing) -> Check:
    status: Status = (
        "pass" if found.high_ms <= wanted else "fail" if found.low_ms > wanted else "unknown"
    )
    note = f"95 % bounds {found.low_ms:.3f} to {found.high_ms:.3f} ms"
    return Check(name="latency_ms", wanted=wanted, found=found.median_ms, status=status, note=note)


def _in_quiet(check: Check, measured: Measured) -> Check:
    """The check; nothing passes on a machine that was too busy to tell."""
    spread = paired_noise(measured.baseline, measured.result)
    if spread <= BUSY:
        return check
    note = (
        f"the machine is busy: rounds of one measurement differ by {spread:.0%}, wanted at most "
        f"{BUSY:.0%}; stop what else runs on it and call compress again with the same cache_dir"
    )
    status: Status = "unknown" if check.status == "pass" else check.status
    return replace(check, status=status, note=f"{check.note}; {note}")


def _peak(wanted: float, found: int | None) -> Check:
    if found is None:
        return Check(
            name="peak_mb",
            wanted=wanted,
            found=math.nan,
            status="unknown",
            note="this system does not account for peak memory",
        )
    return _at_most("peak_mb", wanted, found / BYTES_PER_MB)


def _at_most(name: str, wanted: float, found: float) -> Check:
    slack = 1e-9 * max(1.0, abs(wanted))
    status: Status = "pass" if found <= wanted + slack else "fail"
    return Check(name=name, wanted=wanted, found=found, status=status)


def _at_least(name: str, wanted: float, found: float) -> Check:
    slack = 1e-9 * max(1.0, abs(wanted))
    status: Status = "pass" if found >= wanted - slack else "fail"
    return Check(name=name, wanted=wanted, found=found, status=status)


def _quality(measured: Measured, check: Check) -> Check:
    count = len(measured.agreement)
    if count < ENOUGH_TEST_SAMPLES:
        return replace(
            check,
            status="unknown",
            note=f"{count} test samples; wanted at least {ENOUGH_TEST_SAMPLES}",
        )
    return check


def agreement(
    found: Sequence[Sequence[Tensor]], wanted: Sequence[Sequence[Tensor]], kind: OutputKind
) -> Tensor:
    """Agreement of each sample, over batches of flat outputs; in their order within a shape."""
    return torch.cat([sample_agreement(*pair, kind) for pair in by_shape(found, wanted)])


def by_shape(
    found: Sequence[Sequence[Tensor]], wanted: Sequence[Sequence[Tensor]]
) -> list[tuple[list[Tensor], list[Tensor]]]:
    """Batches of flat outputs of two models, joined where the shapes of a sample are equal."""
    groups: dict[tuple[torch.Size, ...], list[int]] = {}
    for index, flat in enumerate(wanted):
        groups.setdefault(tuple(t.shape[1:] for t in flat), []).append(index)
    return [
        (_joined([found[i] for i in group]), _joined([wanted[i] for i in group]))
        for group in groups.values()
    ]


def _joined(batches: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    columns = (list(parts) for parts in zip(*batches, strict=True))
    return [torch.cat(parts) if parts[0].dim() else parts[0] for parts in columns]
