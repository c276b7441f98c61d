"""Number formats of one site: grids, sharing, shifts, refits, determinism."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

import pytest
import torch
from torch import Tensor, nn

from tersor.analyse.calibration import site_statistics
from tersor.analyse.sites import find_sites
from tersor.core.errors import ConfigError
from tersor.core.records import Candidate, Site
from tersor.graph.contracts import Graph, Method, SiteChange, SiteStatistics
from tersor.methods.quantize import Quantize, choose_quantizer, layer_error
from tersor.observe.statistics import observe
from tersor.ops.float8 import RELATIVE_VARIANCE
from tersor.ops.moments import moments_of
from tests.unit.capturing import graph_of, random, trained

FOUR_BYTES = 4


@dataclass(frozen=True)
class Case:
    graph: Graph
    sites: Mapping[str, Site]
    statistics: Mapping[str, SiteStatistics]

    def propose(self, name: str, method: Quantize) -> dict[str, Candidate]:
        found = method.propose(self.sites[name], self.statistics[name])
        return {candidate.level: candidate for candidate in found}

    def apply(self, name: str, level: str, method: Quantize) -> SiteChange:
        candidate = self.propose(name, method)[level]
        return method.apply(self.sites[name], candidate, self.statistics[name])


def case(graph: Graph, *flat: Tensor) -> Case:
    sites = find_sites(graph)
    found = site_statistics(graph, sites, observe(graph, [flat], 1, seed=0))
    return Case(graph, {s.name: s for s in sites}, found)


class Net(nn.Module):
    """Readers of one tensor with outliers, a one-sided tensor, an almost one-sided one, padding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.table = nn.Embedding(7, 8), nn.Embedding(5, 8)
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))
        self.after_relu, self.after_gelu = nn.Linear(8, 6), nn.Linear(8, 6, bias=False)
        self.padded, self.plain = nn.Conv1d(8, 4, 3, padding=1), nn.Conv1d(8, 4, 3)
        self.depthwise = nn.Conv1d(8, 8, 3, groups=8)

    def forward(self, x: Tensor, i: Tensor) -> tuple[Tensor, ...]:
        y = x + self.embed(i).unsqueeze(1) + self.table(i % 5).unsqueeze(1)
        y = y * torch.tensor([1.0, 1, 1, 30, 1, 1, 1, 1])
        q, k, v = self.q(y), self.k(y), self.v(y)
        gelu = torch.nn.functional.gelu(k * 0.1)
        wide = torch.nn.functional.gelu(v * 0.1).transpose(1, 2)
        return (
            self.after_relu(q.relu()),
            self.after_gelu(gelu),
            self.padded(wide),
            self.plain(wide * 2),
            self.depthwise(wide * 3),
        )


@pytest.fixture(scope="module")
def net() -> Case:
    graph = graph_of(trained(Net()), random(4, 6, 8), torch.arange(4))
    return case(graph, random(600, 6, 8, seed=3), torch.arange(600) % 7)


LEVELS = ["f32", "bf16", "int8", "int8_weight"]


def test_it_is_a_method() -> None:
    assert isinstance(Quantize(), Method)


def test_levels_and_sizes(net: Case) -> None:
    for name, site in net.sites.items():
        found = net.propose(name, Quantize())
        is_table = site.op_kind == "embedding"
        assert list(found) == ([lv for lv in LEVELS if lv != "int8"] if is_table else LEVELS)
        rows = site.shape[0]
        n_weights = torch.Size(site.shape).numel()
        wanted = n_weights + FOUR_BYTES * rows * (1 if is_table else 2)  # steps, and a bias
        assert {found[lv].size_bytes for lv in found if lv.startswith("int8")} == {wanted}
        assert all(c.method == "quantize" and c.site == name for c in found.values())


@pytest.mark.parametrize("limit", [127, 63])
def test_codes_keep_to_the_limit_and_the_error_is_small(net: Case, limit: int) -> None:
    method = Quantize(weight_limit=limit)
    for name, site in net.sites.items():
        if site.op_kind == "embedding":
            continue
        change = net.apply(name, "int8", method)
        assert change.codes is not None
        assert change.codes.dtype == torch.int8
        assert change.codes.shape == site.shape
        assert limit // 2 < int(change.codes.abs().max()) <= limit
        # Uniform rounding noise of weights and activations, 127 steps to three deviations:
        # each adds about (3 / 127)^2 / 12 of the variance; 63 steps four times that.
        assert 0 < layer_error(net.statistics[name], change) < 2 * (127 / limit) ** 2 * 1e-3
        assert change.bias is not None
        assert change.bias.shape == (site.shape[0],)


