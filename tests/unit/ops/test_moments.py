"""Moments: exact sums, means that survive large offsets, and patches that are the convolution."""

from dataclasses import fields

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from tersor.core.errors import ShapeError
from tersor.ops import moments as module
from tersor.ops.moments import (
    Moments,
    add_moments,
    centred,
    drift_covariance,
    drift_variance,
    means,
    moments_of,
    original_covariance,
    output_covariance,
    output_variance,
    second_moment,
    unfold,
)

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


def integers(seed: int, *shape: int) -> Tensor:
    """Small whole numbers: their sums of products are exact in float64, in any order."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-8, 9, shape, generator=generator).to(torch.float64)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def products(a: Tensor, b: Tensor) -> Tensor:
    """Sum over rows of a b^T for each group, in plain loops."""
    total = torch.zeros(a.shape[1], a.shape[2], b.shape[2], dtype=torch.float64)
    for left, right in zip(a.tolist(), b.tolist(), strict=True):
        for group, (row_a, row_b) in enumerate(zip(left, right, strict=True)):
            for i, value in enumerate(row_a):
                for j, other in enumerate(row_b):
                    total[group, i, j] += value * other
    return total


def assert_equal(a: Moments, b: Moments) -> None:
    for field in fields(Moments):
        left, right = getattr(a, field.name), getattr(b, field.name)
        if isinstance(left, Tensor):
            assert torch.equal(left, right), field.name
        else:
            assert left == right, field.name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("device", DEVICES)
def test_sums_are_the_definition(dtype: torch.dtype, device: str) -> None:
    x, original, d = integers(0, 7, 2, 3), integers(1, 7, 2, 3), integers(2, 7, 2, 4)
    got = moments_of(*(value.to(device, dtype) for value in (x, original, d)))
    wanted = Moments(
        count=7,
        xx=products(x, x),
        x=sum(x),
        cross=products(original, x),
        x_original=sum(original),
        xx_original=products(original, original),
        residual=products(d, x),
        residual_original=products(d, original),
        d=sum(d),
        dd=torch.stack([products(d, d)[g].trace() for g in range(2)]),
    )
    assert got.xx.device.type == device
    on_cpu = {
        field.name: value.cpu() if isinstance(value := getattr(got, field.name), Tensor) else value
        for field in fields(Moments)
    }
    assert_equal(Moments(**on_cpu), wanted)


@given(SEEDS, st.integers(0, 5), st.integers(0, 5), st.booleans(), st.booleans())
@settings(max_examples=40)
def test_moments_add_like_rows(
    seed: int, n_first: int, n_second: int, has_original: bool, has_residual: bool
) -> None:
    n_rows = n_first + n_second
    x = integers(seed, n_rows, 2, 3)
    original = integers(seed + 1, n_rows, 2, 3) if has_original else None
    d = integers(seed + 2, n_rows, 2, 1) if has_residual else None

    def part(rows: slice) -> Moments:
        return moments_of(*(value if value is None else value[rows] for value in (x, original, d)))

    added = add_moments(part(slice(n_first)), part(slice(n_first, n_rows)))
    assert_equal(added, moments_of(x, original, d))
    assert (added.cross is not None) == has_original
    assert (added.residual is not None) == has_residual


@pytest.mark.parametrize("n_values", [1, 12, 13, 1000])
def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch, n_values: int) -> None:
    args = integers(0, 11, 2, 3), integers(1, 11, 2, 3), integers(2, 11, 2, 4)
    whole = moments_of(*args)
    seen: list[int] = []
    single = module._moments_of_chunk

    def watched(*parts: Tensor | None) -> Moments:
        seen.extend(part.numel() for part in parts if part is not None)
        return single(*parts)

    monkeypatch.setattr(module, "CHUNK_VALUES", n_values)
    monkeypatch.setattr(module, "_moments_of_chunk", watched)
    assert_equal(moments_of(*args), whole)
    assert max(seen) <= max(n_values, 2 * 4)  # never below one row


def test_a_row_that_counts_twice_is_there_twice() -> None:
    args = integers(0, 6, 2, 3), integers(1, 6, 2, 3), integers(2, 6, 2, 4)
    counts = torch.tensor([2.0, 1.0, 0.0, 1.0, 1.0, 1.0])  # mean 1
    index = torch.tensor([0, 0, 1, 3, 4, 5])
    assert_equal(moments_of(*args, counts), moments_of(*(a[index] for a in args)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_covariance_survives_a_large_mean(dtype: torch.dtype) -> None:
    offset, n_rows = 1e4, 500
    x = (normal(3, n_rows, 2, 4) + offset).to(dtype)
    covariance, mean = centred(moments_of(x))
    rows = x.to(torch.float64) - x.to(torch.float64).mean(0)
    wanted = torch.einsum("tgi,tgj->gij", rows, rows) / n_rows
    # Two sums of n_rows products of offset^2 are subtracted, each good to n_rows roundings.
    rounding = 2 * n_rows * EPS * (2 * offset**2)
    assert rounding < 1e-4  # float32 products would be wrong by 6
    assert bool(((covariance - wanted).abs() <= rounding).all())
    assert bool(((mean - x.to(torch.float64).mean(0)).abs() <= 2 * n_rows * EPS * offset).all())
    assert torch.equal(covariance, covariance.mT)


def test_constant_channel_has_exactly_no_covariance() -> None:
    x = normal(0, 300, 1, 3)
    x[..., 1] = 1000 / 3
    original, d = normal(1, 300, 1, 3) + 1000, normal(2, 300, 1, 2) + 1000
    moments = moments_of(x, original, d)
    covariance, mean = centred(moments)
    drift = drift_covariance(normal(3, 1, 2, 3), moments)
    assert torch.equal(covariance[0, 1], torch.zeros(3, dtype=torch.float64))
    assert torch.equal(covariance[0, :, 1], torch.zeros(3, dtype=torch.float64))
    assert torch.equal(drift[0, :, 1], torch.zeros(2, dtype=torch.float64))
    assert bool((covariance[0, [0, 2], [0, 2]] > 0.5).all())
    assert mean[0, 1] == pytest.approx(1000 / 3)


def test_second_moment_is_not_centred() -> None:
    x = integers(5, 8, 2, 3)  # eight rows: the division is exact
    assert torch.equal(second_moment(moments_of(x)), products(x, x) / 8)


def test_means_of_both_inputs() -> None:
    x, original = integers(0, 8, 1, 3), integers(1, 8, 1, 3)
    mean, mean_original = means(moments_of(x, original))
    assert torch.equal(mean, sum(x) / 8)
    assert torch.equal(mean_original, sum(original) / 8)
    assert torch.equal(means(moments_of(x))[1], mean)


@pytest.mark.parametrize("has_original", [False, True])
@pytest.mark.parametrize("has_residual", [False, True])
def test_drift_is_the_definition(has_original: bool, has_residual: bool) -> None:
    n_rows, weight = 60, normal(9, 2, 4, 3)
    x = normal(0, n_rows, 2, 3) + 1
    original = x + 0.3 * normal(1, n_rows, 2, 3) + 2 if has_original else None
    d = normal(2, n_rows, 2, 4) + 0.5 * x[..., :1] if has_residual else None
    v = torch.zeros(n_rows, 2, 4, dtype=torch.float64)
    for t in range(n_rows):
        for g in range(2):
            v[t, g] += weight[g] @ (original[t, g] - x[t, g]) if original is not None else 0
            v[t, g] += d[t, g] if d is not None else 0
    v_moving, x_moving = v - v.mean(0), x - x.mean(0)
    moments = moments_of(x, original, d)
    # Every term is a mean of products below `largest`; n_rows roundings each, 3 inputs, 4 outputs, a few terms.
    largest = float((1 + weight.abs().max()) ** 2 * (1 + x.abs().max() + v.abs().max()) ** 2)
    rounding = 10 * 3 * 4 * n_rows * EPS * largest
    wanted = products(v_moving, x_moving) / n_rows
    assert bool(((drift_covariance(weight, moments) - wanted).abs() <= rounding).all())
    variance = v_moving.square().mean(0).sum(1)
    assert bool(((drift_variance(weight, moments) - variance).abs() <= rounding).all())


@pytest.mark.parametrize("n_kept", [1, 3, 5])
def test_sums_of_unlike_widths_are_the_definition(n_kept: int) -> None:
    x, original, d = integers(0, 7, 2, n_kept), integers(1, 7, 2, 5), integers(2, 7, 2, 4)
    got = moments_of(x, original, d)
    assert got.cross is not None
    assert torch.equal(got.cross, products(original, x))
    assert got.xx_original is not None
    assert torch.equal(got.xx_original, products(original, original))
    assert got.residual_original is not None
    assert torch.equal(got.residual_original, products(d, original))
    first, second = (
        moments_of(*(a[rows] for a in (x, original, d))) for rows in (slice(3), slice(3, 7))
    )
    assert_equal(add_moments(first, second), got)


@pytest.mark.parametrize("has_original", [False, True])
@pytest.mark.parametrize("has_residual", [False, True])
def test_wanted_output_is_that_of_the_rows(has_original: bool, has_residual: bool) -> None:
    n_rows, n_inputs = 40, 5 if has_original else 3
    weight, x = normal(0, 2, 4, n_inputs), normal(1, n_rows, 2, 3) + 2
    original = 0.5 * normal(2, n_rows, 2, 5) + x[..., :1] if has_original else None
    d = normal(3, n_rows, 2, 4) + 0.5 * x[..., :1] if has_residual else None
    seen = x if original is None else original
    out = torch.einsum("gmn,tgn->tgm", weight, seen) + (0 if d is None else d)
    moments = moments_of(x, original, d)
    moving = out - out.mean(0)
    # Means of products below `largest`; n_rows roundings each, 5 inputs, 4 outputs, a few terms.
    largest = float((1 + weight.abs().max()) ** 2 * (1 + seen.abs().max() + out.abs().max()) ** 2)
    rounding = 10 * 5 * 4 * n_rows * EPS * largest
    wanted = products(moving, x - x.mean(0)) / n_rows
    assert bool(((output_covariance(weight, moments) - wanted).abs() <= rounding).all())
    variance = moving.square().mean(0).sum(1)
    assert bool(((output_variance(weight, moments) - variance).abs() <= rounding).all())
    covariance = products(seen - seen.mean(0), seen - seen.mean(0)) / n_rows
    assert bool(((original_covariance(moments) - covariance).abs() <= rounding).all())


def test_drift_of_unlike_widths_is_refused() -> None:
    moments, weight = moments_of(integers(0, 4, 1, 2), integers(1, 4, 1, 3)), torch.ones(1, 2, 2)
    for function in (drift_covariance, drift_variance):
        with pytest.raises(
            ShapeError, match=r"3 original and 2 compressed inputs.*use refit_across"
        ):
            function(weight, moments)


def test_no_rows_have_no_mean() -> None:
    empty = moments_of(torch.zeros(0, 1, 3))
    assert empty.count == 0
    for function in (centred, second_moment, means):
        with pytest.raises(ShapeError, match=r"moments of 0 rows have no mean: give at least one"):
            function(empty)


def test_adding_what_was_not_collected_alike_is_refused() -> None:
    x = integers(0, 4, 1, 3)
    with pytest.raises(
        ShapeError, match=r"`cross`: found \(1, 3, 3\) and None, wanted equal sizes"
    ):
        add_moments(moments_of(x, x), moments_of(x))
    with pytest.raises(ShapeError, match=r"`residual`: found None and \(1, 3, 3\)"):
        add_moments(moments_of(x), moments_of(x, residual=x))
    with pytest.raises(ShapeError, match=r"`xx`: found \(1, 3, 3\) and \(1, 2, 2\).*same layer"):
        add_moments(moments_of(x), moments_of(x[..., :2].contiguous()))


def test_variance_of_the_drift_names_what_is_missing() -> None:
    x, weight = integers(0, 4, 1, 3), torch.ones(1, 2, 3)
    full = moments_of(x, x)
    lean = Moments(count=4, xx=full.xx, x=full.x, cross=full.cross, x_original=full.x_original)
    with pytest.raises(ShapeError, match=r"lack `xx_original`.*collect them with moments_of"):
        drift_variance(weight, lean)


@given(st.data(), SEEDS, st.integers(1, 3), st.sampled_from([1, 2, 4]))
@settings(max_examples=60)
def test_patches_are_the_convolution(
    data: st.DataObject, seed: int, n_space: int, groups: int
) -> None:
    def sizes(low: int, high: int) -> tuple[int, ...]:
        return tuple(
            data.draw(st.lists(st.integers(low, high), min_size=n_space, max_size=n_space))
        )

    space, kernel, stride, padding, dilation = (
        sizes(low, high) for low, high in ((3, 7), (1, 3), (1, 3), (0, 2), (1, 2))
    )
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    assume(all(r <= s + 2 * p for r, s, p in zip(reach, space, padding, strict=True)))
    x = integers(seed, 2, 4, *space)
    weight = integers(seed + 1, 8, 4 // groups, *kernel)
    convolve = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}[n_space]
    wanted = convolve(x, weight, None, stride, padding, dilation, groups)
    rows = unfold(x, kernel, stride, padding, dilation, groups)
    got = torch.einsum("tgn,gmn->tgm", rows, weight.reshape(groups, 8 // groups, -1))
    # Whole numbers: exact. Rows run over (batch, positions), outputs over (group, output).
    assert torch.equal(got.reshape(-1, 8), wanted.movedim(1, -1).reshape(-1, 8))


def test_patches_keep_the_type_and_the_input() -> None:
    x = integers(0, 1, 2, 5).to(torch.float32)
    before = x.clone()
    rows = unfold(x, (3,), (1,), (1,), (1,), 2)
    rows += 1
    assert rows.dtype == torch.float32
    assert rows.shape == (5, 2, 3)
    assert torch.equal(x, before)


def test_pointwise_patches_do_not_share_memory_with_the_input() -> None:
    x = integers(0, 1, 2, 1)
    before = x.clone()
    unfold(x, (1,), (1,), (0,), (1,), 1).add_(1)
    assert torch.equal(x, before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((3, 3), (1, 1), (0, 0), (1, 1), 3), r"4 channels do not split into 3 groups"),
        (((3,), (1,), (0,), (1,), 1), r"has 2 spatial dimensions; kernel \(3,\).*one number a"),
        (((3, 3), (1, 1), (0, 0), (3, 1), 1), r"the dilated kernel covers \(7, 3\); use a larger"),
    ],
)
def test_patches_refuse_what_does_not_fit(arguments: tuple, message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        unfold(torch.zeros(1, 4, 5, 5), *arguments)
