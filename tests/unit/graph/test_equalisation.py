"""Channels of a convolution's input evened out: where it is offered, and that it errs less there."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from tersor.analyse.calibration import site_statistics
from tersor.analyse.sites import find_sites
from tersor.core.records import Candidate, Site
from tersor.graph.apply import apply
from tersor.graph.contracts import Graph, SiteStatistics
from tersor.graph.equalisation import (
    equalised_quantizer,
    equalising_exponent,
    is_equalisable,
)
from tersor.graph.geometry import output_error
from tersor.methods.quantize import Quantize
from tersor.observe.statistics import observe
from tersor.ops.smoothing import is_power_of_two
from tests.unit.capturing import graph_of, random, trained

Case = tuple[Graph, dict[str, Site], dict[str, SiteStatistics]]


class Net(nn.Module):
    """Channels of very different size, which one reader sees alone, two see, or a norm's reader sees."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.alone = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3, groups=2)
        self.both, self.left, self.right = (nn.Conv2d(6, 6, 1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.alone(torch.relu(self.first(x))))
        shared = torch.relu(self.both(y))
        return (self.left(shared) + self.right(shared)).flatten(1)


def net(spread: float) -> nn.Module:
    """The same function for every spread, as far as floats go."""
    module = trained(Net())
    factor = spread ** torch.linspace(-1, 1, 8)
    with torch.no_grad():
        module.first.weight.mul_(factor.reshape(-1, 1, 1, 1))
        module.first.bias.mul_(factor)
        halves = factor.reshape(2, 1, 4, 1, 1)
        module.alone.weight.reshape(2, 3, 4, 3, 3).div_(halves)
    return module


def case(spread: float) -> Case:
    graph = graph_of(net(spread), random(2, 3, 10, 10))
    sites = find_sites(graph)
    observed = observe(graph, [(random(40, 3, 10, 10, seed=4),)], 1, seed=0)
    return graph, {s.name: s for s in sites}, site_statistics(graph, sites, observed)


def int8(found: list[Candidate]) -> list[Candidate]:
    return [c for c in found if c.level == "int8"]


@pytest.fixture(scope="module")
def uneven() -> Case:
    return case(12.0)


def test_only_what_one_convolution_reads_behind_a_foldable_op(uneven: Case) -> None:
    _, sites, known = uneven
    assert [name for name in sites if is_equalisable(known[name])] == ["alone", "both"]


def test_factors_are_powers_of_two_and_even_the_channels_out(uneven: Case) -> None:
    _, _, known = uneven
    statistics = known["alone"]
    quantizer = equalised_quantizer(statistics, 1.0)
    assert quantizer.inverse_scale is not None
    assert is_power_of_two(quantizer.inverse_scale)
    assert (quantizer.low, quantizer.high, quantizer.channel_dim) == (0, 255, 1)
    sizes = torch.quantile(statistics.channels.abs(), 0.999, dim=0)
    evened = sizes * quantizer.inverse_scale
    # Powers of two leave every channel within sqrt(2) of the others' mean.
    assert float(evened.max() / evened.min()) <= 2.0 + 1e-6
    assert float(sizes.max() / sizes.min()) > 20


def test_it_is_offered_beside_the_plain_one_and_errs_less_in_the_whole_model(uneven: Case) -> None:
    graph, sites, known = uneven
    method = Quantize()
    found = int8(list(method.propose(sites["alone"], known["alone"])))
    assert [c.detail["alpha"] is None for c in found] == [True, False]
    assert {c.size_bytes for c in found} == {found[0].size_bytes}
    x = random(64, 3, 10, 10, seed=8)
    before = graph.run([x])
    errors, nodes = [], []
    for candidate in found:
        change = method.apply(sites["alone"], candidate, known["alone"])
        edited = apply(graph, [change])
        nodes.append(len([n for n in edited.module.graph.nodes if n.op == "call_function"]))
        errors.append(float(output_error(edited.run([x]), before, "values").mean()))
    assert errors[1] < 0.5 * errors[0]
    assert nodes[0] == nodes[1]  # nothing is left to compute
    assert equalising_exponent(known["alone"], method.alphas, 127) == found[1].detail["alpha"]


def test_behind_a_prefix_the_same_exponent_is_used(uneven: Case) -> None:
    _, sites, known = uneven
    method = Quantize()
    candidate = int8(list(method.propose(sites["alone"], known["alone"])))[1]
    doubled = replace(known["alone"], channels=known["alone"].channels * 2)
    change = method.apply(sites["alone"], candidate, doubled)
    assert change.quantizer is not None
    assert change.quantizer.inverse_scale is not None
    assert change.quantizer.step == pytest.approx(
        2 * equalised_quantizer(known["alone"], candidate.detail["alpha"]).step, rel=0.01
    )


def test_even_channels_have_nothing_to_gain() -> None:
    module = trained(Net())
    with torch.no_grad():  # one and the same channel, eight times
        module.first.weight.copy_(module.first.weight[:1].expand_as(module.first.weight))
        module.first.bias.fill_(0.1)
        module.alone.weight.copy_(module.alone.weight[:1, :1].expand_as(module.alone.weight))
    graph = graph_of(module, random(2, 3, 10, 10))
    sites = find_sites(graph)
    observed = observe(graph, [(random(40, 3, 10, 10, seed=4),)], 1, seed=0)
    known = site_statistics(graph, sites, observed)
    assert is_equalisable(known["alone"])
    site = next(s for s in sites if s.name == "alone")
    assert len(int8(list(Quantize().propose(site, known["alone"])))) == 1
