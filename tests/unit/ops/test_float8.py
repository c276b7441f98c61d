"""8-bit floats: the nearest of all of them, by looking at every one."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tersor.ops.float8 import (
    FLOAT8,
    FLOAT8_LIMIT,
    RELATIVE_ERROR,
    RELATIVE_VARIANCE,
    SMALLEST_ERROR,
    float8_codes,
    float8_rounded,
    float8_steps,
)

ALL = torch.arange(256, dtype=torch.uint8).view(FLOAT8).double()
GRID = ALL[ALL.isfinite()].unique()


@settings(max_examples=200, deadline=None)
@given(st.floats(-600, 600, width=32))
def test_codes_are_the_nearest_of_all(x: float) -> None:
    value = torch.tensor([x])
    found = float(float8_codes(value).double())
    inside = min(max(float(value.double()), -FLOAT8_LIMIT), FLOAT8_LIMIT)
    assert found in GRID
    assert abs(found - inside) == float((GRID - inside).abs().min())
    assert abs(found - inside) <= max(RELATIVE_ERROR * abs(inside), SMALLEST_ERROR)


def test_ties_go_to_the_even_mantissa_and_sizes_beyond_the_end_stay_there() -> None:
    x = torch.tensor([1.0625, 1.1875, 464.0, 1e9, -1e9, 0.0])
    assert float8_rounded(x).tolist() == [1.0, 1.25, 448.0, 448.0, -448.0, 0.0]
    assert bool(float8_rounded(torch.tensor([float("nan")])).isnan())


def test_steps_put_the_largest_value_at_the_end() -> None:
    weight = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0)).double()
    weight[1, 2] = 0
    step = float8_steps(weight)
    assert step[1, 2] == 1
    units = (weight / step.unsqueeze(-1)).abs().amax(2)
    assert torch.allclose(units[step != 1], torch.full((5,), float(FLOAT8_LIMIT)).double())


def test_the_share_of_noise_is_that_of_spread_values() -> None:
    # By logarithm over eight whole powers of two; the mean of so many squares is within 2 %.
    x = 2.0 ** (torch.linspace(-4, 4, 200_001).double())[:-1]
    noise = (float8_rounded(x.float()).double() - x).square() / x.square()
    assert abs(float(noise.mean()) / RELATIVE_VARIANCE - 1) <= 0.02
