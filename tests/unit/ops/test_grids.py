"""Grids: the definition in plain Python, half a step, and steps that are the best on offer."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tersor.core.errors import ConfigError, NumericalError
from tersor.ops.grids import (
    N_RANGE_FRACTIONS,
    SIGNED_CODES,
    SMALLEST_RANGE_FRACTION,
    UNSIGNED_CODES,
    WEIGHT_FRACTIONS,
    fake_quantize,
    range_step,
    round_nearest,
    weight_steps,
)

EPS = torch.finfo(torch.float64).eps
SEEDS = st.integers(0, 2**32 - 1)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def nearest(value: float, step: float, low: int, high: int) -> int:
    return min(max(round(value / step), low), high)  # Python rounds half to even


@given(SEEDS, st.sampled_from([0.125, 0.1, 3.0]), st.sampled_from([(-128, 127), (0, 255), (-7, 7)]))
@settings(max_examples=40)
def test_fake_quantize_is_the_definition(seed: int, step: float, codes: tuple[int, int]) -> None:
    x = torch.cat([normal(seed, 20) * 4, torch.arange(-9, 10) * step / 2])  # ties among them
    wanted = [nearest(value, step, *codes) * step for value in x.tolist()]
    assert fake_quantize(x, step, *codes).tolist() == wanted


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_fake_quantize_keeps_the_type_and_the_input(dtype: torch.dtype) -> None:
    x = torch.tensor([-1.5, -0.5, 0.5, 1.5, 2.5, 400.0, -400.0], dtype=dtype)
    before = x.clone()
    out = fake_quantize(x, torch.tensor(1.0, dtype=torch.float64), -128, 127)
    assert out.dtype == dtype
    assert out.tolist() == [-2, 0, 0, 2, 2, 127, -128]
    assert torch.equal(x, before)


def test_fake_quantize_takes_a_step_for_each_row() -> None:
    x, step = torch.tensor([[1.0, 2.2], [1.0, 2.2]]), torch.tensor([[1.0], [0.5]])
    assert fake_quantize(x, step, -7, 7).tolist() == [[1.0, 2.0], [1.0, 2.0]]
    assert fake_quantize(x, step, -1, 1).tolist() == [[1.0, 1.0], [0.5, 0.5]]


@given(SEEDS, st.floats(1e-3, 10), st.sampled_from([torch.float32, torch.float64]))
@settings(max_examples=40)
def test_error_is_at_most_half_a_step_inside(seed: int, step: float, dtype: torch.dtype) -> None:
    x = (normal(seed, 50).clamp(-3, 3) * 40 * step).to(dtype)  # codes up to 120
    error = (fake_quantize(x, step, *SIGNED_CODES) - x).abs()
    # Half a step, and one rounding of the quotient and of the product, each of a code up to 127.
    rounding = 2 * 128 * step * torch.finfo(dtype).eps
    assert bool((error <= step / 2 + rounding).all())


def test_fake_quantize_refuses_an_empty_grid() -> None:
    with pytest.raises(ConfigError, match=r"codes 3\.\.-3 are an empty grid; give low <= high"):
        fake_quantize(torch.zeros(2), 1.0, 3, -3)


def weighted_error(row: list[float], step: float, limit: int, importance: list[float]) -> float:
    return sum(
        weight * (value - nearest(value, step, -limit, limit) * step) ** 2
        for value, weight in zip(row, importance, strict=True)
    )


@given(SEEDS, st.sampled_from([1, 3, 7, 127]), st.booleans())
@settings(max_examples=40)
def test_weight_steps_are_the_best_of_their_fractions(
    seed: int, limit: int, is_weighted: bool
) -> None:
    weight, importance = normal(seed, 2, 3, 6), normal(seed + 1, 2, 6).square()
    steps = weight_steps(weight, limit, importance if is_weighted else None)
    for g in range(2):
        scores = importance[g].tolist() if is_weighted else [1.0] * 6
        for i in range(3):
            row, step = weight[g, i].tolist(), float(steps[g, i])
            largest = max(abs(value) for value in row) / limit
            candidates = [largest * fraction for fraction in WEIGHT_FRACTIONS]
            assert step in candidates
            errors = [weighted_error(row, s, limit, scores) for s in candidates]
            # A sum of six squares, its terms good to a few roundings of the row's largest weight squared.
            rounding = 10 * 6 * EPS * (largest * limit) ** 2 * max(scores)
            assert weighted_error(row, step, limit, scores) <= min(errors) + rounding


def test_importance_decides_and_the_first_fraction_wins_a_tie() -> None:
    weight, fractions = torch.tensor([[[1.0, 0.8]]]).double(), (1.0, 0.8)
    for importance, wanted in (
        ([1.0, 0.0], 1.0),
        ([0.0, 1.0], 0.8),
        (None, 1.0),
        ([0.0, 0.0], 1.0),
    ):
        H_diag = None if importance is None else torch.tensor([importance]).double()
        assert float(weight_steps(weight, 1, H_diag, fractions)) == wanted


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_zero_rows_get_step_one(dtype: torch.dtype) -> None:
    weight = torch.zeros(1, 3, 4, dtype=dtype)
    weight[0, 1] = 7
    steps = weight_steps(weight, 7)
    assert steps.dtype == torch.float64
    assert steps.tolist() == [[1.0, 1.0, 1.0]]
    weight[0, 1] = 14
    assert weight_steps(weight, 7).tolist() == [[1.0, 2.0, 1.0]]
    assert weight_steps(weight, 7, fractions=(0.5,)).tolist() == [[1.0, 1.0, 1.0]]
    weight[0, 1] = 28
    assert weight_steps(weight, 7, fractions=(0.5,)).tolist() == [[1.0, 2.0, 1.0]]


def test_single_weight_is_met_exactly() -> None:
    assert weight_steps(torch.tensor([[[-2.5]]]), 1).tolist() == [[2.5]]


@given(SEEDS, st.sampled_from([1, 7, 127]))
@settings(max_examples=40)
def test_codes_are_the_nearest(seed: int, limit: int) -> None:
    weight, step = normal(seed, 2, 3, 5), normal(seed + 1, 2, 3).abs() / limit + 1e-3
    codes = round_nearest(weight, step, limit)
    wanted = [
        [[nearest(w, s, -limit, limit) for w in row] for row, s in zip(rows, steps, strict=True)]
        for rows, steps in zip(weight.tolist(), step.tolist(), strict=True)
    ]
    assert codes.dtype == torch.int8
    assert codes.tolist() == wanted


@pytest.mark.parametrize("limit", [0, 128])
def test_limit_outside_int8_is_refused(limit: int) -> None:
    message = rf"limit must be 1\.\.127 \(127 for int8, 7 for int4\), got {limit}"
    with pytest.raises(ConfigError, match=message):
        weight_steps(torch.ones(1, 1, 2), limit)
    with pytest.raises(ConfigError, match=message):
        round_nearest(torch.ones(1, 1, 2), torch.ones(1, 1), limit)


def test_no_fractions_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"no fractions to choose from; give at least"):
        weight_steps(torch.ones(1, 1, 2), 7, fractions=())


def test_weight_that_is_not_finite_is_refused() -> None:
    weight = torch.ones(2, 3, 4)
    weight[1, 2, 3] = float("inf")
    message = r"weight \(2, 3, 4\): found inf at group 1, output 2, input 3.*mend the checkpoint"
    with pytest.raises(NumericalError, match=message):
        weight_steps(weight, 7)
    with pytest.raises(NumericalError, match=message):
        round_nearest(weight, torch.ones(2, 3), 7)


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_step_that_is_not_positive_is_refused(bad: float) -> None:
    step = torch.ones(2, 3)
    step[1, 0] = bad
    with pytest.raises(NumericalError, match=r"output 0 of group 1 has step (0\.0|-1\.0|nan|inf)"):
        round_nearest(torch.ones(2, 3, 4), step, 7)


def histogram(values: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    low, high = float(values.min()), float(values.max())
    edges = torch.linspace(low, high, bins + 1, dtype=torch.float64)
    return torch.histogram(values, edges)[0], edges


def expected_error(
    counts: list[float], edges: list[float], step: float, codes: tuple[int, int]
) -> float:
    centres = [(a + b) / 2 for a, b in pairwise(edges)]
    return math.fsum(
        count * (centre - nearest(centre, step, *codes) * step) ** 2
        for count, centre in zip(counts, centres, strict=True)
    )


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("shape", ["normal", "heavy", "outlier", "skewed"])
def test_range_step_is_the_best_on_offer(shape: str, signed: bool) -> None:
    values = normal(4, 20_000)
    values = {
        "normal": values,
        "heavy": values**3,
        "outlier": torch.cat([values, torch.tensor([60.0]).double()]),
        "skewed": values - 2,
    }[shape]
    values = values if signed else values.abs()
    counts, edges = histogram(values, 2048)
    codes = SIGNED_CODES if signed else UNSIGNED_CODES
    step = range_step(counts, edges, signed=signed)
    top = max(float(edges[-1]), -float(edges[0]) if signed else 0.0)
    spacing = (1 - SMALLEST_RANGE_FRACTION) / (N_RANGE_FRACTIONS - 1)
    fractions = [1 - spacing * k for k in range(N_RANGE_FRACTIONS)]

    def error(s: float) -> float:
        return expected_error(counts.tolist(), edges.tolist(), s, codes)

    # 2048 terms summed in another order.
    assert error(step) <= min(error(f * top / codes[1]) for f in fractions) * (1 + 2048 * EPS)
    # Between two fractions: the larger one clips less, and its rounding error grows by the square.
    finer = min(
        error((f - spacing * part / 4) * top / codes[1])
        for f in fractions[:-1]
        for part in (1, 2, 3)
    )
    assert error(step) <= finer * (1 + spacing / SMALLEST_RANGE_FRACTION) ** 2


def test_range_step_clips_a_rare_extreme_and_keeps_an_even_tensor() -> None:
    even = torch.ones(256).double(), torch.linspace(-1, 1, 257).double()
    assert range_step(*even, signed=True) >= 0.97 / 127  # one fraction below the whole at most
    counts, edges = torch.zeros(1000).double(), torch.linspace(0, 1000, 1001).double()
    counts[:100], counts[-1] = 1e6, 1
    # All but one of 1e8 values are below 100: the least range on offer.
    assert range_step(counts, edges, signed=False) == pytest.approx(0.15 * 1000 / 255)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64])
def test_range_step_scales_with_the_tensor_and_not_with_the_count(dtype: torch.dtype) -> None:
    counts, edges = histogram(normal(1, 1000), 64)
    step = range_step(counts.to(dtype), edges, signed=True)
    assert range_step(counts.to(dtype) * 4, edges, signed=True) == step
    assert range_step(counts.to(dtype), edges * 4, signed=True) == step * 4
    assert range_step(counts.to(dtype).flip(0), -edges.flip(0), signed=True) == pytest.approx(
        step, rel=0.05
    )


def test_range_step_looks_at_filled_bins_only() -> None:
    counts, edges = torch.tensor([0.0, 5.0, 0.0]), torch.tensor([-100.0, 1.0, 2.0, 100.0])
    assert range_step(counts, edges, signed=True) <= 2 / 127 * (1 + EPS)


@pytest.mark.parametrize("signed", [True, False])
def test_range_step_of_nothing_is_one(signed: bool) -> None:
    assert range_step(torch.zeros(4), torch.linspace(-1, 1, 5), signed=signed) == 1.0
    assert range_step(torch.ones(1), torch.zeros(2), signed=signed) == 1.0
    assert range_step(torch.zeros(0), torch.zeros(1), signed=signed) == 1.0


def test_range_step_of_negative_values_on_the_unsigned_grid_is_one() -> None:
    counts, edges = torch.ones(2), torch.tensor([-3.0, -2.0, -1.0])
    assert range_step(counts, edges, signed=False) == 1.0
    assert range_step(counts, edges, signed=True) < 1.0


@pytest.mark.parametrize(
    ("counts", "edges"),
    [
        ([1.0, 1.0], [0.0, 1.0]),
        ([1.0, -1.0], [0.0, 1.0, 2.0]),
        ([1.0, float("nan")], [0.0, 1.0, 2.0]),
        ([1.0, 1.0], [0.0, 1.0, float("inf")]),
        ([1.0, 1.0], [0.0, 2.0, 1.0]),
    ],
)
def test_range_step_refuses_what_is_no_histogram(counts: list[float], edges: list[float]) -> None:
    message = rf"histogram of 2 counts and {len(edges)} edges: wanted finite counts >= 0"
    with pytest.raises(NumericalError, match=message):
        range_step(torch.tensor(counts), torch.tensor(edges), signed=True)
