"""ADMM finds supports of the pattern that are close to the best, and better than elimination's."""

import itertools

import pytest
import torch
from torch import Tensor

from tersor.core.errors import ConfigError
from tersor.ops.admm import choose_support
from tersor.ops.sparsity import NofM, Pattern, Unstructured, eliminate
from tersor.ops.support import refit_support


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def problem(seed: int, outputs: int = 3, inputs: int = 8) -> tuple[Tensor, Tensor]:
    """A weight and the moment of strongly correlated inputs of unequal size."""
    x = normal(seed + 2, 1, 200, inputs) @ (normal(seed + 1, 1, inputs, inputs) + torch.eye(inputs))
    x = x * (0.3 + torch.arange(inputs) / inputs)
    return normal(seed, 1, outputs, inputs), x.mT @ x / 200


def fitted_loss(weight: Tensor, H: Tensor, keep: Tensor) -> float:
    return float(refit_support(weight, H, keep, damping=0.0).loss)


def every_support(inputs: int, pattern: Pattern) -> list[list[int]]:
    if isinstance(pattern, NofM):
        groups = [range(s, s + pattern.of) for s in range(0, inputs, pattern.of)]
        ways = [list(itertools.combinations(g, pattern.kept)) for g in groups]
        return [list(itertools.chain(*choice)) for choice in itertools.product(*ways)]
    return [list(c) for c in itertools.combinations(range(inputs), round(pattern.kept * inputs))]


@pytest.mark.parametrize("pattern", [Unstructured(kept=0.5, each_row=True), NofM()])
def test_close_to_the_best_of_all_supports(pattern: Pattern) -> None:
    found, best, eliminated = 0.0, 0.0, 0.0
    for seed in range(15):
        weight, H = problem(10 * seed, outputs=1)
        supports = every_support(8, pattern)
        keep = torch.zeros(1, len(supports), 8, dtype=torch.bool)
        for i, columns in enumerate(supports):
            keep[0, i, columns] = True
        fit = refit_support(weight.expand(1, len(supports), 8), H, keep, damping=0.0).weight
        D = weight - fit
        least = float(((D @ H) * D).sum(2).min())
        result = choose_support(weight, H, pattern)
        assert result.is_settled
        ours = fitted_loss(weight, H, result.keep)
        assert ours >= least * (1 - 1e-9)
        found, best = found + ours, best + least
        eliminated += fitted_loss(weight, H, eliminate(weight, H, pattern).keep)
    assert found < 1.35 * best
    assert found < eliminated


@pytest.mark.parametrize("kept", [0.4, 0.2, 0.1])
def test_better_than_elimination_above_sixty_percent(kept: float) -> None:
    weight, H = problem(3, outputs=24, inputs=48)
    pattern = Unstructured(kept=kept)
    result = choose_support(weight, H, pattern)
    assert int(result.keep.sum()) == round(kept * weight.numel())
    ours = fitted_loss(weight, H, result.keep)
    assert ours < 0.9 * fitted_loss(weight, H, eliminate(weight, H, pattern).keep)


def test_patterns_hold_and_steps_can_run_out() -> None:
    weight, H = problem(4, outputs=6, inputs=16)
    keep = choose_support(weight, H, NofM()).keep
    assert bool((keep.unflatten(2, (-1, 4)).sum(3) == 2).all())
    rows = choose_support(weight, H, Unstructured(kept=0.25, each_row=True)).keep
    assert bool((rows.sum(2) == 4).all())
    short = choose_support(weight, H, NofM(), steps=1)
    assert (short.steps, short.is_settled) == (1, False)
    assert torch.equal(choose_support(weight, H, NofM()).keep, keep)


def test_dead_inputs_few_rows_and_zero_weights() -> None:
    weight, _ = problem(5)
    x = normal(1, 1, 3, 8)
    x[..., 2] = 0
    H = x.mT @ x / 3
    result = choose_support(weight, H, Unstructured(kept=0.5))
    assert not result.keep[..., 2].any()
    assert int(result.keep.sum()) == 12
    assert bool(choose_support(weight, H, Unstructured(kept=1.0)).keep.all())
    assert not choose_support(weight, H, Unstructured(kept=0.0)).keep.any()
    assert int(choose_support(weight * 0, H, NofM()).keep.sum()) == 12
    assert int(choose_support(weight, H * 0, NofM()).keep.sum()) == 12


def test_wrong_arguments_are_refused() -> None:
    weight, H = problem(0)
    with pytest.raises(ConfigError, match=r"steps must be at least 1, got 0"):
        choose_support(weight, H, NofM(), steps=0)
    with pytest.raises(ConfigError, match=r"damping must be >= 0, got -1"):
        choose_support(weight, H, NofM(), damping=-1.0)
