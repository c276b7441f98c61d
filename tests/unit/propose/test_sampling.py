"""When an error is known well enough, and which samples it is read from."""

import math
from collections.abc import Iterator, Mapping

import pytest
import torch
from torch import Tensor, nn

from tersor.core.errors import ConfigError
from tersor.graph.contracts import Graph
from tersor.graph.edit import copy_graph, rebuild
from tersor.graph.geometry import constant_error, output_error, output_spreads, sample_sensitivity
from tersor.propose.errors import sampled_errors
from tersor.propose.sampling import (
    Precision,
    by_shape,
    draw,
    gathered,
    mean_error,
    plan_scale,
    spread_order,
)
from tests.unit.capturing import graph_of, random


def test_looks_double_up_to_what_there_is() -> None:
    rule = Precision(least=16, most=100)
    assert rule.looks(1000) == (16, 32, 64, 100)
    assert rule.looks(64) == (16, 32, 64)
    assert rule.looks(40) == (16, 32, 40)
    assert rule.looks(5) == (5,)
    assert rule.looks(16) == (16,)
    assert Precision(least=8, most=8).looks(99) == (8,)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"relative": 0.0}, "relative=0.0, share=0.001 and floor=0.01, wanted a positive"),
        ({"share": -1.0}, "share=-1.0"),
        ({"floor": -1.0}, "floor=-1.0"),
        ({"least": 1}, "found 1 to 256 samples, wanted at least 2"),
        ({"least": 32, "most": 16}, "found 32 to 16 samples"),
    ],
)
def test_rules_that_make_no_sense_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Precision(**settings)  # type: ignore[arg-type]


def test_enough_is_a_tenth_or_little_to_the_plan_or_useless() -> None:
    rule = Precision(relative=0.1, share=0.01)
    errors = torch.tensor([1.0, 3.0] * 8, dtype=torch.float64)  # 2 +- 0.258
    assert mean_error(errors) == pytest.approx((2.0, math.sqrt(16 / 15) / 4))
    far = math.inf
    assert not rule.is_enough(errors, 0.0, far)
    assert rule.is_enough(errors.repeat(2), 0.0, far)  # 2 +- 0.180
    assert not rule.is_enough(errors, 25.0, far)  # allowed is 0.25
    assert rule.is_enough(errors, 26.0, far)
    assert not rule.is_enough(errors, 0.0, 1.6)  # at least 1.48
    assert rule.is_enough(errors, 0.0, 1.4)
    assert rule.is_enough(errors / 2600, 0.0, far)  # 0.01 of the floor of 0.01
    assert not rule.is_enough(errors / 2500, 0.0, far)
    assert rule.is_enough(torch.zeros(2), 0.0, far)
    assert rule.is_enough(torch.tensor([1.0, math.nan]), 0.0, far)


def test_the_scale_of_a_plan_is_no_sites_own() -> None:
    means = {0: 1.0, 1: 2.0, 2: 3.0, 3: 5.0, 4: 1e9, 5: math.nan}
    sites = {0: "a", 1: "a", 2: "a", 3: "b", 4: "c", 5: "c"}
    assert plan_scale(means, sites) == 3 * 5.0
    assert plan_scale({}, {}) == 0.0


@pytest.mark.parametrize("count", [1, 2, 7, 64, 1000])
def test_every_beginning_is_spread_over_all(count: int) -> None:
    order = spread_order(count)
    assert sorted(order.tolist()) == list(range(count))
    for start in range(16, count, 37):
        places = torch.cat([order[:start].sort().values.double(), torch.tensor([float(count)])])
        gaps = places.diff(prepend=torch.tensor([0.0], dtype=torch.float64))
        assert float(gaps.max()) <= 3 * count / start  # three-distance theorem: 2.6, and rounding


