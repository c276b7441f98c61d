"""8-bit linears: the reference against its definition in loops of integers."""

import pytest
import torch
import torch.ao.quantization.fx._decomposed  # registers quantized_decomposed
from hypothesis import given, settings
from hypothesis import strategies as st

from tersor.kernels.linear8 import ACTIVATIONS, activated, linear8, quantize_codes, quantize_floats

# Two float32 roundings, of the product with the scale and of the sum.
ROUNDED = 2.0**-22


def drawn(seed: int, rows: int, inp: int, out: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    x, w = (
        torch.randint(-128, 128, shape, generator=generator).to(torch.int8)
        for shape in ((rows, inp), (out, inp))
    )
    scale = torch.rand(out, generator=generator) * 1e-3 + 1e-6
    return x, w, scale, torch.randn(out, generator=generator)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 9), st.integers(1, 40), st.integers(1, 17))
def test_product_is_exact(seed: int, rows: int, inp: int, out: int) -> None:
    x, w, scale, offset = drawn(seed, rows, inp, out)
    exact = torch.tensor(
        [[sum(int(a) * int(b) for a, b in zip(r, c, strict=True)) for c in w] for r in x]
    )
    wanted = exact.double() * scale.double() + offset.double()
    found = linear8(x, w, scale, offset, torch.float32)
    bound = ROUNDED * (exact.double().abs() * scale.double() + offset.double().abs())
    assert bool(((found.double() - wanted).abs() <= bound + 1e-30).all())


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_result_on_the_next_grid(activation: str) -> None:
    x, w, scale, offset = drawn(1, 5, 24, 6)
    x = x.reshape(1, 5, 24)
    y = linear8(x, w, scale, offset, torch.float32, activation)
    assert torch.equal(y, activated(linear8(x, w, scale, offset, torch.float32), activation))
    step = 0.02
    inverse = torch.full((6,), 1.0 / step)
    found = linear8(x, w, scale, offset, torch.int8, activation, inverse, 3.0, -90, 80)
    assert found.shape == (1, 5, 6)
    assert int((found.int() - quantize_codes(y, step, 3, -90, 80).int()).abs().max()) <= 1
    assert int(found.min()) >= -90
    assert int(found.max()) <= 80


def test_eight_bit_floats_saturate() -> None:
    x = torch.full((2, 8), 400.0).to(torch.float8_e4m3fn)
    w = torch.full((3, 8), 2.0).to(torch.float8_e4m3fn)
    scale, offset = torch.ones(3), torch.zeros(3)
    found = linear8(x, w, scale, offset, torch.float8_e4m3fn, inverse=torch.ones(3))
    assert torch.equal(found.float(), torch.full((2, 3), 448.0))


def test_codes_are_torchs_own() -> None:
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(0)) * 4
    wanted = torch.ops.quantized_decomposed.quantize_per_tensor(x, 0.03, 5, -100, 100, torch.int8)
    assert torch.equal(quantize_codes(x, 0.03, 5, -100, 100), wanted)


def test_eight_bit_floats_are_the_nearest_ones() -> None:
    bits = torch.arange(256, dtype=torch.uint8)
    grid = bits.view(torch.float8_e4m3fn).double()
    grid = grid[grid.isfinite()].unique()
    step = 0.01
    x = torch.randn(500, generator=torch.Generator().manual_seed(0)) * 3
    found = quantize_floats(x, step).double()
    # The division is a multiplication by 1 / step: two float32 roundings in front of the grid's.
    units = x.double() / step
    nearest = (units[:, None].clamp(-448, 448) - grid).abs().amin(1)
    assert bool(((found - units.clamp(-448, 448)).abs() <= nearest + units.abs() * 2.0**-22).all())
    assert bool(torch.isin(found, grid).all())


def test_integers_behind_eight_bit_floats() -> None:
    x, w = (torch.randn(n, 32, generator=torch.Generator().manual_seed(n)) for n in (4, 6))
    x, w = x.to(torch.float8_e4m3fn), w.to(torch.float8_e4m3fn)
    scale, offset = torch.full((6,), 0.1), torch.zeros(6)
    y = x.double() @ w.double().t() * 0.1
    found = linear8(x, w, scale, offset, torch.int8, inverse=torch.full((6,), 20.0))
    assert int((found.int() - (y * 20).round().clamp(-128, 127).int()).abs().max()) <= 1
