"""The curve is that of whitened singular values, no factors are better, and refits leave no gradient."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tersor.core.errors import ConfigError, ShapeError
from tersor.ops.damping import damped_cholesky
from tersor.ops.lowrank import (
    Factors,
    RoundFactor,
    factors,
    rank_curve,
    refit_left,
    refit_right,
    refit_rounded,
)
from tersor.ops.moments import moments_of, unfold
from tersor.ops.objective import Objective, objective_of
from tersor.ops.refit import relative_error

EPS = torch.finfo(torch.float64).eps
SEEDS = st.integers(0, 2**32 - 1)
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA"),
        ],
    ),
]


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rows(seed: int, n_rows: int, groups: int, inputs: int) -> Tensor:
    """Correlated inputs with means, [t, g, n]."""
    mixing = normal(seed + 1, groups, inputs, inputs) / inputs**0.5
    x = torch.einsum("tgn,gnk->tgk", normal(seed + 2, n_rows, groups, inputs), mixing)
    return x + normal(seed + 3, groups, inputs)


def layer(
    seed: int,
    *,
    groups: int = 2,
    outputs: int = 5,
    inputs: int = 7,
    n_rows: int = 60,
    damping: float = 1e-4,
) -> Objective:
    return objective_of(
        normal(seed, groups, outputs, inputs),
        moments_of(rows(seed, n_rows, groups, inputs)),
        damping,
    )


def drifted(
    seed: int, outputs: int = 6, inputs: int = 5, damping: float = 1e-3
) -> tuple[Objective, Tensor, Tensor, Tensor, Tensor]:
    """A layer behind a change: objective, W, x, xh and the residual stream's change."""
    W, x = normal(seed, 1, outputs, inputs), rows(seed, 80, 1, inputs)
    xh = x + 0.3 * normal(seed + 7, 80, 1, inputs) + 0.2
    d = 0.5 * normal(seed + 8, 80, 1, outputs) + 0.3 * xh @ normal(seed + 9, inputs, outputs)
    return objective_of(W, moments_of(xh, x, d), damping), W, x, xh, d


