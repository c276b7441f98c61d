"""Ranks of one layer: what is offered, what it takes, and that the chain is W' x + b."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn

from tersor.analyse.calibration import site_statistics
from tersor.analyse.sites import find_sites
from tersor.core.errors import ConfigError
from tersor.core.rank_levels import RankLevel, rank_of
from tersor.core.records import Candidate, Site
from tersor.graph.apply import apply
from tersor.graph.contracts import Graph, Method, SiteChange, SiteStatistics
from tersor.graph.edit import parameters_by_name
from tersor.graph.factors import product, run_chain
from tersor.methods.lowrank import Lowrank
from tersor.observe.statistics import observe
from tests.unit.capturing import graph_of, random, trained

METHOD = Lowrank(rank_step=lambda _: 8)


class Net(nn.Module):
    """A wide linear layer behind a GELU, square and strided kernels, and layers without ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.square = nn.Conv2d(32, 32, 3, padding=1, bias=False)
        self.strided = nn.Conv2d(32, 48, 3, stride=2)
        self.line, self.depthwise = nn.Conv1d(48, 40, 5), nn.Conv1d(40, 40, 3, groups=40)
        self.wide, self.last = nn.Linear(40, 64), nn.Linear(64, 48)
        self.small = nn.Linear(48, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = self.strided(self.square(x).relu())
        x = self.depthwise(self.line(x.flatten(2)).relu()).mean(2)
        return self.small(self.last(torch.nn.functional.gelu(self.wide(x))))


@dataclass(frozen=True)
class Case:
    graph: Graph
    sites: Mapping[str, Site]
    statistics: Mapping[str, SiteStatistics]

    def propose(self, name: str) -> dict[str, Candidate]:
        found = METHOD.propose(self.sites[name], self.statistics[name])
        return {str(candidate.level): candidate for candidate in found}

    def ranks(self, name: str, form: str) -> list[int]:
        levels = [v for v in self.propose(name) if v.startswith(form)]
        return [rank_of(v) for v in levels if rank_of(v)]

    def apply(self, name: str, level: str) -> SiteChange:
        return METHOD.apply(self.sites[name], self.propose(name)[level], self.statistics[name])


@pytest.fixture(scope="module")
def net() -> Case:
    graph = graph_of(trained(Net()), random(4, 3, 12, 12))
    sites = find_sites(graph)
    seen = observe(graph, [(random(300, 3, 12, 12, seed=3),)], 1, seed=0)
    return Case(graph, {s.name: s for s in sites}, site_statistics(graph, sites, seen))


FACTORED = ("square", "strided", "line", "wide", "last")


def test_it_is_a_method() -> None:
    assert isinstance(Lowrank(), Method)
    with pytest.raises(ConfigError, match="found most=0"):
        Lowrank(most=0)


def test_layers_without_ranks_are_offered_as_they_are(net: Case) -> None:
    for name in ("depthwise", "small"):
        assert list(net.propose(name)) == ["f32", "bf16"]


@pytest.mark.parametrize("name", FACTORED)
def test_ranks_are_tiles_below_break_even(net: Case, name: str) -> None:
    ranks = net.ranks(name, "f32")
    assert 1 <= len(ranks) <= 4
    assert ranks == sorted(ranks, reverse=True)
    assert ranks == net.ranks(name, "int8")
    assert all(rank % 8 == 0 for rank in ranks)
    found, site = net.propose(name), net.sites[name]
    whole = torch.Size(site.shape).numel()
    for rank in ranks:
        factors = net.apply(name, f"f32_rank{rank}").factors
        assert sum(f.dense().numel() for f in factors) < whole
        assert found[f"f32_rank{rank}"].size_bytes < site.size_bytes + 4 * site.shape[0]


@pytest.mark.parametrize("name", FACTORED)
@pytest.mark.parametrize("form", ["f32", "int8"])
def test_sizes_are_those_of_the_edited_graph(net: Case, name: str, form: str) -> None:
    level = f"{form}_rank{net.ranks(name, form)[-1]}"
    edited = apply(net.graph, [net.apply(name, level)])
    before, after = (parameters_by_name(g.module) for g in (net.graph, edited))
    gone = sum(t.nbytes for n, t in before.items() if n not in after)
    new = sum(t.nbytes for n, t in after.items() if n not in before)
    scales = sum(t.nbytes for n, t in after.items() if n.endswith("inverse_scale"))
    assert net.propose(name)[level].size_bytes == new - scales
    assert gone == net.sites[name].size_bytes


@pytest.mark.parametrize("name", FACTORED)
def test_the_chain_is_one_weight_and_a_bias(net: Case, name: str) -> None:
    """At the borders, too: the first op has no bias that its zeros would miss."""
    site = net.sites[name]
    change = net.apply(name, f"f32_rank{net.ranks(name, 'f32')[0]}")
    whole = product(change.factors)
    assert tuple(whole.shape) == site.shape
    data = random(5, *_input_shape(name), seed=9)
    window = net.statistics[name].window
    assert change.bias is not None
    if window is None:
        wanted = torch.nn.functional.linear(data, whole.float(), change.bias)
    else:
        call = torch.nn.functional.conv2d if len(window.kernel) == 2 else torch.nn.functional.conv1d
        padding = [before for before, _ in window.padding]
        wanted = call(data, whole.float(), change.bias, window.stride, padding)
    found = run_chain(data, change)
    assert torch.allclose(found, wanted, atol=1e-5 * float(wanted.abs().max()))


def _input_shape(name: str) -> tuple[int, ...]:
    shapes = {"square": (32, 12, 12), "strided": (32, 12, 12), "line": (48, 25)}
    return shapes.get(name, (40,) if name == "wide" else (64,))


@pytest.mark.parametrize("name", FACTORED)
@pytest.mark.parametrize("form", ["f32", "int8"])
def test_errors_fall_with_the_rank(net: Case, name: str, form: str) -> None:
    losses = [net.apply(name, f"{form}_rank{r}").report["loss"] for r in net.ranks(name, form)]
    assert losses == sorted(losses)
    assert 0 < losses[0] < 1


@pytest.mark.parametrize("name", FACTORED)
def test_int8_adds_little_to_what_the_rank_loses(net: Case, name: str) -> None:
    rank = net.ranks(name, "f32")[0]
    wanted = net.graph.run([DATA])[0]
    errors = []
    for form in ("f32", "int8"):
        found = apply(net.graph, [net.apply(name, f"{form}_rank{rank}")]).run([DATA])[0]
        errors.append(float((found - wanted).square().mean() / wanted.var()))
    # Three roundings to 8 bits, each about (3 / 127)^2 / 12 of the variance, some of it clipped.
    assert errors[1] < errors[0] * 1.25 + 4e-4


DATA = random(200, 3, 12, 12, seed=5)


def test_a_rank_above_what_is_left_is_that(net: Case) -> None:
    """Widths may be cut below a rank that was offered for the whole layer."""
    candidate = replace(net.propose("last")[f"f32_rank{net.ranks('last', 'f32')[0]}"])
    statistics = net.statistics["last"]
    few = replace(statistics, weight=statistics.weight[:, :5], bias=None)
    site = replace(net.sites["last"], shape=(5, 64))
    change = METHOD.apply(site, candidate, few)
    assert [tuple(f.dense().shape) for f in change.factors] == [(5, 64), (5, 5)]
    assert torch.allclose(product(change.factors), statistics.weight[0, :5], atol=1e-5)


def test_levels_that_it_does_not_have(net: Case) -> None:
    candidate = Candidate(site="wide", level="int8", method="lowrank", size_bytes=0)
    with pytest.raises(ConfigError, match="lowrank has no level 'int8'"):
        METHOD.apply(net.sites["wide"], candidate, net.statistics["wide"])
    grouped = replace(candidate, level=RankLevel("f32_rank8"), site="depthwise")
    with pytest.raises(ConfigError, match="depthwise: lowrank has no level"):
        METHOD.apply(net.sites["depthwise"], grouped, net.statistics["depthwise"])
