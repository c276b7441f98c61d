"""The result beside the best uncompressed build and the original: latency, memory, test part."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from tersor.api.files import ranges_of
from tersor.api.final import Final
from tersor.api.latency import measure_calls
from tersor.api.quality import original_score, score
from tersor.api.session import Session, metric_of
from tersor.api.stages import build_for, eager_call
from tersor.build.build import Built
from tersor.core.records import (
    Prices,
    TensorSpec,
    Timing,
    Verdict,
)
from tersor.core.target import Target
from tersor.runtime.runner import Runner
from tersor.timing.protocol import Protocol, Ratio, ratio
from tersor.verify.memory import peak_bytes
from tersor.verify.verify import Measured, agreement, verdict

_FINAL = Protocol(rounds=9, runs=15, max_seconds=60.0)
# Bytes that the stated size leaves free: a file says when it was written, and its own size. Of 60 other dates the
# deflated text was 2 bytes longer at most, and 3 with the spaces that make a file's own size come out.
_FREE = 8


@dataclass
class TestPart:
    """The test part, and how often it was used."""

    uses: int = 0
    wanted: list[tuple[Tensor, ...]] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Decision:
    """Why the result is what it is, and how large its file is with a verdict in it.

    Attributes:
        size_of: Bytes of the file that says a verdict, on the day of the call.
    """

    binding: str
    is_baseline: bool
    reason: str
    size_of: Callable[[Verdict], int]


def runner_for(session: Session, built: Built) -> Runner:
    """A build with the original's calling convention."""
    signature, ranges = session.graph.signature, ranges_of(session)
    return Runner(built.executable, signature, built.choice.batch, ranges=ranges)


@dataclass(frozen=True, kw_only=True)
class Race:
    """Latencies of one interleaved run, and the extra memory of one call."""

    timings: Mapping[str, Timing]
    peak: int | None

    def speed(self, seed: int) -> Ratio:
        """Best uncompressed build over result."""
        return ratio(self.timings["baseline"], self.timings["result"], seed)


def race(session: Session, prices: Prices, final: Final) -> Race:
    """Measure result, best uncompressed build and the model as given, interleaved."""
    session.progress.stage("verify")
    base = prices.baseline.choice
    assert base is not None
    baseline = build_for(session, session.graph, base)
    peak = peak_bytes(session.caller(final.built.executable, final.built.choice.batch))
    timings = measure_calls(
        session,
        {
            "result": session.caller(final.built.executable, final.built.choice.batch),
            "baseline": session.caller(baseline.executable, base.batch),
            "original": eager_call(session),
        },
        _FINAL,
    )
    return Race(timings=timings, peak=peak)


def judge(
    session: Session,
    target: Target,
    final: Final,
    test: TestPart,
    measured: Race,
    decision: Decision,
) -> Verdict:
    """Run the result on the test part, once, and compare with the target.

    The size is that of the file with the verdict in its report, and a few bytes above it.
    """
    test.uses += 1
    found = _measured(session, final, test, measured.timings, measured.peak)

    def judged(size_bytes: int) -> Verdict:
        return verdict(
            target,
            replace(found, size_bytes=size_bytes),
            binding=decision.binding,
            returned_baseline=decision.is_baseline,
            reason=decision.reason,
            notes=final.notes,
            seed=session.settings.seed,
        )

    return judged(stated_size(lambda size: decision.size_of(judged(size))))


def stated_size(size_of: Callable[[int], int]) -> int:
    """A size that is not below that of the file that states it.

    What a file says of its size, and of what is judged by it, is part of the file, whose deflated text
    grows with it in no even way: no size may be exactly its own.

    Args:
        size_of: Bytes of the file that states a size.
    """
    stated = size_of(0)
    while True:
        found = size_of(stated)
        if found + _FREE <= stated:
            return stated
        stated = max(stated, found) + 2 * _FREE


def _measured(
    session: Session,
    final: Final,
    test: TestPart,
    timings: Mapping[str, Timing],
    peak: int | None,
) -> Measured:
    runner = runner_for(session, final.built)
    batches = list(session.parts["test"].batches(16))
    if not test.wanted:
        test.wanted = [session.graph.run(flat) for flat in batches]
    found = [_flat_outputs(session, runner, flat) for flat in batches]
    own = metric_of(session.settings.test_metric)
    metric = own or metric_of(session.settings.metric)
    name = "test_metric" if own else "metric"
    return Measured(
        result=timings["result"],
        baseline=timings["baseline"],
        original=timings["original"],
        size_bytes=0,
        original_bytes=session.original_bytes,
        peak_bytes=peak,
        agreement=agreement(found, test.wanted, session.kind),
        kind=session.kind,
        metric_original=None if metric is None else original_score(session, name),
        metric_result=None if metric is None else score(metric, session.as_given(runner), name),
        points=0.01 if metric is None else metric.points,
        metric_is_held_out=own is not None,
        test_uses=test.uses,
        difference=final.built.difference,
    )


def _flat_outputs(session: Session, runner: Runner, flat: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    specs = session.graph.signature
    parts: list[dict[str, Any]] = []
    size = runner.built_batch
    count = flat[0].shape[0]
    for start in range(0, count, size):
        rows = torch.arange(start, start + size).clamp_max(count - 1)
        inputs = {s.name: t[rows].numpy() for s, t in zip(specs.inputs, flat, strict=True)}
        parts.append(runner.executable.run(inputs))
    sized = [[_sized(torch.from_numpy(p[s.name]), s, size) for p in parts] for s in specs.outputs]
    return tuple(torch.cat(each)[:count] if each[0].dim() else each[0] for each in sized)


def _sized(tensor: Tensor, spec: TensorSpec, batch: int) -> Tensor:
    if spec.dynamic:
        return tensor
    return tensor.reshape([batch if size is None else size for size in spec.shape])
