"""Chains are what they stand for, their errors the definition, and every step an exact least squares."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from tersor.core.errors import ConfigError, ShapeError
from tersor.ops import split_kernels
from tersor.ops.chains import ChainStep, Geometry, output_chain, split_chain
from tersor.ops.lowrank import factors, rank_curve
from tersor.ops.moments import moments_of, unfold
from tersor.ops.objective import Objective, objective_of
from tersor.ops.split_kernels import (
    SplitProblem,
    fit_split,
    multiplied,
    refit_first,
    split_curve,
    split_problem,
)

EPS = torch.finfo(torch.float64).eps
DAMPING = 1e-3
SPLITS = ["input", "height", "width"]
SEEDS = st.integers(0, 2**32 - 1)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def smooth(seed: int, *shape: int) -> Tensor:
    """Images with correlated neighbours and channels, and a mean."""
    x = functional.avg_pool2d(normal(seed, *shape), 3, 1, 1)
    mixing = normal(seed + 1, shape[1], shape[1]) / shape[1] ** 0.5
    return torch.einsum("bchw,dc->bdhw", x, mixing) + 0.3 * normal(seed, *shape) + 0.5


def convolution(
    seed: int,
    *,
    outputs: int = 6,
    channels: int = 4,
    kernel: tuple[int, int] = (3, 2),
    groups: int = 1,
    behind: bool = False,
) -> tuple[Objective, Tensor, Tensor]:
    """Objective, unfolded weight and rows of a small convolution."""
    W = normal(seed, groups, outputs // groups, channels // groups * kernel[0] * kernel[1])
    rows = unfold(smooth(seed, 6, channels, 7, 6), kernel, (1, 1), (1, 0), (1, 1), groups)
    if not behind:
        return objective_of(W, moments_of(rows), DAMPING), W, rows
    other = rows + 0.3 * normal(seed + 5, *rows.shape)
    return objective_of(W, moments_of(other, rows), DAMPING), W, other


def damped_loss(problem: SplitProblem, first: Tensor, core: Tensor) -> Tensor:
    """By definition, in the order of the objective."""
    D = problem.objective.weight - multiplied(problem, first, core)
    return torch.einsum("gmi,gij,gmj->", D, problem.objective.damped(), D)


def run(steps: tuple[ChainStep, ...], x: Tensor) -> Tensor:
    for step in steps:
        g = step.geometry
        x = functional.conv2d(x, step.weight, None, g.stride, g.padding, g.dilation, step.groups)
    return x


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("rank_out", [None, 2])
def test_a_chain_is_the_convolution_of_its_product(
    split: str, groups: int, rank_out: int | None
) -> None:
    """With unequal strides, paddings and dilations, at the borders too."""
    geometry = Geometry(kernel=(3, 2), stride=(2, 1), padding=(2, 1), dilation=(1, 2))
    objective, _, _ = convolution(1, groups=groups)
    problem = split_problem(objective, (3, 2), split)  # type: ignore[arg-type]
    found = fit_split(split_curve(problem), 2, rank_out)
    core = (
        found.core if found.last is None else torch.einsum("gms,gsrk->gmrk", found.last, found.core)
    )
    weight = multiplied(problem, found.first, core)
    x = normal(3, 2, 4, 9, 8)
    whole = functional.conv2d(x, weight.reshape(6, -1, 3, 2), None, (2, 1), (2, 1), (1, 2), groups)
    steps = split_chain(found, geometry, split)  # type: ignore[arg-type]
    assert len(steps) == (2 if rank_out is None else 3)
    assert torch.allclose(run(steps, x), whole, atol=1e-10)
    if split == "height":
        assert steps[0].weight.shape[2:] == (3, 1)
        assert steps[1].weight.shape[2:] == (1, 2)


@pytest.mark.parametrize("groups", [1, 2])
def test_an_output_chain_is_the_convolution_of_its_product(groups: int) -> None:
    geometry = Geometry(kernel=(3, 2), stride=(2, 1), padding=(2, 1), dilation=(1, 2))
    objective, _, _ = convolution(2, groups=groups)
    found = factors(rank_curve(objective), 2)
    x = normal(3, 2, 4, 9, 8)
    weight = (found.left @ found.right).reshape(6, -1, 3, 2)
    whole = functional.conv2d(x, weight, None, (2, 1), (2, 1), (1, 2), groups)
    assert torch.allclose(run(output_chain(found, geometry), x), whole, atol=1e-10)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("rank_out", [None, 3])
def test_errors_are_the_definition_and_sweeps_never_raise_them(
    split: str, behind: bool, rank_out: int | None
) -> None:
    objective, W, rows = convolution(7, groups=2, outputs=8, behind=behind)
    problem = split_problem(objective, (3, 2), split)  # type: ignore[arg-type]
    curve = split_curve(problem)
    for rank in range(1, curve.first.shape[1] + 1):
        out = None if rank_out is None else min(rank_out, rank)
        found = fit_split(curve, rank, out, sweeps=4)
        core = found.core
        if found.last is not None:
            core = torch.einsum("gms,gsrk->gmrk", found.last, core)
        new = multiplied(problem, found.first, core)
        assert torch.allclose(found.error, objective.error(new), rtol=1e-9, atol=1e-12)
        if not behind:
            change = torch.einsum("tgn,gmn->tgm", rows, W - new) - found.bias
            wanted = change.square().mean(0).sum(1)
            assert torch.allclose(found.error, wanted, rtol=1e-7, atol=1e-10)
        floor = float(objective.floor.sum())
        now = floor + float(damped_loss(problem, found.first, core))
        assert found.losses[-1] == pytest.approx(now, rel=1e-9, abs=1e-12)
        for before, after in pairwise(found.losses):
            assert after <= before * (1 + 1e-9) + 1e-12
        if rank_out is None:
            assert found.losses[0] == pytest.approx(
                float(curve.errors[:, rank].sum()), rel=1e-8, abs=1e-9
            )
    assert bool((curve.errors.diff(dim=1) <= 0).all())
    full = (curve.errors[:, -1] - objective.floor).max()
    assert float(full) <= 1e-9 * float(objective.variance.max())


@given(SEEDS, st.sampled_from(SPLITS), st.sampled_from([None, 2]), st.booleans())
@settings(max_examples=12, deadline=None)
def test_no_factor_has_a_gradient_left_after_its_refit(
    seed: int, split: str, rank_out: int | None, behind: bool
) -> None:
    objective, _, _ = convolution(seed, behind=behind)
    problem = split_problem(objective, (3, 2), split)  # type: ignore[arg-type]
    found = fit_split(split_curve(problem), 2, rank_out, sweeps=1)
    last = torch.eye(6, dtype=torch.float64)[None] if found.last is None else found.last

    def gradients(first: Tensor, core: Tensor, last: Tensor) -> list[Tensor]:
        free = [f.detach().clone().requires_grad_() for f in (first, core, last)]
        joined = torch.einsum("gms,gsrk->gmrk", free[2], free[1])
        damped_loss(problem, free[0], joined).backward()
        return [f.grad for f in free if f.grad is not None]

    size = float(
        damped_loss(problem, 0 * found.first, torch.einsum("gms,gsrk->gmrk", last, found.core))
    )
    _, of_core, of_last = gradients(found.first, found.core, last)
    assert float(of_core.abs().max()) <= 1e-9 * size
    if rank_out is not None:
        assert float(of_last.abs().max()) <= 1e-9 * size
    joined = torch.einsum("gms,gsrk->gmrk", last, found.core)
    first, _ = refit_first(problem, found.first, joined)
    of_first, _, _ = gradients(first, found.core, last)
    assert float(of_first.abs().max()) <= 1e-8 * size


def test_tucker_with_a_fixed_first_factor_is_reduced_rank_regression() -> None:
    """Against many steps of gradient descent on core and last together, from several starts."""
    objective, _, _ = convolution(4)
    problem = split_problem(objective, (3, 2), "input")
    curve = split_curve(problem)
    best = fit_split(curve, 2, 2, sweeps=0).losses[0]
    found = [descended(problem, curve.first[:, :2], seed) for seed in range(2)]
    assert min(found) >= best * (1 - 1e-9)
    assert min(found) == pytest.approx(best, rel=1e-3)


def descended(problem: SplitProblem, first: Tensor, seed: int) -> float:
    """Loss after L-BFGS on core and last factor, ranks 2 and 2."""
    core = normal(seed, 1, 2, 2, 6).requires_grad_()
    last = normal(seed + 9, 1, 6, 2).requires_grad_()
    optimizer = torch.optim.LBFGS([core, last], max_iter=120, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = damped_loss(problem, first, torch.einsum("gms,gsrk->gmrk", last, core))
        loss.backward()
        return loss

    optimizer.step(closure)
    return float(closure().detach())


def test_lots_of_rows_reach_what_one_system_does(monkeypatch: pytest.MonkeyPatch) -> None:
    objective, _, _ = convolution(5, outputs=8)
    problem = split_problem(objective, (3, 2), "height")
    curve = split_curve(problem)
    start = curve.first[:, :3]
    core = fit_split(curve, 3, sweeps=0).core
    whole, _ = refit_first(problem, start, core)
    monkeypatch.setattr(split_kernels, "SYSTEM_SIZE", 13)  # a row at a time
    rows, losses = start, [float(damped_loss(problem, start, core))]
    for _ in range(100):
        rows, _ = refit_first(problem, rows, core)
        losses.append(float(damped_loss(problem, rows, core)))
    for before, after in pairwise(losses):
        assert after <= before * (1 + 1e-12)
    assert torch.allclose(rows, whole, atol=1e-3)


def test_a_separable_kernel_is_found_exactly() -> None:
    vertical, horizontal = normal(0, 2, 4, 3), normal(1, 6, 2, 2)  # [r, c, kh], [m, r, kw]
    W = torch.einsum("rci,mrj->mcij", vertical, horizontal).reshape(1, 6, -1)
    rows = unfold(smooth(0, 6, 4, 7, 6), (3, 2), (1, 1), (1, 0), (1, 1), 1)
    objective = objective_of(W, moments_of(rows))
    for split, rank in (("height", 2), ("input", 4)):
        found = fit_split(split_curve(split_problem(objective, (3, 2), split)), rank)  # type: ignore[arg-type]
        assert float(found.error.sum()) <= 1e-12 * float(objective.variance)


def test_sweeps_gain_over_the_start() -> None:
    gains = []
    for seed in range(6):
        objective, _, _ = convolution(seed, outputs=12, channels=8, kernel=(3, 3))
        for split in SPLITS:
            curve = split_curve(split_problem(objective, (3, 3), split))  # type: ignore[arg-type]
            losses = fit_split(curve, 3, sweeps=3).losses
            gains.append(losses[-1] / losses[0])
    assert max(gains) <= 1
    assert sum(gains) / len(gains) < 0.97


@pytest.mark.parametrize("split", SPLITS)
def test_degenerate_convolutions(split: str) -> None:
    # A dead channel, a constant one, a channel without weight, fewer rows than inputs; one output.
    x = smooth(2, 1, 4, 5, 4)
    x[:, 0], x[:, 1] = 0, 3
    rows = unfold(x, (3, 2), (2, 2), (0, 0), (1, 1), 1)
    for outputs in (5, 1):
        W = normal(2, 1, outputs, 24)
        W[:, :, 12:18] = 0
        objective = objective_of(W, moments_of(rows))
        curve = split_curve(split_problem(objective, (3, 2), split))  # type: ignore[arg-type]
        found = fit_split(curve, 1, 1)
        assert bool(found.error.isfinite().all())
        assert bool(found.bias.isfinite().all())
        assert float(found.error.sum()) <= float(objective.variance.sum())
        for before, after in pairwise(found.losses):
            assert after <= before * (1 + 1e-6) + 1e-12
    nothing = objective_of(torch.zeros(1, 3, 24), moments_of(rows))
    curve = split_curve(split_problem(nothing, (3, 2), split))  # type: ignore[arg-type]
    assert float(fit_split(curve, 1).error.sum()) == 0


def test_one_dimensional_convolutions() -> None:
    W, rows = normal(0, 1, 5, 12), unfold(normal(1, 4, 4, 20), (3,), (2,), (1,), (1,), 1)
    objective = objective_of(W, moments_of(rows))
    found = fit_split(split_curve(split_problem(objective, (3,), "input")), 2, 2)
    geometry = Geometry(kernel=(3,), stride=(2,), padding=(1,), dilation=(1,))
    steps = split_chain(found, geometry, "input")
    assert [tuple(s.weight.shape) for s in steps] == [(2, 4, 1), (2, 2, 3), (5, 2, 1)]


def test_messages() -> None:
    objective, _, _ = convolution(0)
    problem = split_problem(objective, (3, 2), "height")
    curve = split_curve(problem)
    with pytest.raises(ConfigError, match=r"split 'height'.*rank 13, wanted 0\.\.12"):
        fit_split(curve, 13)
    with pytest.raises(ConfigError, match="rank 0, wanted at least one channel"):
        fit_split(curve, 0)
    with pytest.raises(ConfigError, match=r"outputs of split 'height'.*rank 7, wanted 0\.\.6"):
        fit_split(curve, 5, 7)
    with pytest.raises(ConfigError, match="sweeps must be >= 0, got -1"):
        fit_split(curve, 2, sweeps=-1)
    with pytest.raises(ConfigError, match="found 1 spatial dimensions, wanted 2"):
        split_problem(objective, (3,), "width")
    with pytest.raises(ShapeError, match="24 inputs are no multiple of the 25 elements"):
        split_problem(objective, (5, 5), "input")
    geometry = Geometry(kernel=(5, 5), stride=(1, 1), padding=(0, 0), dilation=(1, 1))
    with pytest.raises(ShapeError, match=r"wanted the \(1, 5\) offsets"):
        split_chain(
            fit_split(
                split_curve(split_problem(convolution(0, kernel=(5, 1))[0], (5, 1), "height")), 1
            ),
            geometry,
            "height",
        )
    with pytest.raises(ShapeError, match="no multiple of the 25 elements"):
        output_chain(factors(rank_curve(objective), 2), geometry)
    with pytest.raises(ConfigError, match="one number a spatial dimension"):
        Geometry(kernel=(3, 3), stride=(1,), padding=(0, 0), dilation=(1, 1))


def test_a_trained_residual_network(resnet20: nn.Module, images: dict[str, Tensor]) -> None:
    """Each form, fitted on few images, runs in place of a convolution on others with the error it says."""
    conv = [m for m in resnet20.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)][
        9
    ]
    seen: list[Tensor] = []
    hook = conv.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        resnet20(images["train"][:80])
        resnet20(images["test"][:80])
    hook.remove()
    x, held_out = (s.double() for s in seen)
    assert isinstance(conv.padding, tuple)
    geometry = Geometry(
        kernel=(3, 3), stride=conv.stride, padding=conv.padding, dilation=conv.dilation
    )
    rows = unfold(x, (3, 3), conv.stride, conv.padding, conv.dilation, 1)
    W = conv.weight.detach().double()
    objective = objective_of(W.flatten(1).unsqueeze(0), moments_of(rows))

    def lost(steps: tuple[ChainStep, ...], bias: Tensor, images: Tensor) -> float:
        exact = functional.conv2d(images, W, None, conv.stride, conv.padding)
        change = exact - run(steps, images) - bias.reshape(1, -1, 1, 1)
        variance = exact.var((0, 2, 3), correction=0).sum()
        return float(change.square().mean((0, 2, 3)).sum() / variance)

    rank = W.shape[1] // 2
    for split in SPLITS:
        problem = split_problem(objective, (3, 3), split)  # type: ignore[arg-type]
        found = fit_split(split_curve(problem), rank, sweeps=2)
        steps = split_chain(found, geometry, split)  # type: ignore[arg-type]
        share = float(found.error.sum() / objective.variance.sum())
        assert lost(steps, found.bias[0], x) == pytest.approx(share, rel=1e-6)
        unfolded = problem.weight[0].permute(0, 2, 1).flatten(0, 1)  # [(m k), u]
        _, _, Vt = torch.linalg.svd(unfolded, full_matrices=False)
        cut = (unfolded @ Vt[:rank].T @ Vt[:rank]).reshape(len(W), -1, Vt.shape[1]).permute(0, 2, 1)
        D = problem.weight - cut
        unaware = torch.einsum("gmuk,gukvl,gmvl->", D, problem.H, D) / objective.variance
        assert lost(steps, found.bias[0], held_out) < 0.8 * float(unaware)
