"""Steps are the best of their candidates by the definition; grids know their codes and bytes."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tersor.core.errors import ConfigError, NumericalError, ShapeError
from tersor.ops import group_grids
from tersor.ops.bit_packing import pack
from tersor.ops.group_grids import (
    FRACTIONS,
    GroupGrid,
    bits_per_weight,
    dequantize,
    fit_steps,
    innovations,
    nearest_codes,
)

SEEDS = st.integers(0, 2**32 - 1)
GRIDS = st.builds(
    GroupGrid,
    bits=st.integers(2, 8),
    group=st.sampled_from([None, 1, 4, 5, 64]),
    symmetric=st.booleans(),
    signed_steps=st.booleans(),
    step_type=st.sampled_from(["float16", "bfloat16", "float32"]),
)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def nearest(value: float, step: float, zero: int, grid: GroupGrid) -> float:
    code = min(max(round(value / step) + zero, grid.low), grid.high)
    return (code - zero) * step


def cost_of(
    values: list[float], matter: list[float], step: float, zero: int, grid: GroupGrid
) -> float:
    return sum(
        h * (w - nearest(w, step, zero, grid)) ** 2 for w, h in zip(values, matter, strict=True)
    )


@given(SEEDS, GRIDS)
@settings(max_examples=30, deadline=None)
def test_no_fraction_of_the_range_costs_less(seed: int, grid: GroupGrid) -> None:
    weight, matter = normal(seed, 1, 2, 11), normal(seed + 1, 1, 11).square()
    steps = fit_steps(weight, grid, matter)
    width = grid.width(11)
    assert steps.step.shape == (1, 2, grid.n_steps(11))
    for i in range(2):
        for group in range(grid.n_steps(11)):
            part = slice(group * width, (group + 1) * width)
            values, h = weight[0, i, part].tolist(), matter[0, part].tolist()
            step, zero = float(steps.step[0, i, group]), int(steps.zero[0, i, group])
            got = cost_of(values, h, step, zero, grid)
            low, high = min(0.0, *values), max(0.0, *values)
            for fraction in FRACTIONS:
                if grid.symmetric:
                    other = max(high, -low) * fraction / grid.high
                    choices = [(other, 0)]
                else:
                    other = (high - low) * fraction / (grid.high - grid.low)
                    start = round(low * fraction / other)
                    choices = [(other, min(max(grid.low - start, grid.low), grid.high))]
                kind = getattr(torch, grid.step_type)
                for size, offset in choices:
                    stored = float(torch.tensor(size, dtype=torch.float64).to(kind))
                    assert got <= cost_of(values, h, stored, offset, grid) * (1 + 1e-9)


@given(SEEDS, GRIDS)
@settings(max_examples=20, deadline=None)
def test_codes_are_the_nearest_ones(seed: int, grid: GroupGrid) -> None:
    weight = normal(seed, 2, 2, 7)
    steps = fit_steps(weight, grid)
    codes = nearest_codes(weight, steps, grid)
    assert grid.low <= int(codes.amin()) <= int(codes.amax()) <= grid.high
    back = dequantize(codes, steps, grid)
    for g in range(2):
        for i in range(2):
            for j in range(7):
                group = j // grid.width(7)
                step, zero = float(steps.step[g, i, group]), int(steps.zero[g, i, group])
                points = [(q - zero) * step for q in range(grid.low, grid.high + 1)]
                best = min(abs(float(weight[g, i, j]) - p) for p in points)
                assert abs(float(weight[g, i, j] - back[g, i, j])) == pytest.approx(best, rel=1e-9)


def test_more_codes_never_cost_more_on_average() -> None:
    weight = normal(3, 1, 64, 64)
    errors = []
    for bits in range(2, 9):
        grid = GroupGrid(bits=bits, group=32)
        steps = fit_steps(weight, grid)
        back = dequantize(nearest_codes(weight, steps, grid), steps, grid)
        errors.append(float((weight - back).square().sum()))
    assert all(b < a / 2.5 for a, b in itertools.pairwise(errors))  # 4 in theory


def test_negative_steps_put_the_spare_code_where_it_helps() -> None:
    weight = torch.tensor([[[2.0, -1.0, 1.0, 0.0]]])  # exact with a step of -1 and codes -2..1
    steps = fit_steps(weight, GroupGrid(bits=2))
    assert float(steps.step) == -1.0
    assert nearest_codes(weight, steps, GroupGrid(bits=2)).tolist() == [[[-2, 1, -1, 0]]]
    positive = GroupGrid(bits=2, signed_steps=False)
    assert float(fit_steps(weight, positive).step) > 0


def test_rows_are_searched_alike_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = normal(6, 2, 7, 12)
    grid = GroupGrid(bits=3, group=5, symmetric=False)
    whole = fit_steps(weight, grid)
    monkeypatch.setattr(group_grids, "CHUNK_VALUES", 48)
    parts = fit_steps(weight, grid)
    assert torch.equal(whole.step, parts.step)
    assert torch.equal(whole.zero, parts.zero)


def test_what_matters_decides_the_step() -> None:
    weight = torch.tensor([[[1.0, 0.1, -0.1, 0.1]]])
    grid = GroupGrid(bits=2, step_type="float32")
    first = fit_steps(weight, grid, torch.tensor([[1.0, 0.0, 0.0, 0.0]]), (1.0, 0.1))
    others = fit_steps(weight, grid, torch.tensor([[0.0, 1.0, 1.0, 1.0]]), (1.0, 0.1))
    assert abs(float(first.step)) > 0.3
    assert abs(float(others.step)) < 0.2


@pytest.mark.parametrize("symmetric", [True, False])
def test_degenerate_groups(symmetric: bool) -> None:
    grid = GroupGrid(bits=3, group=2, symmetric=symmetric, step_type="float32")
    weight = torch.tensor([[[0.0, 0.0, 0.7, 0.7, -0.7]]])  # zeros, constant, one input in the last
    steps = fit_steps(weight, grid)
    assert steps.step[0, 0, 0] == 1.0
    assert steps.zero[0, 0, 0] == 0
    back = dequantize(nearest_codes(weight, steps, grid), steps, grid)
    assert back[0, 0].tolist() == pytest.approx([0, 0, 0.7, 0.7, -0.7], rel=1e-6)
    tiny = torch.full((1, 1, 2), 1e-9)
    assert bool((fit_steps(tiny, GroupGrid(group=2, symmetric=symmetric)).step != 0).all())


def test_innovations_are_the_conditional_variances() -> None:
    x = normal(0, 50, 6) @ (normal(1, 6, 6) + 2 * torch.eye(6))
    H = (x.mT @ x / 50).unsqueeze(0)
    got = innovations(H, 0.01)[0]
    damped = H[0] + 0.01 * H[0].diagonal().mean() * torch.eye(6, dtype=torch.float64)
    order = H[0].diagonal().argsort(descending=True).tolist()
    for place, j in enumerate(order):
        later = order[place + 1 :]
        cross = damped[j, later]
        left = damped[j, j]
        if later:
            left = left - cross @ torch.linalg.solve(damped[later][:, later], cross)
        assert float(got[j]) == pytest.approx(float(left), rel=1e-9)


def test_bytes_are_what_packing_takes() -> None:
    weight = normal(1, 1, 6, 70)
    for bits in (2, 3, 4, 8):
        for group in (None, 32):
            for symmetric in (True, False):
                grid = GroupGrid(bits=bits, group=group, symmetric=symmetric)
                steps = fit_steps(weight, grid)
                stored = pack(nearest_codes(weight, steps, grid), bits).numel()
                stored += steps.step.to(torch.float16).numel() * 2
                stored += 0 if symmetric else pack(steps.zero, bits).numel()
                assert grid.size_bytes(6, 70) == stored
    assert bits_per_weight(GroupGrid(bits=4, group=128), 256, 1024) == 4.125
    assert bits_per_weight(GroupGrid(bits=4, group=32, symmetric=False), 256, 1024) == 4.625


def test_wrong_arguments_are_refused() -> None:
    weight = normal(0, 1, 2, 8)
    with pytest.raises(ConfigError, match=r"bits must be 2\.\.8, got 1"):
        GroupGrid(bits=1)
    with pytest.raises(ConfigError, match=r"group must be at least 1 input, got 0"):
        GroupGrid(group=0)
    with pytest.raises(ConfigError, match=r"step_type must be one of float16"):
        GroupGrid(step_type="int8")
    with pytest.raises(ConfigError, match=r"wanted at least one, all > 0"):
        fit_steps(weight, GroupGrid(), fractions=())
    steps = fit_steps(weight, GroupGrid(group=4))
    with pytest.raises(ShapeError, match=r"step \(1, 2, 2\) and weight .* wanted \(1, 2, 1\)"):
        nearest_codes(weight, steps, GroupGrid())
    with pytest.raises(NumericalError, match=r"wanted at most 6\.55e\+04 \(float16\)"):
        fit_steps(weight * 1e7, GroupGrid())
    weight[0, 1, 3] = torch.inf
    with pytest.raises(NumericalError, match=r"found inf at group 0, output 1, input 3"):
        fit_steps(weight, GroupGrid())
