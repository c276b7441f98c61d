"""Errors of single replacements against their definition: one whole run of the edited graph."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tersor.analyse.calibration import site_statistics
from tersor.analyse.sites import find_sites
from tersor.core.records import Candidate, OutputKind, Site
from tersor.graph.apply import apply
from tersor.graph.contracts import Graph, SiteChange, SiteStatistics
from tersor.graph.geometry import output_error, output_spreads, sample_sensitivity
from tersor.methods.quantize import Quantize
from tersor.observe.statistics import observe
from tersor.propose.propose import (
    NATIVE,
    Offer,
    best_of_each,
    chunk_size,
    chunks,
    measure_errors,
    offers,
)
from tersor.propose.sampling import Precision, draw, spread_order
from tests.unit.capturing import graph_of, random, trained


def all_offers(graph: Graph, flat: Tensor, *, low_bits: bool = False) -> list[Offer]:
    """Rounding to low bits takes longer than all the rest."""
    sites = find_sites(graph)
    statistics = site_statistics(graph, sites, observe(graph, [(flat,)], 1, seed=0))
    method = Quantize(low_bits=low_bits, blends=())
    return offers(sites, statistics, {"q": method}, lambda _: True)


@pytest.mark.parametrize("kind", ["logits", "values"])
def test_errors_are_those_of_whole_runs(
    lenet5_graph: Graph, images: dict[str, Tensor], kind: OutputKind
) -> None:
    graph = lenet5_graph
    proposals = all_offers(graph, images["train"][:32], low_bits=kind == "values")
    flat = images["train"][200:240]
    calls: list[int] = []
    found = measure_errors(graph, proposals, (flat,), kind, lambda: calls.append(1))
    unmeasured = [replace(c, error=0.0, error_se=0.0, samples=0) for c in found]
    assert unmeasured == [o.candidate for o in proposals]
    wanted = graph.run([flat])
    spreads = output_spreads([graph.run([flat[spread_order(40)[:16]]])])
    looks = draw(sample_sensitivity(wanted, kind, 40), Precision())
    for offer, candidate in zip(proposals, found, strict=True):
        if candidate.level in NATIVE:
            assert (candidate.error, candidate.error_se, candidate.samples) == (0, 0, 0)
            continue
        edited = apply(graph, [offer.change])
        look = next(look for look in looks if len(look.draws) == candidate.samples)
        all_errors = output_error(edited.run([flat]), wanted, kind, spreads)
        errors = all_errors[look.draws] * look.weights
        # Batches of other sizes: single floats of the output differ in the last place, by 1e-7,
        # beside changes of 1e-2 to 1e-3.
        assert candidate.error == pytest.approx(float(errors.mean()), rel=1e-3)
        deviation = float(errors.std()) / len(errors) ** 0.5
        assert candidate.error_se == pytest.approx(deviation, rel=1e-3)
        assert candidate.error > 0
    assert len(calls) == sum(o.candidate.level not in NATIVE for o in proposals)


def test_more_bits_err_less(lenet5_graph: Graph, images: dict[str, Tensor]) -> None:
    flat = images["train"][:32]
    sites = find_sites(lenet5_graph)
    statistics = site_statistics(lenet5_graph, sites, observe(lenet5_graph, [(flat,)], 1, seed=0))
    errors = []
    for limit in (7, 31, 127):
        method = Quantize(weight_limit=limit, low_bits=False)
        proposals = offers(sites, statistics, {"q": method}, lambda c: c.level == "int8")
        measured = measure_errors(lenet5_graph, proposals, (flat,), "logits")
        errors.append(sum(c.error for c in measured))
    assert errors[0] > errors[1] > errors[2] > 0


class OutputNamed(nn.Module):
    """An input that is called as the graph's own last node."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 3)

    def forward(self, output: Tensor) -> Tensor:
        return self.a(output)


def test_an_input_may_be_called_output() -> None:
    graph = graph_of(trained(OutputNamed()), random(4, 4))
    found = measure_errors(graph, all_offers(graph, random(32, 4)), (random(8, 4),), "values")
    assert all(0 < c.error < 1e-2 for c in found if c.level not in NATIVE)


@dataclass(frozen=True)
class Twice:
    """A method with two candidates of one level."""

    def propose(self, site: Site, statistics: SiteStatistics) -> Sequence[Candidate]:
        assert len(statistics.weight) == site.groups
        make = {"site": site.name, "method": "?", "size_bytes": 1}
        return [Candidate(level="f32", **make), Candidate(level="int8", **make)]

    def apply(self, site: Site, candidate: Candidate, statistics: SiteStatistics) -> SiteChange:
        assert statistics is not None
        return SiteChange(site=site, level=candidate.level)


