"""Experts as sites: what they cost alone decides who goes."""

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch

from tersor.analyse.widths import width_sites, width_statistics
from tersor.core.records import Level, Site
from tersor.graph.axes import Axes, analyse_axes, keep_units
from tersor.graph.contracts import Graph, WidthStatistics
from tersor.graph.edit import attribute
from tersor.graph.facts import NodeFacts, node_facts, stored_elsewhere
from tersor.graph.geometry import output_error, output_spreads
from tersor.methods.prune import Prune
from tersor.price.facts import learn_facts
from tersor.price.terms import size_terms
from tersor.propose.widths import measure_widths, unit_costs
from tests.unit.graph.axes.test_experts import NAME, experts


@pytest.fixture(scope="module")
def graph() -> Graph:
    """Nobody asks for expert 2, and expert 4 does what expert 5 does."""
    found = experts(6, 2, seed=3)
    with torch.no_grad():
        router, maps = attribute(found.module, "a.weight"), attribute(found.module, "w")
        router[2] = -100.0
        maps[2] *= 5.0
        router[4] = 1.05 * router[5]
        maps[4] = maps[5]
    return found


@pytest.fixture(scope="module")
def axes(graph: Graph) -> Axes:
    return analyse_axes(graph)


@pytest.fixture(scope="module")
def site(axes: Axes) -> Site:
    return next(s for s in width_sites(axes) if s.unit_kind == "experts")


def tokens() -> list[tuple[torch.Tensor, ...]]:
    """Positive: expert 2 is the last choice of every one."""
    x = 4 * torch.rand(64, 4, generator=torch.Generator().manual_seed(0))
    return [(x[:40],), (x[40:],)]


def test_the_site_says_what_its_maps_take(graph: Graph, axes: Axes, site: Site) -> None:
    (x,) = graph.example
    assert (site.name, site.units, site.unit_kind) == (f"width:{NAME}", 6, "experts")
    assert site.macs == len(x) * 2 * 5 * 4  # two maps of 5 x 4 a token
    assert site.size_bytes == 4 * 6 * (5 * 4 + 4)  # the maps, and the router's rows
    assert [graph.module.graph.find_nodes(op="call_function", target=torch.ops.aten.index.Tensor)[
        0].name] == list(site.ops)  # fmt: skip
    assert width_statistics(axes, site, {}) == WidthStatistics()


def test_costs_are_what_single_removals_cost(graph: Graph, axes: Axes, site: Site) -> None:
    batches = tokens()
    costs = unit_costs(axes, axes[site.width], batches, "values")
    spreads = output_spreads([graph.run(b) for b in batches])
    for unit in range(6):
        small = keep_units(graph, axes, {site.width: [u for u in range(6) if u != unit]})
        errors = [output_error(small.run(b), graph.run(b), "values", spreads) for b in batches]
        assert float(costs[unit]) == pytest.approx(float(torch.cat(errors).mean()), rel=1e-5)
    assert int(costs.argmin()) == 2  # its maps are the largest, and no token takes them
    assert float(costs[2]) < 1e-12
    assert float(costs.sort().values[1]) > 1e-6


def test_the_cheapest_go_first_and_their_errors_are_measured(axes: Axes, site: Site) -> None:
    costs = unit_costs(axes, axes[site.width], tokens(), "values")
    statistics = WidthStatistics(costs=costs)
    method = Prune(counts=lambda _: (2, 3, 5))
    found = method.propose(site, statistics)
    assert [c.level for c in found] == [6, 5, 3, 2]
    kept = [set(c.detail["kept"]) for c in found[1:]]
    assert kept[0] == {0, 1, 3, 4, 5}
    assert kept[0] > kept[1] > kept[2]
    order = costs.argsort().tolist()
    assert kept[2] == set(order[4:])
    assert found[3].detail["loss"] == pytest.approx(float(costs[order[:4]].sum()))
    pairs = [(c, method.apply(site, c, statistics)) for c in found]
    measured = measure_widths(axes, pairs, {site.name: statistics}, {}, tokens(), kind="values")
    errors = [c.error for c in measured]
    assert errors[0] == 0
    assert errors[1] == pytest.approx(float(costs[2]), abs=1e-12)
    assert errors == sorted(errors)
    assert errors[3] > 0


def test_bytes_follow_the_experts(graph: Graph, axes: Axes, site: Site) -> None:
    layers = [
        replace(site, name=n, kind="format", ops=(o,), shape=tuple(attribute(graph.module, f"{n}.weight").shape),
                size_bytes=s, op_kind="linear", units=0)
        for n, o, s in (("a", "linear_default", 96), ("b", "linear_default_1", 72))
    ]  # fmt: skip
    sites = (*layers, site)
    levels = {site.name: (6, 4, 2)}

    def facts(assignment: Mapping[str, Level]) -> Mapping[str, NodeFacts]:
        count = int(assignment.get(site.name, 6))
        return node_facts(keep_units(graph, axes, {site.width: range(count)}), 1)

    learned = learn_facts(facts, sites, levels, "f32")
    terms = size_terms(learned, sites, levels, stored_elsewhere(graph))
    for count in levels[site.name]:
        total = sum(term.at({site.name: count}) for term in terms)
        assert total == 4 * count * (5 * 4 + 4)


def test_stored_elsewhere_counts_each_tensor_once(graph: Graph) -> None:
    (name,) = width_ops(graph)
    assert stored_elsewhere(graph) == {name: 4 * 6 * 5 * 4}


def width_ops(graph: Graph) -> list[str]:
    found = [n.name for n in graph.module.graph.nodes if n.target is torch.ops.aten.index.Tensor]
    assert len(found) == 1
    return found