def test_chunks_hold_every_wanted_sample_once_by_shape() -> None:
    long, short = torch.arange(60.0).reshape(60, 1), torch.arange(60.0, 90.0).repeat(2, 1).mT
    groups = by_shape([(long[:25],), (short,), (long[25:],)])
    assert [len(flat[0]) for flat in groups] == [60, 30]
    index = spread_order(90)[:47]
    found = list(gathered(groups, index, 7))
    assert all(torch.equal(flat[0][:, 0].long(), rows) for flat, rows in found)
    assert all(0 < len(rows) <= 7 for _, rows in found)
    assert sorted(torch.cat([r for _, r in found]).tolist()) == sorted(index.tolist())
    for stop in (18, 36, 72):  # shapes in their shares
        assert int((spread_order(90)[:stop] >= 60).sum()) == pytest.approx(stop / 3, abs=2)


def test_equally_sensitive_samples_are_drawn_once() -> None:
    looks = draw(torch.ones(90), Precision(least=18, most=80))
    order = spread_order(90)
    for look, (start, stop) in zip(looks, ((0, 18), (18, 36), (36, 72), (72, 80)), strict=True):
        assert torch.equal(look.draws, order[:stop])
        assert look.fresh.tolist() == sorted(order[start:stop].tolist())
        assert bool((look.weights == 1).all())
    assert torch.equal(draw(torch.zeros(9), Precision())[0].draws, spread_order(9))


def test_sensitive_samples_are_drawn_more_often_and_count_for_less() -> None:
    """Errors in proportion to the sensitivity, of which a few samples hold nearly all."""
    sensitivity = torch.rand(400, generator=torch.Generator().manual_seed(3)).double() ** 30
    noise = torch.rand(400, generator=torch.Generator().manual_seed(4)).double() + 0.5
    errors = sensitivity * noise
    looks = draw(sensitivity, Precision(least=16, most=256))
    assert [len(look.draws) for look in looks] == [16, 32, 64, 128, 256]
    read: list[int] = []
    for look in looks:
        read += look.fresh.tolist()
        assert len(read) == len(set(read))
        assert set(read) == set(look.draws.tolist())
        assert float(look.weights.max()) <= 2.0
    p = 0.5 / 400 + 0.5 * sensitivity / sensitivity.sum()
    torch.testing.assert_close(looks[-1].weights, 1 / (400 * p[looks[-1].draws]))
    drawn = torch.bincount(looks[-1].draws, minlength=400).double() / 256
    assert float((drawn.cumsum(0) - p.cumsum(0)).abs().max()) < 3 / 256  # evenly spread
    wanted = float(errors.mean())
    for look, even in zip(looks, draw(torch.ones(400), Precision(least=16, most=256)), strict=True):
        mean, deviation = mean_error(errors[look.draws] * look.weights)
        assert abs(mean - wanted) < 2 * deviation
        assert deviation < 0.5 * mean_error(errors[even.draws])[1] or len(look.draws) < 64
    whole = draw(sensitivity, Precision(most=512))[-1]  # as many draws as samples: all of them
    assert sorted(whole.draws.tolist()) == list(range(400))
    assert float((errors[whole.draws] * whole.weights).mean()) == pytest.approx(wanted)


class Answers(nn.Module):
    """y = x w, three inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 3, bias=False)
        with torch.no_grad():
            self.a.weight.copy_(torch.eye(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x)


class Variants(Mapping[int, Graph]):
    """The graph with other weights each; counts how often each is asked for."""

    def __init__(self, graph: Graph, weights: Mapping[int, Tensor]) -> None:
        self.graph, self.weights = graph, weights
        self.asked: list[int] = []

    def __getitem__(self, key: int) -> Graph:
        self.asked.append(key)
        fresh, tensors = copy_graph(self.graph.module)
        return Graph(
            rebuild(fresh, {**tensors, "a.weight": self.weights[key]}),
            self.graph.signature,
            self.graph.example,
        )

    def __iter__(self) -> Iterator[int]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)


def scaled(*factors: float) -> Tensor:
    """What of each input's size is missing in its output."""
    return torch.diag(1 - torch.tensor(factors))


