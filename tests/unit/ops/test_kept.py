"""The weight on the kept inputs is the regression of the output on them, with its mean kept."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tersor.core.errors import ConfigError, NumericalError, ShapeError
from tersor.ops.kept import damped, kept_columns, refit_columns, refit_kept
from tersor.ops.moments import Moments, moments_of
from tersor.ops.obs import Consumer, removal_order

EPS = torch.finfo(torch.float64).eps
SEEDS = st.integers(0, 2**32 - 1)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rows_of(seed: int, n_rows: int, groups: int, inputs: int) -> Tensor:
    x = normal(seed, n_rows, groups, inputs)
    return x + 0.7 * x.roll(1, 2) + 2


@given(SEEDS, st.integers(0, 5), st.integers(1, 2), st.booleans())
@settings(max_examples=40, deadline=None)
def test_refit_is_the_regression_with_intercept(
    seed: int, n_kept: int, groups: int, has_bias: bool
) -> None:
    x, weight = rows_of(seed, 40, groups, 5), normal(seed + 1, groups, 3, 5)
    bias = normal(seed + 2, groups, 3) if has_bias else None
    kept = torch.stack([torch.randperm(5)[:n_kept].sort().values for _ in range(groups)])
    got = refit_kept(weight, bias, moments_of(x), kept, 0.0)
    assert got.damping == 0.0
    for g in range(groups):
        y = x[:, g] @ weight[g].T + (0 if bias is None else bias[g])
        design = torch.cat([x[:, g, kept[g]], torch.ones(40, 1, dtype=torch.float64)], 1)
        solution = torch.linalg.lstsq(design, y).solution
        error = y - design @ solution
        # Conditions of 40 such rows are below 1e5, squared in the normal equations, with room.
        torch.testing.assert_close(got.weight[g], solution[:-1].T, rtol=0, atol=1e10 * EPS)
        torch.testing.assert_close(got.bias[g], solution[-1], rtol=0, atol=1e11 * EPS)
        loss = float(error.square().sum() / 40)
        assert float(got.loss[g]) == pytest.approx(loss, rel=1e-9, abs=1e5 * EPS)
        assert float(got.damped_loss[g]) == pytest.approx(loss, rel=1e-9, abs=1e5 * EPS)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("n_rows", [4, 60])
@pytest.mark.parametrize("damping", [1e-4, 1e-1])
def test_damped_loss_is_what_an_order_adds_up(groups: int, n_rows: int, damping: float) -> None:
    x, weight = rows_of(0, n_rows, groups, 12), normal(1, groups, 7, 12)
    columns = torch.stack([torch.randperm(12)[:10].reshape(5, 2) for _ in range(groups)])
    moments = moments_of(x)
    moving = x - x.mean(0)
    H, _ = damped(torch.einsum("tgi,tgj->gij", moving, moving) / n_rows, damping)
    order = removal_order([Consumer(weight=weight, second_moment=H, columns=columns)])
    for removed in range(1, 6):
        kept = kept_columns(columns, 12, order.order[removed:])
        got = refit_kept(weight, None, moments, kept, damping)
        # Both sums lose the condition, at most 1e6, of some 1e2 roundings.
        assert float(got.damped_loss.sum()) == pytest.approx(
            float(order.loss[removed - 1]), rel=1e-8
        )
        assert bool((got.loss <= got.damped_loss * (1 + 1e-12)).all())
        # The true loss, row by row.
        outputs = torch.einsum(
            "gmk,tgk->tgm", got.weight, x.gather(2, kept.expand(n_rows, *kept.shape))
        )
        error = torch.einsum("gmn,tgn->tgm", weight, x) - outputs - got.bias
        assert float(got.loss.sum()) == pytest.approx(
            float(error.square().sum() / n_rows), rel=1e-8, abs=1e6 * EPS
        )


def test_strong_damping_is_plain_deletion() -> None:
    x, weight = rows_of(0, 30, 2, 4), normal(1, 2, 3, 4)
    kept = torch.tensor([[0, 2], [1, 3]])
    got = refit_kept(weight, None, moments_of(x), kept, 1e12)
    wanted = weight.gather(2, kept.unsqueeze(1).expand(-1, 3, -1))
    assert 0 < float((got.weight - wanted).abs().max()) < 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_keeping_all_changes_nothing(dtype: torch.dtype) -> None:
    x, weight, bias = rows_of(0, 30, 1, 4), normal(1, 1, 3, 4).to(dtype), normal(2, 1, 3)
    got = refit_kept(weight, bias, moments_of(x), torch.arange(4).unsqueeze(0))
    assert torch.equal(got.weight, weight.double())
    assert torch.equal(got.bias, bias)
    assert got.loss.tolist() == [0.0]
    assert got.damped_loss.tolist() == [0.0]


def test_kept_columns_may_be_permuted() -> None:
    H, weight = damped(normal(0, 1, 5, 5) @ normal(0, 1, 5, 5).mT, 0.1)[0], normal(1, 1, 2, 5)
    sorted_, loss = refit_columns(weight, H, torch.tensor([[1, 2, 4]]))
    turned, same = refit_columns(weight, H, torch.tensor([[4, 1, 2]]))
    torch.testing.assert_close(turned, sorted_[:, :, [2, 0, 1]], rtol=1e-10, atol=1e-12)
    assert float(loss) == pytest.approx(float(same), rel=1e-10)


def test_damped_is_the_definition() -> None:
    H = normal(0, 2, 3, 3)
    H = H @ H.mT
    H[1] = 0
    got, used = damped(H, 0.5)
    mean = H[0].trace() / 3
    assert used == 0.5
    assert torch.equal(got[1], torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(got[0], H[0] + 0.5 * mean * torch.eye(3, dtype=torch.float64))
    _, used = damped(torch.ones(1, 3, 3), 0.0)
    assert used > 0  # singular: said, not hidden


def test_columns_of_kept_units() -> None:
    columns = torch.tensor([[[5, 0], [1, 4]], [[0, 1], [2, 5]]])
    got = kept_columns(columns, 6, torch.tensor([1]))
    assert got.tolist() == [[1, 2, 3, 4], [2, 3, 4, 5]]
    assert kept_columns(columns, 6, torch.tensor([1, 0])).tolist() == [list(range(6))] * 2
    nothing = kept_columns(columns, 6, torch.zeros(0, dtype=torch.int64))
    assert nothing.tolist() == [[2, 3], [3, 4]]
    columns[1, 0, 1] = -1
    with pytest.raises(ShapeError, match=r"groups would keep \[4, 5\] inputs each"):
        kept_columns(columns, 6, torch.tensor([1]))


def test_what_does_not_fit_is_refused() -> None:
    weight, H = torch.ones(1, 2, 3), torch.eye(3).unsqueeze(0)
    with pytest.raises(ShapeError, match=r"from 0 to 3, wanted -1\.\.2"):
        refit_columns(weight, H, torch.tensor([[0, 3]]))
    with pytest.raises(ShapeError, match=r"column 1 is given 2 times"):
        refit_columns(weight, H, torch.tensor([[1, 1]]))
    with pytest.raises(ShapeError, match=r"found a negative one"):
        refit_columns(weight, H, torch.tensor([[-1, 1]]))
    with pytest.raises(NumericalError, match=r"pivot that is not positive"):
        refit_columns(weight, torch.ones(1, 3, 3), torch.tensor([[0, 1]]))
    moments = moments_of(torch.ones(4, 1, 2))
    with pytest.raises(ShapeError, match=r"weight \(1, 2, 3\).*`x` \(1, 2\) differ; collect"):
        refit_kept(weight, None, moments, torch.tensor([[0]]))
    empty = Moments(count=0, xx=torch.zeros(1, 3, 3).double(), x=torch.zeros(1, 3).double())
    with pytest.raises(ShapeError, match=r"moments of 0 rows"):
        refit_kept(weight, None, empty, torch.tensor([[0]]))
    with pytest.raises(ConfigError, match=r"damping must be >= 0"):
        damped(H, -1.0)
