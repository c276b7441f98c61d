"""Ranks front to back: the chain sees the compressed prefix and aims at the original outputs."""

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tersor.analyse.calibration import embedding_statistics, site_statistics, tensor_readers
from tersor.analyse.sites import find_sites
from tersor.core.rank_levels import rank_of
from tersor.core.records import Candidate
from tersor.graph.apply import apply
from tersor.graph.contracts import Graph, SiteChange
from tersor.graph.edit import attribute
from tersor.graph.geometry import output_error
from tersor.methods.lowrank import Lowrank
from tersor.observe.statistics import observe
from tersor.transform.sequential import Transformed, transform
from tests.data.zoo import load_lenet5
from tests.unit.capturing import graph_of

METHOD = Lowrank(rank_step=lambda _: 8)
FORMS = ("f32", "int8")


@pytest.fixture(scope="module")
def lenet(images: dict[str, Tensor]) -> Graph:
    """Two convolutions and two linear layers, trained."""
    return graph_of(load_lenet5(), images["train"][:2])


@pytest.fixture(scope="module")
def batches(images: dict[str, Tensor]) -> list[tuple[Tensor, ...]]:
    return [(images["train"][i : i + 64],) for i in range(0, 256, 64)]


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
            if rank_of(candidate.level):
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
    return float(output_error(other.run([images]), graph.run([images]), "logits").mean())


def test_every_layer_with_a_rank_is_a_chain(
    offered: dict[str, dict[str, tuple[Candidate, SiteChange]]],
) -> None:
    assert {s: c[0].detail["form"] for s, row in offered.items() for c in row.values()} == {
        "conv2": "height",
        "fc1": "output",
    } or set(offered) >= {"conv2", "fc1"}


@pytest.mark.parametrize("form", FORMS)
def test_the_edited_graph_is_what_the_runs_saw(
    lenet: Graph,
    batches: list[tuple[Tensor, ...]],
    offered: dict[str, dict[str, tuple[Candidate, SiteChange]]],
    form: str,
) -> None:
    """Errors fall with the rank, and final weights are better than those from the original."""
    fresh = batches[0][0]
    errors, stitched = [], []
    for place in (0, -1):
        rows = {s: [r[v] for v in r if v.startswith(form)][place] for s, r in offered.items()}
        chosen = {s: replace(candidate, method="lowrank") for s, (candidate, _) in rows.items()}
        done = sequential(lenet, batches, chosen)
        assert torch.allclose(
            apply(lenet, done.changes).run([fresh])[0], done.graph.run([fresh])[0]
        )
        errors.append(error(lenet, done.graph, fresh))
        stitched.append(error(lenet, apply(lenet, [c for _, c in rows.values()]), fresh))
    assert errors[0] < errors[1]
    assert errors[1] < stitched[1]  # the least rank: much is lost before the last layer
