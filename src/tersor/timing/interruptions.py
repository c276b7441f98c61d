"""Which timed calls the system interrupted.

Two readings tell. A call on one thread that computes all the time has as much processor time as
wall time: what is missing, somebody else had. Its involuntary switches say less, as most of them
cost nothing (a kernel thread for some microseconds; on a busy machine half of all calls have one).
With several threads it is the other way round: those that wait for the one that was interrupted
spin, so that processor time is not missing, and the switches tell.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

COMPUTE_BOUND = 0.95  # processor time / wall time of a call that does not wait
ONE_THREAD = 1.05  # that of several threads is above
LOST = 0.9  # of its usual share of processor time: a call with less was interrupted
_CALM = 0.05  # of all calls without a switch show what is usual


@dataclass(frozen=True, slots=True)
class Sample:
    """One timed call; processor time is that of all threads."""

    wall_ms: float
    cpu_ms: float
    preemptions: int  # involuntary switches
    probe_ms: float = 1.0


def interrupted(samples: Sequence[Sample]) -> list[bool]:
    """Which calls of one callable were interrupted.

    Args:
        samples: All its timed calls, wall times above 0.

    Returns:
        A flag each. Where no call went without a switch, one thread is taken to compute all
        the time: on a machine so busy nothing else can be known.
    """
    shares = [s.cpu_ms / s.wall_ms for s in samples]
    switched = [s.preemptions > 0 for s in samples]
    if min(shares) <= 0:  # a clock that stands still through a call can't tell
        return switched
    calm = [share for share, flag in zip(shares, switched, strict=True) if not flag]
    is_known = len(calm) > _CALM * len(samples)
    usual = statistics.median(calm) if is_known else max(1.0, statistics.median(shares))
    if usual > ONE_THREAD:
        return switched
    lost = [share < LOST * usual for share in shares]
    if usual >= COMPUTE_BOUND:
        return lost
    return [a and b for a, b in zip(lost, switched, strict=True)]  # it waits by its nature
