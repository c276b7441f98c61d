"""Medians over rounds that a bootstrap drew: thousands of them, so all at once."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]


def pooled_medians(rounds: Sequence[FloatArray], picks: NDArray[np.int64]) -> FloatArray:
    """The median of all times of the rounds in each draw.

    Args:
        rounds: Times of each round [runs of that round], finite, at least one each.
        picks: Rounds of each draw [draws, rounds in a draw].

    Returns:
        [draws]; to the bit what ``np.median`` says of the concatenated rounds.
    """
    lengths = np.asarray([len(r) for r in rounds])
    padded = np.full((len(rounds), int(lengths.max())), np.inf)
    for row, times in zip(padded, rounds, strict=True):
        row[: len(times)] = times
    pools = np.sort(padded[picks].reshape(len(picks), -1), axis=1)  # what was filled in goes last
    counts = lengths[picks].sum(axis=1)[:, np.newaxis]
    low = np.take_along_axis(pools, (counts - 1) // 2, axis=1)
    high = np.take_along_axis(pools, counts // 2, axis=1)
    found: FloatArray = ((low + high) / 2)[:, 0]
    return found
