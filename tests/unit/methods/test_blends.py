"""Low bits in the metric of the outputs as well: where they are offered, and what comes of it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from tersor.analyse.calibration import site_statistics, tensor_readers
from tersor.analyse.sites import find_sites
from tersor.core.records import Candidate, Site
from tersor.graph import low_bits
from tersor.graph.contracts import Graph, SiteChange, SiteStatistics
from tersor.methods.quantize import Quantize
from tersor.observe.output_moments import Felt, felt_by, moment_at, output_moments
from tersor.observe.statistics import observe
from tersor.ops.moments import centred
from tersor.ops.two_sided import blended, two_sided_loss
from tersor.propose.propose import Offer, best_of_each, measure_errors
from tersor.transform.sequential import transform

LOW = ("int4_weight", "int3_weight", "int2_weight")
BLEND = 0.1


@dataclass(frozen=True)
class Case:
    graph: Graph
    batches: list[tuple[Tensor]]
    sites: Mapping[str, Site]
    statistics: Mapping[str, SiteStatistics]
    felt: Felt


@pytest.fixture(scope="module")
def lenet(lenet5_graph: Graph, images: dict[str, Tensor]) -> Case:
    batches = [(images["train"][i : i + 16],) for i in range(0, 128, 16)]
    felt = felt_by(lenet5_graph, batches, "logits", seed=0, samples=40)
    sites = find_sites(lenet5_graph)
    seen = observe(lenet5_graph, batches, len(batches), seed=0)
    known = site_statistics(lenet5_graph, sites, seen, felt)
    return Case(lenet5_graph, batches, {s.name: s for s in sites}, known, felt)


def blends(found: list[Candidate]) -> list[tuple[object, object]]:
    return [(c.level, c.detail["blend"]) for c in found if "blend" in c.detail]


def test_each_low_level_is_offered_once_more(lenet: Case) -> None:
    found = list(Quantize(blends=(0.4, BLEND)).propose(lenet.sites["f2"], lenet.statistics["f2"]))
    assert blends(found) == [(level, t) for level in LOW for t in (0.4, BLEND)]
    for candidate in found:
        if "blend" in candidate.detail:
            plain = replace(candidate, detail={"group": candidate.detail["group"]})
            assert plain in found


def test_without_gradients_or_for_large_layers_it_is_not(
    lenet: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    site, statistics = lenet.sites["f2"], lenet.statistics["f2"]
    for blind in (None, lambda: None):
        assert (
            blends(list(Quantize().propose(site, replace(statistics, output_moment=blind)))) == []
        )
    assert blends(list(Quantize(blends=()).propose(site, statistics))) == []
    monkeypatch.setattr(low_bits, "MOST_BLENDED", statistics.weight.numel() - 1)
    assert blends(list(Quantize().propose(site, statistics))) == []


def test_nobody_asks_for_gradients_without_low_bits(lenet: Case) -> None:
    def fail() -> Tensor:
        raise AssertionError("asked for")

    statistics = replace(lenet.statistics["f2"], output_moment=fail)
    assert Quantize(low_bits=False).propose(lenet.sites["f2"], statistics)


def changes(lenet: Case, level: str) -> dict[str, SiteChange]:
    """With and without the blend."""
    site, statistics = lenet.sites["f2"], lenet.statistics["f2"]
    method = Quantize(blends=(BLEND,))
    every = method.propose(site, statistics)  # 128 rows are few: also without them
    found = [c for c in every if c.level == level and "assumed" not in c.detail]
    names = ["both" if "blend" in c.detail else "inputs" for c in found]
    return {n: method.apply(site, c, statistics) for n, c in zip(names, found, strict=True)}


@pytest.mark.parametrize("level", ["int3_weight", "int2_weight"])
def test_it_loses_less_in_that_metric(lenet: Case, level: str) -> None:
    statistics = lenet.statistics["f2"]
    metric = centred(statistics.moments())[0]
    moment = moment_at(("linear_1",), lenet.felt)
    assert moment is not None
    losses = {}
    for name, change in changes(lenet, level).items():
        weight = change.float_weight()
        assert weight is not None
        off = statistics.weight - weight.double().reshape(statistics.weight.shape)
        losses[name] = float(two_sided_loss(off, metric, blended(moment, BLEND)).sum())
    assert losses["both"] < losses["inputs"]


def test_measured_errors_choose_between_them(lenet: Case, images: dict[str, Tensor]) -> None:
    site, statistics = lenet.sites["f2"], lenet.statistics["f2"]
    method = Quantize(blends=(BLEND,))
    offers = [
        Offer(candidate, method.apply(site, candidate, statistics))
        for candidate in method.propose(site, statistics)
        if candidate.level in LOW
    ]
    flat = (images["train"][200:264],)
    measured = measure_errors(lenet.graph, offers, flat, "logits")
    found = [Offer(c, o.change) for c, o in zip(measured, offers, strict=True)]
    best = best_of_each(found, {})
    assert [o.candidate.level for o in best] == list(LOW)
    for offer in best:
        errors = [c.error for c in measured if c.level == offer.candidate.level]
        assert offer.candidate.error == min(errors)
        assert len(set(errors)) == 3  # and that of rounding without statistics, as rows are few


def test_the_final_weights_are_rounded_so_too(lenet: Case) -> None:
    """Within no_grad, on the statistics of the compressed prefix."""
    method = Quantize(blends=(BLEND,))
    chosen = {
        name: [c for c in method.propose(lenet.sites[name], lenet.statistics[name])
               if c.level == "int3_weight"]
        for name in ("c2", "f2")
    }  # fmt: skip
    done = [
        transform(
            lenet.graph,
            list(lenet.sites.values()),
            {name: candidates[place] for name, candidates in chosen.items()},
            {"quantize": method},
            lenet.batches,
            readers=tensor_readers(lenet.graph, list(lenet.sites.values())),
            embedding=lambda site: lenet.statistics[site.name],
            seed=0,
            felt=felt_by(lenet.graph, lenet.batches, "logits", seed=0, samples=40),
        )
        for place in (0, 1)
    ]
    for plain, both in zip(done[0].changes, done[1].changes, strict=True):
        assert plain.packed is not None
        assert both.packed is not None
        assert plain.packed.packing == both.packed.packing
        assert plain.packed.data != both.packed.data


def test_the_first_samples_are_taken_and_sites_add_up(lenet: Case) -> None:
    first = [(t[0],) for t in [(lenet.batches[0][0],), (lenet.batches[1][0],)]]
    cut = [*first, (lenet.batches[2][0][:8],)]
    wanted = output_moments(lenet.graph, cut, "logits", seed=0)
    assert all(torch.equal(lenet.felt()[n], wanted[n]) for n in wanted)
    both = moment_at(("linear", "linear"), lenet.felt)
    assert both is not None
    assert torch.equal(both, wanted["linear"] * 2)
    assert moment_at(("linear", "absent"), lenet.felt) is None
