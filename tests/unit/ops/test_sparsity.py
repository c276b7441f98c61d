"""Masks by the definition, elimination as optimal brain surgery, and what it costs on a real layer."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tersor.core.errors import ConfigError, NumericalError, ShapeError
from tersor.ops.admm import choose_support
from tersor.ops.group_grids import GroupGrid, dequantize, fit_steps, nearest_codes
from tersor.ops.group_rounding import RoundingConfig, round_weight
from tersor.ops.moments import centred, moments_of
from tersor.ops.sparsity import (
    NofM,
    Pattern,
    Unstructured,
    activity_scores,
    best_mask,
    check_splits,
    eliminate,
    eliminate_exactly,
    magnitude_scores,
    obs_scores,
)
from tersor.ops.support import refit_support

SEEDS = st.integers(0, 2**32 - 1)
PATTERNS: tuple[Pattern, ...] = (
    Unstructured(kept=0.5),
    Unstructured(kept=0.3, each_row=True),
    NofM(),
    NofM(kept=1, of=2),
)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def problem(
    seed: int, groups: int = 2, outputs: int = 3, inputs: int = 8, n_rows: int = 40
) -> tuple[Tensor, Tensor]:
    mixing = normal(seed + 1, groups, inputs, inputs) / inputs**0.5 + torch.eye(inputs)
    x = normal(seed + 2, groups, n_rows, inputs) @ mixing * (0.5 + torch.arange(inputs) / inputs)
    return normal(seed, groups, outputs, inputs), x.mT @ x / n_rows


def loss(weight: Tensor, new: Tensor, H: Tensor) -> float:
    D = weight.double() - new
    return float(torch.einsum("gmj,gjk,gmk->", D, H.double(), D))


def damped(H: Tensor, damping: float = 0.01) -> Tensor:
    mean = H.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    return H + damping * mean * torch.eye(H.shape[-1], dtype=torch.float64)


@given(SEEDS, st.floats(0, 1), st.booleans())
@settings(max_examples=40, deadline=None)
def test_masks_keep_the_highest_and_as_many_as_asked(
    seed: int, kept: float, each_row: bool
) -> None:
    scores = (normal(seed, 2, 3, 8) * 3).round()  # with ties
    mask = best_mask(scores, Unstructured(kept=kept, each_row=each_row))
    parts = [(scores, mask)]
    if each_row:
        parts = [(scores[g, i], mask[g, i]) for g in range(2) for i in range(3)]
    for values, keep in parts:
        wanted = round(kept * values.numel())
        assert int(keep.sum()) == wanted
        best = values.flatten().sort(descending=True).values[:wanted]
        assert torch.equal(values[keep].sort(descending=True).values, best)


@given(SEEDS, st.sampled_from([NofM(), NofM(kept=1, of=2), NofM(kept=0, of=4), NofM(kept=4, of=8)]))
@settings(max_examples=20, deadline=None)
def test_n_of_m_keeps_the_best_of_every_group(seed: int, pattern: NofM) -> None:
    scores = normal(seed, 1, 3, 8)
    mask = best_mask(scores, pattern)
    for i, start in itertools.product(range(3), range(0, 8, pattern.of)):
        values = scores[0, i, start : start + pattern.of].tolist()
        best = sorted(range(pattern.of), key=lambda j: -values[j])[: pattern.kept]
        kept = mask[0, i, start : start + pattern.of].nonzero().flatten().tolist()
        assert kept == sorted(best)


def test_ties_go_to_the_lower_index() -> None:
    ones = torch.ones(1, 2, 4)
    assert best_mask(ones, Unstructured(kept=0.75)).flatten().tolist() == [True] * 6 + [False] * 2
    assert best_mask(ones, NofM())[0, 0].tolist() == [True, True, False, False]


def test_scores_are_what_a_removal_costs() -> None:
    weight, H = problem(0, groups=1, outputs=2)
    metric = damped(H)
    scores = obs_scores(weight, H, 0.01)
    for i, j in itertools.product(range(2), range(8)):
        keep = torch.ones(1, 2, 8, dtype=torch.bool)
        keep[0, i, j] = False
        alone = torch.where(keep, weight, 0.0)
        assert float(activity_scores(weight, H)[0, i, j]) == pytest.approx(loss(weight, alone, H))
        fitted = refit_support(weight, metric, keep, damping=0.0).weight
        assert float(scores[0, i, j]) == pytest.approx(loss(weight, fitted, metric), rel=1e-9)
        assert float(magnitude_scores(weight)[0, i, j]) == float(weight[0, i, j]) ** 2


def surgery(
    row: Tensor, H: Tensor, pattern: Pattern, block: int, order: list[int]
) -> tuple[Tensor, Tensor]:
    """SparseGPT of one output by downdates: choose before each block, zero, let later columns adapt."""
    w, inverse = row.clone(), torch.linalg.inv(H)
    keep = torch.ones(len(row), dtype=torch.bool)
    pivots = []
    for j in order:
        pivots.append(float(inverse[j, j]))
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    inverse = torch.linalg.inv(H)
    for start in range(0, len(order), block):
        part = order[start : start + block]
        scores = torch.tensor([float(w[j]) ** 2 / pivots[start + i] for i, j in enumerate(part)])
        keep[part] = best_mask(scores.reshape(1, 1, -1), pattern).flatten()
        for position, j in enumerate(part, start):
            if not keep[j]:
                for k in order[position + 1 :]:
                    w[k] -= w[j] / inverse[j, j] * inverse[j, k]
                w[j] = 0
            inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return keep, w


@given(
    SEEDS,
    st.sampled_from([Unstructured(kept=0.5, each_row=True), NofM()]),
    st.sampled_from([3, 128]),
)
@settings(max_examples=20, deadline=None)
def test_elimination_is_surgery_column_by_column(seed: int, pattern: Pattern, block: int) -> None:
    weight, H = problem(seed)
    found = eliminate(weight, H, pattern, block=block)
    metric, is_structured = damped(H), isinstance(pattern, NofM)
    for g, i in itertools.product(range(2), range(3)):
        order = list(range(8))
        if not is_structured:
            order = sorted(order, key=lambda j: -float(H[g, j, j]))
        keep, wanted = surgery(
            weight[g, i], metric[g], pattern, 4 if is_structured else block, order
        )
        assert torch.equal(found.keep[g, i], keep)
        torch.testing.assert_close(found.weight[g, i], wanted, rtol=1e-7, atol=1e-9)


def obc(row: Tensor, H: Tensor, n_removed: int) -> Tensor:
    """The greedy support of one output, by trying every removal with a refit."""
    keep = torch.ones(1, 1, len(row), dtype=torch.bool)
    for _ in range(n_removed):
        costs = {}
        for j in keep[0, 0].nonzero().flatten().tolist():
            trial = keep.clone()
            trial[0, 0, j] = False
            fit = refit_support(row.reshape(1, 1, -1), H.unsqueeze(0), trial, damping=0.0)
            costs[j] = float(fit.loss)
        keep[0, 0, min(costs, key=costs.__getitem__)] = False
    return keep[0, 0]


@given(SEEDS, st.integers(0, 6))
@settings(max_examples=10, deadline=None)
def test_exact_elimination_is_greedy_with_a_refit_after_each(seed: int, n_removed: int) -> None:
    weight, H = problem(seed, outputs=2, inputs=6)
    pattern = Unstructured(kept=1 - n_removed / 6, each_row=True)
    keep = eliminate_exactly(weight, H, pattern)
    metric = damped(H)
    for g, i in itertools.product(range(2), range(2)):
        assert torch.equal(keep[g, i], obc(weight[g, i], metric[g], n_removed))


def test_exact_elimination_over_the_layer_takes_from_where_it_costs_least() -> None:
    weight, H = problem(3, outputs=4)
    weight[:, 0] *= 0.01
    each = eliminate_exactly(weight, H, Unstructured(kept=0.5, each_row=True))
    layer = eliminate_exactly(weight, H, Unstructured(kept=0.5))
    assert int(each.sum()) == int(layer.sum()) == 32
    assert not layer[:, 0].any()
    losses = [float(refit_support(weight, H, k, damping=1e-2).loss.sum()) for k in (each, layer)]
    assert losses[1] < losses[0]


def test_over_the_layer_every_output_keeps_what_it_would_keep_by_itself() -> None:
    for seed in range(10):
        weight, H = problem(seed, groups=1, outputs=4, inputs=6)
        layer = eliminate_exactly(weight, H, Unstructured(kept=0.5))
        assert int(layer.sum()) == 12
        for i, count in enumerate(layer[0].sum(1).tolist()):
            alone = Unstructured(kept=count / 6, each_row=True)
            assert torch.equal(layer[0, i], eliminate_exactly(weight, H, alone)[0, i])


def test_less_kept_costs_more_and_exact_elimination_is_nested() -> None:
    weight, H = problem(9, groups=1, outputs=6, inputs=16, n_rows=100)
    before, kept_before = -1.0, torch.ones(1, 6, 16, dtype=torch.bool)
    for kept in (0.9, 0.7, 0.5, 0.3, 0.1, 0.0):
        keep = eliminate_exactly(weight, H, Unstructured(kept=kept))
        assert not (keep & ~kept_before).any()
        now = float(refit_support(weight, H, keep, damping=0.0).loss)
        assert now > before
        before, kept_before = now, keep


@pytest.mark.parametrize("pattern", PATTERNS)
def test_degenerate_layers(pattern: Pattern) -> None:
    weight, H = problem(5, n_rows=2)  # fewer rows than inputs
    H[:, 2], H[:, :, 2] = 0, 0
    weight[:, 0] = 0
    weight[:, 1] = 0.5
    found = eliminate(weight, H, pattern)
    assert found.weight.isfinite().all()
    assert not found.weight[~found.keep].any()
    if isinstance(pattern, Unstructured):
        assert int(found.keep.sum()) == pytest.approx(pattern.kept * 48, abs=3)
        assert int(eliminate_exactly(weight, H, pattern).sum()) == pytest.approx(
            pattern.kept * 48, abs=3
        )
    else:
        assert int(found.keep.sum()) == 48 * pattern.kept // pattern.of
    one = eliminate(torch.ones(1, 1, 1), torch.ones(1, 1, 1), Unstructured(kept=1.0))
    assert one.weight.tolist() == [[[1.0]]]
    nothing = eliminate(weight, H * 0, pattern)
    torch.testing.assert_close(nothing.weight[nothing.keep], weight[nothing.keep])


def test_pruning_and_rounding_in_one_pass() -> None:
    weight, H = problem(4, outputs=6, inputs=32, n_rows=200)
    grid = GroupGrid(bits=4, group=8, symmetric=False)
    steps = fit_steps(weight, grid)
    found = eliminate(weight, H, NofM(), onto=(grid, steps))
    back = dequantize(nearest_codes(found.weight, steps, grid), steps, grid)
    torch.testing.assert_close(found.weight, back, rtol=1e-12, atol=1e-12)
    assert int(found.keep.sum()) == weight.numel() // 2
    assert not found.weight[~found.keep].any()
    apart = dequantize(nearest_codes(eliminate(weight, H, NofM()).weight, steps, grid), steps, grid)
    assert loss(weight, found.weight, H) < loss(weight, apart * found.keep, H)


def test_real_layer_every_cell_below_the_usual_methods(
    lenet5: nn.Module, images: dict[str, Tensor]
) -> None:
    """Held-out error on the first fully connected layer of LeNet-5; and prune before rounding."""
    weight, H, unseen = fully_connected(lenet5, images)

    def error(new: Tensor) -> float:
        return loss(weight, new, unseen)

    for pattern in (Unstructured(kept=0.5), Unstructured(kept=0.3), Unstructured(kept=0.1), NofM()):
        rows = (
            Unstructured(kept=pattern.kept, each_row=True)
            if isinstance(pattern, Unstructured)
            else pattern
        )
        ours = refit_support(weight, H, choose_support(weight, H, pattern).keep, damping=1e-2)
        peers = {
            "magnitude": weight * best_mask(magnitude_scores(weight), pattern),
            "wanda": weight * best_mask(activity_scores(weight, H), rows),
            "sparsegpt": eliminate(weight, H, pattern).weight,
        }
        assert all(error(ours.weight) < 0.9 * error(peer.double()) for peer in peers.values())
    grid, pattern = GroupGrid(bits=3), Unstructured(kept=0.3)
    keep = choose_support(weight, H, pattern).keep
    sparse = refit_support(weight, H, keep, damping=1e-2).weight
    first = round_weight(sparse, H, grid, RoundingConfig(sweeps=2), keep)
    rounded = round_weight(weight, H, grid, RoundingConfig(sweeps=2))
    after = dequantize(rounded.codes, rounded.steps, grid)
    after = after * best_mask(activity_scores(after, H), pattern)
    assert (
        error(dequantize(first.codes, first.steps, grid)) < error(after) / 5
    )  # 15 in ALGORITHMS 9


def fully_connected(model: nn.Module, images: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Weight of 120 outputs, covariance of what it reads, and that of other images."""
    layer = next(m for m in model.modules() if isinstance(m, nn.Linear))
    seen: list[Tensor] = []
    handle = layer.register_forward_hook(lambda _m, args, _out: seen.append(args[0].detach()))
    with torch.no_grad():
        for part in ("train", "test"):
            model(images[part])
    handle.remove()
    H, unseen = (centred(moments_of(x.unsqueeze(1)))[0] for x in seen)
    return layer.weight.detach()[:120].unsqueeze(0), H, unseen


def test_wrong_arguments_are_refused() -> None:
    weight, H = problem(0)
    with pytest.raises(ConfigError, match=r"kept must be a share within 0\.\.1, got 1\.5"):
        Unstructured(kept=1.5)
    with pytest.raises(ConfigError, match=r"pattern 5 of 4: wanted"):
        NofM(kept=5, of=4)
    with pytest.raises(ShapeError, match=r"10 inputs do not split into groups of 4"):
        check_splits(10, NofM())
    with pytest.raises(ConfigError, match=r"block must be at least 1 column, got 0"):
        eliminate(weight, H, NofM(), block=0)
    with pytest.raises(ConfigError, match=r"exact elimination takes 4\.3e\+12 updates"):
        eliminate_exactly(
            torch.zeros(1, 512, 2032), torch.zeros(1, 2032, 2032), Unstructured(kept=0.5)
        )
    with pytest.raises(NumericalError, match=r"found nan at group 0, output 0, input 0"):
        eliminate(weight * float("nan"), H, NofM())
