"""The fit before a ReLU: its bound falls, its loss is never above least squares, exact cases are exact."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tersor.core.errors import ConfigError, NumericalError, ShapeError
from tersor.ops import rectified as module
from tersor.ops.rectified import RectifiedRows, fit_rectified

EPS = torch.finfo(torch.float64).eps
SEEDS = st.integers(0, 2**32 - 1)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def problem(
    seed: int, n_rows: int = 60, *, has_offset: bool = True, groups: int = 2
) -> RectifiedRows:
    """Wanted pre-activations that the inputs explain in part, shifted so that many are negative."""
    x = normal(seed, n_rows, groups, 4) + 1
    wanted = x @ normal(seed + 1, 4, 3) + normal(seed + 2, n_rows, groups, 3) - 1
    offset = 0.5 * normal(seed + 3, n_rows, groups, 3) if has_offset else None
    return RectifiedRows(inputs=x, wanted=wanted, offset=offset)


def predicted(rows: RectifiedRows, weight: Tensor, bias: Tensor) -> Tensor:
    out = torch.einsum("gmn,tgn->tgm", weight, rows.inputs.double()) + bias
    return out if rows.offset is None else out + rows.offset


def loss_of(rows: RectifiedRows, weight: Tensor, bias: Tensor) -> float:
    error = predicted(rows, weight, bias).relu() - rows.wanted.relu()
    return float(error.square().sum((1, 2)).mean())


@given(SEEDS, st.integers(2, 60), st.booleans(), st.sampled_from([0.0, 1e-4, 1.0]))
@settings(max_examples=40, deadline=None)
def test_never_worse_than_least_squares(
    seed: int, n_rows: int, has_offset: bool, damping: float
) -> None:
    rows = problem(seed, n_rows, has_offset=has_offset)
    plain = fit_rectified(lambda: [rows], damping=damping, iterations=0)
    got = fit_rectified(lambda: [rows], damping=damping, iterations=6)
    assert len(got.losses) == len(got.bounds) == 7
    assert got.losses[0] == plain.losses[0]
    assert got.losses[got.step] == min(got.losses) <= plain.losses[0]
    size = float(1 + got.weight.abs().max()) ** 2 * float(1 + rows.inputs.abs().max()) ** 2
    rounding = 1e3 * EPS * size * n_rows
    assert loss_of(rows, got.weight, got.bias) == pytest.approx(
        got.losses[got.step], rel=1e-12, abs=rounding
    )
    assert all(a <= b + rounding for a, b in zip(got.losses, got.bounds, strict=True))


@given(SEEDS, st.booleans())
@settings(max_examples=30, deadline=None)
def test_the_bound_falls_in_every_step(seed: int, has_offset: bool) -> None:
    rows = problem(seed, has_offset=has_offset)
    got = fit_rectified(lambda: [rows], damping=0.0, iterations=8)
    assert got.damping == 0.0
    steps = zip(got.bounds, got.bounds[1:], strict=False)
    assert all(after <= before * (1 + 1e-12) for before, after in steps)
    assert got.bounds[-1] < got.bounds[0] * (1 - 1e-3)  # and it does fall on such rows


def test_long_runs_reach_the_minimum_of_the_bound() -> None:
    few = problem(4, groups=1)
    # Steps shrink the gap by the share of rows that are not active: with most active, 400 are plenty.
    rows = RectifiedRows(inputs=few.inputs, wanted=few.wanted + 2, offset=few.offset)
    assert bool((rows.wanted > 0).double().mean(0).min() > 0.2)
    got = fit_rectified(lambda: [rows], damping=0.0, iterations=400)
    # The last bound is that of the last weight; its minimum by another way: LBFGS on the definition.
    theta = torch.zeros(3, 5, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS(
        [theta], max_iter=500, tolerance_grad=1e-12, line_search_fn="strong_wolfe"
    )

    def bound() -> Tensor:
        out = predicted(rows, theta[None, :, :4], theta[None, :, 4])
        error = torch.where(rows.wanted > 0, out - rows.wanted, out.relu())
        return error.square().sum((1, 2)).mean()

    def closure() -> Tensor:
        solver.zero_grad()
        value = bound()
        value.backward()
        return value

    solver.step(closure)
    # Convex: one minimum, and errors of both searches enter it squared.
    assert got.bounds[-1] == pytest.approx(float(bound().detach()), rel=1e-6)


@pytest.mark.parametrize("has_offset", [False, True])
def test_least_squares_is_step_zero(has_offset: bool) -> None:
    rows = problem(0, groups=1, has_offset=has_offset)
    got = fit_rectified(lambda: [rows], damping=0.0, iterations=0)
    design = torch.cat([rows.inputs[:, 0], torch.ones(60, 1, dtype=torch.float64)], 1)
    target = rows.wanted[:, 0] - (0 if rows.offset is None else rows.offset[:, 0])
    solution = torch.linalg.lstsq(design, target).solution
    torch.testing.assert_close(got.weight[0], solution[:-1].T, rtol=0, atol=1e-10)
    torch.testing.assert_close(got.bias[0], solution[-1], rtol=0, atol=1e-10)
    assert got.step == 0


def test_what_a_layer_made_is_recovered() -> None:
    x, weight, bias = normal(0, 50, 2, 4) + 1, normal(1, 2, 3, 4), normal(2, 2, 3)
    offset = normal(3, 50, 2, 3)
    wanted = torch.einsum("gmn,tgn->tgm", weight, x) + bias + offset
    rows = RectifiedRows(inputs=x, wanted=wanted, offset=offset)
    got = fit_rectified(lambda: [rows], damping=0.0)
    torch.testing.assert_close(got.weight, weight, rtol=0, atol=1e-10)
    torch.testing.assert_close(got.bias, bias, rtol=0, atol=1e-10)


def test_negative_values_are_left_free() -> None:
    # relu(wanted) is a line, wanted is not: least squares fails, the fit reaches it exactly.
    x = torch.linspace(-1, 1, 41, dtype=torch.float64).reshape(-1, 1, 1)
    wanted = torch.where(x > 0, x, -9 * x.square())
    rows = RectifiedRows(inputs=x, wanted=wanted)
    got = fit_rectified(lambda: [rows], damping=0.0, iterations=300)
    assert got.losses[0] > 0.05
    assert got.losses[got.step] < 1e-4 * got.losses[0]


def test_damping_leads_to_the_prior() -> None:
    rows, prior = problem(0), normal(9, 2, 3, 4)
    got = fit_rectified(lambda: [rows], prior=prior, damping=1e9)
    assert 0 < float((got.weight - prior).abs().max()) < 1e-6
    zero = fit_rectified(lambda: [rows], damping=1e9)
    assert float(zero.weight.abs().max()) < 1e-6


def test_parts_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = problem(0)
    assert rows.offset is not None
    whole = fit_rectified(lambda: [rows])

    def parts() -> list[RectifiedRows]:
        cuts = [slice(0, 0), slice(0, 7), slice(7, 33), slice(33, 60)]
        return [
            RectifiedRows(inputs=rows.inputs[c], wanted=rows.wanted[c], offset=rows.offset[c])
            for c in cuts
        ]

    monkeypatch.setattr(module, "CHUNK_VALUES", 20)
    split = fit_rectified(parts)
    assert split.step == whole.step
    torch.testing.assert_close(split.weight, whole.weight, rtol=0, atol=1e-10)
    assert split.losses == pytest.approx(whole.losses, rel=1e-10)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_rows_are_read_only_and_summed_in_float64(dtype: torch.dtype) -> None:
    rows = problem(0)
    assert rows.offset is not None
    low = RectifiedRows(
        inputs=rows.inputs.to(dtype), wanted=rows.wanted.to(dtype), offset=rows.offset.to(dtype)
    )
    assert low.offset is not None
    before = low.inputs.clone(), low.wanted.clone(), low.offset.clone()
    got = fit_rectified(lambda: [low])
    same = RectifiedRows(
        inputs=low.inputs.double(), wanted=low.wanted.double(), offset=low.offset.double()
    )
    assert torch.equal(got.weight, fit_rectified(lambda: [same]).weight)
    assert torch.equal(low.inputs, before[0])
    assert torch.equal(low.wanted, before[1])
    assert torch.equal(low.offset, before[2])


def test_constant_input_keeps_its_prior() -> None:
    rows, prior = problem(0), normal(9, 2, 3, 4)
    rows.inputs[..., 1] = 1000 / 3
    got = fit_rectified(lambda: [rows], prior=prior)
    assert torch.equal(got.weight[..., 1], prior[..., 1])
    assert got.losses[got.step] <= got.losses[0]


def test_what_does_not_fit_is_refused() -> None:
    rows = problem(0)
    with pytest.raises(ConfigError, match=r"iterations must be >= 0, got -1"):
        fit_rectified(lambda: [rows], iterations=-1)
    for nothing in ([], [problem(0, 0)]):
        with pytest.raises(ShapeError, match=r"found no rows to fit, wanted at least one"):
            fit_rectified(lambda nothing=nothing: nothing)
    rows.wanted[3, 1, 2] = float("nan")
    with pytest.raises(NumericalError, match=r"wanted pre-activations or offset: found NaN"):
        fit_rectified(lambda: [rows])


@given(SEEDS, st.sampled_from([0.5, 1.0, 6.0]))
@settings(max_examples=20, deadline=None)
def test_above_a_ceiling_anything_goes(seed: int, ceiling: float) -> None:
    rows = problem(seed)
    got = fit_rectified(lambda: [rows], iterations=6, ceiling=ceiling)
    plain = fit_rectified(lambda: [rows], iterations=0, ceiling=ceiling)
    error = predicted(rows, got.weight, got.bias).clamp(0, ceiling) - rows.wanted.clamp(0, ceiling)
    assert float(error.square().sum((1, 2)).mean()) == pytest.approx(got.losses[got.step], rel=1e-9)
    assert got.losses[got.step] <= plain.losses[0]
    bounds = got.bounds
    # The ridge is part of what falls: it is 1e-4 of the inputs' variance.
    assert all(b <= a * (1 + 1e-2) + 1e-9 for a, b in itertools.pairwise(bounds))


def test_a_ceiling_helps_where_most_is_above_it() -> None:
    rows = problem(1, 400, groups=1)
    rows = RectifiedRows(inputs=rows.inputs, wanted=4 * rows.wanted.square(), offset=None)
    capped = fit_rectified(lambda: [rows], iterations=8, ceiling=1.0)
    assert capped.losses[capped.step] < 0.9 * capped.losses[0]


def test_a_ceiling_is_positive() -> None:
    with pytest.raises(ConfigError, match="ceiling must be > 0, got 0"):
        fit_rectified(lambda: [problem(0)], ceiling=0)