def whitened(objective: Objective) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The definition: singular values of W L."""
    L, _ = damped_cholesky(objective.damped(), 0.0)
    return *torch.linalg.svd(objective.weight @ L, full_matrices=False), L


@pytest.mark.parametrize("sizes", [(5, 7), (7, 5), (1, 4), (4, 1), (6, 6)])
@pytest.mark.parametrize("form", ["outputs", "inputs"])
def test_factors_are_those_of_the_whitened_decomposition(sizes: tuple[int, int], form: str) -> None:
    objective = layer(3, outputs=sizes[0], inputs=sizes[1])
    U, S, Vt, L = whitened(objective)
    curve = rank_curve(objective, form)  # type: ignore[arg-type]
    assert curve.errors.shape == (2, min(sizes) + 1)
    for r in range(min(sizes) + 1):
        found = factors(curve, r)
        wanted = (U[:, :, :r] * S[:, None, :r]) @ Vt[:, :r] @ torch.linalg.inv(L)
        assert torch.allclose(found.left @ found.right, wanted, rtol=1e-9, atol=1e-9)
        white = factors(curve, r, "white")
        assert torch.allclose(white.left @ white.right, wanted, rtol=1e-9, atol=1e-9)
        latent = white.right @ objective.damped() @ white.right.mT
        assert torch.allclose(latent, torch.eye(r, dtype=torch.float64).expand_as(latent))
        # The white factors are U S and V^T L^-1 themselves, up to a sign a direction.
        assert torch.allclose(white.left.abs(), (U * S.unsqueeze(1))[:, :, :r].abs())


@pytest.mark.parametrize("form", ["outputs", "inputs"])
def test_without_damping_errors_are_tails_of_squared_singular_values(form: str) -> None:
    objective = layer(5, damping=0.0)
    _, S, _, _ = whitened(objective)
    curve = rank_curve(objective, form)  # type: ignore[arg-type]
    squares = S.square()
    for r in range(6):
        assert torch.allclose(curve.errors[:, r], squares[:, r:].sum(1), rtol=1e-9, atol=1e-11)


@given(SEEDS, st.integers(1, 6), st.integers(1, 6), st.sampled_from([2, 40]), st.booleans())
@settings(max_examples=25, deadline=None)
def test_errors_are_the_definition_and_never_rise(
    seed: int, outputs: int, inputs: int, n_rows: int, centre: bool
) -> None:
    W, x = normal(seed, 2, outputs, inputs), rows(seed, n_rows, 2, inputs)
    if not centre:
        x = x + 30
    objective = objective_of(W, moments_of(x))
    curve = rank_curve(objective)
    # The mean square is a difference of squares of numbers as large as the mean.
    noise = 1e4 * EPS * float(W.abs().max() ** 2 * x.abs().max() ** 2) * inputs**2
    for r in range(min(outputs, inputs) + 1):
        found = factors(curve, r)
        change = torch.einsum("tgn,gmn->tgm", x, W - found.left @ found.right) - found.bias
        wanted = change.square().mean(0).sum(1)
        assert torch.allclose(found.error, wanted, rtol=1e-7, atol=noise)
        assert torch.allclose(objective.error(found.left @ found.right), wanted, atol=noise)
        gram = found.left.mT @ found.left
        assert torch.allclose(gram, torch.eye(r, dtype=torch.float64).expand_as(gram))
    assert bool((curve.errors.diff(dim=1) <= 0).all())
    assert float(curve.errors[:, -1].abs().max()) == 0


@given(SEEDS)
@settings(max_examples=15, deadline=None)
def test_behind_a_change_the_error_is_against_the_original_outputs(seed: int) -> None:
    objective, W, x, xh, d = drifted(seed)
    curve = rank_curve(objective)
    wanted_output = torch.einsum("tgn,gmn->tgm", x, W) + d
    moments = moments_of(xh, x, d)
    for r in range(6):
        found = factors(curve, r)
        new = found.left @ found.right
        output = torch.einsum("tgn,gmn->tgm", xh, new)
        # The bias shift is what the original bias lacks; that of W is part of both outputs.
        wanted = (wanted_output - output - found.bias).square().mean(0).sum(1)
        assert torch.allclose(found.error, wanted, rtol=1e-8)
        assert torch.allclose(objective.error(new), wanted, rtol=1e-8)
        assert torch.allclose(found.bias, (wanted_output - output).mean(0), rtol=1e-8, atol=1e-10)
        share = float(found.error.sum() / objective.variance.sum())
        assert relative_error(W, new, moments) == pytest.approx(share, rel=1e-8)


@given(SEEDS, st.integers(1, 4), st.booleans())
@settings(max_examples=25, deadline=None)
def test_no_gradient_is_left_and_no_other_factors_are_better(
    seed: int, rank: int, behind: bool
) -> None:
    objective = drifted(seed)[0] if behind else layer(seed, groups=1)
    metric = objective.damped()
    found = factors(rank_curve(objective), rank)
    B, A = (f.clone().requires_grad_() for f in (found.left, found.right))

    def loss(B: Tensor, A: Tensor) -> Tensor:
        D = objective.weight - B @ A
        return ((D @ metric) * D).sum()

    loss(B, A).backward()
    largest = max(found.left.abs().max(), found.right.abs().max())
    size = float((objective.weight @ metric).abs().max() * largest)
    for factor in (A, B):
        assert factor.grad is not None
        assert float(factor.grad.abs().max()) <= 1e4 * EPS * size
    least = float(loss(found.left, found.right))
    for step in range(20):
        noise = [0.1 * normal(seed + 50 + step, *f.shape) for f in (B, A)]
        assert float(loss(found.left + noise[0], found.right + noise[1])) >= least


def test_alternating_least_squares_from_anywhere_ends_at_the_curve() -> None:
    objective = layer(11, groups=1, damping=1e-3)
    B, A = normal(1, 1, 5, 2), normal(2, 1, 2, 7)
    for _ in range(400):
        B, used = refit_left(objective, B, A)
        assert used == 0
        A, used = refit_right(objective, B, A)
        assert used == 0
    wanted = factors(rank_curve(objective), 2)
    assert torch.allclose(B @ A, wanted.left @ wanted.right, atol=1e-6)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_refit_of_one_factor_leaves_no_gradient_on_it(side: str) -> None:
    objective, *_ = drifted(21)
    B, A = normal(3, 1, 6, 3), normal(4, 1, 3, 5)
    if side == "left":
        B, _ = refit_left(objective, B, A)
    else:
        A, _ = refit_right(objective, B, A)
    free = (B if side == "left" else A).requires_grad_()
    D = objective.weight - B @ A
    ((D @ objective.damped()) * D).sum().backward()
    assert free.grad is not None
    assert float(free.grad.abs().max()) <= 1e5 * EPS * float(objective.weight.abs().max() ** 2)


def test_factors_of_lower_rank_than_stated_are_refitted_with_damping() -> None:
    objective = layer(8, groups=1)
    B, A = normal(3, 1, 5, 3), normal(4, 1, 3, 7)
    A[:, 2] = 0
    new, used = refit_left(objective, B, A)
    assert used > 0
    assert torch.equal(new[:, :, 2], B[:, :, 2])  # nothing tells about it: it stays
    two, _ = refit_left(objective, B[:, :, :2], A[:, :2])
    assert torch.allclose(new[:, :, :2], two, atol=1e-6)


def grid(step: float) -> RoundFactor:
    def rounded(factor: Tensor, metric: Tensor) -> Tensor:
        assert metric.shape[-1] == factor.shape[-1]
        return (factor / step).round() * step

    return rounded


def test_refits_make_up_for_rounding_and_the_best_pair_is_kept() -> None:
    better = 0
    for seed in range(10):
        objective = layer(seed, groups=1, outputs=12, inputs=16, n_rows=200)
        start = factors(rank_curve(objective), 6)
        coarse, fine = grid(0.2), grid(0.02)
        metric = objective.damped()
        plain = fine(start.left, torch.eye(6)) @ coarse(start.right, metric)
        fit = refit_rounded(objective, start, round_left=fine, round_right=coarse, sweeps=4)
        kept = fit.factors
        assert torch.allclose(kept.left, fine(kept.left, torch.eye(6)))
        assert torch.allclose(kept.right, coarse(kept.right, metric))
        assert fit.losses[fit.step] == min(fit.losses)
        assert torch.equal(kept.error, objective.error(kept.left @ kept.right))
        excess = (e.sum() - start.error.sum() for e in (kept.error, objective.error(plain)))
        ours, unfitted = map(float, excess)
        better += ours < 0.9 * unfitted
    assert better >= 9


def test_without_rounding_the_closed_form_stays() -> None:
    objective = layer(1)
    start = factors(rank_curve(objective), 3)
    same = refit_rounded(
        objective, start, round_left=lambda f, _: f, round_right=lambda f, _: f, sweeps=3
    ).factors
    assert torch.allclose(same.left @ same.right, start.left @ start.right, atol=1e-10)
    assert torch.allclose(same.error, start.error, rtol=1e-9)


def test_weights_of_one_input_share_their_right_factor() -> None:
    parts = [normal(s, 1, 4, 9) for s in range(3)]
    common = normal(9, 1, 5, 9)  # all three read five directions only
    parts = [p[:, :, :5] @ common for p in parts]
    moments = moments_of(rows(0, 100, 1, 9))
    curve = rank_curve(objective_of(torch.cat(parts, 1), moments))
    found = factors(curve, 5)
    for weight, left in zip(parts, found.left.split(4, 1), strict=True):
        assert torch.allclose(left @ found.right, weight, atol=1e-10)
    alone = [float(rank_curve(objective_of(p, moments)).errors[0, 3]) for p in parts]
    assert float(curve.errors[0, 3]) >= sum(alone)  # one right factor for all can't beat three


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_types_devices_and_arguments_that_stay(dtype: torch.dtype, device: str) -> None:
    W, x = normal(0, 2, 4, 6).to(device, dtype), rows(0, 50, 2, 6).to(device, dtype)
    before = W.clone()
    found = factors(rank_curve(objective_of(W, moments_of(x))), 2)
    assert found.left.dtype == torch.float64
    assert found.left.device.type == device
    assert torch.equal(W, before)


@pytest.mark.parametrize("form", ["outputs", "inputs"])
def test_degenerate_layers(form: str) -> None:
    # Zero columns, constant inputs, fewer rows than inputs, and a weight of zero.
    x = rows(4, 3, 1, 6)
    x[:, :, 1], x[:, :, 2] = 0, 7
    W = normal(4, 1, 4, 6)
    W[:, 0], W[:, :, 3] = 0, 0
    curve = rank_curve(objective_of(W, moments_of(x)), form)  # type: ignore[arg-type]
    # Three rows, centred, have rank 2; the damped metric may put up to its ridge's share elsewhere.
    assert float(curve.errors[0, 2]) <= 1e-2 * float(curve.errors[0, 0])
    assert bool((curve.errors >= 0).all())
    nothing = rank_curve(objective_of(torch.zeros(1, 4, 6), moments_of(x)), form)  # type: ignore[arg-type]
    assert not bool(nothing.errors.any())
    assert not bool(factors(nothing, 2, "white").bias.any())
    silent = rank_curve(objective_of(W, moments_of(torch.zeros(5, 1, 6))), form)  # type: ignore[arg-type]
    assert not bool(silent.errors.any())


def test_a_singular_moment_needs_no_damping_in_the_output_form() -> None:
    W, x = normal(1, 1, 4, 9), rows(1, 4, 1, 9)
    objective = objective_of(W, moments_of(x), damping=0.0)
    curve = rank_curve(objective)
    assert curve.damping == 0
    found = factors(curve, 3)  # four rows, centred
    assert float(found.error) <= 1e-12 * float(objective.variance)
    assert rank_curve(objective, "inputs").damping > 0


def test_messages() -> None:
    objective = layer(0)
    curve = rank_curve(objective)
    with pytest.raises(ConfigError, match=r"weight \(2, 5, 7\).*rank 6, wanted 0\.\.5"):
        factors(curve, 6)
    with pytest.raises(ConfigError, match="sweeps must be at least 1, got 0"):
        refit_rounded(
            objective,
            Factors(
                left=normal(0, 2, 5, 1),
                right=normal(0, 2, 1, 7),
                bias=normal(0, 2, 5),
                error=normal(0, 2),
            ),
            round_left=grid(1),
            round_right=grid(1),
            sweeps=0,
        )
    with pytest.raises(ConfigError, match="damping must be >= 0, got -1"):
        layer(0, damping=-1.0)
    with pytest.raises(ShapeError, match=r"new weight \(2, 5, 6\).*wanted \(2, 5, 7\)"):
        objective.error(torch.zeros(2, 5, 6))


def test_a_trained_layer(lenet5: nn.Module, images: dict[str, Tensor]) -> None:
    """On held-out images the whitened factors of LeNet-5's second convolution beat the plain ones."""
    convolutions = [m for m in lenet5.modules() if isinstance(m, nn.Conv2d)]
    conv, seen = convolutions[1], []
    hook = conv.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        lenet5(images["train"][:120])
        lenet5(images["test"][:60])
    hook.remove()
    assert isinstance(conv.padding, tuple)
    x, held_out = (
        unfold(s, conv.kernel_size, conv.stride, conv.padding, conv.dilation, 1) for s in seen
    )
    W = conv.weight.detach().flatten(1).unsqueeze(0)
    curve, held = rank_curve(objective_of(W, moments_of(x))), moments_of(held_out)
    U, S, Vt = torch.linalg.svd(W.double(), full_matrices=False)
    for rank in (4, 10, 20):
        found = factors(curve, rank)
        plain = (U[:, :, :rank] * S[:, None, :rank]) @ Vt[:, :rank]
        ours = relative_error(W, found.left @ found.right, held)
        assert ours < 0.9 * relative_error(W, plain, held)
        share = float(found.error.sum() / curve.objective.variance.sum())
        assert ours == pytest.approx(share, rel=0.25)  # 60 images are few
