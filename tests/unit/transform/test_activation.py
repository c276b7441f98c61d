"""Activations replaced in graphs: sites, edits, front to back, prices, records."""

from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, hardswish, silu

from tersor.analyse.activations import activation_sites, activation_statistics
from tersor.analyse.calibration import embedding_statistics, site_statistics, tensor_readers
from tersor.analyse.sites import find_sites
from tersor.core.errors import ConfigError
from tersor.core.records import BuildChoice, Candidate, Level, PriceTable, Site
from tersor.graph.apply import apply
from tersor.graph.changes import pack, unpack
from tersor.graph.contracts import Graph, Method, SiteChange
from tersor.graph.edit import attribute
from tersor.methods.activation import Activation
from tersor.methods.quantize import Quantize
from tersor.observe.statistics import observe
from tersor.price import activations as pricing
from tersor.price.refuse import refused
from tersor.price.tools import PriceTools
from tersor.transform.sequential import Transformed, transform
from tests.unit.capturing import graph_of, random, targets, trained

METHODS: Mapping[str, Method] = {"activation": Activation(), "quantize": Quantize()}


class Net(nn.Module):
    """GELU and SiLU in front of linears; one that two ops read, and one that is pinned."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 32), nn.Linear(32, 8), nn.Linear(8, 24)
        self.d, self.e = nn.Linear(24, 6, bias=False), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.b(gelu(self.a(x)))
        y = self.d(silu(self.c(x)))
        shared = gelu(y)
        found: Tensor = self.e(shared) + shared
        return found


@pytest.fixture(scope="module")
def graph() -> Graph:
    return graph_of(trained(Net()), random(4, 8))


@pytest.fixture(scope="module")
def batches() -> list[tuple[Tensor, ...]]:
    return [(random(300, 8, seed=i),) for i in range(2, 4)]


def sites_of(graph: Graph, keep: tuple[str, ...] = ()) -> dict[str, Site]:
    return {s.name: s for s in activation_sites(graph, find_sites(graph, keep))}


def change_at(
    graph: Graph, batches: list[tuple[Tensor, ...]], name: str, level: Level
) -> SiteChange:
    site = sites_of(graph)[name]
    statistics = activation_statistics(graph, [site], batches, 0)[name]
    (candidate,) = [c for c in Activation().propose(site, statistics) if c.level == level]
    return Activation().apply(site, candidate, statistics)


def test_sites_are_what_one_linear_alone_reads(graph: Graph) -> None:
    found = sites_of(graph, keep=("d",))
    assert {name: (s.units, s.pinned is None) for name, s in found.items()} == {
        "act:gelu": (32, True),
        "act:silu": (24, False),
    }


@pytest.mark.parametrize("name", ["act:gelu", "act:silu"])
def test_the_edited_graph_computes_the_change(
    graph: Graph, batches: list[tuple[Tensor, ...]], name: str
) -> None:
    change = change_at(graph, batches, name, "hardswish")
    (found,) = apply(graph, [change]).run([batches[0][0]])
    net = Net()
    net.load_state_dict({n: attribute(graph.module, n) for n in net.state_dict()})
    (reader, functions) = (net.b, 0) if name == "act:gelu" else (net.d, 1)
    assert change.weight is not None
    assert change.bias is not None
    reader.weight.data, reader.bias = change.weight, nn.Parameter(change.bias)

    def cheaper(x: Tensor) -> Tensor:
        return hardswish(x * change.factor) / change.factor

    with torch.no_grad():
        x = batches[0][0]
        x = x + net.b((cheaper if functions == 0 else gelu)(net.a(x)))
        shared = gelu(net.d((cheaper if functions == 1 else silu)(net.c(x))))
        wanted = net.e(shared) + shared
    torch.testing.assert_close(found, wanted)


def test_a_refit_is_worth_it(graph: Graph, batches: list[tuple[Tensor, ...]]) -> None:
    fresh = random(500, 8, seed=9)
    (wanted,) = graph.run([fresh])
    for level in ("hardswish", "relu"):
        change = change_at(graph, batches, "act:gelu", level)
        bare = replace(change, weight=None, bias=None)
        errors = [
            float((apply(graph, [c]).run([fresh])[0] - wanted).square().mean())
            for c in (change, bare)
        ]
        assert errors[0] < 0.8 * errors[1]


def sequential(
    graph: Graph, batches: list[tuple[Tensor, ...]], chosen: Mapping[str, Candidate]
) -> Transformed:
    sites = find_sites(graph)
    return transform(
        graph,
        (*sites, *activation_sites(graph, sites)),
        chosen,
        METHODS,
        batches,
        readers=tensor_readers(graph, sites),
        embedding=lambda site: embedding_statistics(attribute(graph.module, site.weight)),
        seed=0,
    )


def offer(site: str, level: Level, method: str = "activation") -> Candidate:
    return Candidate(site=site, level=level, method=method, size_bytes=0)


def test_front_to_back_alone_it_is_the_change_of_the_original(
    graph: Graph, batches: list[tuple[Tensor, ...]]
) -> None:
    done = sequential(graph, batches, {"act:gelu": offer("act:gelu", "hardswish")})
    (change,) = done.changes
    alone = change_at(graph, batches, "act:gelu", "hardswish")
    assert change.factor == alone.factor
    assert change.weight is not None
    assert alone.weight is not None
    torch.testing.assert_close(change.weight, alone.weight)
    assert "aten.hardswish.default" in targets(done.graph)


def test_a_reader_that_is_rounded_is_fitted_by_its_own_method(
    graph: Graph, batches: list[tuple[Tensor, ...]]
) -> None:
    fresh = random(500, 8, seed=9)
    (wanted,) = graph.run([fresh])
    both = {"act:gelu": offer("act:gelu", "relu"), "b": offer("b", "int8", "quantize")}
    done = sequential(graph, batches, both)
    sites = find_sites(graph)
    statistics = site_statistics(graph, sites, observe(graph, batches, 2, seed=0))
    site = next(s for s in sites if s.name == "b")
    stitched = [
        change_at(graph, batches, "act:gelu", "relu"),
        Quantize().apply(site, both["b"], statistics["b"]),
    ]
    errors = [
        float((g.run([fresh])[0] - wanted).square().mean())
        for g in (done.graph, apply(graph, stitched))
    ]
    assert errors[0] < 0.7 * errors[1]
    names = {n.name for n in apply(graph, stitched).module.graph.nodes}
    assert "b_weight_codes" in names  # the rounded weight goes before the activation's
    assert "b_weight_new" not in names


def test_changes_are_kept(graph: Graph, batches: list[tuple[Tensor, ...]]) -> None:
    change = change_at(graph, batches, "act:gelu", "hardswish")
    records, arrays = pack([change])
    (found,) = unpack(records, arrays, sites_of(graph))
    assert (found.factor, found.level) == (change.factor, "hardswish")
    assert found.weight is not None
    assert change.weight is not None
    assert torch.equal(found.weight, change.weight)


def test_other_levels_and_factors_are_refused(graph: Graph) -> None:
    site = sites_of(graph)["act:gelu"]
    statistics = activation_statistics(graph, [site], [(random(8, 8),)], 0)["act:gelu"]
    with pytest.raises(ConfigError, match="activation has no level 'int8'"):
        Activation().apply(site, offer("act:gelu", "int8"), statistics)
    with pytest.raises(ConfigError, match="all above 0"):
        Activation(factors=(1.0, -1.0))


TABLE = PriceTable(
    choice=BuildChoice(backend="none"), ops={"b": {"f32": 1.0}}, quantizers={}, glue_ms=8.0,
    scale=2.0,
)  # fmt: skip


def priced(
    graph: Graph, monkeypatch: pytest.MonkeyPatch, ms: Callable[[Mapping[str, Level]], float]
) -> PriceTable:
    sites = [*find_sites(graph), *sites_of(graph).values()]
    levels = {s.name: ("f32", "hardswish", "relu") for s in sites_of(graph).values()}
    levels["b"] = ("f32", "int8")  # type: ignore[assignment]
    monkeypatch.setattr(
        pricing,
        "measure_builds",
        lambda _, variants, __: {i: ms(v.assignment) for i, v in variants.items()},
    )
    return pricing.with_activations(TABLE, sites, levels, PriceTools.__new__(PriceTools))


def test_gains_of_whole_builds_are_shared_by_elements(
    graph: Graph, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ms(assignment: Mapping[str, Level]) -> float:
        saved = {"hardswish": 3.0, "relu": 5.0}.get(str(assignment["act:gelu"]), 0.0)
        return 20.0 - (saved if assignment["b"] == "f32" else saved / 2)  # int8: 1.5 and 2.5

    table = priced(graph, monkeypatch, ms)
    assert table.predict_ms({}, {}) == TABLE.predict_ms({}, {})
    for level, gain in {"hardswish": 1.5, "relu": 2.5}.items():
        both = {"act:gelu": level, "act:silu": level}
        assert table.predict_ms(both, {}) == pytest.approx(18.0 - gain)  # type: ignore[arg-type]
        assert table.ops["act:gelu"][level] / table.ops["act:silu"][level] == pytest.approx(32 / 24)


def test_what_is_not_measured_faster_is_refused(
    graph: Graph, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ms(assignment: Mapping[str, Level]) -> float:
        level = str(assignment["act:gelu"])
        return {"hardswish": 19.9, "relu": 15.0}.get(level, 20.0)  # half a percent is noise

    table = priced(graph, monkeypatch, ms)
    rows = {"act:gelu": (offer("act:gelu", "hardswish"), offer("act:gelu", "relu"))}
    (found,) = refused(rows, [table], {})
    assert (found.site, found.level) == ("act:gelu", "hardswish")
    assert "not faster than without" in found.reason
    assert {r.level for r in refused(rows, [TABLE], {})} == {"hardswish", "relu"}
