"""Rounding on both sides: nearest planes of the Kronecker product, and descent that never goes up."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tersor.core.errors import ConfigError, ShapeError
from tersor.ops import two_sided
from tersor.ops.feedback import round_with_feedback
from tersor.ops.group_grids import GroupGrid, Steps, dequantize, fit_steps
from tersor.ops.group_rounding import Feedback, RoundingConfig, round_weight
from tersor.ops.two_sided import (
    blended,
    check_output_metric,
    feed_back_two_sided,
    round_two_sided,
    two_sided_loss,
)

EPS = torch.finfo(torch.float64).eps
SEEDS = st.integers(0, 2**32 - 1)
PLAIN = RoundingConfig(damping=0.0, act_order=False)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moment(seed: int, groups: int, n: int) -> Tensor:
    """Correlated, of unequal size."""
    x = normal(seed, groups, 4 * n, n) @ (normal(seed + 1, groups, n, n) / n**0.5 + torch.eye(n))
    x = x * (0.5 + torch.arange(n) / n)
    return x.mT @ x / (4 * n)


def problem(seed: int, groups: int = 2, m: int = 5, n: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    return (
        normal(seed, groups, m, n), moment(seed + 2, groups, n), moment(seed + 4, groups, m)
    )  # fmt: skip


@pytest.mark.parametrize("rows", [2, 32])
@pytest.mark.parametrize("seed", range(6))
def test_it_is_feedback_on_the_product_of_both_metrics(
    monkeypatch: pytest.MonkeyPatch, rows: int, seed: int
) -> None:
    """One row of all weights, whose second moment is the Kronecker product."""
    monkeypatch.setattr(two_sided, "ROWS", rows)
    weight, H, G = problem(seed, groups=1)
    # Codes of about 3 in a grid of 8 bits: nothing is clipped, as the two grids end differently.
    grid = GroupGrid(bits=8, step_type="float32")
    step = (weight.abs().amax(2) / 3).float().double()
    steps = Steps(step=step.unsqueeze(2), zero=torch.zeros(1, 5, 1, dtype=torch.int8))
    factors = (Feedback.of(weight, H, PLAIN), Feedback.of(weight.mT, G, PLAIN))
    found = feed_back_two_sided(weight, factors, steps, grid)
    both = torch.kron(G[0], H[0]).unsqueeze(0)
    # A step for each row: the same lattice with all steps 1, the metric scaled instead.
    spread = step[0].repeat_interleave(7)
    scaled = (weight[0] / step[0, :, None]).reshape(1, 1, -1)
    metric = both * spread.unsqueeze(0) * spread.unsqueeze(1)
    one = torch.ones(1, 1, dtype=torch.float64)
    wanted = round_with_feedback(scaled, one, metric, limit=127, damping=0.0, act_order=False)
    assert torch.equal(found.reshape(-1), wanted.codes.reshape(-1))


@given(SEEDS, st.sampled_from([2, 3, 4]), st.sampled_from([None, 3]))
@settings(max_examples=20, deadline=None)
def test_losses_are_the_definition_and_never_rise(seed: int, bits: int, group: int | None) -> None:
    weight, H, G = problem(seed)
    grid = GroupGrid(bits=bits, group=group)
    done = round_two_sided(weight, H, G, grid)
    D = weight - dequantize(done.codes, done.steps, grid)
    wanted = torch.stack([torch.trace(g @ d @ h @ d.T) for g, d, h in zip(G, D, H, strict=True)])
    # Rounding of a form of this size; the gradient was updated some hundred times.
    size = float(weight.abs().max() ** 2 * H.abs().max() * G.abs().max())
    noise = 1e4 * 35**2 * EPS * size
    torch.testing.assert_close(done.loss, wanted, rtol=0, atol=noise)
    torch.testing.assert_close(two_sided_loss(D, H, G), wanted, rtol=0, atol=noise)
    assert done.losses[-1] == pytest.approx(float(wanted.sum()), abs=noise)
    assert all(b <= a + noise for a, b in zip(done.losses, done.losses[1:], strict=False))


@given(SEEDS)
@settings(max_examples=10, deadline=None)
def test_where_it_ends_no_single_code_can_be_better(seed: int) -> None:
    weight, H, G = problem(seed, groups=1, m=4, n=5)
    grid = GroupGrid(bits=3)
    config = RoundingConfig(sweeps=50, stretches=(1.0,), refit_steps=False)
    done = round_two_sided(weight, H, G, grid, config)
    new = dequantize(done.codes, done.steps, grid)
    least = float(two_sided_loss(weight - new, H, G))
    for i in range(4):
        for j in range(5):
            for code in range(grid.low, grid.high + 1):
                other = done.codes.clone()
                other[0, i, j] = code
                loss = two_sided_loss(weight - dequantize(other, done.steps, grid), H, G)
                assert float(loss) >= least * (1 - 1e-9)


def test_rows_that_count_alike_and_alone_are_rounded_as_by_one_side() -> None:
    weight, H, _ = problem(3)
    identity = torch.eye(5, dtype=torch.float64).expand(2, -1, -1)
    grid, config = GroupGrid(bits=3), RoundingConfig(stretches=(1.0,), sweeps=0)
    found = round_two_sided(weight, H, identity, grid, config)
    wanted = round_weight(weight, H, grid, config)
    assert torch.equal(found.codes, wanted.codes)
    torch.testing.assert_close(found.loss, wanted.loss)


def test_it_errs_less_in_its_metric_than_one_side_alone() -> None:
    """Outputs that are nearly copies of each other: their errors can cancel."""
    grid, ratios = GroupGrid(bits=2), []
    for seed in range(6):
        weight, H, _ = problem(seed, 1, 12, 16)
        G = blended(torch.ones(1, 12, 12, dtype=torch.float64), 0.2)
        alone = round_weight(weight, H, grid)
        off = weight - dequantize(alone.codes, alone.steps, grid)
        both = round_two_sided(weight, H, G, grid)
        ratios.append(float(both.loss.sum() / two_sided_loss(off, H, G).sum()))
    assert max(ratios) < 1
    assert sum(ratios) / 6 < 0.8


def test_a_blend_keeps_the_mean_diagonal() -> None:
    G = moment(1, 2, 4)
    found = blended(G, 0.9)
    torch.testing.assert_close(
        found.diagonal(dim1=1, dim2=2).mean(1), torch.ones(2, dtype=torch.float64)
    )
    one = torch.eye(4, dtype=torch.float64)
    torch.testing.assert_close(found[1], 0.9 * one + 0.1 * G[1] / G[1].diagonal().mean())
    assert torch.equal(blended(G, 1.0), one.expand(2, -1, -1))
    assert torch.equal(blended(torch.zeros(1, 4, 4), 0.5)[0], one)
    with pytest.raises(ConfigError, match=r"blend must be within 0\.\.1, got 1\.5"):
        blended(G, 1.5)


def test_degenerate_weights_and_metrics() -> None:
    weight, H, G = problem(0, 1, 3, 4)
    grid = GroupGrid(bits=4)
    nothing = round_two_sided(torch.zeros_like(weight), H, G, grid)
    assert not bool(nothing.codes.any())
    dead = H.clone()
    dead[:, 1], dead[:, :, 1] = 0.0, 0.0
    done = round_two_sided(weight, dead, G, grid)
    assert done.losses[-1] <= done.losses[0]
    one = round_two_sided(weight[:, :1, :1], H[:, :1, :1], G[:, :1, :1], grid)
    assert tuple(one.codes.shape) == (1, 1, 1)


def test_what_does_not_fit_is_refused() -> None:
    weight, H, G = problem(0)
    with pytest.raises(ShapeError, match=r"output metric \(2, 4, 4\) differ, wanted \(2, 5, 5\)"):
        check_output_metric(weight, G[:, :4, :4])
    with pytest.raises(ConfigError, match="wanted a symmetric grid"):
        round_two_sided(weight, H, G, GroupGrid(symmetric=False))


def test_arguments_are_left_alone() -> None:
    weight, H, G = problem(5)
    before = [t.clone() for t in (weight, H, G)]
    round_two_sided(weight, H, G, GroupGrid(bits=2))
    assert all(torch.equal(a, b) for a, b in zip(before, (weight, H, G), strict=True))
    assert fit_steps(weight, GroupGrid(bits=2)).step.shape == (2, 5, 1)
