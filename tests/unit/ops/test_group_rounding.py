"""Grouped rounding: feedback by the definition, descent that never goes up, codes of real layers."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tersor.core.errors import ConfigError, NumericalError, ShapeError
from tersor.ops import group_descent
from tersor.ops.group_descent import descend_groups
from tersor.ops.group_grids import GroupGrid, Steps, dequantize, fit_steps, nearest_codes
from tersor.ops.group_rounding import (
    Feedback,
    RoundingConfig,
    check_keep,
    check_metric,
    round_weight,
)
from tersor.ops.moments import centred, moments_of, unfold
from tests.data.zoo import load_lenet5, load_resnet20

EPS = torch.finfo(torch.float64).eps
SEEDS = st.integers(0, 2**32 - 1)
GRIDS = st.builds(
    GroupGrid,
    bits=st.sampled_from([2, 3, 4, 8]),
    group=st.sampled_from([None, 3, 4]),
    symmetric=st.booleans(),
)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def problem(
    seed: int, groups: int = 2, outputs: int = 3, inputs: int = 10, n_rows: int = 40
) -> tuple[Tensor, Tensor]:
    """Weight and the second moment of correlated inputs of unequal size."""
    mixing = normal(seed + 1, groups, inputs, inputs) / inputs**0.5 + torch.eye(inputs)
    x = normal(seed + 2, groups, n_rows, inputs) @ mixing * (0.5 + torch.arange(inputs) / inputs)
    return normal(seed, groups, outputs, inputs), x.mT @ x / n_rows


def row_losses(weight: Tensor, new: Tensor, H: Tensor) -> Tensor:
    D = weight.double() - new
    return torch.einsum("gmj,gjk,gmk->gm", D, H.double(), D)


def noise(weight: Tensor, steps: Steps, H: Tensor) -> float:
    """Rounding of a quadratic form of this size."""
    size = (weight.abs().max() + 256 * steps.step.abs().max()) ** 2 * H.abs().max()
    return 10 * H.shape[1] ** 2 * EPS * float(size)


def brain_quantization(
    row: Tensor, steps: tuple[Tensor, Tensor], grid: GroupGrid, H: Tensor, keep: Tensor
) -> list[int]:
    """OBQ of one row from the most active input on, by downdates of the inverse."""
    w, inverse, width = row.clone(), torch.linalg.inv(H), grid.width(len(row))
    order = sorted(range(len(row)), key=lambda j: -float(H[j, j]))
    codes = [0] * len(row)
    for position, j in enumerate(order):
        step, zero = float(steps[0][j // width]), int(steps[1][j // width])
        code = min(max(round(float(w[j]) / step) + zero, grid.low), grid.high)
        codes[j] = code if bool(keep[j]) else zero
        change = w[j] - (codes[j] - zero) * step
        for k in order[position + 1 :]:
            w[k] -= change / inverse[j, j] * inverse[j, k]
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return codes


@given(SEEDS, GRIDS, st.booleans())
@settings(max_examples=15, deadline=None)
def test_feedback_is_optimal_brain_quantization(seed: int, grid: GroupGrid, masked: bool) -> None:
    weight, H = problem(seed)
    keep = normal(seed + 5, 2, 3, 10) > -0.5 if masked else torch.ones(2, 3, 10, dtype=torch.bool)
    steps = fit_steps(weight, grid)
    feedback = Feedback.of(weight, H, RoundingConfig())
    codes, lost = feedback.round(weight, steps, grid, keep if masked else None)
    eye = torch.eye(10, dtype=torch.float64)
    damped = H + 0.01 * H.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] * eye
    for g in range(2):
        for i in range(3):
            of_row = steps.step[g, i], steps.zero[g, i]
            wanted = brain_quantization(weight[g, i], of_row, grid, damped[g], keep[g, i])
            assert codes[g, i].tolist() == wanted
    new = dequantize(codes, steps, grid)
    assert not new[~keep].any()
    torch.testing.assert_close(lost, row_losses(weight, new, damped), rtol=1e-8, atol=1e-12)


@given(SEEDS, GRIDS, st.sampled_from([2, 40]), st.booleans(), st.sampled_from([2, 3, 128]))
@settings(max_examples=30, deadline=None)
def test_no_sweep_raises_the_loss(
    seed: int, grid: GroupGrid, n_rows: int, masked: bool, block: int
) -> None:
    weight, H = problem(seed, n_rows=n_rows)
    keep = normal(seed + 5, 2, 3, 10) > -0.5 if masked else None
    steps = fit_steps(weight, grid)
    codes = nearest_codes(weight, steps, grid)
    if keep is not None:
        zero = steps.zero.repeat_interleave(grid.width(10), 2)[..., :10]
        codes = torch.where(keep, codes, zero)
    rounding = noise(weight, steps, H)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(group_descent, "BLOCK", block)
        patch.setattr(group_descent, "PIECE", 2)
        before = row_losses(weight, dequantize(codes, steps, grid), H)
        for _ in range(3):
            done = descend_groups(weight, codes, steps, grid, H, sweeps=1, keep=keep)
            codes, steps = done.codes, done.steps
            new = dequantize(codes, steps, grid)
            after = row_losses(weight, new, H)
            assert bool((after <= before + rounding).all())
            assert bool(((done.loss - after.sum(1)).abs() <= 10 * rounding).all())
            assert grid.low <= int(codes.amin()) <= int(codes.amax()) <= grid.high
            assert torch.equal(steps.step, steps.step.half().double())
            if keep is not None:
                assert not new[~keep].any()
            before = after


@pytest.mark.parametrize(
    "grid", [GroupGrid(bits=3, group=g, symmetric=s) for g in (None, 4) for s in (True, False)]
)
@pytest.mark.parametrize("block", [3, 4, 128])
def test_descent_ends_where_no_single_change_helps(
    monkeypatch: pytest.MonkeyPatch, grid: GroupGrid, block: int
) -> None:
    monkeypatch.setattr(group_descent, "BLOCK", block)
    weight, H = problem(21)
    begin = Steps(
        step=torch.full((2, 3, grid.n_steps(10)), 0.5, dtype=torch.float64),
        zero=torch.zeros(2, 3, grid.n_steps(10), dtype=torch.int8),
    )
    codes = torch.zeros(2, 3, 10, dtype=torch.int8)
    done = descend_groups(weight, codes, begin, grid, H, sweeps=300)
    least = row_losses(weight, dequantize(done.codes, done.steps, grid), H)
    slack = least * (1 - 1e-9)
    for j in range(10):
        for code in range(grid.low, grid.high + 1):
            other = done.codes.clone()
            other[..., j] = code
            assert bool((row_losses(weight, dequantize(other, done.steps, grid), H) >= slack).all())
    for group in range(grid.n_steps(10)):
        # A float16 step has neighbours about 1 / 1024 away; further ones must not be better.
        for factor in (0.9, 0.995, 1.005, 1.1):
            step = done.steps.step.clone()
            step[..., group] *= factor
            other = Steps(step=step, zero=done.steps.zero)
            assert bool((row_losses(weight, dequantize(done.codes, other, grid), H) >= slack).all())
        for shift in (-1, 1):
            zero = done.steps.zero.clone()
            zero[..., group] = (zero[..., group] + shift).clamp(grid.low, grid.high)
            if grid.symmetric:
                continue
            other = Steps(step=done.steps.step, zero=zero)
            assert bool((row_losses(weight, dequantize(done.codes, other, grid), H) >= slack).all())
    assert bool((least < row_losses(weight, torch.zeros_like(weight), H)).all())


def sweep_by_hand(
    row: Tensor, codes: list[float], steps: list[float], zeros: list[float], width: int, H: Tensor
) -> None:
    """Codes of a group in order, then its step, then its zero point; 4-bit codes, float32 steps."""
    place = torch.arange(len(row)) // width

    def slope() -> tuple[Tensor, Tensor]:
        v = torch.tensor(codes, dtype=torch.float64) - torch.tensor(zeros).double()[place]
        return v, (row - v * torch.tensor(steps, dtype=torch.float64)[place]) @ H

    for group in range(len(steps)):
        members = (place == group).nonzero().flatten()
        for j in members.tolist():
            wish = float(slope()[1][j] / (H[j, j] * steps[group]))
            if abs(wish) > 0.5:
                codes[j] = min(max(round(codes[j] + wish), -8), 7)
        v, gradient = (value[members] for value in slope())
        curvature = float(v @ H[members][:, members] @ v)
        ratio = 1 + float(v @ gradient) / curvature / steps[group]
        ratio = min(max(ratio, 0.5), 2.0) if ratio > 0 else 1.0
        steps[group] = float(torch.tensor(steps[group] * ratio).float())
        _, gradient = slope()
        ones = float(H[members][:, members].sum())
        wish = -float(gradient[members].sum()) / (ones * steps[group])
        if abs(wish) > 0.5:
            zeros[group] = min(max(round(zeros[group] + wish), -8), 7)


@pytest.mark.parametrize("group", [None, 3, 4])
@pytest.mark.parametrize("block", [3, 8, 128])
def test_a_sweep_is_the_definition(
    monkeypatch: pytest.MonkeyPatch, group: int | None, block: int
) -> None:
    monkeypatch.setattr(group_descent, "BLOCK", block)
    monkeypatch.setattr(group_descent, "PIECE", 2)
    grid = GroupGrid(bits=4, group=group, symmetric=False, step_type="float32")
    moved = 0
    for seed in range(6):
        weight, _ = problem(seed)
        H = problem(seed)[1]
        ones = H.sum(2, keepdim=True)
        H = H - 0.99 * ones @ ones.mT / ones.sum(1, keepdim=True)  # sums of inputs hardly vary
        begin = fit_steps(weight, grid)
        begin = Steps(step=begin.step, zero=(begin.zero + 1).clamp(-8, 7))
        start = nearest_codes(weight, begin, grid)
        start = (start - 3).clamp(-8, 7)
        done = descend_groups(weight, start, begin, grid, H, sweeps=1)
        for g, i in itertools.product(range(2), range(3)):
            codes, zeros = start[g, i].double().tolist(), begin.zero[g, i].double().tolist()
            steps = begin.step[g, i].tolist()
            sweep_by_hand(weight[g, i], codes, steps, zeros, grid.width(10), H[g])
            assert done.codes[g, i].tolist() == codes
            assert done.steps.zero[g, i].tolist() == zeros
            assert done.steps.step[g, i].tolist() == pytest.approx(steps, rel=1e-6)
            moved += zeros != begin.zero[g, i].double().tolist()
    assert moved  # or zero points were not put to the test


@pytest.mark.parametrize("block", [1, 128])
@pytest.mark.parametrize("group", [None, 2])
def test_zero_points_move_all_codes_where_no_single_one_can(
    monkeypatch: pytest.MonkeyPatch, block: int, group: int | None
) -> None:
    monkeypatch.setattr(group_descent, "BLOCK", block)
    H = torch.tensor([[[1.0, -0.9], [-0.9, 1.0]]])
    grid = GroupGrid(bits=4, group=group, symmetric=False)
    begin = Steps(step=torch.ones(1, 1, 1).double(), zero=torch.zeros(1, 1, 1, dtype=torch.int8))
    codes = torch.tensor([[[2, -2]]], dtype=torch.int8)
    done = descend_groups(torch.tensor([[[6.0, 2.0]]]), codes, begin, grid, H, sweeps=1)
    assert torch.equal(done.codes, codes)
    assert int(done.steps.zero) == -4
    assert float(done.loss) < 1e-12


def test_close_to_the_best_of_all_codes() -> None:
    """Two bits, five inputs: all 4^5 codes with the steps found."""
    grid, ratios = GroupGrid(bits=2, step_type="float32"), []
    for seed in range(20):
        weight, H = problem(seed, groups=1, outputs=1, inputs=5)
        found = round_weight(weight, H, grid)
        every = torch.tensor(list(itertools.product(range(-2, 2), repeat=5)), dtype=torch.float64)
        D = weight[0] - every * found.steps.step[0, 0, 0]
        best = float(torch.einsum("cj,jk,ck->c", D, H[0], D).min())
        assert float(found.loss) >= best * (1 - 1e-9)
        ratios.append(float(found.loss) / best)
    assert sum(ratios) / 20 < 1.05
    assert sum(r < 1 + 1e-9 for r in ratios) >= 15


@given(SEEDS)
@settings(max_examples=15, deadline=None)
def test_losses_fall_along_the_way_and_are_the_definition(seed: int) -> None:
    weight, H = problem(seed, n_rows=4)  # fewer rows than inputs
    grid = GroupGrid(bits=3, group=4, symmetric=False)
    found = round_weight(weight, H, grid)
    rounding = noise(weight, found.steps, H)
    assert all(b <= a + rounding for a, b in itertools.pairwise(found.losses))
    wanted = row_losses(weight, dequantize(found.codes, found.steps, grid), H).sum(1)
    assert bool(((found.loss - wanted).abs() <= 10 * rounding).all())


def test_losses_fall_with_bits_and_with_smaller_groups() -> None:
    weight, H = problem(7, groups=1, outputs=32, inputs=64, n_rows=500)
    loss = {
        (bits, group): float(round_weight(weight, H, GroupGrid(bits=bits, group=group)).loss)
        for bits in (2, 3, 4, 8)
        for group in (None, 16)
    }
    for group in (None, 16):
        assert loss[2, group] > 2 * loss[3, group] > 4 * loss[4, group] > 100 * loss[8, group]
    assert all(loss[bits, 16] < loss[bits, None] for bits in (2, 3, 4))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [None, 4])
def test_dead_inputs_zero_rows_and_constant_rows(symmetric: bool, group: int | None) -> None:
    weight, H = problem(5)
    dead = [2, 7]
    H[:, dead] = 0
    H[:, :, dead] = 0
    weight[:, 0] = 0
    weight[:, 1] = 0.25
    grid = GroupGrid(bits=3, group=group, symmetric=symmetric)
    found = round_weight(weight, H, grid)
    new = dequantize(found.codes, found.steps, grid)
    assert not new[:, 0].any()
    torch.testing.assert_close(new[:, 1], weight[:, 1], rtol=2**-10, atol=0)
    # What dead inputs weigh is no matter to the others.
    other = weight.clone()
    other[..., dead] *= -1
    alive, feedback = (
        [j for j in range(10) if j not in dead],
        Feedback.of(weight, H, RoundingConfig()),
    )
    first, second = (feedback.round(w, found.steps, grid)[0] for w in (weight, other))
    assert torch.equal(first[..., alive], second[..., alive])
    assert torch.equal(second[..., dead], nearest_codes(other, found.steps, grid)[..., dead])


def test_no_activity_and_one_channel() -> None:
    weight = normal(1, 1, 4, 6)
    grid = GroupGrid(bits=4, group=3)
    found = round_weight(weight, torch.zeros(1, 6, 6), grid)
    assert found.loss.tolist() == [0.0]
    single = round_weight(torch.tensor([[[-0.7]]]), torch.ones(1, 1, 1), grid)
    assert float(dequantize(single.codes, single.steps, grid)) == pytest.approx(-0.7, rel=2**-10)
    zeros = round_weight(torch.zeros(1, 2, 6), torch.eye(6).unsqueeze(0), grid)
    assert not dequantize(zeros.codes, zeros.steps, grid).any()


@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("group", [None, 4])
def test_descent_leaves_what_it_was_given(outputs: int, group: int | None) -> None:
    weight, H = problem(2, outputs=outputs)
    grid = GroupGrid(bits=3, group=group, symmetric=False)
    steps = fit_steps(weight, grid)
    codes = nearest_codes(weight, steps, grid)
    given = weight, H, codes, steps.step, steps.zero
    before = [value.clone() for value in given]
    done = descend_groups(weight, codes, steps, grid, H, sweeps=2)
    assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))
    assert not torch.equal(done.steps.step, steps.step)


def test_inputs_stay_untouched_and_maps_do_not_meet() -> None:
    weight, H = problem(11)
    before = weight.clone(), H.clone()
    grid = GroupGrid(bits=3, group=4, symmetric=False)
    together = round_weight(weight, H, grid)
    assert torch.equal(weight, before[0])
    assert torch.equal(H, before[1])
    alone = round_weight(weight[1:], H[1:], grid)
    assert torch.equal(alone.codes[0], together.codes[1])


def gptq(weight: Tensor, H: Tensor, grid: GroupGrid) -> Tensor:
    """GPTQ as published: steps from the largest weight, one pass of feedback."""
    step = fit_steps(weight, grid, fractions=(1.0,)).step
    inputs = weight.shape[2]
    width = grid.width(inputs)
    largest = torch.stack([part.abs().amax(2) for part in weight.double().split(width, 2)], 2)
    steps = Steps(
        step=2 * largest / (2**grid.bits - 1), zero=torch.zeros(step.shape, dtype=torch.int8)
    )
    codes, _ = Feedback.of(weight, H, RoundingConfig()).round(weight, steps, grid)
    return dequantize(codes, steps, grid)


@pytest.fixture(scope="module")
def real_layers(images: dict[str, Tensor]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Weight [1, m, n], covariance of its input, and that on other images."""
    resnet, lenet = load_resnet20(), load_lenet5()
    convolutions = [m for m in resnet.modules() if isinstance(m, nn.Conv2d)]
    linear = next(m for m in lenet.modules() if isinstance(m, nn.Linear))
    layers = []
    for model, layer, few in ((resnet, convolutions[10], 60), (lenet, linear, None)):
        rows = [rows_of(model, layer, images[part][:few]) for part in ("train", "test")]
        H, unseen = (centred(moments_of(x))[0] for x in rows)
        weight = layer.weight.detach().flatten(1)[:120]
        layers.append((weight.unsqueeze(0), H, unseen))
    return layers


