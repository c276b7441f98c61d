"""Histograms that grow, and row samples that stay bounded."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tersor.observe.streams import BINS, Histogram, MomentStream, RowSample
from tests.unit.capturing import random


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.lists(st.floats(2**-3, 2**4), min_size=1, max_size=5))
def test_growth_merges_exactly(seed: int, sizes: list[float]) -> None:
    # Odd multiples of half the finest bin that occurs (edge 2**-4): no value lies on a border, and
    # value + edge is exact in float32.
    generator = torch.Generator().manual_seed(seed)
    unit = 2.0**-4 * 2 / BINS
    parts = []
    for size in sizes:
        raw = (torch.rand(200, generator=generator) * 2 - 1) * size
        parts.append(raw.div(unit).floor().add(0.5).mul(unit))
    grown, whole = Histogram(), Histogram()
    for part in parts:
        grown.add_(part)
    whole.add_(torch.cat(parts))
    reference = torch.histogram(torch.cat(parts).double(), bins=grown.edges()).hist
    assert grown.edge == whole.edge
    assert torch.equal(grown.counts, whole.counts)
    assert torch.equal(grown.counts, reference)
    assert (grown.low, grown.high) == (float(torch.cat(parts).min()), float(torch.cat(parts).max()))


def test_the_edge_is_the_least_power_of_two() -> None:
    for largest, edge in ((0.3, 0.5), (0.5, 0.5), (1.0, 1.0), (1.0001, 2.0), (1e-6, 2.0**-19)):
        histogram = Histogram()
        histogram.add_(torch.tensor([-largest, 0.0, largest / 3]))
        assert histogram.edge == edge
        assert histogram.counts.sum() == 3
        assert len(histogram.edges()) == BINS + 1
        assert (histogram.edges()[0], histogram.edges()[-1]) == (-edge, edge)


def test_nothing_and_zeros() -> None:
    histogram = Histogram()
    histogram.add_(torch.zeros(0))
    assert (histogram.low, histogram.high) == (float("inf"), float("-inf"))
    histogram.add_(torch.zeros(5))
    assert (histogram.edge, histogram.low, histogram.high) == (0.0, 0.0, 0.0)
    whole = Histogram()
    for part in (torch.ones(2), torch.full((3,), -0.1)):
        histogram.add_(part)
    whole.add_(torch.cat([torch.zeros(5), torch.ones(2), torch.full((3,), -0.1)]))
    assert torch.equal(histogram.counts, whole.counts)


@pytest.mark.parametrize(("limit", "n_batches"), [(10, 3), (4, 9), (100, 2)])
def test_row_samples_are_bounded(limit: int, n_batches: int) -> None:
    sample = RowSample(limit, n_batches)
    generator = torch.Generator().manual_seed(0)
    shares = []
    for batch in range(n_batches):
        rows = torch.full((6, 2), float(batch))
        picked = sample.pick(len(rows), generator)
        assert len(picked.unique()) == len(picked)
        sample.add_(rows[picked])
        shares.append(len(picked))
    assert len(sample.value()) == min(limit, sum(shares))
    assert max(shares) <= min(6, -(-limit // n_batches))


def test_a_sample_does_not_follow_its_source() -> None:
    sample = RowSample(3, 1)
    rows = torch.zeros(3, 2)
    sample.add_(rows)
    rows += 1
    assert torch.equal(sample.value(), torch.zeros(3, 2))


def test_moments_of_parts_add_up() -> None:
    x = random(10, 2, 3)
    whole, parts = MomentStream(), MomentStream()
    whole.add_(x)
    for part in x.split(4):
        parts.add_(part)
    assert parts.value().count == 10
    assert torch.allclose(parts.value().xx, whole.value().xx, rtol=1e-13)
    with pytest.raises(AssertionError, match="no rows were added"):
        MomentStream().value()
