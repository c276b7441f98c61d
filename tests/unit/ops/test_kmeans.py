"""The tables are the best of all partitions, their errors the definition, and merging hides what it says."""

from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tersor.core.errors import ConfigError, NumericalError, ShapeError
from tersor.ops import kmeans
from tersor.ops.kmeans import optimal_codebooks

SEEDS = st.integers(0, 2**32 - 1)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def uniform(seed: int, *shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def least_error(values: Tensor, weights: Tensor, entries: int) -> float:
    """Over all partitions of the sorted values into that many intervals."""
    order = values.argsort()
    v, w = values[order].tolist(), weights[order].tolist()
    least = float("inf")
    for cuts in combinations(range(1, len(v)), min(entries, len(v)) - 1):
        error = 0.0
        for a, b in zip((0, *cuts), (*cuts, len(v)), strict=True):
            mass = sum(w[a:b])
            if mass:
                mean = sum(x * m for x, m in zip(v[a:b], w[a:b], strict=True)) / mass
                error += sum(m * (x - mean) ** 2 for x, m in zip(v[a:b], w[a:b], strict=True))
        least = min(least, error)
    return least


def error_of(values: Tensor, weights: Tensor, table: Tensor) -> float:
    return float((weights * (values.unsqueeze(1) - table).square().amin(1)).sum())


@given(SEEDS, st.integers(1, 9), st.integers(1, 5), st.booleans(), st.booleans())
@settings(max_examples=25, deadline=None)
def test_tables_are_the_best_of_all_partitions(
    seed: int, n: int, entries: int, ties: bool, gaps: bool
) -> None:
    values, weights = 100 + normal(seed, 3, n), uniform(seed + 1, 3, n)
    if ties:
        values = values.round()
    if gaps:
        weights[:, ::2] = 0
    found = optimal_codebooks(values, weights, entries)
    assert not bool(found.merged.any())
    counted = torch.where(weights.any(1, keepdim=True), weights, 1.0)
    for t in range(3):
        for k in range(1, entries + 1):
            wanted = least_error(values[t], counted[t], k)
            assert float(found.errors[t, k - 1]) == pytest.approx(wanted, abs=1e-11)
        assert error_of(values[t], counted[t], found.tables[t]) == pytest.approx(
            float(found.errors[t, -1]), abs=1e-10
        )
    assert bool((found.tables.diff(dim=1) >= 0).all())
    assert bool((found.errors.diff(dim=1) <= 0).all())


@given(SEEDS, st.sampled_from([3, 16, 64]))
@settings(max_examples=10, deadline=None)
def test_the_halving_search_is_the_plain_recurrence(seed: int, entries: int) -> None:
    n = 90
    values, weights = normal(seed, 1, n).sort().values, uniform(seed + 1, 1, n)
    v, w = values[0], weights[0]
    cost = torch.zeros(n + 1, n + 1, dtype=torch.float64)
    for i in range(n):
        mass, first = w[i:].cumsum(0), (w * v)[i:].cumsum(0)
        cost[i, i + 1 :] = (w * v * v)[i:].cumsum(0) - first**2 / mass
    row = cost[0]
    errors = [row[-1]]
    for _ in range(1, entries):
        whole = row.unsqueeze(1) + cost
        whole[torch.ones_like(whole).tril(-1) > 0] = torch.inf  # a cut is not behind the end
        row = whole.amin(0)
        errors.append(row[-1])
    found = optimal_codebooks(values, weights, entries)
    assert torch.allclose(found.errors[0], torch.stack(errors).clamp(min=0), atol=1e-11)


def test_tables_of_several_sizes_go_in_step() -> None:
    values = normal(0, 5, 40)
    values[1, :35], values[2, :20], values[3] = 1.0, values[2, 20:], 2.0
    together = optimal_codebooks(values, None, 4)
    for t in range(5):
        alone = optimal_codebooks(values[t : t + 1], None, 4)
        assert torch.allclose(together.tables[t], alone.tables[0])
        assert torch.allclose(together.errors[t], alone.errors[0], atol=1e-12)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    values = normal(0, 7, 30)
    whole = optimal_codebooks(values, None, 5)
    monkeypatch.setattr(kmeans, "CHUNK_POINTS", 64)
    parts = optimal_codebooks(values, None, 5)
    assert torch.equal(whole.tables, parts.tables)


def test_more_entries_than_distinct_values() -> None:
    found = optimal_codebooks(torch.tensor([[1.0, 3.0, 1.0, 2.0]]), None, 6)
    assert found.tables.tolist() == [[1, 2, 3, 3, 3, 3]]
    assert found.errors[0, 2:].tolist() == [0, 0, 0, 0]
    same = optimal_codebooks(torch.full((1, 5), 7.0), None, 2)
    assert same.tables.tolist() == [[7, 7]]
    assert not bool(same.errors.any())
    one = optimal_codebooks(torch.tensor([[4.0]]), torch.zeros(1, 1), 3)
    assert one.tables.tolist() == [[4, 4, 4]]


def test_many_tables_share_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    values = normal(3, 8, 2000)
    exact = optimal_codebooks(values, None, 16)
    monkeypatch.setattr(kmeans, "TOTAL_WORK", 8 * 256 * 16)
    shared = optimal_codebooks(values, None, 16)
    assert not bool(exact.merged.any())
    assert bool((shared.merged > 0).all())
    for t in range(8):
        reached = error_of(values[t], torch.ones_like(values[t]), shared.tables[t])
        assert float(exact.errors[t, -1]) <= reached <= 1.02 * float(exact.errors[t, -1])


@pytest.mark.parametrize("entries", [4, 16])
@pytest.mark.parametrize("tail", [False, True])
def test_merging_costs_little_and_says_how_much(entries: int, tail: bool) -> None:
    values, weights = normal(1, 2, 6000), uniform(2, 2, 6000)
    if tail:
        values = values**3
    exact = optimal_codebooks(values, weights, entries)
    merged = optimal_codebooks(values, weights, entries, exact_work=entries * 512)
    assert not bool(exact.merged.any())
    for t in range(2):
        best, reached = (
            float(exact.errors[t, -1]),
            error_of(values[t], weights[t], merged.tables[t]),
        )
        stated, hidden = float(merged.errors[t, -1]), float(merged.merged[t])
        assert 0 < hidden < 0.01 * stated
        assert best <= reached * (1 + 1e-12)
        assert reached <= stated * (1 + 1e-12)
        assert reached <= 1.002 * best
        below = ((stated - hidden) ** 0.5 - hidden**0.5) ** 2
        assert below <= best * (1 + 1e-12)


def test_arguments_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match="entries must be at least 1, got 0"):
        optimal_codebooks(normal(0, 1, 4), None, 0)
    with pytest.raises(ShapeError, match=r"values \(1, 0\).*at least one of each"):
        optimal_codebooks(normal(0, 1, 0), None, 2)
    with pytest.raises(ShapeError, match=r"weights \(1, 3\), wanted \(1, 4\)"):
        optimal_codebooks(normal(0, 1, 4), uniform(0, 1, 3), 2)
    for values, weights in (
        (torch.tensor([[1.0, torch.nan]]), torch.ones(1, 2)),
        (torch.ones(1, 2), torch.tensor([[1.0, -1.0]])),
    ):
        with pytest.raises(NumericalError, match="NaN, infinity or a negative weight"):
            optimal_codebooks(values, weights, 2)


@given(SEEDS, st.integers(1, 90), st.integers(1, 9))
@settings(max_examples=30, deadline=None)
def test_a_range_in_eight_parts_gives_the_same_as_in_halves(
    seed: int, n: int, entries: int
) -> None:
    values, weights = normal(seed, 3, n), uniform(seed + 1, 3, n)
    found = []
    for few in (0, 2**13):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kmeans, "FEW_POINTS", few)
            found.append(optimal_codebooks(values, weights, entries))
    torch.testing.assert_close(found[0].errors, found[1].errors, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found[0].tables, found[1].tables, rtol=1e-9, atol=1e-9)