def test_stored_weights_are_within_half_a_step(net: Case) -> None:
    for name in ("q", "depthwise", "embed"):
        change = net.apply(name, "int8_weight", Quantize())
        assert change.codes is not None
        assert change.scale is not None
        assert (change.quantizer, change.bias) == (None, None)
        rows = net.statistics[name].weight.reshape(change.codes.shape[0], -1)
        codes = change.codes.reshape(len(rows), -1).double()
        gap = (codes * change.scale.double().unsqueeze(1) - rows).abs().amax(1)
        clipped = codes.abs().amax(1) == 127  # a step chosen by squared error may clip the extreme
        step = change.scale.double()
        assert bool((gap[~clipped] <= step[~clipped] * (0.5 + 1e-5)).all())
        assert bool((gap <= 0.2 * rows.abs().amax(1) + step / 2).all())


def test_readers_of_one_tensor_get_one_quantiser(net: Case) -> None:
    changes = [net.apply(name, "int8", Quantize()) for name in ("q", "k", "v")]
    quantizers = [change.quantizer for change in changes]
    for field in fields(quantizers[0]):  # type: ignore[arg-type]
        values = [getattr(q, field.name) for q in quantizers]
        if isinstance(values[0], Tensor):
            assert all(torch.equal(v, values[0]) for v in values)
        else:
            assert len(set(values)) == 1
    details = [net.propose(name, Quantize())["int8"].detail for name in ("q", "k", "v")]
    assert details[0] == details[1] == details[2]
    # One channel is 30 times as large as the others: smoothing pays.
    assert details[0]["alpha"] is not None
    inverse = quantizers[0].inverse_scale  # type: ignore[union-attr]
    assert int(inverse.argmin()) == 3


@pytest.mark.parametrize(
    ("name", "grid", "has_shift"),
    [
        ("q", [-128, 127], False),
        ("after_relu", [0, 255], False),
        ("after_gelu", [0, 255], True),
        ("padded", [-128, 127], False),  # a shift would move the zeros at the border
        ("plain", [-128, 127], False),  # convolutions take the range that fits the tensor itself
    ],
)
def test_grids_and_shifts(net: Case, name: str, grid: list[int], has_shift: bool) -> None:
    detail = net.propose(name, Quantize())["int8"].detail
    assert detail["grid"] == grid
    assert (detail["shift"] > 0) == has_shift
    if has_shift and detail["alpha"] is None:
        assert detail["shift"] >= -net.statistics[name].low - 1e-6


def test_the_shift_is_taken_out_of_the_bias(net: Case) -> None:
    change = net.apply("after_gelu", "int8", Quantize())
    assert change.quantizer is not None
    assert change.quantizer.shift > 0
    statistics = net.statistics["after_gelu"]
    assert noise(statistics, change) < 5e-3
    rows = (change.codes.float() * change.scale.unsqueeze(1)).sum(1)  # type: ignore[union-attr]
    forgotten = replace(change, bias=change.bias + rows * change.quantizer.shift)
    assert noise(statistics, forgotten) > 20 * noise(statistics, change)


def noise(statistics: SiteStatistics, change: SiteChange) -> float:
    """Squared error of a linear layer that runs on codes by hand, of its output's variance."""
    q = change.quantizer
    assert q is not None
    assert change.codes is not None
    assert change.scale is not None
    x = statistics.channels.float()
    raw = x if q.inverse_scale is None else x * q.inverse_scale
    seen = ((raw + q.shift) / q.step).round().clamp(q.low, q.high) * q.step
    found = seen @ (change.codes.float() * change.scale.unsqueeze(1)).T + change.bias
    wanted = x.double() @ statistics.weight[0].T
    wanted = wanted if statistics.bias is None else wanted + statistics.bias
    return float((found - wanted).square().mean() / wanted.var())


def test_smoothing_is_undone_in_the_weight(net: Case) -> None:
    statistics = net.statistics["q"]
    change = net.apply("q", "int8", Quantize())
    assert change.quantizer is not None
    assert change.quantizer.inverse_scale is not None
    assert noise(statistics, change) < 5e-3
    plain, alpha = choose_quantizer(statistics, (None,), 127)
    assert alpha is None
    assert plain.inverse_scale is None


def test_apply_repeats_and_reads_only(net: Case) -> None:
    def copies(statistics: SiteStatistics) -> list[Tensor]:
        moments = statistics.moments()
        values = [statistics.weight, statistics.channels, statistics.counts, statistics.edges]
        values += [moments.xx, moments.x, statistics.rows().original]
        readers = statistics.readers
        assert readers is not None
        values += [v for v in (statistics.bias, readers.amax, readers.weight) if v is not None]
        return [v.clone() for v in values]

    for name in ("q", "plain", "depthwise"):
        before = copies(net.statistics[name])
        first, second = (net.apply(name, "int8", Quantize()) for _ in range(2))
        assert all(
            torch.equal(a, b) for a, b in zip(before, copies(net.statistics[name]), strict=True)
        )
        for attribute in ("codes", "scale", "bias"):
            assert torch.equal(getattr(first, attribute), getattr(second, attribute))


