"""Feedback is optimal brain quantization step by step; descent never goes up and ends where nothing helps."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tersor.core.errors import ConfigError, NumericalError
from tersor.ops.feedback import descend, round_with_feedback
from tersor.ops.grids import round_nearest, weight_steps

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


def problem(
    seed: int,
    *,
    groups: int = 2,
    outputs: int = 3,
    inputs: int = 10,
    n_rows: int = 40,
    limit: int = 3,
) -> tuple[Tensor, Tensor, Tensor]:
    """Weight, steps and the second moment of correlated inputs of unequal size."""
    mixing = normal(seed + 1, groups, inputs, inputs) / inputs**0.5 + torch.eye(inputs)
    x = normal(seed + 2, groups, n_rows, inputs) @ mixing * (0.5 + torch.arange(inputs) / inputs)
    weight = normal(seed, groups, outputs, inputs)
    return weight, weight_steps(weight, limit), x.mT @ x / n_rows


def row_losses(weight: Tensor, codes: Tensor, step: Tensor, H: Tensor) -> Tensor:
    """d H d^T of each row d of D."""
    D = weight.to(torch.float64) - codes.to(torch.float64) * step.unsqueeze(2)
    return torch.einsum("gmj,gjk,gmk->gm", D, H, D)


def clamp_round(value: float, limit: int) -> int:
    return min(max(round(value), -limit), limit)


def brain_quantization(
    row: Tensor, step: float, H: Tensor, limit: int, order: list[int]
) -> tuple[list[int], float]:
    """OBQ of one row in a fixed order, by downdates of the inverse; also the sum of its errors."""
    w, inverse, loss = row.clone(), torch.linalg.inv(H), 0.0
    codes = [0] * len(order)
    for position, j in enumerate(order):
        codes[j] = clamp_round(float(w[j]) / step, limit)
        change = w[j] - codes[j] * step
        loss += float(change**2 / inverse[j, j])
        for k in order[position + 1 :]:
            w[k] -= change / inverse[j, j] * inverse[j, k]
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return codes, loss


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("block", [1, 4, 128])
@pytest.mark.parametrize("limit", [1, 7, 127])
def test_codes_are_those_of_optimal_brain_quantization(
    act_order: bool, block: int, limit: int
) -> None:
    weight, step, H = problem(limit, outputs=12, limit=limit)
    damping, n = 0.01, H.shape[1]
    result = round_with_feedback(
        weight, step, H, limit=limit, damping=damping, act_order=act_order, block=block
    )
    assert result.damping == damping
    assert result.codes.dtype == torch.int8
    for g in range(2):
        damped = H[g] + damping * H[g].diagonal().mean() * torch.eye(n, dtype=torch.float64)
        order = sorted(range(n), key=lambda j: -float(H[g, j, j])) if act_order else list(range(n))
        for i in range(12):
            wanted, _ = brain_quantization(weight[g, i], float(step[g, i]), damped, limit, order)
            assert result.codes[g, i].tolist() == wanted


@given(SEEDS)
@settings(max_examples=25)
def test_the_sum_of_errors_is_the_damped_loss(seed: int) -> None:
    weight, step, H = problem(seed, groups=1, outputs=1, inputs=6)
    result = round_with_feedback(weight, step, H, limit=127)
    damped = H + result.damping * H[0].diagonal().mean() * torch.eye(6, dtype=torch.float64)
    order = H[0].diagonal().argsort(descending=True).tolist()
    _, wanted = brain_quantization(weight[0, 0], float(step), damped[0], 127, order)
    # Downdates lose the condition of the damped matrix, a few roundings in each of six steps.
    rounding = 10 * 6 * 6 * EPS * float(torch.linalg.cond(damped))
    assert float(row_losses(weight, result.codes, step, damped)) == pytest.approx(
        wanted, rel=rounding
    )


@given(SEEDS, st.sampled_from([1, 3, 127]), st.sampled_from([2, 40]), st.booleans())
@settings(max_examples=40)
def test_loss_is_the_definition_and_codes_stay_on_the_grid(
    seed: int, limit: int, n_rows: int, act_order: bool
) -> None:
    weight, step, H = problem(seed, n_rows=n_rows, limit=limit)  # two rows: singular
    result = round_with_feedback(weight, step, H, limit=limit, act_order=act_order)
    assert int(result.codes.to(torch.int16).abs().max()) <= limit
    wanted = row_losses(weight, result.codes, step, H).sum(1)
    size = (weight.abs().max() + step.max()) ** 2 * H.abs().max()
    rounding = 10 * weight[0].numel() * H.shape[1] * EPS * float(size)
    assert bool(((result.loss - wanted).abs() <= rounding).all())


def test_feedback_beats_rounding_to_nearest() -> None:
    better, total, nearest = 0, 0.0, 0.0
    for seed in range(20):
        weight, step, H = problem(100 * seed)
        loss = float(round_with_feedback(weight, step, H, limit=3).loss.sum())
        simple = float(row_losses(weight, round_nearest(weight, step, 3), step, H).sum())
        better, total, nearest = better + (loss < simple), total + loss, nearest + simple
    assert better >= 18
    assert total < 0.75 * nearest  # more than the rounding of a few rows could explain


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_uncoupled_inputs_are_rounded_to_nearest(dtype: torch.dtype, device: str) -> None:
    weight, step, _ = (value.to(device, dtype) for value in problem(0))
    H = torch.diag_embed(torch.linspace(1, 3, 10).expand(2, 10)).to(device, dtype)
    before = weight.clone(), H.clone()
    result = round_with_feedback(weight, step, H, limit=3)
    assert torch.equal(result.codes, round_nearest(weight, step, 3))
    assert result.codes.is_contiguous()
    assert torch.equal(weight, before[0])
    assert torch.equal(H, before[1])
    assert torch.equal(descend(weight, result.codes, step, H, 3, 2), result.codes)


def test_most_active_input_goes_first_whatever_its_place() -> None:
    weight, step, H = problem(3)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(0))
    codes = round_with_feedback(weight, step, H, limit=3).codes
    moved = round_with_feedback(weight[..., order], step, H[:, order][:, :, order], limit=3).codes
    assert torch.equal(moved, codes[..., order])


@pytest.mark.parametrize("act_order", [False, True])
def test_dead_inputs_are_rounded_to_nearest_and_disturb_nobody(act_order: bool) -> None:
    weight, step, H = problem(5)
    dead, alive = [2, 7], [0, 1, 3, 4, 5, 6, 8, 9]
    H[:, dead] = 0.3  # couplings beside a zero diagonal
    H[:, :, dead] = 0.3
    H[:, dead, dead] = 0
    result = round_with_feedback(weight, step, H, limit=3, damping=0.01, act_order=act_order)
    assert torch.equal(result.codes[..., dead], round_nearest(weight, step, 3)[..., dead])
    # The mean diagonal counts the dead inputs: 8 of 10 are alive.
    without = round_with_feedback(
        weight[..., alive],
        step,
        H[:, alive][:, :, alive],
        limit=3,
        damping=0.008,
        act_order=act_order,
    )
    assert torch.equal(result.codes[..., alive], without.codes)


def test_descent_leaves_dead_inputs_alone() -> None:
    weight, step, H = problem(5)
    H[:, 2] = 0.3  # couplings beside a zero diagonal: a slope without curvature
    H[:, :, 2] = 0.3
    H[:, 2, 2] = 0
    start = torch.zeros(2, 3, 10, dtype=torch.int8)
    codes = descend(weight, start, step, H, 3, 2)
    assert not codes[..., 2].any()
    assert bool(codes.any())


def test_all_inputs_dead() -> None:
    weight, step, H = problem(5)
    result = round_with_feedback(weight, step, torch.zeros_like(H), limit=3)
    assert torch.equal(result.codes, round_nearest(weight, step, 3))
    assert result.loss.tolist() == [0.0, 0.0]
    assert torch.equal(descend(weight, result.codes, step, torch.zeros_like(H), 3, 2), result.codes)


def test_zero_weight() -> None:
    _, _, H = problem(5)
    weight = torch.zeros(2, 3, 10)
    result = round_with_feedback(weight, weight_steps(weight, 7), H, limit=7)
    assert not result.codes.any()
    assert result.loss.tolist() == [0.0, 0.0]


def test_one_input_and_one_output() -> None:
    weight, step, H = torch.tensor([[[2.6]]]), torch.ones(1, 1), torch.full((1, 1, 1), 3.0)
    result = round_with_feedback(weight, step, H, limit=7)
    assert result.codes.tolist() == [[[3]]]
    assert float(result.loss) == pytest.approx(
        3 * 0.4**2, rel=4 * torch.finfo(torch.float32).eps / 0.4
    )
    assert descend(weight, result.codes - 1, step, H, 7, 1).tolist() == [[[3]]]


def test_groups_do_not_meet() -> None:
    weight, step, H = problem(11, groups=3)
    together = round_with_feedback(weight, step, H, limit=3)
    start = round_nearest(weight, step, 3)
    descended = descend(weight, start, step, H, 3, 2)
    for g in range(3):
        part = slice(g, g + 1)
        alone = round_with_feedback(weight[part], step[part], H[part], limit=3)
        assert torch.equal(alone.codes, together.codes[part])
        alone_descended = descend(weight[part], start[part], step[part], H[part], 3, 2)
        assert torch.equal(alone_descended, descended[part])


def test_damping_in_use_is_reported() -> None:
    weight, step, H = problem(5, n_rows=2)
    result = round_with_feedback(weight, step, H, limit=3, damping=0.0)
    assert result.damping > 0.0


def coordinate_descent(
    row: Tensor, codes: list[int], step: float, H: Tensor, limit: int
) -> list[int]:
    """One sweep over a row, by the definition."""
    codes = list(codes)
    for j in range(len(codes)):
        D = row - torch.tensor(codes, dtype=torch.float64) * step
        codes[j] = clamp_round((codes[j] * step + float(D @ H[:, j] / H[j, j])) / step, limit)
    return codes


@pytest.mark.parametrize("limit", [1, 7])
@pytest.mark.parametrize("sweeps", [0, 1, 3])
@pytest.mark.parametrize("block", [3, 128])
def test_descent_is_the_definition(
    monkeypatch: pytest.MonkeyPatch, limit: int, sweeps: int, block: int
) -> None:
    monkeypatch.setattr("tersor.ops.feedback.BLOCK", block)
    weight, step, H = problem(limit, limit=limit)
    start = round_nearest(weight, step, limit)
    got = descend(weight, start, step, H, limit, sweeps)
    for g in range(2):
        for i in range(3):
            codes = start[g, i].tolist()
            for _ in range(sweeps):
                codes = coordinate_descent(weight[g, i], codes, float(step[g, i]), H[g], limit)
            assert got[g, i].tolist() == codes
    assert torch.equal(start, round_nearest(weight, step, limit))


@given(SEEDS, st.sampled_from([1, 3, 127]), st.sampled_from([2, 40]), st.booleans())
@settings(max_examples=40)
def test_descent_never_goes_up(seed: int, limit: int, n_rows: int, from_feedback: bool) -> None:
    weight, step, H = problem(seed, n_rows=n_rows, limit=limit)
    codes = round_nearest(weight, step, limit)
    if from_feedback:
        codes = round_with_feedback(weight, step, H, limit=limit).codes
    size = (weight.abs().max() + step.max()) ** 2 * H.abs().max()
    rounding = 10 * H.shape[1] ** 2 * EPS * float(size)
    before = row_losses(weight, codes, step, H)
    for _ in range(3):
        codes = descend(weight, codes, step, H, limit, 1)
        after = row_losses(weight, codes, step, H)
        assert int(codes.to(torch.int16).abs().max()) <= limit
        assert bool((after <= before + rounding).all())
        before = after


def test_descent_ends_where_no_single_code_helps() -> None:
    limit, (weight, step, H) = 3, problem(21)
    codes = descend(weight, torch.zeros(2, 3, 10, dtype=torch.int8), step, H, limit, 50)
    least = row_losses(weight, codes, step, H)
    assert torch.equal(codes, descend(weight, codes, step, H, limit, 1))
    for j in range(10):
        for code in range(-limit, limit + 1):
            other = codes.clone()
            other[..., j] = code
            assert bool((row_losses(weight, other, step, H) >= least * (1 - 1000 * EPS)).all())


def test_descent_leaves_a_tie_alone() -> None:
    # 0.5 is as far from 0 as from 1; without the rule the even code would win.
    weight, step, H = torch.full((1, 1, 1), 0.5), torch.ones(1, 1), torch.ones(1, 1, 1)
    for code in (0, 1):
        start = torch.full((1, 1, 1), code, dtype=torch.int8)
        assert torch.equal(descend(weight, start, step, H, 3, 2), start)


def test_wrong_arguments_are_refused() -> None:
    weight, step, H = problem(0)
    codes = round_nearest(weight, step, 3)
    with pytest.raises(ConfigError, match=r"limit must be 1\.\.127"):
        round_with_feedback(weight, step, H, limit=128)
    with pytest.raises(ConfigError, match=r"block must be at least 1 column, got 0; 128 is"):
        round_with_feedback(weight, step, H, limit=3, block=0)
    with pytest.raises(ConfigError, match=r"damping must be >= 0, got -1"):
        round_with_feedback(weight, step, H, limit=3, damping=-1.0)
    with pytest.raises(ConfigError, match=r"limit must be 1\.\.127"):
        descend(weight, codes, step, H, 0, 1)
    with pytest.raises(ConfigError, match=r"sweeps must be >= 0, got -1; 2 to 4"):
        descend(weight, codes, step, H, 3, -1)


def test_bad_numbers_are_refused() -> None:
    weight, step, H = problem(0)
    codes = round_nearest(weight, step, 3)
    broken = weight.clone()
    broken[1, 0, 0] = float("nan")
    for call in (
        lambda w, s, h: round_with_feedback(w, s, h, limit=3),
        lambda w, s, h: descend(w, codes, s, h, 3, 1),
    ):
        with pytest.raises(NumericalError, match=r"found nan at group 1, output 0, input 0"):
            call(broken, step, H)
        with pytest.raises(NumericalError, match=r"has step 0\.0, wanted a positive number"):
            call(weight, step * 0, H)
        with pytest.raises(NumericalError, match=r"group 0: found NaN or infinity"):
            call(weight, step, H * float("nan"))
