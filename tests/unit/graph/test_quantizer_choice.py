"""The grid of a tensor: by the readers' outputs, one for all of them, chosen once."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tersor.graph import quantizer_choice
from tersor.graph.contracts import Quantizer, Readers, Rows, SiteStatistics
from tersor.graph.quantizer_choice import (
    _quantile,
    best_range,
    choose_quantizer,
    range_errors,
    range_steps,
)
from tersor.observe.streams import Histogram
from tersor.ops.grids import fake_quantize
from tersor.ops.smoothing import smoothing_scale

ALPHAS = (None, 0.3, 0.7)


def seen(rows: int, seed: int = 0) -> SiteStatistics:
    """A tensor with one loud channel, and readers of so many rows in all."""
    draw = torch.Generator().manual_seed(seed)
    channels = torch.randn(300, 12, generator=draw)
    channels[:, 3] *= 20
    weight = torch.randn(rows, 12, generator=draw)
    return SiteStatistics(
        weight=weight.double().unsqueeze(0),
        bias=None,
        moments=lambda: pytest.fail("not needed"),
        channels=channels,
        counts=torch.ones(2, dtype=torch.float64),
        edges=torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64),
        low=float(channels.min()),
        high=float(channels.max()),
        rows=lambda: pytest.fail("not needed"),
        readers=Readers(amax=weight.abs().amax(0), is_padded=False, weight=weight),
    )


def cost(statistics: SiteStatistics, quantizer: Quantizer) -> Tensor:
    """Mean relative error of the outputs through the grid, by definition; weights as they are."""
    assert statistics.readers is not None
    weight = statistics.readers.weight
    assert weight is not None
    x = statistics.channels
    scale = torch.ones(12) if quantizer.inverse_scale is None else quantizer.inverse_scale
    grid = fake_quantize(x * scale + quantizer.shift, quantizer.step, quantizer.low, quantizer.high)
    error = ((grid - quantizer.shift) / scale - x) @ weight.mT
    energy = (x @ weight.mT).square().sum(1)
    return (error.square().sum(1) / (energy + energy[energy > 0].median())).mean()


@pytest.mark.parametrize("rows", [5, 40])  # by the weight itself, and by its W^T W
@pytest.mark.parametrize("alpha", ALPHAS)
def test_the_grid_of_the_least_cost_is_found(rows: int, alpha: float | None) -> None:
    statistics = seen(rows)
    assert statistics.readers is not None
    found, _ = choose_quantizer(statistics, (alpha,), 127)
    sample = statistics.channels
    scales: list[Tensor | None] = [None]
    if alpha is not None:
        every = quantizer_choice._largest(sample)
        scales = [smoothing_scale(a, statistics.readers.amax, alpha).float() for a in every]
    grids = [q for scale in scales for q in quantizer_choice._grids(statistics, sample, scale)]
    least = min(float(cost(statistics, q)) for q in grids)
    assert float(cost(statistics, found)) == pytest.approx(least, rel=0.05)


@pytest.mark.parametrize("rows", [5, 40])
def test_costs_are_those_of_outputs_in_both_products(rows: int) -> None:
    statistics = seen(rows)
    readers = statistics.readers
    assert readers is not None
    assert readers.weight is not None
    expected = quantizer_choice._Expected(
        statistics.channels, readers.weight, 10**9
    )  # exact weights
    assert (expected.gram is None) == (rows == 5)
    for alpha in ALPHAS:
        found, _ = choose_quantizer(statistics, (alpha,), 127)
        scale = None if found.inverse_scale is None else 1 / found.inverse_scale
        smoothed = quantizer_choice._Smoothed(alpha, scale)
        wanted = float(cost(statistics, found))
        assert expected.cost(smoothed, found) == pytest.approx(wanted, rel=1e-2)
        own = torch.zeros(len(statistics.channels))
        # As if channels erred on their own: near, as they nearly do.
        assert expected.rough(smoothed, found, own) == pytest.approx(wanted, rel=0.2)


def gelu(rows: int = 600) -> SiteStatistics:
    """A tensor as GELU gives it: quiet channels, and one that is huge in a few rows."""
    draw = torch.Generator().manual_seed(1)
    loud = torch.rand(64, generator=draw) * 2 + 0.2
    channels = torch.nn.functional.gelu(torch.randn(rows, 64, generator=draw) * loud)
    channels[::30, 5] = 25.0
    weight = torch.randn(200, 64, generator=draw)
    return replace(
        seen(4),
        channels=channels,
        low=float(channels.min()),
        high=float(channels.max()),
        readers=Readers(amax=weight.abs().amax(0), is_padded=False, weight=weight),
    )


def off(statistics: SiteStatistics, quantizer: Quantizer) -> float:
    """Squared error of the outputs, as a share of them."""
    assert statistics.readers is not None
    weight = statistics.readers.weight
    assert weight is not None
    x, scale = statistics.channels, torch.ones(64)
    if quantizer.inverse_scale is not None:
        scale = 1 / quantizer.inverse_scale
    grid = fake_quantize(x / scale + quantizer.shift, quantizer.step, quantizer.low, quantizer.high)
    error = ((grid - quantizer.shift) * scale - x) @ weight.mT
    return float(error.square().sum() / (x @ weight.mT).square().sum())


def test_quiet_channels_do_not_take_a_shifted_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    statistics = gelu()
    alphas = (None, 0.5, 0.7, 0.8, 0.9, 1.0)
    found = off(statistics, choose_quantizer(statistics, alphas, 127)[0])
    plain = off(statistics, choose_quantizer(statistics, (None,), 127)[0])

    def quantiles(sample: Tensor) -> Iterator[Tensor]:
        yield torch.quantile(sample.abs(), 0.999, dim=0).clamp_min(1e-6)

    monkeypatch.setattr(quantizer_choice, "_largest", quantiles)
    before = off(statistics, choose_quantizer(statistics, (*alphas, 0.95), 127)[0])
    assert found < 0.8 * before
    assert found < 0.2 * plain


def test_rows_of_zeros_do_not_decide() -> None:
    """A zero is off the points of a shifted grid: nothing to speak of beside rows that are heard."""
    statistics = gelu()
    readers = statistics.readers
    assert readers is not None
    assert readers.weight is not None
    silent = statistics.channels.clone()
    silent[::3] = silent[1::3] = 0
    found = quantizer_choice._Expected(silent, readers.weight, 127).scale
    heard = quantizer_choice._Expected(silent[2::3], readers.weight, 127).scale
    assert float(found.min()) > 0.3 * float(heard.min())
    assert torch.isfinite(quantizer_choice._Expected(0 * silent, readers.weight, 127).scale).all()


def test_a_loud_channel_is_smoothed() -> None:
    assert choose_quantizer(seen(40), ALPHAS, 127)[1] is not None


def test_readers_share_what_was_decided_until_the_tensor_changes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    statistics, calls = seen(5), []
    original = quantizer_choice._least_cost
    monkeypatch.setattr(quantizer_choice, "_least_cost", lambda *a: calls.append(1) or original(*a))
    first = choose_quantizer(statistics, ALPHAS, 127)
    again = choose_quantizer(replace(statistics, weight=statistics.weight[:, :2]), ALPHAS, 127)
    assert again[0] is first[0]
    assert len(calls) == 1
    changed = replace(statistics, channels=statistics.channels * 2, high=2 * statistics.high)
    other = choose_quantizer(changed, ALPHAS, 127)
    assert len(calls) == 2
    assert other[0].step != first[0].step
    choose_quantizer(statistics, (None,), 127)
    choose_quantizer(statistics, ALPHAS, 63)
    assert len(calls) == 4


def convolution(outlier: float, count: int = 6000) -> SiteStatistics:
    """A convolution's input: values below one, and one row in a thousand with a value far out."""
    draw = torch.Generator().manual_seed(4)
    rows = torch.rand(count, 1, 9, generator=draw)
    rows[::1000, 0, 0] = outlier
    weight = torch.randn(1, 6, 9, generator=draw, dtype=torch.float64)
    weight[:, :, 0] *= 1e-3  # to which the outputs hardly listen
    histogram = Histogram()
    histogram.add_(rows)
    return SiteStatistics(
        weight=weight,
        bias=None,
        moments=lambda: pytest.fail("not needed"),
        channels=rows[:, 0],
        counts=histogram.counts,
        edges=histogram.edges(),
        low=histogram.low,
        high=histogram.high,
        rows=lambda: Rows(original=rows, compressed=rows, output=rows),
        readers=Readers(amax=torch.ones(9), is_padded=False),
        channel_dim=1,
    )