def rows_of(model: nn.Module, layer: nn.Conv2d | nn.Linear, x: Tensor) -> Tensor:
    seen: list[Tensor] = []
    handle = layer.register_forward_hook(lambda _m, args, _out: seen.append(args[0].detach()))
    with torch.no_grad():
        model(x)
    handle.remove()
    if isinstance(layer, nn.Linear):
        return seen[0].unsqueeze(1)
    return unfold(seen[0], (3, 3), (1, 1), (1, 1), (1, 1), 1)[::5]


@pytest.mark.parametrize(("bits", "group"), [(2, None), (3, None), (3, 64), (4, 64)])
def test_real_convolution_and_linear_layer(
    real_layers: list[tuple[Tensor, Tensor, Tensor]], bits: int, group: int | None
) -> None:
    """Less error than GPTQ on images that H has not seen; at 3 bits by the quarter that issue 5 asks for."""
    grid = GroupGrid(bits=bits, group=group)
    for weight, H, unseen in real_layers:
        found = round_weight(weight, H, grid)
        ours = row_losses(weight, dequantize(found.codes, found.steps, grid), unseen).sum()
        peer = row_losses(weight, gptq(weight, H, grid), unseen).sum()
        assert float(ours) < (0.75 if bits == 3 else 0.9) * float(peer)


