"""Patterns and bits together: two of four in an order, zeros first and rounding last."""

import pytest
import torch
from torch import Tensor, nn

from tersor.analyse.calibration import site_statistics
from tersor.analyse.sites import find_sites
from tersor.core.records import Level, Site
from tersor.graph.contracts import SiteChange, SiteStatistics
from tersor.methods.sparsify import Sparsify
from tersor.observe.statistics import observe
from tersor.ops.grids import round_nearest, weight_steps
from tersor.ops.moments import centred
from tersor.ops.sparsity import NofM, Unstructured, best_mask, magnitude_scores
from tests.unit.capturing import graph_of, random, trained

INPUTS = 46  # no multiple of four


@pytest.fixture(scope="module", params=[48, INPUTS])
def layer(request: pytest.FixtureRequest) -> tuple[Site, SiteStatistics]:
    x = random(300, request.param, seed=3) @ random(request.param, request.param, seed=4) + 1
    graph = graph_of(trained(nn.Sequential(nn.Linear(request.param, 32))), x[:4])
    (site,) = find_sites(graph)
    return site, site_statistics(graph, [site], observe(graph, [(x,)], 1, seed=0))[site.name]


def made(layer: tuple[Site, SiteStatistics], level: Level, bits: int = 8) -> SiteChange:
    site, statistics = layer
    method = Sparsify(bits=bits)
    candidate = next(c for c in method.propose(site, statistics) if c.level == level)
    return method.apply(site, candidate, statistics)


def loss(layer: tuple[Site, SiteStatistics], weight: Tensor) -> float:
    _, statistics = layer
    off = statistics.weight - weight.double().reshape(statistics.weight.shape)
    return float(((off @ centred(statistics.moments())[0]) * off).sum())


def test_two_of_four_of_the_stored_order(layer: tuple[Site, SiteStatistics]) -> None:
    change = made(layer, "sparse2of4_weight", 32)
    assert change.packed is not None
    packing = change.packed.packing
    order = torch.frombuffer(bytearray(change.packed.data[: 2 * packing.inputs]), dtype=torch.int16)
    assert order.sort().values.tolist() == list(range(packing.inputs))
    weight = torch.from_numpy(change.packed.expand())[:, order.long()]
    padded = nn.functional.pad(weight, [0, -packing.inputs % 4])
    assert int((padded.reshape(32, -1, 4) != 0).sum(2).max()) == 2
    # Against the largest two of each four as they come.
    _, statistics = layer
    given = nn.functional.pad(statistics.weight, [0, -packing.inputs % 4])
    plain = given * best_mask(magnitude_scores(given), NofM(kept=2, of=4))
    assert loss(layer, torch.from_numpy(change.packed.expand())) < loss(
        layer, plain[:, :, : packing.inputs]
    )


@pytest.mark.parametrize(
    ("whole", "few"),
    [
        ("sparse50_weight", "sparse50_int4_weight"),
        ("sparse2of4_weight", "sparse2of4_int4_weight"),
    ],
)
def test_fewer_bits_cost_more(layer: tuple[Site, SiteStatistics], whole: Level, few: Level) -> None:
    exact, much, less = made(layer, whole, 32), made(layer, whole), made(layer, few)
    losses = [loss(layer, _floats(change)) for change in (exact, much, less)]
    assert 0 < losses[0] < losses[2]
    assert losses[1] < losses[2]
    sizes = [len(change.packed.data) for change in (exact, much, less) if change.packed]
    assert sizes == sorted(sizes, reverse=True)


def test_zeros_first_rounding_last(layer: tuple[Site, SiteStatistics]) -> None:
    """Against rounding a whole weight to its nearest codes and dropping the smaller half."""
    _, statistics = layer
    step = weight_steps(statistics.weight, 7)
    rounded = round_nearest(statistics.weight, step, 7).double() * step.unsqueeze(-1)
    rounded = rounded * best_mask(magnitude_scores(rounded), Unstructured(kept=0.5))
    found = _floats(made(layer, "sparse50_int4_weight"))
    assert int((found != 0).sum()) <= found.numel() // 2
    assert loss(layer, found) < loss(layer, rounded)


def test_bits_of_a_level_are_its_own(layer: tuple[Site, SiteStatistics]) -> None:
    for bits in (3, 8):
        change = made(layer, "sparse2of4_int4_weight", bits)
        assert change.packed is not None
        assert change.packed.packing.bits == 4


def _floats(change: SiteChange) -> Tensor:
    weight = change.float_weight()
    assert weight is not None
    return weight
