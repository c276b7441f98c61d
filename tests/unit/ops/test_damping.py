"""Damped factors: the definition, the ladder, and errors that say what is wrong."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tersor.core.errors import ConfigError, NumericalError
from tersor.ops.damping import (
    LADDER_FACTOR,
    LADDER_STEPS,
    SMALLEST_DAMPING,
    damped_cholesky,
    damped_inverse_upper,
)

EPS = torch.finfo(torch.float64).eps


def second_moment(seed: int, groups: int, n: int, n_rows: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(groups, n_rows, n, generator=generator, dtype=torch.float64)
    return x.mT @ x / n_rows


def damped(H: Tensor, damping: float) -> Tensor:
    out = H.clone()
    for g in range(H.shape[0]):
        mean = sum(H[g, i, i] for i in range(H.shape[1])) / H.shape[1]
        for i in range(H.shape[1]):
            out[g, i, i] += damping * mean
    return out


def backward_error(H: Tensor) -> float:
    """Bound on |L L^T - H|: (n + 1) roundings of the largest diagonal entry (Higham 2002, th. 10.3)."""
    # Twice: once for the factor, once for multiplying it out and damping again.
    return 2 * (H.shape[-1] + 1) * EPS * float(H.diagonal(dim1=1, dim2=2).max())


@given(
    st.integers(0, 2**32 - 1), st.integers(1, 6), st.integers(1, 12), st.sampled_from([1e-4, 0.01])
)
@settings(max_examples=40)
def test_factor_is_of_the_damped_matrix(seed: int, n: int, n_rows: int, damping: float) -> None:
    H = second_moment(seed, 2, n, n_rows)  # singular where n > n_rows
    L, used = damped_cholesky(H, damping)
    assert used == damping
    assert torch.equal(L, L.tril())
    wanted = damped(H, damping)
    assert bool(((L @ L.mT - wanted).abs() <= backward_error(wanted)).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_result_is_float64_and_the_input_unchanged(dtype: torch.dtype) -> None:
    H = second_moment(0, 2, 4, 20).to(dtype)
    before = H.clone()
    L, _ = damped_cholesky(H, 0.01)
    U, _ = damped_inverse_upper(H, 0.01)
    assert L.dtype == U.dtype == torch.float64
    assert torch.equal(H, before)


@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_empty_group_gets_the_identity_and_others_do_not(damping: float) -> None:
    H = second_moment(1, 3, 4, 20)
    alone = H[[0, 2]].clone()
    H[1] = 0
    L, used = damped_cholesky(H, damping)
    assert used == damping
    assert torch.equal(L[1], torch.eye(4, dtype=torch.float64))
    assert torch.equal(L[[0, 2]], damped_cholesky(alone, damping)[0])


def test_single_input() -> None:
    L, used = damped_cholesky(torch.full((1, 1, 1), 4.0), 0.0)
    assert (float(L), used) == (2.0, 0.0)


@pytest.mark.parametrize("n_rows", [1, 3, 5])
def test_singular_matrix_climbs_from_zero(n_rows: int) -> None:
    H = second_moment(2, 1, 6, n_rows)
    L, used = damped_cholesky(H, 0.0)
    assert used in [pytest.approx(SMALLEST_DAMPING * LADDER_FACTOR**k) for k in range(LADDER_STEPS)]
    wanted = damped(H, used)
    assert bool(((L @ L.mT - wanted).abs() <= backward_error(wanted)).all())


def test_factor_of_rounding_noise_is_a_failure() -> None:
    H = torch.tensor([[[1.0, 1.0], [1.0, 1.0 + EPS]]], dtype=torch.float64)
    assert int(torch.linalg.cholesky_ex(H).info) == 0  # "succeeds" with a pivot of one rounding
    assert damped_cholesky(H, 0.0)[1] == SMALLEST_DAMPING


def test_one_dead_input_does_not_make_a_group_empty() -> None:
    H = second_moment(1, 2, 4, 20)
    H[0, 2] = H[0, :, 2] = 0
    L, used = damped_cholesky(H, 0.01)
    wanted = damped(H, used)
    assert bool(((L @ L.mT - wanted).abs() <= backward_error(wanted)).all())


def test_ladder_takes_steps_of_ten_and_says_where_it_ended() -> None:
    H = torch.diag_embed(torch.tensor([[1.0, 1.0], [1.0, -0.05]], dtype=torch.float64))
    # Group 1 has mean 0.475: 0.01 and 0.1 of it are less than 0.05, all of it is more.
    L, used = damped_cholesky(H, 0.01)
    assert used == pytest.approx(1.0)
    assert float(L[1, 1, 1]) == pytest.approx((used * 0.475 - 0.05) ** 0.5)
    assert float(L[0, 0, 0]) == pytest.approx((1 + used) ** 0.5)


def test_matrix_that_is_no_second_moment_is_refused() -> None:
    H = torch.eye(2, dtype=torch.float64).repeat(3, 1, 1)
    H[2, 0, 1] = H[2, 1, 0] = 1e9
    last = 0.01 * LADDER_FACTOR ** (LADDER_STEPS - 1)
    message = rf"\(3, 2, 2\), group 2: smallest eigenvalue -1e\+09 .* up to a damping of {last:.3g};".replace(
        "e+05", r"e\+05"
    )
    with pytest.raises(NumericalError, match=message):
        damped_cholesky(H, 0.01)
    with pytest.raises(NumericalError, match=r"begin with a larger damping"):
        damped_inverse_upper(H, 0.01)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_matrix_that_is_not_finite_is_refused(bad: float) -> None:
    H = torch.eye(2).repeat(2, 1, 1)
    H[1, 0, 1] = bad
    with pytest.raises(NumericalError, match=r"group 1: found NaN or infinity.*look for samples"):
        damped_cholesky(H, 0.01)


@pytest.mark.parametrize("damping", [-0.1, float("nan")])
def test_negative_damping_is_refused(damping: float) -> None:
    with pytest.raises(ConfigError, match=r"damping must be >= 0, got (-0.1|nan); 0.01 is"):
        damped_cholesky(torch.eye(2).unsqueeze(0), damping)


@given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.integers(1, 12))
@settings(max_examples=40)
def test_upper_factor_of_the_inverse(seed: int, n: int, n_rows: int) -> None:
    H = second_moment(seed, 2, n, n_rows)
    U, used = damped_inverse_upper(H, 0.01)
    assert used == 0.01
    assert torch.equal(U, U.triu())
    wanted = torch.linalg.cholesky(torch.linalg.inv(damped(H, used)), upper=True)
    # Both ways lose cond(H) times n roundings of the largest entry, the explicit inverse a few times over.
    condition = float(torch.linalg.cond(damped(H, used)).max())
    rounding = 10 * n * EPS * condition * float(wanted.abs().max())
    assert bool(((U - wanted).abs() <= rounding).all())


@pytest.mark.parametrize("n", [95, 96, 97, 250, 385])
def test_an_inverse_by_halves_is_the_inverse(n: int) -> None:
    """Sizes around those that are solved directly, odd halves among them."""
    H = second_moment(n, 2, n, 2 * n)
    U, used = damped_inverse_upper(H, 0.01)
    assert used == 0.01
    assert bool((U.tril(-1) == 0).all())
    product = U.mT @ U @ damped(H, 0.01)
    # Some roundings times the condition number, which damping keeps below (1 + 4) / 0.01.
    bound = 8 * n * EPS * 500
    torch.testing.assert_close(
        product, torch.eye(n, dtype=torch.float64).expand_as(product), rtol=0, atol=bound
    )
