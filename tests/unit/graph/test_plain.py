"""A quantised graph without its quantisers has the sizes of the float one."""

import torch
from torch import nn

from tersor.analyse.sites import find_sites
from tersor.api.tiles import rounded
from tersor.graph.apply import apply
from tersor.graph.contracts import Graph, Quantizer
from tersor.graph.facts import node_facts
from tersor.graph.plain import formats_of, plain
from tests.unit.capturing import graph_of, random, trained


def quantized(keep: str) -> tuple[Graph, Graph]:
    module = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3),
        nn.Flatten(),
        nn.Linear(576, 5),
    )
    graph = graph_of(trained(module), random(2, 3, 8, 8))
    grids: dict[str | None, Quantizer] = {}
    changes = [
        rounded(graph, site, 127, grids, after=False)
        for site in find_sites(graph)
        if site.name != keep and site.has_weight
    ]
    return graph, apply(graph, changes)


def test_sizes_and_names_are_those_of_the_float_graph() -> None:
    graph, int8 = quantized("")
    wanted, found = node_facts(graph, 1), node_facts(plain(int8), 1)
    assert found == wanted


def test_sites_keep_their_names() -> None:
    graph, int8 = quantized("2")
    assert [s.name for s in find_sites(plain(int8))] == [s.name for s in find_sites(graph)]


def test_formats_are_those_of_the_layers() -> None:
    _, int8 = quantized("2")
    assert formats_of(int8, "f32") == {"conv2d": "int8", "conv2d_1": "f32", "linear": "int8"}


def test_a_float_graph_stays_what_it_is() -> None:
    graph = graph_of(trained(nn.Linear(4, 3)), random(2, 4))
    x = random(3, 4, seed=1)
    assert torch.equal(plain(graph).run([x])[0], graph.run([x])[0])
