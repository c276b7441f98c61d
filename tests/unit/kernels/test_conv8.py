"""8-bit convolutions: the reference against its definition in float64, refusals, tiles."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tersor.core.errors import ConfigError, ShapeError
from tersor.kernels.conv8 import border_offsets, conv8, result_size

# Of the sum to float32, of its product with the scale, of the sum with the offset; the scale and the offset
# themselves are float32 already where the bound is used.
ROUNDED = 3 * 2.0**-24


def drawn(seed: int, codes: tuple[int, ...], weight: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Codes [n, inp, h, w] and weight [out, kh, kw, inp], scale and bias [out]."""
    generator = torch.Generator().manual_seed(seed)
    x, w = (
        torch.randint(-128, 128, shape, generator=generator).to(torch.int8)
        for shape in (codes, weight)
    )
    scale = torch.rand(weight[0], generator=generator) * 1e-4 + 1e-6
    return x, w, scale, torch.randn(weight[0], generator=generator)


def convolved(
    x: Tensor, w: Tensor, scale: Tensor, bias: Tensor, zero: int, **window: Any
) -> tuple[Tensor, Tensor]:
    """In float64, of the values that codes stand for: the result, and the sum of its terms' sizes."""
    values, kernel = x.double() - zero, w.permute(0, 3, 1, 2).double()
    factor, start = (v.double().reshape(-1, 1, 1) for v in (scale, bias))
    sums = torch.nn.functional.conv2d(values, kernel, **window) * factor
    sizes = torch.nn.functional.conv2d(values.abs(), kernel.abs(), **window) * factor
    return sums + start, sizes + start.abs()


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_sums_are_exact_up_to_the_scale(data: st.DataObject) -> None:
    draw = data.draw
    n, inp, out = (draw(st.integers(low, high)) for low, high in ((1, 3), (1, 40), (1, 9)))
    kernel = [draw(st.integers(1, 5)) for _ in range(2)]
    padding = [draw(st.integers(0, k - 1)) for k in kernel]
    stride = [draw(st.integers(1, 3)) for _ in range(2)]
    size = [draw(st.integers(max(1, k - 2 * p), 9)) for k, p in zip(kernel, padding, strict=True)]
    zero = draw(st.sampled_from([0, 3, -128]))
    seed = draw(st.integers(0, 2**32 - 1))
    x, w, scale, bias = drawn(seed, (n, inp, *size), (out, *kernel, inp))
    offset = border_offsets(w, scale, zero, bias, padding)
    found = conv8(x, w, scale, offset, stride, padding, torch.float32, -torch.inf, torch.inf)
    wanted, sizes = convolved(x, w, scale, bias, zero, stride=stride, padding=padding)
    assert found.shape == wanted.shape
    assert found.is_contiguous(memory_format=torch.channels_last)
    # The zero point's part is in the offset, so that the terms are those of codes and of the zero alone.
    kept = convolved(x, w.abs(), scale, bias.abs(), 0, stride=stride, padding=padding)[1]
    most = (
        sizes
        + kept
        + abs(zero) * w.double().abs().sum((1, 2, 3)).reshape(-1, 1, 1) * scale.reshape(-1, 1, 1)
    )
    assert bool(((found.double() - wanted).abs() <= ROUNDED * most).all())


def test_many_channels_are_exact() -> None:
    """More than float32 adds exactly at once: all products are the largest there are."""
    x = torch.full((1, 1200, 3, 3), -128, dtype=torch.int8)
    w = torch.full((1, 3, 3, 1200), -128, dtype=torch.int8)
    w[0, 0, 0, 0] = -127
    found = conv8(
        x, w, torch.ones(1), torch.zeros(1, 1), [1, 1], [0, 0], torch.float32, -torch.inf, torch.inf
    )
    exact = torch.tensor(float(1200 * 9 * 128**2 - 128))  # rounded once
    assert float(found) == float(exact)


def test_what_follows_the_sums() -> None:
    x, w, scale, bias = drawn(1, (2, 8, 5, 5), (6, 3, 3, 8))
    window: dict[str, Any] = {"stride": [2, 2], "padding": [1, 1]}
    offset = border_offsets(w, scale, 0, bias, [1, 1])
    z, _ = convolved(x, w, scale, bias, 0, **window)
    residual = torch.randint(-128, 128, z.shape, generator=torch.Generator().manual_seed(2))
    args = (x, w, scale, offset, [2, 2], [1, 1])
    found = conv8(*args, torch.float32, 0.0, 6.0)
    assert torch.allclose(found.double(), z.clamp(0, 6), rtol=0, atol=1e-6)
    found = conv8(*args, torch.float32, -torch.inf, torch.inf, residual.to(torch.int8), 0.25, 1.5)
    assert torch.allclose(found.double(), z + residual * 0.25 + 1.5, rtol=0, atol=1e-5)
    inner = (-2.0, 2.0, 30.0)
    wanted = z.round().clamp(-2, 2) * 30 + residual * 0.25 + 1.5
    found = conv8(*args, torch.int8, -50.0, 70.0, residual.to(torch.int8), 0.25, 1.5, inner)
    assert found.dtype == torch.int8
    off = (found.double() - wanted.clamp(-50, 70).round()).abs()
    assert float((off > 0).double().mean()) < 0.02  # values that lie on a border
    assert float(off.max()) <= 31


