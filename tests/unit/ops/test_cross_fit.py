"""Which weight is approached behind a compressed prefix."""

import torch
from torch import Tensor

from tersor.ops.cross_fit import cross_fitted
from tersor.ops.moments import Moments, moments_of
from tests.unit.capturing import random


def moments(rows: Tensor, wanted: Tensor) -> Moments:
    return moments_of(rows.unsqueeze(1), wanted.unsqueeze(1))


def test_a_single_row_fits_nothing() -> None:
    """Of one calibration sample one half is empty: it has no mean, and nothing to judge a fit by."""
    weight = random(1, 3, 4).double()
    rows, wanted = random(1, 4).double(), random(1, 4, seed=1).double()
    halves = moments(rows, wanted), moments(rows[:0], wanted[:0])
    for order in (halves, halves[::-1]):
        found, damping = cross_fitted(weight, order)
        assert damping is None
        assert torch.equal(found, weight)


def test_a_shrunk_input_is_made_up_for() -> None:
    """The control of the test above: with rows in both halves the same input is fitted."""
    weight = random(1, 3, 4).double()
    rows = random(400, 4).double()
    halves = moments(rows[::2], 2 * rows[::2]), moments(rows[1::2], 2 * rows[1::2])
    found, damping = cross_fitted(weight, halves)
    assert damping is not None
    assert torch.allclose(found, 2 * weight, rtol=0.02)