@pytest.fixture(scope="module")
def graph() -> Graph:
    return graph_of(Answers(), random(4, 3))


@pytest.fixture(scope="module")
def data() -> Tensor:
    """+-1; rare and large; normal."""
    x = random(300, 3, seed=5)
    x[:, 0] = x[:, 0].sign()
    x[:, 1] = x[:, 1].exp() ** 2
    return x


def measure(variants: Variants, data: Tensor, **options: object) -> dict[int, Tensor]:
    sites = {i: f"site {i}" for i in variants}
    precision = options.pop("precision", Precision())
    return sampled_errors(
        variants.graph,
        variants,
        [(data[:100],), (data[100:],)],
        "values",
        sites=sites,
        precision=precision,
        **options,
    )  # type: ignore[arg-type]


def test_constant_errors_stop_first_and_wide_ones_last(graph: Graph, data: Tensor) -> None:
    weights = {0: scaled(0.1, 0, 0), 1: scaled(0, 0.1, 0), 2: scaled(0, 0, 0.1)}
    variants, ticks = Variants(graph, weights), []
    found = measure(variants, data, precision=Precision(share=0.0), advance=lambda: ticks.append(1))
    counts = [len(found[i]) for i in range(3)]
    # chi^2 varies by sqrt(2) of its mean: 200 samples for a tenth
    assert counts == [16, 256, 256]
    assert len(ticks) == 3
    # (type checks look at the first one, too)
    assert [i for i in variants.asked if i] == [1, 2]
    mean, deviation = mean_error(found[2])
    assert deviation <= 0.1 * mean
    assert mean_error(found[2][:128])[1] > 0.1 * mean_error(found[2][:128])[0]
    mean, deviation = mean_error(found[1])
    assert deviation > 0.1 * mean  # as many as there may be


