"""Heads lose directions: what has fewer of them is narrowed without loss, through every step."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tersor.analyse.sites import find_sites
from tersor.analyse.widths import width_sites, width_statistics
from tersor.core.rank_levels import RankLevel
from tersor.core.records import Site
from tersor.graph.apply import apply
from tersor.graph.axes import Axes, analyse_axes
from tersor.graph.axes.gate import require
from tersor.graph.axes.heads import heads_of, turned
from tersor.graph.axes.slicing import gone_from
from tersor.graph.changes import pack, unpack
from tersor.graph.contracts import Factor, Graph, SiteChange, WidthStatistics
from tersor.graph.edit import parameters_by_name
from tersor.graph.requantize import requantized
from tersor.methods.prune import Prune
from tersor.observe.statistics import Observed, observe
from tersor.ops.grids import round_nearest, weight_steps
from tersor.propose.widths import replaced
from tersor.transform.narrow import NarrowConfig, narrow
from tests.unit.attending import Attention
from tests.unit.capturing import graph_of, random, scale_error, trained

X = random(48, 5, 10, seed=1)
RANK = 3  # of the six dimensions that every head has


def thin(model: Attention) -> Attention:
    """Each head's values, and its keys, in three directions of six, in other units for each head."""
    trained(model)
    with torch.no_grad():
        for layer, seed in ((model.v, 2), (model.k, 3)):
            heads = len(layer.weight) // model.size
            for h in range(heads):
                own = slice(h * model.size, (h + 1) * model.size)
                used = torch.arange(2 * h, 2 * h + RANK) % model.size
                basis = torch.zeros(model.size, RANK)
                basis[used] = torch.linalg.qr(random(RANK, RANK, seed=100 * seed + h)).Q
                layer.weight[own] = basis @ (basis.T @ layer.weight[own])
                layer.bias[own] = basis @ (basis.T @ layer.bias[own])
    return model


class Case:
    """The original, and the widths of its heads with what is known of them."""

    def __init__(self, sharing: int) -> None:
        self.graph: Graph = graph_of(thin(Attention(sharing)), X[:2])
        self.axes: Axes = analyse_axes(self.graph)
        self.observed: dict[str, Observed] = observe(self.graph, [(X,)], 1, seed=0)
        own = [s for s in width_sites(self.axes) if s.unit_kind == "head_dim"]
        self.sites: dict[str, Site] = {"values" if "v:" in s.name else "scores": s for s in own}
        self.statistics: dict[str, WidthStatistics] = {
            kind: width_statistics(self.axes, site, self.observed, damping=1e-9)
            for kind, site in self.sites.items()
        }

    def change(self, kind: str) -> SiteChange:
        """Half of the dimensions gone."""
        method = Prune(counts=lambda _: (RANK,))
        site, known = self.sites[kind], self.statistics[kind]
        whole, half = method.propose(site, known)
        assert (whole.level, half.level, half.detail) == (6, RANK, {"directions": kind})
        assert method.apply(site, whole, known).turn == {}
        return method.apply(site, half, known)

    def turned(self, change: SiteChange) -> Graph:
        heads = heads_of(self.axes, self.axes[change.site.width])
        assert heads is not None
        return turned(self.graph, heads.places, change.turn)


@pytest.fixture(scope="module", params=[1, 2], ids=["heads", "grouped"])
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


def test_both_kinds_of_heads_are_sites(case: Case) -> None:
    assert case.sites.keys() == {"values", "scores"}
    assert {s.units for s in case.sites.values()} == {6}
    assert all(s.macs > 0 and s.size_bytes > 0 for s in case.sites.values())


@pytest.mark.parametrize("kind", ["values", "scores"])
def test_one_change_alone_loses_nothing(case: Case, kind: str) -> None:
    change = case.change(kind)
    assert change.report["loss"] < 1e-5
    moments = {name: seen.moments for name, seen in case.observed.items()}
    small = replaced(case.axes, change, case.statistics[kind], moments)
    (wanted,), (found,) = case.graph.run([X]), small.run([X])
    assert scale_error(found, wanted) < 1e-3
    # As many units as they are: the comparison can fail.
    if kind == "values":
        known = replace(case.statistics[kind], heads=None)
        method = Prune(counts=lambda _: (RANK,))
        units = method.apply(case.sites[kind], method.propose(case.sites[kind], known)[1], known)
        assert units.turn == {}
        plain = replaced(case.axes, units, known, moments)
        assert scale_error(plain.run([X])[0], wanted) > 1e-2


@pytest.mark.parametrize("kind", ["values", "scores"])
def test_changes_are_kept(case: Case, kind: str) -> None:
    change = case.change(kind)
    records, arrays = pack([change])
    (again,) = unpack(records, arrays, {change.site.name: change.site})
    assert again.turn.keys() == change.turn.keys()
    assert len(again.turn) == (3 if kind == "values" else 4)  # weights and biases
    for name, maps in change.turn.items():
        assert torch.equal(again.turn[name], maps)
    assert again.kept is not None
    assert again.kept.tolist() == list(range(RANK))


def fitted(case: Case, kind: str) -> tuple[Graph, SiteChange]:
    change = case.change(kind)
    base, keep = case.turned(change), {change.site.width: list(range(RANK))}
    require(base, case.axes, gone_from(case.axes, keep))
    config = NarrowConfig(damping=1e-9)
    return narrow(base, case.axes, keep, [(X,)], config, base=base).graph, change


@pytest.mark.parametrize("kind", ["values", "scores"])
def test_the_fit_takes_over_what_is_left(case: Case, kind: str) -> None:
    small, _ = fitted(case, kind)
    (wanted,), (found,) = case.graph.run([X]), small.run([X])
    assert scale_error(found, wanted) < 1e-3
    before, after = (sum(t.numel() for t in parameters_by_name(g.module).values())
                     for g in (case.graph, small))  # fmt: skip
    assert after < before


@pytest.mark.parametrize("form", ["f32", "int8"])
def test_low_rank_values_follow_their_heads(case: Case, form: str) -> None:
    """The rows of the last factor are turned with the heads: of full rank here, so nothing is lost."""
    small, change = fitted(case, "values")
    site = next(s for s in find_sites(case.graph) if s.name == "v")
    weight: Tensor = parameters_by_name(case.graph.module)["v.weight"].detach()
    last = Factor(weight=weight)
    if form == "int8":
        step = weight_steps(weight.double().unsqueeze(0), 127)
        codes = round_nearest(weight.double().unsqueeze(0), step, 127)[0]
        last = Factor(codes=codes, scale=step.reshape(-1).float())
    factored = SiteChange(
        site=site,
        level=RankLevel(f"{form}_rank10"),
        bias=parameters_by_name(case.graph.module)["v.bias"].detach(),
        factors=(Factor(weight=torch.eye(10)), last),
    )
    heads = heads_of(case.axes, case.axes[change.site.width])
    assert heads is not None
    turns = {n: [(heads.places[n], m)] for n, m in change.turn.items() if heads.places[n][0] == 0}
    removed = case.axes.removed(gone_from(case.axes, {change.site.width: list(range(RANK))}))
    (carried,) = requantized([factored], case.graph, case.axes, removed, small, turns)
    (wanted,), (found,) = small.run([X]), apply(small, [carried]).run([X])
    assert scale_error(found, wanted) < (1e-4 if form == "f32" else 0.02)
    (lost,) = requantized([factored], case.graph, case.axes, removed, small)
    assert scale_error(apply(small, [lost]).run([X])[0], wanted) > 0.05
