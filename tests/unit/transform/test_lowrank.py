"""Ranks front to back: the chain sees the compressed prefix and aims at the original outputs."""

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tersor.analyse.calibration import embedding_statistics, site_statistics, tensor_readers
from tersor.analyse.sites import find_sites
from tersor.core.rank_levels import RankLevel, rank_of
from tersor.core.records import Candidate
from tersor.graph.apply import apply
from tersor.graph.contracts import Graph, SiteChange
from tersor.graph.edit import attribute
from tersor.graph.geometry import output_error
from tersor.methods.lowrank import Lowrank
from tersor.observe.statistics import observe
from tersor.transform.sequential import Transformed, transform
from tests.data.zoo import load_lenet5, load_resnet20
from tests.unit.capturing import graph_of

METHOD = Lowrank(rank_step=lambda _: 16, most=2)
FORMS = ("f32", "int8")


@pytest.fixture(scope="module")
def lenet(images: dict[str, Tensor]) -> Graph:
    """Two convolutions and two linear layers, trained."""
    return graph_of(load_lenet5(), images["train"][:2])


@pytest.fixture(scope="module")
def batches(images: dict[str, Tensor]) -> list[tuple[Tensor, ...]]:
    return [(images["train"][i : i + 96],) for i in range(0, 192, 96)]


@pytest.fixture(scope="module")
def offered(
    lenet: Graph, batches: list[tuple[Tensor, ...]]
) -> dict[str, dict[str, tuple[Candidate, SiteChange]]]:
    """Site -> level -> candidate and its change on the original."""
    sites = find_sites(lenet)
    seen = site_statistics(lenet, sites, observe(lenet, batches, len(batches), seed=0))
    found: dict[str, dict[str, tuple[Candidate, SiteChange]]] = {}
    for site in sites:
        for candidate in METHOD.propose(site, seen[site.name]):
            if rank_of(candidate.level) and site.name != "f2":  # rank 8 of its 10 outputs
                change = METHOD.apply(site, candidate, seen[site.name])
                found.setdefault(site.name, {})[str(candidate.level)] = (candidate, change)
    return found


def sequential(
    graph: Graph, batches: list[tuple[Tensor, ...]], chosen: Mapping[str, Candidate]
) -> Transformed:
    sites = find_sites(graph)
    return transform(
        graph,
        sites,
        chosen,
        {"lowrank": METHOD},
        batches,
        readers=tensor_readers(graph, sites),
        embedding=lambda site: embedding_statistics(attribute(graph.module, site.weight)),
        seed=0,
    )


def error(graph: Graph, other: Graph, images: Tensor) -> float:
    """The squared one, which is what every layer is fitted to."""
    return float(output_error(other.run([images]), graph.run([images]), "values").mean())


def test_every_layer_with_a_rank_is_a_chain(
    offered: dict[str, dict[str, tuple[Candidate, SiteChange]]],
) -> None:
    forms = {s: {c.detail["form"] for c, _ in row.values()} for s, row in offered.items()}
    assert forms == {"c2": {"height"}, "f1": {"output"}}
    for row in offered.values():
        assert all(len(change.factors) == 2 for _, change in row.values())


@pytest.mark.parametrize("form", FORMS)
def test_errors_fall_with_the_rank(
    lenet: Graph,
    batches: list[tuple[Tensor, ...]],
    offered: dict[str, dict[str, tuple[Candidate, SiteChange]]],
    form: str,
) -> None:
    fresh = batches[0][0]
    errors = []
    for place in (0, -1):
        rows = {s: [r[v] for v in r if v.startswith(form)][place] for s, r in offered.items()}
        chosen = {s: replace(candidate, method="lowrank") for s, (candidate, _) in rows.items()}
        done = sequential(lenet, batches, chosen)
        edited = apply(lenet, done.changes).run([fresh])[0]
        assert torch.allclose(edited, done.graph.run([fresh])[0])
        errors.append(error(lenet, done.graph, fresh))
    assert 0 < 2 * errors[0] < errors[1]


def test_a_deep_network_needs_the_compressed_prefix(images: dict[str, Tensor]) -> None:
    """Layers at their least ranks: what one loses the next ones see, and make up for."""
    graph = graph_of(load_resnet20(), images["train"][:2])
    parts = [(images["train"][:64],), (images["train"][64:128],)]
    sites = [
        s for s in find_sites(graph) if s.name.startswith(tuple(f"layers.{i}." for i in range(6)))
    ]
    seen = site_statistics(graph, sites, observe(graph, parts, len(parts), seed=0))
    method = Lowrank(rank_step=lambda _: 8, most=1)
    chosen, changes = {}, []
    for site in sites:
        for candidate in method.propose(site, seen[site.name]):
            if str(candidate.level).startswith("f32_rank"):
                chosen[site.name] = replace(candidate, level=RankLevel("f32_rank8"))
                changes.append(method.apply(site, chosen[site.name], seen[site.name]))
    assert len(chosen) == 13  # a projection among them
    fresh = images["test"][:64]
    found = error(graph, sequential(graph, parts, chosen).graph, fresh)
    assert found < 0.7 * error(graph, apply(graph, changes), fresh)
