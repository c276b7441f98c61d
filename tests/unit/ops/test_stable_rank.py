"""The stable rank by power iteration: its definition by singular values, its bounds, degenerate weights."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tersor.ops.stable_rank import stable_rank


def start(inputs: int, seed: int = 0) -> torch.Tensor:
    v = torch.randn(inputs, generator=torch.Generator().manual_seed(seed))
    return v / v.norm()


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32 - 1), st.integers(1, 9), st.integers(1, 9))
def test_it_is_its_definition_and_never_too_small(seed: int, outputs: int, inputs: int) -> None:
    weight = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed))
    values = torch.linalg.svdvals(weight.double())
    wanted = float(values.square().sum() / values[0] ** 2)
    few, v = stable_rank(weight, start(inputs), 2)
    many, _ = stable_rank(weight, v, 2000)
    bound = 1 - 20 * torch.finfo(torch.float32).eps  # sums of at most 81 squares
    assert float(few) >= wanted * bound
    assert float(many) >= wanted * bound
    assert float(many) <= wanted * 1.01  # two values that nearly agree converge slowly


def test_it_goes_on_from_the_last_vector() -> None:
    weight = torch.randn(20, 30, generator=torch.Generator().manual_seed(3))
    v = start(30)
    found = []
    for _ in range(60):
        rank, v = stable_rank(weight, v, 3)
        found.append(float(rank))
    values = torch.linalg.svdvals(weight.double())
    wanted = float(values.square().sum() / values[0] ** 2)
    assert abs(found[-1] / wanted - 1) < 1e-3
    assert found[0] > found[-1]


def test_degenerate_weights() -> None:
    zero, v = stable_rank(torch.zeros(3, 4), start(4), 3)
    assert float(zero) == 0.0
    assert bool(torch.isfinite(v).all())
    one, _ = stable_rank(torch.ones(5, 1), start(1), 1)
    assert float(one) == 1.0
    bad, _ = stable_rank(torch.full((2, 2), torch.nan), start(2), 1)
    assert bool(bad.isnan())