def compressed(
    statistics: SiteStatistics, n: int, noise: float
) -> tuple[SiteStatistics, Tensor, Tensor]:
    """Statistics of a prefix that lost a third of two channels and adds noise; the inputs, too."""
    rows = statistics.moments().x.shape[1]
    x = random(n, rows, seed=8) @ random(rows, rows, seed=9) / rows**0.5
    xh = x + noise * random(n, rows, seed=10)
    xh[:, :2] *= 0.6
    halves = tuple(moments_of(xh[i::2].unsqueeze(1), x[i::2].unsqueeze(1)) for i in range(2))
    whole = moments_of(xh.unsqueeze(1), x.unsqueeze(1))
    found = replace(statistics, moments=lambda: whole, moments_of=lambda *_: halves)  # type: ignore[arg-type]
    return found, x, xh


def test_a_refit_takes_up_what_the_prefix_lost(net: Case) -> None:
    site = net.sites["after_gelu"]
    statistics, x, xh = compressed(net.statistics["after_gelu"], 4000, 0.05)
    candidate = net.propose("after_gelu", Quantize())["int8_weight"]
    wanted = x.double() @ statistics.weight[0].T

    def error(change: SiteChange) -> float:
        weight = change.codes.double() * change.scale.double().unsqueeze(1)  # type: ignore[union-attr]
        bias = 0 if change.bias is None else change.bias
        return float((xh.double() @ weight.T + bias - wanted).square().mean() / wanted.var())

    refitted = error(Quantize().apply(site, candidate, statistics))
    plain = error(Quantize().apply(site, candidate, replace(statistics, moments_of=None)))
    # Without noise the loss of two channels could be undone but for rounding; noise leaves about
    # noise^2 = 0.0025 of the variance. Not undone it is 2 / 8 x 0.4^2 = 0.04.
    assert refitted < 0.01
    assert plain > 2 * refitted


def test_an_empty_range_offers_no_int8(net: Case) -> None:
    silent = replace(net.statistics["q"], low=0.0, high=0.0)
    levels = [c.level for c in Quantize().propose(net.sites["q"], silent)]
    assert levels == ["f32", "bf16", "int8_weight"]
    apart = replace(net.sites["q"], tensor=None)
    assert "int8" not in [c.level for c in Quantize().propose(apart, net.statistics["q"])]


def test_a_row_of_zeros_stays_zero(net: Case) -> None:
    weight = net.statistics["q"].weight.clone()
    weight[0, 2] = 0
    statistics = replace(net.statistics["q"], weight=weight)
    for level in ("int8", "int8_weight"):
        candidate = net.propose("q", Quantize())[level]
        change = Quantize().apply(net.sites["q"], candidate, statistics)
        assert change.codes is not None
        assert change.scale is not None
        assert not change.codes[2].any()
        assert float(change.scale[2]) > 0


def test_native_levels_change_nothing(net: Case) -> None:
    for level in ("f32", "bf16"):
        change = net.apply("q", level, Quantize())
        assert [change.codes, change.scale, change.weight, change.bias, change.quantizer] == [
            None
        ] * 5
        assert layer_error(net.statistics["q"], change) == 0


@pytest.mark.parametrize("limit", [0, 128, -1])
def test_weight_limits_outside_int8_are_refused(limit: int) -> None:
    with pytest.raises(ConfigError, match=rf"weight_limit: found {limit}, wanted 1\.\.127"):
        Quantize(weight_limit=limit)


def test_unknown_levels_are_refused(net: Case) -> None:
    candidate = replace(net.propose("q", Quantize())["int8"])
    object.__setattr__(candidate, "level", "int4")  # as a plug-in without type checks might
    with pytest.raises(ConfigError, match="q: quantize has no level 'int4'"):
        Quantize().apply(net.sites["q"], candidate, net.statistics["q"])


def test_eight_bit_floats_of_linears(net: Case) -> None:
    method = Quantize(fp8=True)
    steps: dict[str, float] = {}
    for name, site in net.sites.items():
        found, is_linear = net.propose(name, method), site.op_kind == "linear"
        assert ("fp8" in found) == is_linear
        assert "fp8" not in net.propose(name, Quantize())
        if not is_linear:
            continue
        assert found["fp8"].size_bytes == found["int8"].size_bytes
        change = net.apply(name, "fp8", method)
        assert change.codes is not None
        assert change.codes.dtype == torch.float8_e4m3fn
        assert change.quantizer is not None
        assert change.quantizer.kind == "fp8"
        assert steps.setdefault(str(site.tensor), change.quantizer.step) == change.quantizer.step
        # Input and weight each add the share of a value's square that its rounding is off by.
        assert 0 < layer_error(net.statistics[name], change) < 2 * 2 * RELATIVE_VARIANCE


def test_eight_bit_floats_are_for_linears_alone(net: Case) -> None:
    name = next(n for n, site in net.sites.items() if site.op_kind == "conv")
    candidate = Candidate(site=name, level="fp8", method="quantize", size_bytes=1)
    with pytest.raises(ConfigError, match="fp8 is for linears"):
        Quantize(fp8=True).apply(net.sites[name], candidate, net.statistics[name])
