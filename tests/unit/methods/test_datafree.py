"""Weights by themselves alone: no statistic is asked for, and what quantize does where there are none."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tersor.analyse.calibration import embedding_statistics, self_check, site_statistics
from tersor.analyse.sites import find_sites
from tersor.core.errors import ConfigError
from tersor.core.records import Candidate, Site
from tersor.graph.apply import apply
from tersor.graph.contracts import Graph, Method, SiteStatistics
from tersor.graph.edit import attribute
from tersor.graph.storing import aim_of
from tersor.methods.datafree import Datafree
from tersor.methods.quantize import Quantize
from tersor.observe.statistics import observe
from tersor.ops.assumed import plain_moments
from tersor.ops.moments import centred, moments_of
from tersor.transform.sequential import transform
from tests.unit.capturing import graph_of, random, trained

LOW = ("int4_weight", "int3_weight", "int2_weight")


class Net(nn.Module):
    """A norm, a rectifier, and a layer of which a second input without rows decides."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm = nn.Embedding(48, 24), nn.LayerNorm(24)
        self.wide, self.after = nn.Linear(24, 64), nn.Linear(64, 40)
        self.never = nn.Linear(40, 32)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.after(torch.relu(self.wide(self.norm(self.table(ids)))))
        return hidden.mean(1), self.never(hidden[:, :0])


@pytest.fixture(scope="module")
def graph() -> Graph:
    return graph_of(trained(Net()), torch.arange(8).reshape(2, 4))


def statistics_of(graph: Graph, samples: int) -> tuple[dict[str, Site], dict[str, SiteStatistics]]:
    ids = torch.randint(0, 48, (samples, 4), generator=torch.Generator().manual_seed(0))
    sites = find_sites(graph)
    found = dict(site_statistics(graph, sites, observe(graph, [(ids,)], 1, seed=0)))
    for site in sites:
        if site.op_kind == "embedding":
            found[site.name] = embedding_statistics(attribute(graph.module, site.weight))
    return {s.name: s for s in sites}, found


def blind(statistics: SiteStatistics) -> SiteStatistics:
    """As they are, but whoever asks for anything that was seen fails."""

    def fail(*_: Any) -> Any:
        raise AssertionError("a statistic was asked for")

    nothing = torch.full((1,), torch.nan)
    return replace(
        statistics, moments=fail, rows=fail, channels=nothing, counts=nothing, edges=nothing
    )


def test_it_looks_at_no_statistic(graph: Graph) -> None:
    sites, known = statistics_of(graph, 64)
    method = Datafree()
    assert isinstance(method, Method)
    for name, site in sites.items():
        own = blind(known[name])
        found = {c.level: c for c in method.propose(site, own)}
        assert list(found) == ["int8_weight", *LOW]
        for candidate in found.values():
            for statistics in (own, replace(own, moments_of=own.moments)):  # also behind a prefix
                change = method.apply(site, candidate, statistics)
                size = sum(
                    t.numel() * t.element_size()
                    for t in (change.codes, change.scale, change.bias)
                    if t is not None
                )
                size += 0 if change.packed is None else len(change.packed.data)
                # 8 bits leave the bias alone, of which quantize's size has one an output.
                spare = 4 * site.shape[0] if candidate.level == "int8_weight" else 0
                assert candidate.size_bytes - size in {0, spare}


def test_behind_a_norm_the_bias_takes_up_its_shift(graph: Graph) -> None:
    sites, known = statistics_of(graph, 64)
    site, statistics = sites["wide"], known["wide"]
    method = Datafree()
    candidate = next(c for c in method.propose(site, statistics) if c.level == "int2_weight")
    change = method.apply(site, candidate, statistics)
    weight = change.float_weight()
    assert weight is not None
    assert change.bias is not None
    assert statistics.bias is not None
    shift = attribute(graph.module, "norm.bias").double()
    wanted = statistics.bias[0] + (statistics.weight[0] - weight.double()) @ shift
    torch.testing.assert_close(change.bias.double(), wanted, rtol=1e-5, atol=1e-5)