def test_ranges_are_chosen_by_the_outputs_of_the_layer() -> None:
    """By definition: the outliers are read by weights next to nothing, so clipping them is right."""
    statistics = convolution(outlier=8.0)
    steps, errors = range_steps(statistics), range_errors(statistics)
    rows = statistics.rows().compressed[:, 0].double()
    for rule, step in steps.items():
        moved = (fake_quantize(rows, step, 0, 255) - rows) @ statistics.weight[0].T
        wanted = (moved - moved.mean(0)).square().sum(1)
        torch.testing.assert_close(errors[rule], wanted, rtol=1e-4, atol=1e-9)
    found, alpha = choose_quantizer(statistics, ALPHAS, 127)
    best = best_range(errors)
    assert best not in ("mse", "max")
    assert (found.step, alpha) == (steps[best], None)
    assert found.step < steps["mse"]
    assert errors[best].mean() < 0.5 * errors["mse"].mean()


def test_all_readers_of_a_tensor_take_the_range_of_the_first() -> None:
    first = convolution(outlier=8.0)
    other = replace(first, weight=first.weight.flip(2))
    own, _ = choose_quantizer(replace(other, readers=Readers(amax=torch.ones(9), is_padded=False)),
                              (None,), 127)  # fmt: skip
    one, _ = choose_quantizer(first, (None,), 127)
    two, _ = choose_quantizer(other, (0.5,), 63)
    assert own.step != one.step
    assert two == one


def test_a_range_that_is_not_surely_better_is_not_taken() -> None:
    errors = {"max": torch.tensor([1.0, 1.0, 1.0, 1.0]), "mse": torch.tensor([1.0, 1.0, 1.0, 2.0])}
    assert best_range(errors) == "mse"  # one row tells nothing
    assert best_range({"max": errors["max"] / 2, "mse": errors["mse"]}) == "max"
    assert best_range({"max": torch.zeros(1), "mse": torch.ones(1)}) == "mse"
    assert best_range({"max": torch.zeros(0), "mse": torch.zeros(0)}) == "mse"


@pytest.mark.parametrize("rows", [1, 2, 3, 999, 1000, 1001, 4096])
@pytest.mark.parametrize("share", [0.5, 0.999, 1.0])
def test_a_quantile_is_torchs(rows: int, share: float) -> None:
    values = torch.rand(rows, 7, generator=torch.Generator().manual_seed(rows))
    found = _quantile(values, share)
    torch.testing.assert_close(found, torch.quantile(values, share, dim=0), rtol=1e-5, atol=1e-6)
