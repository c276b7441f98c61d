"""Latency of one call, where calls differ in their sizes: the expectation over the data's.

A session's callers run one call of each example, one after the other; what is measured of them
is the mean over the examples.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

from tersor.api.session import MIX, Session
from tersor.core.records import Timing
from tersor.timing.protocol import Protocol, measure


def measure_calls(
    session: Session,
    calls: Mapping[str, Callable[[], object]],
    protocol: Protocol,
    mix: int = MIX,
) -> dict[str, Timing]:
    """Latencies of a session's callers, of a mix of that many calls, interleaved, for one call."""
    count = len(session.examples(session.settings.batch, mix))
    return {name: one_call(found, count) for name, found in measure(calls, protocol).items()}


def one_call(timing: Timing, count: int) -> Timing:
    """The latency of one of ``count`` calls that were measured together: their mean."""
    return replace(
        timing,
        median_ms=timing.median_ms / count,
        low_ms=timing.low_ms / count,
        high_ms=timing.high_ms / count,
        rounds_ms=tuple(ms / count for ms in timing.rounds_ms),
    )
