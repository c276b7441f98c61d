"""Additions whose operands are read as integers: which are offered, and what they compute."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tersor.analyse.additions import addition_sites, addition_statistics, own_operands
from tersor.analyse.calibration import site_statistics, tensor_readers
from tersor.analyse.sites import find_sites
from tersor.core.errors import ShapeError
from tersor.core.records import Candidate, Site
from tersor.graph.apply import apply
from tersor.graph.changes import pack, unpack
from tersor.graph.contracts import Graph, Quantizer, SiteChange
from tersor.graph.quantizer import restored
from tersor.methods.quantize import Quantize
from tersor.observe.statistics import observe
from tersor.propose.propose import offers
from tersor.transform.sequential import transform
from tests.unit.capturing import graph_of, random, scale_error, trained


class Residual(nn.Module):
    """Two blocks as in a convolutional network: one with a projection, one without."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.left, self.right = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.inner, self.outer = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.last = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x).relu()
        y = (self.left(y) + self.right(y)).relu()
        y = (self.outer(self.inner(y).relu()) + y).relu()
        return self.last(y.mean((2, 3)))


class Encoder(nn.Module):
    """A feed-forward block behind a norm, and sums that are none of activations of one shape."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.inner, self.outer = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)
        self.shift = nn.Parameter(torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        y = self.outer(self.inner(y).relu()) + y
        return y + self.shift + y.mean(1, keepdim=True)


def residual() -> Graph:
    return graph_of(trained(Residual()), random(4, 3, 6, 6))


def encoder() -> Graph:
    return graph_of(trained(Encoder()), random(4, 5, 8))


def additions(graph: Graph, keep: tuple[str, ...] = ()) -> tuple[Site, ...]:
    return addition_sites(graph, find_sites(graph, keep))


def known(graph: Graph) -> tuple[tuple[Site, ...], dict[str, Any]]:
    """The sites of additions, and statistics of all sites."""
    layers = find_sites(graph)
    batches = [tuple(random(*t.shape, seed=seed) for t in graph.example) for seed in range(2)]
    statistics: dict[str, Any] = site_statistics(graph, layers, observe(graph, batches, 2, seed=0))
    sites = addition_sites(graph, layers)
    named = {site.name: site for site in layers}
    return sites, statistics | addition_statistics(graph, sites, named, statistics, batches)


def change_of(site: Site, statistics: Any) -> SiteChange:
    method = Quantize()
    candidate = next(c for c in method.propose(site, statistics) if c.level == "int8")
    return method.apply(site, candidate, statistics)


def test_additions_of_convolutions_and_of_what_layers_read_are_offered() -> None:
    first, second = additions(residual())
    assert first.tensor is None  # two convolutions that nothing else reads
    assert second.tensor is not None
    assert (first.op_kind, first.size_bytes, first.macs) == ("add", 0, 0)
    graph = residual()
    own = own_operands(graph, additions(graph), find_sites(graph))
    assert [len(own[s.name]) for s in (first, second)] == [2, 1]


def test_sums_of_parameters_and_of_other_shapes_are_not_offered() -> None:
    (only,) = additions(encoder())
    assert only.tensor == "layer_norm"
    assert own_operands(encoder(), (only,), find_sites(encoder()))[only.name] == ()


def test_what_only_kept_layers_read_is_not_offered() -> None:
    assert len(additions(residual(), ("inner",))) == 1
    assert additions(encoder(), ("inner",)) == ()


def test_an_addition_in_place_is_one_like_others() -> None:
    class Overwriting(Residual):
        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x).relu()
            z = self.inner(y)
            y += z
            return self.last(y.mean((2, 3)))

    graph = graph_of(trained(Overwriting()), random(4, 3, 6, 6))
    (site,), statistics = known(graph)
    edited = apply(graph, [change_of(site, statistics[site.name])])
    x = random(4, 3, 6, 6, seed=1)  # within the ranges that were seen
    assert 0 < scale_error(edited.run([x])[0], graph.run([x])[0]) < 0.02


@pytest.mark.parametrize("make", [residual, encoder])
def test_operands_are_read_rounded_in_their_own_units(make: Callable[[], Graph]) -> None:
    graph = make()
    sites, statistics = known(graph)
    for site in sites:
        change = change_of(site, statistics[site.name])
        values: dict[str, Tensor] = {}

        class Watch(torch.fx.Interpreter):
            def run_node(self, n: torch.fx.Node, values: dict[str, Tensor] = values) -> Any:
                values[n.name] = super().run_node(n)
                return values[n.name]

        edited = apply(graph, [change])
        Watch(edited.module).run(*graph.example)
        node = next(n for n in edited.module.graph.nodes if n.name == site.ops[0])
        seen = [values[a.name] for a in node.all_input_nodes]
        before = next(n for n in graph.module.graph.nodes if n.name == site.ops[0])
        for found, operand in zip(seen, before.all_input_nodes, strict=True):
            raw = values[operand.name]
            quantizer = change.operands.get(operand.name)
            wanted = raw if quantizer is None else restored(raw, quantizer)
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
            if quantizer is not None:
                assert float((wanted - raw).abs().max()) > 0


def test_scale_and_shift_of_a_shared_quantiser_are_undone() -> None:
    graph = encoder()
    (site,) = additions(graph)
    scale = torch.linspace(0.5, 2.0, 8)
    quantizer = Quantizer(step=0.03, low=0, high=255, inverse_scale=scale, shift=3.0)
    edited = apply(graph, [SiteChange(site=site, level="int8", operands={"layer_norm": quantizer})])
    x = random(2, 5, 8, seed=4)
    module = trained(Encoder())
    with torch.no_grad():
        y = module.norm(x)
        codes = ((y * scale + 3.0) / 0.03).round().clamp(0, 255)
        rounded = (codes * 0.03 - 3.0) / scale
        z = module.outer(module.inner(y).relu()) + rounded
        wanted = z + module.shift + z.mean(1, keepdim=True)
    torch.testing.assert_close(edited.run([x])[0], wanted, rtol=1e-4, atol=1e-5)


def test_readers_of_one_tensor_agree_on_its_quantiser() -> None:
    for graph in (residual(), encoder()):
        sites, statistics = known(graph)
        changes = [change_of(s, statistics[s.name]) for s in (*find_sites(graph), *sites)]
        edited = apply(graph, changes)  # refuses readers that do not agree
        names = [
            n.name for n in edited.module.graph.nodes if "quantize_per_tensor.d" in str(n.target)
        ]
        readers = {s.tensor for s in find_sites(graph)} | {t for c in changes for t in c.operands}
        assert sum(n.endswith("_quantize") for n in names) == len(readers)


def test_an_operand_that_is_none_is_refused() -> None:
    graph = encoder()
    (site,) = additions(graph)
    wrong = {"linear": Quantizer(step=0.1, low=-128, high=127)}
    with pytest.raises(ShapeError, match="linear is no operand of add"):
        apply(graph, [SiteChange(site=site, level="int8", operands=wrong)])


def test_changes_of_additions_are_kept_and_read_again() -> None:
    graph = encoder()
    (site,), statistics = known(graph)
    change = change_of(site, statistics[site.name])
    scaled = replace(
        change,
        operands={
            "layer_norm": replace(change.operands["layer_norm"], inverse_scale=torch.ones(8) * 2)
        },
    )
    for one in (change, scaled):
        records, arrays = pack([one])
        (again,) = unpack(records, arrays, {site.name: site})
        before, after = one.operands["layer_norm"], again.operands["layer_norm"]
        assert (before.step, before.low, before.high, before.shift) == (
            after.step, after.low, after.high, after.shift,
        )  # fmt: skip
        if before.inverse_scale is None:
            assert after.inverse_scale is None
        else:
            assert torch.equal(before.inverse_scale, after.inverse_scale)


@pytest.mark.parametrize("make", [residual, encoder])
def test_front_to_back_is_as_good_with_additions(make: Callable[[], Graph]) -> None:
    graph = make()
    layers = find_sites(graph)
    sites, statistics = known(graph)
    method = Quantize()
    chosen = {
        s.name: replace(c, method="quantize")
        for s in (*layers, *sites)
        for c in method.propose(s, statistics[s.name])
        if c.level == "int8"
    }
    batches = [tuple(random(*t.shape, seed=seed) for t in graph.example) for seed in range(2)]
    done = transform(
        graph,
        (*layers, *sites),
        chosen,
        {"quantize": method},
        batches,
        readers=tensor_readers(graph, layers),
        embedding=lambda site: statistics[site.name],
        seed=0,
        own=own_operands(graph, sites, layers),
    )
    assert {c.site.name for c in done.changes if c.operands} == {s.name for s in sites}
    x = [random(*t.shape, seed=7) for t in graph.example]
    wanted = graph.run(x)[0]
    error = float((done.graph.run(x)[0] - wanted).square().mean() / wanted.square().mean())
    assert error < 1e-3


def test_a_method_of_layers_is_not_asked_about_additions() -> None:
    """A plug-in that says nothing of its kinds expects a weight in the statistics."""

    class Layers:
        def __init__(self) -> None:
            self.asked: list[str] = []

        def propose(self, site: Site, statistics: Any) -> list[Candidate]:
            assert statistics.weight is not None
            self.asked.append(site.name)
            return []

        def apply(self, site: Site, candidate: Candidate, statistics: Any) -> SiteChange:
            raise AssertionError(f"nothing was proposed at {site.name}: {candidate}, {statistics}")

    graph = residual()
    sites, statistics = known(graph)
    layers = find_sites(graph)
    plugin = Layers()
    found = offers((*layers, *sites), statistics, {"a": plugin, "b": Quantize()}, lambda _: True)
    assert plugin.asked == [s.name for s in layers]
    assert {s.name for s in sites} <= {o.candidate.site for o in found}