def test_without_a_budget_of_bytes_8_bits_are_all(graph: Graph) -> None:
    sites, known = statistics_of(graph, 64)
    found = Datafree(low_bits=False).propose(sites["wide"], known["wide"])
    assert [c.level for c in found] == ["int8_weight"]
    with pytest.raises(ConfigError, match="wide: datafree has no level 'bf16'"):
        Datafree().apply(sites["wide"], replace(found[0], level="bf16"), known["wide"])


def levels(found: list[Candidate], *, is_assumed: bool) -> list[Any]:
    return [c.level for c in found if bool(c.detail.get("assumed")) == is_assumed]


@pytest.mark.parametrize(("samples", "is_few"), [(30, True), (64, False)])
def test_quantize_offers_both_where_rows_are_few(graph: Graph, samples: int, is_few: bool) -> None:
    """4 rows a sample, 64 inputs: 256 rows are enough."""
    sites, known = statistics_of(graph, samples)
    method = Quantize()
    found = list(method.propose(sites["after"], known["after"]))
    assert levels(found, is_assumed=True) == (list(LOW) if is_few else [])
    assert set(LOW) < set(levels(found, is_assumed=False))
    for candidate in found:
        change = method.apply(sites["after"], candidate, known["after"])
        assert bool(change.report.get("is_assumed")) == bool(candidate.detail.get("assumed"))
    assert levels(list(method.propose(sites["table"], known["table"])), is_assumed=True) == []


def test_a_layer_that_nothing_reaches_is_rounded_by_itself(graph: Graph) -> None:
    sites, known = statistics_of(graph, 64)
    site, statistics = sites["never"], known["never"]
    assert statistics.moments().count == 0
    method = Quantize()
    found = {c.level: c for c in method.propose(site, statistics)}
    assert list(found) == ["f32", "bf16", "int8_weight", *LOW]
    assert all(found[level].detail["assumed"] for level in LOW)
    assert torch.equal(aim_of(site, statistics).metric, centred(plain_moments(1, 40))[0])
    changes = [method.apply(site, found[level], statistics) for level in ("int8_weight", *LOW)]
    assert all(apply(graph, [c]).run((torch.arange(8).reshape(2, 4),)) for c in changes)
    assert self_check(graph, [torch.arange(8).reshape(2, 4)], seed=0, note=lambda _: None) < 1e-3


def test_few_rows_in_one_half_are_not_refitted(graph: Graph) -> None:
    sites, known = statistics_of(graph, 64)
    rows = random(1, 1, 64).double()
    halves = (moments_of(rows, rows * 2), moments_of(rows[:0], rows[:0]))
    aim = aim_of(sites["after"], replace(known["after"], moments_of=lambda *_: halves))
    assert torch.equal(aim.target, known["after"].weight)
    assert (aim.damping, aim.is_draft, aim.is_assumed) == (None, False, False)


@pytest.mark.parametrize("level", ["int8_weight", "int3_weight"])
@pytest.mark.parametrize("method", [Quantize(), Datafree()], ids=["quantize", "datafree"])
def test_the_final_weights_need_no_rows(graph: Graph, level: str, method: Any) -> None:
    sites, known = statistics_of(graph, 64)
    chosen = {
        name: next(c for c in method.propose(site, known[name]) if c.level == level)
        for name, site in sites.items()
    }
    kinds: Callable[[Site], SiteStatistics] = lambda site: known[site.name]  # noqa: E731
    done = transform(
        graph,
        list(sites.values()),
        chosen,
        {c.method: method for c in chosen.values()},
        [(torch.arange(8).reshape(2, 4),)],
        readers={},
        embedding=kinds,
        seed=0,
    )
    assert {c.site.name: c.level for c in done.changes} == dict.fromkeys(sites, level)
    (out, _) = done.graph.run((torch.arange(8).reshape(2, 4),))
    assert bool(torch.isfinite(out).all())