def test_large_layers_get_less() -> None:
    assert RoundingConfig.for_layer(2048, 2048) == RoundingConfig()
    large = RoundingConfig.for_layer(4096, 4096)
    assert (large.stretches, large.sweeps) == ((1.0,), 2)


def test_wrong_arguments_are_refused() -> None:
    weight, H = problem(0)
    with pytest.raises(ShapeError, match=r"second moment \(2, 9, 9\) differ, wanted \(2, 10, 10\)"):
        check_metric(weight, H[:, :9, :9])
    with pytest.raises(ShapeError, match=r"mask \(2, 3, 9\) and weight"):
        check_keep(weight, torch.ones(2, 3, 9, dtype=torch.bool))
    with pytest.raises(ConfigError, match=r"damping must be >= 0, got -1"):
        round_weight(weight, H, GroupGrid(), RoundingConfig(damping=-1.0))
    with pytest.raises(ConfigError, match=r"stretches \(\): wanted one or more"):
        RoundingConfig(stretches=())
    with pytest.raises(ConfigError, match=r"sweeps must be >= 0, got -1"):
        RoundingConfig(sweeps=-1)
    broken = weight.clone()
    broken[1, 0, 0] = float("nan")
    with pytest.raises(NumericalError, match=r"found nan at group 1, output 0, input 0"):
        round_weight(broken, H, GroupGrid())
    with pytest.raises(NumericalError, match=r"group 0: found NaN or infinity"):
        round_weight(weight, H * float("nan"), GroupGrid())
