"""Which calls were interrupted, from readings as machines give them."""

import pytest

from tersor.timing.interruptions import Sample, interrupted


def samples(*rows: tuple[float, float, int]) -> list[Sample]:
    return [Sample(wall, cpu, switches) for wall, cpu, switches in rows]


CALM = (1.0, 1.0, 0)
TWO = (1.0, 1.9, 0)


@pytest.mark.parametrize(
    ("rows", "wanted"),
    [
        ([CALM] * 3 + [(4.0, 1.0, 1)], [False] * 3 + [True]),
        ([CALM] * 3 + [(4.0, 1.0, 0)], [False] * 3 + [True]),  # its host was busy
        # Three other processes on two cores: most calls have a switch, few lose any time.
        ([CALM] * 2 + [(1.0, 1.0, 1)] * 5 + [(3.0, 1.0, 1)], [False] * 7 + [True]),
        # Two threads: the other one spins meanwhile, so that the switch alone tells.
        ([TWO] * 3 + [(2.0, 3.8, 1)], [False] * 3 + [True]),
        # Two threads of which one waits now and then: nobody interrupted it.
        ([TWO] * 3 + [(1.5, 1.9, 0)], [False] * 4),
        # It waits by its nature: less processor time is no sign.
        ([(2.0, 1.0, 0)] * 3 + [(3.0, 1.0, 0)], [False] * 4),
        ([(2.0, 1.0, 0)] * 3 + [(3.0, 1.0, 1)], [False] * 3 + [True]),
    ],
)
def test_readings(rows: list[tuple[float, float, int]], wanted: list[bool]) -> None:
    assert interrupted(samples(*rows)) == wanted


def test_where_every_call_shares_its_core_all_were_interrupted() -> None:
    """Measured with a process on each core beside it: 0.4 of the time, a switch in each call."""
    assert interrupted(samples(*[(28.0, 11.2, 6)] * 9, (24.0, 11.0, 5))) == [True] * 10


def test_a_coarse_clock_of_processor_time_leaves_the_switches() -> None:
    rows = [(1.0, 0.0, 0), (1.0, 10.0, 0), (1.0, 0.0, 1), (1.0, 0.0, 0)]
    assert interrupted(samples(*rows)) == [False, False, True, False]