def test_eight_bit_floats() -> None:
    generator = torch.Generator().manual_seed(0)
    x, w = (
        torch.randn(shape, generator=generator).to(torch.float8_e4m3fn)
        for shape in ((2, 5, 6, 6), (4, 3, 3, 5))
    )
    scale, offset = torch.full((4,), 100.0), torch.zeros(1, 4)
    found = conv8(x, w, scale, offset, [1, 1], [1, 1], torch.float32, -torch.inf, torch.inf)
    wanted, sizes = convolved(x, w, scale, offset[0], 0, padding=1)
    assert bool(((found.double() - wanted).abs() <= ROUNDED * sizes).all())
    found = conv8(x, w, scale, offset, [1, 1], [1, 1], torch.float8_e4m3fn, 0.0, 448.0)
    assert torch.equal(found.float(), wanted.clamp(0, 448).float().to(torch.float8_e4m3fn).float())


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16])
def test_empty_batches_and_other_layouts(dtype: torch.dtype) -> None:
    x, w, scale, bias = drawn(3, (4, 16, 6, 5), (8, 3, 3, 16))
    rest = (w, scale, bias[None], [1, 1], [1, 1], dtype, -100.0, 100.0)
    assert conv8(x[:0], *rest).shape == (0, 8, 6, 5)
    wanted = conv8(x, *rest)
    for other in (
        x.to(memory_format=torch.channels_last),
        torch.cat([x, x], 1)[:, :16],
        x.flip(3).flip(3),
    ):
        assert torch.equal(conv8(other, *rest), wanted)


GOOD: dict[str, Any] = {
    "codes": ((2, 8, 6, 6), torch.int8), "weight": ((4, 3, 3, 8), torch.int8), "offset": (1, 4),
    "stride": [1, 1], "padding": [1, 1], "dtype": torch.int8, "residual": None,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"codes": ((2, 8, 6, 6), torch.uint8)}, ConfigError, "uint8.*wanted both int8"),
        ({"weight": ((4, 3, 3, 8), torch.float8_e4m3fn)}, ConfigError, "wanted both int8"),
        ({"dtype": torch.float8_e4m3fn}, ConfigError, "one kind of codes"),
        ({"codes": ((2, 8, 6), torch.int8)}, ShapeError, "3 dimensions"),
        ({"weight": ((4, 3, 3, 2), torch.int8)}, ShapeError, "grouped convolutions"),
        ({"stride": [0, 1]}, ShapeError, "stride of at least 1"),
        ({"padding": [3, 1]}, ShapeError, "less padding than kernel"),
        ({"codes": ((2, 8, 1, 1), torch.int8), "padding": [0, 0]}, ShapeError, "fits"),
        ({"offset": (2, 4)}, ShapeError, r"4 channels in 1 or 16 rows"),
        ({"offset": (1, 5)}, ShapeError, "4 channels"),
        ({"residual": (2, 4, 5, 6)}, ShapeError, r"wanted the result's shape \(2, 4, 6, 6\)"),
        ({"codes": ((2**15, 8, 128, 128), torch.int8)}, ShapeError, r"less than 2\*\*31"),
    ],
)
def test_refusals(change: dict[str, Any], error: type[Exception], said: str) -> None:
    given = {**GOOD, **change}
    with FakeTensorMode():  # sizes without memory
        codes, weight = (torch.empty(s, dtype=d) for s, d in (given["codes"], given["weight"]))
        residual = None if given["residual"] is None else torch.empty(given["residual"])
        args = (codes, weight, torch.empty(4), torch.empty(given["offset"]), given["stride"])
        with pytest.raises(error, match=said):
            conv8(*args, given["padding"], given["dtype"], 0.0, 1.0, residual)


def test_refusals_of_what_int8_alone_has() -> None:
    x, w = torch.zeros(1, 4, 3, 3), torch.zeros(2, 3, 3, 4)
    x, w = (t.to(torch.float8_e4m3fn) for t in (x, w))
    with pytest.raises(ConfigError, match="inner bounds are for int8"):
        conv8(x, w, torch.ones(2), torch.zeros(1, 2), [1, 1], [1, 1], torch.float32, 0.0, 1.0,
              inner=(-1.0, 1.0, 1.0))  # fmt: skip
    x, w = torch.zeros(1, 4, 3, 3, dtype=torch.int8), torch.zeros(2, 3, 3, 4, dtype=torch.int8)
    with pytest.raises(ConfigError, match="at most 255 from 0"):
        conv8(x, w, torch.ones(2), torch.zeros(1, 2), [1, 1], [1, 1], torch.float32, 0.0, 1.0,
              inner=(-300.0, 1.0, 1.0))  # fmt: skip
    wide = torch.zeros(2, 15, 15, 4, dtype=torch.int8)
    with pytest.raises(ConfigError, match=r"padding \(7, 8\) with zero point 3"):
        border_offsets(wide, torch.ones(2), 3, None, [7, 8])
    assert border_offsets(wide, torch.ones(2), 0, None, [7, 8]).shape == (1, 2)


def test_sizes() -> None:
    for size, kernel, stride, padding in ((224, 7, 2, 3), (56, 3, 2, 1), (7, 1, 2, 0)):
        x = torch.zeros(1, 1, size, size)
        found = torch.nn.functional.conv2d(
            x, torch.zeros(1, 1, kernel, kernel), None, stride, padding
        )
        assert result_size(size, kernel, stride, padding) == found.shape[2]
