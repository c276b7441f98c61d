"""Medians of resampled rounds: those of the definition, whatever the rounds' lengths."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tersor.timing.pooled import pooled_medians

times = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=6)


@given(st.lists(times, min_size=1, max_size=5), st.integers(0, 2**32 - 1))
def test_it_is_the_median_of_the_rounds_that_were_drawn(rows: list[list[float]], seed: int) -> None:
    rounds = [np.asarray(row) for row in rows]
    picks = np.random.default_rng(seed).integers(0, len(rounds), size=(20, len(rounds)))
    wanted = [np.median(np.concatenate([rounds[i] for i in draw])) for draw in picks]
    assert np.array_equal(pooled_medians(rounds, picks), wanted)


def test_a_single_run_is_its_own_median() -> None:
    assert (
        pooled_medians([np.asarray([2.5])], np.zeros((3, 1), dtype=np.int64)).tolist() == [2.5] * 3
    )