def test_every_method_is_asked_at_every_free_site(lenet5_graph: Graph) -> None:
    sites = find_sites(lenet5_graph, keep=("c2",))
    seen = observe(lenet5_graph, [(random(4, 1, 28, 28),)], 1, seed=0)
    statistics = site_statistics(lenet5_graph, sites, seen)
    calls: list[int] = []
    found = offers(
        sites,
        statistics,
        {"one": Twice(), "two": Twice()},
        lambda c: (c.site, c.method) != ("f2", "two"),
        lambda: calls.append(1),
    )
    # What edits nothing is offered once, whoever names it.
    wanted = [(s, m, lv) for s in ("c1", "f1", "f2") for m, lv in
              (("one", "f32"), ("one", "int8"), ("two", "int8"))][:-1]  # fmt: skip
    assert [(o.candidate.site, o.candidate.method, o.candidate.level) for o in found] == wanted
    assert all(o.change.site.name == o.candidate.site for o in found)
    assert len(calls) == len(sites)


def test_chunks_are_complete_and_fit_in_memory(lenet5_graph: Graph) -> None:
    size = chunk_size(lenet5_graph)
    assert 1 <= size <= 16
    flat = (random(37, 1, 28, 28),)
    parts = chunks(lenet5_graph, flat)
    assert torch.equal(torch.cat([p[0] for p in parts]), flat[0])
    assert max(len(p[0]) for p in parts) == size
    assert len(parts) == -(-37 // size)


def test_few_draws_come_near_the_mean_of_all(
    resnet20_graph: Graph, images: dict[str, Tensor]
) -> None:
    """ResNet-20 is sure of most pictures: the rest make up its errors, and are drawn more often."""
    proposals = all_offers(resnet20_graph, images["train"][:64])
    last = [o for o in proposals if o.candidate.level == "int8"][-8:]  # whose suffixes are short
    flat = (images["train"][200:600],)
    rules = {n: Precision(least=n, most=n) for n in (48, 400)}
    few, all_of_them = (
        measure_errors(resnet20_graph, last, flat, "logits", precision=rule)
        for rule in rules.values()
    )
    pairs = list(zip(few, all_of_them, strict=True))
    assert [(a.samples, b.samples) for a, b in pairs] == [(48, 400)] * 8
    off = [(a.error - b.error) / a.error_se for a, b in pairs]
    # Where single pictures hold most of an error, no deviation of a few draws knows it.
    assert sum(abs(x) < 3 for x in off) >= 5
    # Evenly drawn, as many would leave sqrt(400 / 48) = 2.9 times the deviation of all.
    shares = [a.error_se / b.error_se for a, b in pairs]
    assert sorted(shares)[4] < 2.3


@dataclass(frozen=True)
class Only:
    """A method with one stored level and no native one."""

    def propose(self, site: Site, statistics: SiteStatistics) -> Sequence[Candidate]:
        assert statistics is not None
        return [Candidate(site=site.name, level="lut4_weight", method="?", size_bytes=7)]

    def apply(self, site: Site, candidate: Candidate, statistics: SiteStatistics) -> SiteChange:
        assert statistics is not None
        return SiteChange(site=site, level=candidate.level)


def test_a_layer_can_be_left_alone_whatever_a_method_names(lenet5_graph: Graph) -> None:
    sites = find_sites(lenet5_graph)
    seen = observe(lenet5_graph, [(random(4, 1, 28, 28),)], 1, seed=0)
    statistics = site_statistics(lenet5_graph, sites, seen)
    found = offers(sites, statistics, {"only": Only()}, lambda c: c.level != "bf16")
    for site in sites:
        own = [o.candidate for o in found if o.candidate.site == site.name]
        assert {c.level: (c.method, c.size_bytes) for c in own} == {
            "f32": ("as given", site.size_bytes),
            "lut4_weight": ("only", 7),
        }


def offer_of(method: str, error: float, size: int, level: Any = "lut4_weight") -> Offer:
    candidate = Candidate(site="a", level=level, method=method, size_bytes=size, error=error)
    site = Site(name="a", kind="format", ops=("a",))
    return Offer(candidate, SiteChange(site=site, level=level))


def test_of_several_methods_at_one_level_what_errs_least_stays() -> None:
    small, good = offer_of("small", 2.0, 10), offer_of("good", 1.0, 20)
    same, lost = offer_of("same", 1.0, 19), offer_of("lost", float("nan"), 1)
    other = offer_of("other", 9.0, 9, level="int8")
    assert best_of_each([small, good, other], {}) == [good, other]
    assert best_of_each([other, good, small], {}) == [other, good]
    assert best_of_each([good, same], {}) == best_of_each([same, good], {}) == [same]
    assert best_of_each([lost, small], {}) == best_of_each([small, lost], {}) == [small]
    assert best_of_each([good, small], {"a": "small", "b": "good"}) == [small]
    assert best_of_each([good, small], {"a": "gone"}) == [good]