def test_edits_that_do_not_fit_in_memory_are_made_again(
    graph: Graph, data: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = {i: scaled(0, 0, 0.1 * (i + 1)) for i in range(4)}
    rule = Precision(share=0.0, least=32, most=64)
    plenty = measure(Variants(graph, weights), data, precision=rule)
    own = 4 * 3 * 3
    for room, asked in ((own, [1, 2, 3] * 2), (2 * own, [1, 2, 3, 2, 3]), (0, [1, 2, 3] * 2)):
        monkeypatch.setattr("tersor.propose.errors._EDIT_BYTES", room)
        variants = Variants(graph, weights)
        found = measure(variants, data, precision=rule)
        assert [i for i in variants.asked if i] == asked
        assert all(torch.equal(found[i], plenty[i]) for i in weights)


def test_samples_are_the_same_for_all_in_the_same_order(graph: Graph, data: Tensor) -> None:
    weights = {0: scaled(0.1, 0, 0), 1: scaled(0, 0.1, 0.1), 2: scaled(0, 0, 0.3)}
    variants = Variants(graph, weights)
    found = measure(variants, data, precision=Precision(share=0.0))
    x = data[spread_order(300)[:256]]
    spreads = output_spreads([(x[:16],)])
    for i, weight in weights.items():
        wanted = output_error([x @ weight], [x], "values", spreads)[: len(found[i])]
        torch.testing.assert_close(found[i], wanted, rtol=1e-4, atol=1e-9)
    again = measure(Variants(graph, weights), data, precision=Precision(share=0.0))
    assert all(torch.equal(found[i], again[i]) for i in weights)


def test_what_no_plan_feels_reads_few(graph: Graph, data: Tensor) -> None:
    tiny = Variants(graph, {0: scaled(0, 1e-4, 0)})  # 1e-8 of its square
    assert len(measure(tiny, data)[0]) == 16


def test_what_is_negligible_or_useless_or_thinned_reads_few(graph: Graph, data: Tensor) -> None:
    mild, wide, hopeless = scaled(0, 0, 1e-3), scaled(0, 0, 0.1), scaled(-30.0, -30.0, -30.0)
    variants = Variants(graph, {0: mild, 1: wide, 2: hopeless, 3: wide})
    found = measure(variants, data, few=frozenset({3}))
    assert [len(found[i]) for i in range(4)] == [16, 256, 16, 16]
    assert torch.equal(found[3], found[1][:16])


def test_all_samples_without_a_rule_and_no_more_than_there_are(graph: Graph, data: Tensor) -> None:
    variants = Variants(graph, {0: scaled(0.1, 0, 0)})
    assert len(measure(variants, data, precision=None)[0]) == 300
    assert len(measure(variants, data[:101])[0]) == 16
    few = measure(variants, data[:101], precision=Precision(share=0.0, least=64))
    assert len(few[0]) == 64
    for count in (1, 3):
        short = sampled_errors(
            graph, variants, [(data[:count],)], "values", sites={0: "s"}, precision=Precision()
        )
        assert len(short[0]) == count


def test_stopping_early_is_a_little_too_low_as_documented() -> None:
    """The bias of the rule on log-normal errors with sigma = 1, by simulation."""
    rule, generator = Precision(share=0.0), torch.Generator().manual_seed(0)
    draws = torch.randn(2000, 256, generator=generator, dtype=torch.float64).exp()
    found = []
    for row in draws:
        stop = next(
            n for n in rule.looks(256) if n == 256 or rule.is_enough(row[:n], 0.0, math.inf)
        )
        found.append(float(row[:stop].mean()))
    bias = sum(found) / len(found) / math.exp(0.5) - 1
    assert -0.025 < bias < -0.005  # +- 0.003


def test_spreads_do_not_depend_on_batches_and_constants_err_by_one() -> None:
    y = random(12, 5, seed=3).double()
    whole, parts = output_spreads([(y,)]), output_spreads([(y[:5],), (y[5:],)])
    assert whole == pytest.approx(parts)
    assert whole == pytest.approx((float(y.var(0).mean()),))
    error = output_error([y.mean(0).expand_as(y)], [y], "values", whole)
    assert float(error.mean()) == pytest.approx(11 / 12)
    ragged = output_spreads([(y,), (random(1, 3),)])  # a single one of its shape has no spread
    assert ragged == pytest.approx(whole)
    assert output_spreads([(y[:1],)]) == pytest.approx((float(y[0].square().mean()),))
    assert constant_error([(y, y)], "values") == 2.0
    logits = random(20, 4, seed=4) * 3
    constant = logits.softmax(-1).mean(0).log().expand_as(logits)
    wanted = float(output_error([constant], [logits], "logits").mean())
    assert constant_error([(logits[:7],), (logits[7:],)], "logits") == pytest.approx(
        wanted, rel=1e-5
    )
    assert constant_error([(torch.arange(3),)], "logits") == 0.0


def test_sensitivity_is_twice_the_divergence_of_independent_logits() -> None:
    logits = random(6, 4, seed=8).double() * 2
    moved = logits + 1e-3 * random(20000, 6, 4, seed=9).double()
    divergence = torch.stack([output_error([m], [logits], "logits") for m in moved[:4000]]).mean(0)
    found = sample_sensitivity([logits], "logits", 6)
    torch.testing.assert_close(found * 0.5e-6, divergence, rtol=0.08, atol=0)
    dense = logits.reshape(2, 3, 4).movedim(2, 1).unsqueeze(3)  # [n, classes, h, w]
    wanted = found.reshape(2, 3).mean(1)
    torch.testing.assert_close(sample_sensitivity([dense, torch.arange(2)], "logits", 2), wanted)
    assert sample_sensitivity([logits], "values", 6).tolist() == [1.0] * 6
