"""The refit on a support is least squares, whichever way it is solved."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tersor.core.errors import ConfigError, NumericalError
from tersor.ops import support
from tersor.ops.support import refit_support

SEEDS = st.integers(0, 2**32 - 1)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def problem(seed: int, n_rows: int = 40) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weight, inputs, their second moment and a support with rows of unequal counts, one of them empty."""
    x = normal(seed + 1, 2, n_rows, 9) @ (normal(seed + 2, 2, 9, 9) + 2 * torch.eye(9))
    keep = normal(seed + 3, 2, 5, 9) > torch.linspace(-1, 1, 5).unsqueeze(1)
    keep[0, 0] = False
    return normal(seed, 2, 5, 9), x, x.mT @ x / n_rows, keep


@given(SEEDS, st.booleans(), st.sampled_from([90, 2**24]))
@settings(max_examples=30, deadline=None)
def test_it_is_the_least_squares_of_the_outputs(seed: int, direct: bool, batch: int) -> None:
    weight, x, H, keep = problem(seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(support, "BATCH_VALUES", batch)
        found = refit_support(weight, H, keep, damping=0.0, direct=direct, tolerance=1e-12)
    assert found.damping == 0.0
    assert (found.steps > 0) == (not direct)
    for g in range(2):
        for i in range(5):
            columns = keep[g, i].nonzero().flatten()
            wanted = torch.zeros(9, dtype=torch.float64)
            target = (x[g] @ weight[g, i]).unsqueeze(1)
            wanted[columns] = torch.linalg.lstsq(x[g][:, columns], target).solution[:, 0]
            torch.testing.assert_close(found.weight[g, i], wanted, rtol=1e-7, atol=1e-8)
    D = weight - found.weight
    torch.testing.assert_close(found.loss, ((D @ x.mT).square().sum((1, 2)) / 40))


@given(SEEDS, st.booleans(), st.sampled_from([3, 40]))
@settings(max_examples=30, deadline=None)
def test_the_gradient_on_the_support_is_zero(seed: int, direct: bool, n_rows: int) -> None:
    weight, _, H, keep = problem(seed, n_rows)
    found = refit_support(weight, H, keep, damping=1e-2, direct=direct)
    metric = H + found.damping * H.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] * torch.eye(9)
    slope = ((weight - found.weight) @ metric * keep).norm(dim=2)
    size = (weight @ metric * keep).norm(dim=2)
    bound = 1e-10 if direct else support.TOLERANCE * (1 + 1e-6)
    assert bool((slope <= bound * size + 1e-13).all())
    assert found.residual == pytest.approx(
        float((slope / size.clamp_min(1e-300)).max()), rel=1e-6, abs=1e-12
    )
    assert not found.weight[~keep].any()


def test_more_of_the_support_never_costs_more() -> None:
    weight, _, H, keep = problem(1)
    before = refit_support(weight, H, keep, damping=0.0).loss
    for j in range(9):
        keep[..., j] = True
        now = refit_support(weight, H, keep, damping=0.0).loss
        assert bool((now <= before + 1e-12).all())
        before = now
    assert bool((before < 1e-20).all())


def test_rows_of_one_pattern_share_a_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, _, H, keep = problem(2)
    keep[:] = keep[0, 3]
    sizes: list[torch.Size] = []
    real = support.factor
    monkeypatch.setattr(support, "factor", lambda M: sizes.append(M.shape) or real(M))
    found = refit_support(weight, H, keep, damping=0.0, direct=True)
    k = int(keep[0, 3].sum())
    assert sizes == [(k, k), (k, k)]
    each = [
        refit_support(weight[:, i : i + 1], H, keep[:, i : i + 1], damping=0.0) for i in range(5)
    ]
    torch.testing.assert_close(found.weight, torch.cat([e.weight for e in each], 1))


def test_the_cheaper_way_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, _, H, keep = problem(3)
    assert refit_support(weight, H, keep).steps == 0
    monkeypatch.setattr(support, "USUAL_STEPS", 0.01)
    assert refit_support(weight, H, keep).steps > 0


def test_steps_that_run_out_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(support, "MOST_STEPS", 1)
    weight, _, H, keep = problem(4)
    found = refit_support(weight, H, keep, direct=False)
    assert found.steps == 1
    assert found.residual > support.TOLERANCE


def test_dead_inputs_and_singular_moments() -> None:
    weight, _, H, keep = problem(5, n_rows=3)
    H[:, 4], H[:, :, 4] = 0, 0
    found = refit_support(weight, H, keep, damping=0.0)
    assert found.damping > 0
    assert found.weight.isfinite().all()
    nothing = refit_support(weight, H * 0, keep)
    torch.testing.assert_close(nothing.weight, weight * keep)
    assert nothing.loss.tolist() == [0.0, 0.0]


def test_wrong_arguments_are_refused() -> None:
    weight, _, H, keep = problem(0)
    with pytest.raises(ConfigError, match=r"tolerance must be > 0, got 0"):
        refit_support(weight, H, keep, tolerance=0.0)
    with pytest.raises(NumericalError, match=r"found nan at group 0"):
        refit_support(weight * float("nan"), H, keep)


@given(SEEDS, st.sampled_from([1e-2, 1e-3, 1e-4]))
@settings(max_examples=20, deadline=None)
def test_coarse_tolerances_hold_after_float32(seed: int, tolerance: float) -> None:
    weight, _, H, keep = problem(seed)
    start = normal(seed + 4, 2, 5, 9)
    for begin in (None, start):
        found = refit_support(
            weight, H, keep, damping=1e-2, direct=False, tolerance=tolerance, start=begin
        )
        metric = H + 1e-2 * H.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] * torch.eye(9)
        slope = ((weight - found.weight) @ metric * keep).norm(dim=2)
        assert bool((slope <= tolerance * (weight @ metric * keep).norm(dim=2) + 1e-13).all())
        assert not found.weight[~keep].any()
        D = weight - found.weight
        torch.testing.assert_close(found.loss, ((D @ H) * D).sum((1, 2)))
        assert found.steps >= found.single_steps > 0


def test_what_float32_cannot_reach_goes_on_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(support, "SINGLE_TOLERANCE", 1e-13)
    weight, _, H, keep = problem(6)
    found = refit_support(weight, H, keep, damping=1e-2, direct=False, tolerance=1e-12)
    assert found.steps > found.single_steps > 0
    assert found.residual <= 1e-12
    exact = refit_support(weight, H, keep, damping=1e-2, direct=True)
    torch.testing.assert_close(found.weight, exact.weight, rtol=1e-9, atol=1e-10)
    fine = refit_support(weight, H, keep, damping=1e-2, direct=False)
    assert fine.single_steps > 0  # the default is above the patched bound
    monkeypatch.undo()
    assert refit_support(weight, H, keep, direct=False).single_steps == 0


def test_solved_outputs_leave_and_come_back_whole() -> None:
    """Of one group rows are dropped as they are solved; of several none is."""
    weight, _, H, keep = problem(7)
    both = refit_support(weight, H, keep, damping=1e-2, direct=False, tolerance=1e-10)
    for g in range(2):
        part = slice(g, g + 1)
        alone = refit_support(
            weight[part], H[part], keep[part], damping=1e-2, direct=False, tolerance=1e-10
        )
        torch.testing.assert_close(alone.weight, both.weight[part], rtol=1e-7, atol=1e-8)
