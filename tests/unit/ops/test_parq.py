"""The proximal map towards a grid: its definition by plain loops, its ends, bad input."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tersor.core.errors import ConfigError
from tersor.ops.parq import pulled

# A division, a product and a sum on the way there and back.
ROUNDINGS = 8 * torch.finfo(torch.float64).eps


def by_definition(p: float, step: float, low: int, high: int, s: float) -> float:
    """clamp(c + (p - c) / s, q_lo, q_hi) between neighbours; beyond the ends the end plus s of the rest."""
    place = p / step
    if place <= low or place >= high:
        end = low if place <= low else high
        return (end + s * (place - end)) * step
    below = math.floor(place)
    middle = below + 0.5
    found = float(round(place)) if s == 0 else middle + (place - middle) / s
    return min(below + 1.0, max(float(below), found)) * step


@settings(deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([2, 3, 4]),
    st.sampled_from([0.0, 0.01, 0.3, 0.7, 1.0]),
)
def test_the_map_is_its_definition(seed: int, bits: int, softness: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    latent = torch.randn(3, 2, 5, generator=generator, dtype=torch.float64)
    step = torch.tensor([0.3, -0.2, 1.7], dtype=torch.float64)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    found = pulled(latent, step, low=low, high=high, softness=softness)
    wanted = torch.tensor(
        [
            [[by_definition(p, s, low, high, softness) for p in row] for row in rows]
            for rows, s in zip(latent.tolist(), step.tolist(), strict=True)
        ],
        dtype=torch.float64,
    )
    scale = float(latent.abs().max()) / max(softness, 0.01)
    torch.testing.assert_close(found, wanted, rtol=0, atol=scale * ROUNDINGS * 2**bits)


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_it_begins_with_the_values_themselves_and_ends_on_the_grid(seed: int) -> None:
    latent = 3 * torch.randn(4, 6, generator=torch.Generator().manual_seed(seed))
    step = torch.tensor([0.5, -0.25, 0.125, 2.0])
    begun = pulled(latent, step, low=-8, high=7, softness=1.0)
    torch.testing.assert_close(begun, latent, rtol=0, atol=1e-5)
    ended = pulled(latent, step, low=-8, high=7, softness=0.0)
    codes = ended / step[:, None]
    assert torch.equal(codes, codes.round().clamp(-8, 7))
    assert torch.equal(pulled(ended, step, low=-8, high=7, softness=0.3), ended)  # points stay


def test_zeros_stay_zero_at_any_softness() -> None:
    for softness in (1.0, 0.5, 1e-6, 0.0):
        found = pulled(torch.zeros(2, 3), torch.ones(2), low=-2, high=1, softness=softness)
        assert not found.any()


@pytest.mark.parametrize(("softness", "low"), [(-0.1, -8), (1.1, -8), (float("nan"), -8), (0.5, 8)])
def test_what_is_no_softness_or_grid_is_refused(softness: float, low: int) -> None:
    with pytest.raises(ConfigError, match=r"wanted 0\.\.1"):
        pulled(torch.ones(1, 2), torch.ones(1), low=low, high=7, softness=softness)
