"""The refit is the regression, its bias makes means agree, and the error is that of the rows."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tersor.core.errors import NumericalError, ShapeError
from tersor.ops.moments import Moments, moments_of
from tersor.ops.refit import (
    bias_shift,
    bias_shift_across,
    layer_loss,
    refit,
    refit_across,
    relative_error,
    relative_error_across,
)

EPS = torch.finfo(torch.float64).eps
SEEDS = st.integers(0, 2**32 - 1)
GROUPS, OUTPUTS, INPUTS = 2, 3, 4
Rows = tuple[Tensor, Tensor | None, Tensor | None]


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def drifted(
    seed: int, n_rows: int, *, has_original: bool = True, has_residual: bool = True
) -> Rows:
    """Compressed and original inputs and residual difference, with means and correlations."""
    x = normal(seed, n_rows, GROUPS, INPUTS) + 1
    original = 0.9 * x.flip(2) + 0.5 * normal(seed + 1, n_rows, GROUPS, INPUTS) + 0.3
    d = 0.4 * x[..., :OUTPUTS] + 0.2 * normal(seed + 2, n_rows, GROUPS, OUTPUTS) - 1
    return x, original if has_original else None, d if has_residual else None


def target_of(weight: Tensor, rows: Rows) -> Tensor:
    """W x + d, row by row."""
    x, original, d = rows
    seen = x if original is None else original
    out = torch.zeros(x.shape[0], GROUPS, weight.shape[1], dtype=torch.float64)
    for t in range(x.shape[0]):
        for g in range(GROUPS):
            out[t, g] = weight[g] @ seen[t, g] + (0 if d is None else d[t, g])
    return out


def error_of(weight: Tensor, new: Tensor, rows: Rows) -> float:
    """Mean squared error with the best bias shift, row by row, summed over outputs and groups."""
    error = target_of(weight, rows) - torch.einsum("gmn,tgn->tgm", new, rows[0])
    return float((error - error.mean(0)).square().mean(0).sum())


def scale_of(weight: Tensor, rows: Rows) -> float:
    """Size of the largest term that any of the sums here holds."""
    largest = max(float(value.abs().max()) for value in rows if value is not None)
    return (1 + float(weight.abs().max())) ** 2 * (1 + largest) ** 2 * INPUTS**2 * OUTPUTS * GROUPS


@pytest.mark.parametrize("damping", [1e-3, 1.0])
@pytest.mark.parametrize("has_residual", [False, True])
@pytest.mark.parametrize("has_original", [False, True])
def test_refit_is_ridge_regression(damping: float, has_original: bool, has_residual: bool) -> None:
    n_rows, weight = 50, normal(7, GROUPS, OUTPUTS, INPUTS)
    rows = drifted(0, n_rows, has_original=has_original, has_residual=has_residual)
    got, shift, used = refit(weight, moments_of(*rows), damping)
    assert used == damping
    y, x = target_of(weight, rows), rows[0]
    for g in range(GROUPS):
        moving, wanted_out = x[:, g] - x[:, g].mean(0), y[:, g] - y[:, g].mean(0)
        power = moving.square().sum() / n_rows / INPUTS
        ridge = (n_rows * damping * power).sqrt()
        # Rows of the ridge pull every weight towards the original one.
        stacked = torch.cat([moving, ridge * torch.eye(INPUTS, dtype=torch.float64)])
        wished = torch.cat([wanted_out, ridge * weight[g].T])
        solution = torch.linalg.lstsq(stacked, wished).solution.T
        # Normal equations lose the squared condition of the rows, n_rows roundings a sum.
        condition = float(torch.linalg.cond(stacked)) ** 2
        rounding = n_rows * EPS * condition * scale_of(weight, rows)
        assert bool(((got[g] - solution).abs() <= rounding).all())
        wanted_shift = y[:, g].mean(0) - solution @ x[:, g].mean(0)
        assert bool(((shift[g] - wanted_shift).abs() <= rounding * 10).all())


@given(SEEDS)
@settings(max_examples=25)
def test_gradient_is_zero_and_means_agree_without_damping(seed: int) -> None:
    n_rows, weight = 40, normal(seed + 9, GROUPS, OUTPUTS, INPUTS)
    rows = drifted(seed, n_rows)
    new, shift, used = refit(weight, moments_of(*rows), 0.0)
    assert used == 0.0
    error = target_of(weight, rows) - torch.einsum("gmn,tgn->tgm", new, rows[0]) - shift
    gradient = torch.einsum("tgm,tgn->gmn", error, rows[0]) / n_rows
    # Backward stable: the residual of the normal equations is rounding, whatever their condition.
    rounding = 10 * n_rows * EPS * scale_of(weight, rows) * (1 + float(new.abs().max()))
    assert bool((gradient.abs() <= rounding).all())
    assert bool((error.mean(0).abs() <= rounding).all())


@given(SEEDS, st.sampled_from([2, 3, 10, 40]), st.sampled_from([0.0, 1e-6, 1e-3, 1.0, 1e3]))
@settings(max_examples=40)
def test_refit_is_never_worse_than_the_original_weight(
    seed: int, n_rows: int, damping: float
) -> None:
    weight = normal(seed + 9, GROUPS, OUTPUTS, INPUTS)
    rows = drifted(seed, n_rows)  # fewer rows than inputs among them
    new, _, _ = refit(weight, moments_of(*rows), damping)
    # The error is quadratic around its minimum, so that rounding of W* enters squared; what is left
    # is the rounding of the two sums. A singular H without damping begins at 1e-12: W* is then good
    # to EPS / 1e-12 of its size, whose square is far below.
    rounding = 10 * n_rows * EPS * scale_of(weight, rows) * (1 + float(new.abs().max()))
    slack = (EPS / 1e-12 * scale_of(weight, rows)) ** 2
    assert error_of(weight, new, rows) <= error_of(weight, weight, rows) + rounding + slack


@pytest.mark.parametrize("damping", [1e6, 1e12])
def test_infinite_damping_gives_the_original_weight(damping: float) -> None:
    weight, rows = normal(7, GROUPS, OUTPUTS, INPUTS), drifted(3, 30)
    new, _, _ = refit(weight, moments_of(*rows), damping)
    # |W* - W| <= |Cov(v, xh)| / lam, and the mean diagonal of these rows is above a half.
    bound = scale_of(weight, rows) / (damping * 0.5)
    assert 0 < float((new - weight).abs().max()) <= bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nothing_changes_where_nothing_drifted(dtype: torch.dtype) -> None:
    weight, (x, _, _) = normal(7, GROUPS, OUTPUTS, INPUTS).to(dtype), drifted(0, 30)
    for moments in (
        moments_of(x),
        moments_of(x, x),
        moments_of(x, x, torch.zeros(30, GROUPS, OUTPUTS)),
    ):
        new, shift, _ = refit(weight, moments)
        assert torch.equal(new, weight.to(torch.float64))
        assert torch.equal(shift, torch.zeros(GROUPS, OUTPUTS, dtype=torch.float64))


@pytest.mark.parametrize("n_rows", [1, 3])
def test_fewer_rows_than_inputs(n_rows: int) -> None:
    weight, rows = normal(7, GROUPS, OUTPUTS, INPUTS), drifted(0, n_rows)
    new, shift, used = refit(weight, moments_of(*rows))
    assert used == 1e-3
    assert bool(new.isfinite().all())
    assert bool(shift.isfinite().all())


def test_constant_input_keeps_its_weight() -> None:
    weight, (x, original, d) = normal(7, GROUPS, OUTPUTS, INPUTS), drifted(0, 50)
    x[..., 2] = 0
    new, _, _ = refit(weight, moments_of(x, original, d))
    assert torch.equal(new[..., 2], weight[..., 2])
    assert bool((new[..., [0, 1, 3]] != weight[..., [0, 1, 3]]).all())


def test_all_zero_input() -> None:
    weight, zeros = normal(7, GROUPS, OUTPUTS, INPUTS), torch.zeros(5, GROUPS, INPUTS)
    new, shift, _ = refit(weight, moments_of(zeros, zeros + 1))
    assert torch.equal(new, weight)
    assert bool(((shift - weight.sum(2)).abs() <= INPUTS * EPS * weight.abs().sum(2)).all())


@pytest.mark.parametrize("has_residual", [False, True])
@pytest.mark.parametrize("has_original", [False, True])
def test_bias_shift_makes_means_agree(has_original: bool, has_residual: bool) -> None:
    weight, new = normal(7, GROUPS, OUTPUTS, INPUTS), normal(8, GROUPS, OUTPUTS, INPUTS)
    rows = drifted(0, 30, has_original=has_original, has_residual=has_residual)
    output = torch.einsum("gmn,tgn->tgm", new, rows[0])
    wanted = (target_of(weight, rows) - output).mean(0)
    rounding = 10 * 30 * EPS * scale_of(weight, rows)
    assert bool(((bias_shift(weight, new, moments_of(*rows)) - wanted).abs() <= rounding).all())


def test_layer_loss_is_the_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    delta = torch.randint(-5, 6, (2, 3, 4), generator=generator).to(torch.float32)
    H = torch.randint(-5, 6, (2, 4, 4), generator=generator).to(torch.float32)
    wanted = [
        sum(
            delta[g, i, j] * H[g, j, k] * delta[g, i, k]
            for i in range(3)
            for j in range(4)
            for k in range(4)
        )
        for g in range(2)
    ]
    got = layer_loss(delta, H)
    assert got.dtype == torch.float64
    assert got.tolist() == [float(value) for value in wanted]  # whole numbers: exact


@given(SEEDS, st.booleans(), st.booleans())
@settings(max_examples=25)
def test_relative_error_is_that_of_the_rows(
    seed: int, has_original: bool, has_residual: bool
) -> None:
    n_rows, weight = 30, normal(seed + 7, GROUPS, OUTPUTS, INPUTS)
    new = weight + 0.1 * normal(seed + 8, GROUPS, OUTPUTS, INPUTS)
    x, original, d = drifted(seed, n_rows, has_original=has_original, has_residual=has_residual)
    zeros = torch.zeros_like(weight)
    variance = error_of(weight, zeros, (x, original, None))
    wanted = error_of(weight, new, (x, original, d)) / variance
    rounding = 10 * n_rows * EPS * scale_of(weight, (x, original, d)) / variance * (1 + wanted)
    assert relative_error(weight, new, moments_of(x, original, d)) == pytest.approx(
        wanted, rel=0, abs=rounding
    )


def test_relative_error_resolves_a_tiny_change() -> None:
    weight, rows = (
        normal(7, GROUPS, OUTPUTS, INPUTS),
        drifted(0, 30, has_original=False, has_residual=False),
    )
    size = 2.0**-30  # its square is 1e-18: below one rounding of the variance
    zeros = torch.zeros_like(weight)
    whole = relative_error(weight, zeros, moments_of(*rows))
    assert whole == pytest.approx(1.0, rel=1e-14)
    # W - (1 - size) W is size * W to EPS / size, twice in the square.
    tiny = relative_error(weight, weight * (1 - size), moments_of(*rows))
    assert tiny == pytest.approx(size**2, rel=4 * EPS / size)


def test_relative_error_of_the_same_layer_is_zero() -> None:
    weight, (x, _, _) = normal(7, GROUPS, OUTPUTS, INPUTS), drifted(0, 30)
    assert relative_error(weight, weight, moments_of(x)) == 0.0
    assert relative_error(weight, weight, moments_of(x, x)) == 0.0


def test_relative_error_where_the_original_is_constant() -> None:
    x, zeros = drifted(0, 30)[0], torch.zeros(GROUPS, OUTPUTS, INPUTS, dtype=torch.float64)
    assert relative_error(zeros, zeros, moments_of(x)) == 0.0
    assert relative_error(zeros, zeros + 1, moments_of(x)) == math.inf


def test_sizes_that_differ_are_refused() -> None:
    moments = moments_of(*drifted(0, 5))
    wide = torch.zeros(GROUPS, OUTPUTS, INPUTS + 1)
    tall = torch.zeros(GROUPS, OUTPUTS + 1, INPUTS)
    for call in (refit, lambda w, m: bias_shift(w, w, m), lambda w, m: relative_error(w, w, m)):
        with pytest.raises(
            ShapeError, match=r"\(2, 3, 5\).*moments `x` \(2, 4\) differ, wanted \(2, 5\)"
        ):
            call(wide, moments)
        with pytest.raises(
            ShapeError, match=r"moments `d` \(2, 3\) differ, wanted \(2, 4\); collect"
        ):
            call(tall, moments)


@pytest.mark.parametrize("name", ["xx_original", "residual_original", "dd"])
def test_error_against_the_original_names_what_is_missing(name: str) -> None:
    weight = torch.ones(GROUPS, OUTPUTS, INPUTS)
    lean = replace(moments_of(*drifted(0, 5)), **{name: None})
    with pytest.raises(ShapeError, match=rf"moments lack `{name}`"):
        relative_error(weight, weight, lean)
    refit(weight, lean)  # does without


def test_moments_that_are_not_finite_are_refused() -> None:
    x = drifted(0, 5)[0]
    x[0, 1, 0] = float("nan")
    with pytest.raises(NumericalError, match=r"group 1: found NaN or infinity"):
        refit(torch.ones(GROUPS, OUTPUTS, INPUTS), moments_of(x))


def test_no_rows_are_refused() -> None:
    empty = Moments(count=0, xx=torch.zeros(1, 2, 2).double(), x=torch.zeros(1, 2).double())
    with pytest.raises(ShapeError, match=r"moments of 0 rows"):
        refit(torch.ones(1, 1, 2), empty)
    with pytest.raises(ShapeError, match=r"moments of 0 rows"):
        bias_shift(torch.ones(1, 1, 2), torch.ones(1, 1, 2), empty)


def pruned(seed: int, n_rows: int, kept: list[int], *, has_residual: bool = True) -> Rows:
    """As ``drifted``, but of the compressed input only some columns are left."""
    x, original, d = drifted(seed, n_rows, has_residual=has_residual)
    return x[..., kept], original, d


@pytest.mark.parametrize("damping", [0.0, 1e-3, 1.0])
@pytest.mark.parametrize("has_residual", [False, True])
@pytest.mark.parametrize("kept", [[1], [0, 2, 3], [0, 1, 2, 3]])
def test_refit_across_is_ridge_regression(
    damping: float, has_residual: bool, kept: list[int]
) -> None:
    n_rows, weight = 50, normal(7, GROUPS, OUTPUTS, INPUTS)
    rows = pruned(0, n_rows, kept, has_residual=has_residual)
    prior = weight[..., kept]
    moments = moments_of(*rows)
    got, shift, used = refit_across(weight, moments, prior, damping)
    assert used == damping
    y, x = target_of(weight, rows), rows[0]
    for g in range(GROUPS):
        moving, wanted = x[:, g] - x[:, g].mean(0), y[:, g] - y[:, g].mean(0)
        ridge = (damping * moving.square().sum() / len(kept)).sqrt()
        stacked = torch.cat([moving, ridge * torch.eye(len(kept), dtype=torch.float64)])
        solution = torch.linalg.lstsq(stacked, torch.cat([wanted, ridge * prior[g].T])).solution.T
        # Normal equations lose the squared condition of the rows, n_rows roundings a sum.
        condition = float(torch.linalg.cond(stacked)) ** 2
        rounding = n_rows * EPS * condition * scale_of(weight, rows)
        assert bool(((got[g] - solution).abs() <= rounding).all())
        wanted_shift = y[:, g].mean(0) - solution @ x[:, g].mean(0)
        assert bool(((shift[g] - wanted_shift).abs() <= rounding * 10).all())
    assert torch.equal(shift, bias_shift_across(weight, got, moments))


@pytest.mark.parametrize("has_original", [False, True])
def test_across_with_all_inputs_is_refit(has_original: bool) -> None:
    weight, rows = normal(7, GROUPS, OUTPUTS, INPUTS), drifted(0, 40, has_original=has_original)
    moments = moments_of(*rows)
    across, shift, used = refit_across(weight, moments, weight, 1e-2)
    plain, plain_shift, plain_used = refit(weight, moments, 1e-2)
    # A damping of 1e-2 keeps the condition below 1e3.
    rounding = 1e3 * 40 * EPS * scale_of(weight, rows)
    assert used == plain_used
    assert bool(((across - plain).abs() <= rounding).all())
    assert bool(((shift - plain_shift).abs() <= rounding).all())
    assert relative_error_across(weight, plain, moments) == pytest.approx(
        relative_error(weight, plain, moments), rel=1e-9
    )


def test_infinite_damping_across_gives_the_prior() -> None:
    weight, rows = normal(7, GROUPS, OUTPUTS, INPUTS), pruned(3, 30, [0, 2])
    prior = normal(8, GROUPS, OUTPUTS, 2)
    new, _, _ = refit_across(weight, moments_of(*rows), prior, 1e12)
    assert 0 < float((new - prior).abs().max()) <= 4 * scale_of(weight, rows) / 1e12


def test_constant_input_across_keeps_its_prior() -> None:
    weight, (x, original, d) = normal(7, GROUPS, OUTPUTS, INPUTS), pruned(0, 50, [0, 1, 3])
    x = x.clone()
    x[..., 1] = 1000 / 3
    prior = normal(8, GROUPS, OUTPUTS, 3)
    new, _, _ = refit_across(weight, moments_of(x, original, d), prior)
    assert torch.equal(new[..., 1], prior[..., 1])


@given(SEEDS, st.booleans(), st.integers(1, INPUTS))
@settings(max_examples=25)
def test_relative_error_across_is_that_of_the_rows(
    seed: int, has_residual: bool, n_kept: int
) -> None:
    n_rows, weight = 30, normal(seed + 7, GROUPS, OUTPUTS, INPUTS)
    rows = pruned(seed, n_rows, list(range(n_kept)), has_residual=has_residual)
    new, moments = normal(seed + 8, GROUPS, OUTPUTS, n_kept), moments_of(*rows)
    variance = error_of(weight, torch.zeros_like(new), (rows[0], rows[1], None))
    wanted = error_of(weight, new, rows) / variance
    size = scale_of(weight, rows) * (1 + float(new.abs().max())) ** 2
    rounding = 10 * n_rows * EPS * size / variance * (1 + wanted)
    got = relative_error_across(weight, new, moments)
    assert got == pytest.approx(wanted, rel=0, abs=rounding)
    # The regression is the best of all.
    best, _, _ = refit_across(weight, moments, new, 0.0)
    assert relative_error_across(weight, best, moments) <= got + rounding


def test_relative_error_across_where_the_original_is_constant() -> None:
    x, original, _ = pruned(0, 30, [0, 1], has_residual=False)
    moments, zeros = moments_of(x, original), torch.zeros(GROUPS, OUTPUTS, INPUTS)
    assert relative_error_across(zeros, zeros[..., :2], moments) == 0.0
    assert relative_error_across(zeros, zeros[..., :2] + 1, moments) == math.inf


def test_sizes_that_differ_across_are_refused() -> None:
    moments = moments_of(*pruned(0, 5, [0, 1]))
    weight, new = torch.zeros(GROUPS, OUTPUTS, INPUTS), torch.zeros(GROUPS, OUTPUTS, 2)
    cases = [
        (weight, weight, r"\(2, 3, 4\).*moments `x` \(2, 2\) differ, wanted \(2, 4\)"),
        (weight[..., :3], new, r"moments `x_original` \(2, 4\) differ, wanted \(2, 3\)"),
        (weight[:, :2], new[:, :2], r"moments `d` \(2, 3\) differ, wanted \(2, 2\)"),
    ]
    for original, kept, message in cases:
        for call in (
            lambda w, v: refit_across(w, moments, v),
            lambda w, v: bias_shift_across(w, v, moments),
            lambda w, v: relative_error_across(w, v, moments),
        ):
            with pytest.raises(ShapeError, match=message):
                call(original, kept)
    with pytest.raises(ShapeError, match=r"moments `x_original` \(2, 4\) differ"):
        refit(new, moments)
