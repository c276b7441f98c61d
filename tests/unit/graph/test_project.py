"""Low-rank layers behind a cut: as good as their ranks let them be, in either format."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from tersor.analyse.calibration import site_statistics
from tersor.analyse.sites import find_sites
from tersor.core.errors import ShapeError
from tersor.core.rank_levels import rank_of
from tersor.graph.apply import apply
from tersor.graph.axes import analyse_axes, keep_units
from tersor.graph.axes.slicing import gone_from
from tersor.graph.changes import pack, unpack
from tersor.graph.contracts import Graph, SiteChange
from tersor.graph.factors import product
from tersor.graph.requantize import requantized
from tersor.methods.lowrank import Lowrank
from tersor.observe.statistics import observe
from tersor.transform.narrow import narrow
from tests.unit.capturing import graph_of, random

IMAGES = random(64, 3, 10, 10, seed=4)
KEEP = {"first": list(range(0, 32, 2)), "middle": list(range(24))}


class Stack(nn.Module):
    """Kernels and a linear layer whose weights are nearly of rank 8: little is lost at it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 32, 3, padding=1)
        self.middle = nn.Conv2d(32, 32, 3, padding=1)
        self.line, self.last = nn.Linear(32, 40), nn.Linear(40, 3)
        generator = torch.Generator().manual_seed(0)
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=generator) / 8
        for layer in (self.middle, self.line):
            flat = layer.weight.data.flatten(1)
            u, s, v = torch.linalg.svd(flat, full_matrices=False)
            s[8:] *= 0.01
            layer.weight.data = (u @ torch.diag(s) @ v).reshape(layer.weight.shape)

    def forward(self, x: Tensor) -> Tensor:
        x = self.middle(self.first(x).relu()).relu().mean((2, 3))
        return self.last(self.line(x).relu())


@pytest.fixture(scope="module")
def graph() -> Graph:
    return graph_of(Stack().eval(), IMAGES[:2])


def changes(graph: Graph, form: str) -> list[SiteChange]:
    sites = find_sites(graph)
    seen = site_statistics(graph, sites, observe(graph, [(IMAGES,)], 1, seed=0))
    method = Lowrank(rank_step=lambda _: 8)
    found = []
    for site in sites:
        offered = method.propose(site, seen[site.name])
        own = [c for c in offered if str(c.level).startswith(f"{form}_rank")]
        if own and site.name in ("middle", "line"):
            found.append(
                method.apply(site, min(own, key=lambda c: rank_of(c.level)), seen[site.name])
            )
    return found


@pytest.mark.parametrize("form", ["f32", "int8"])
def test_what_a_rank_keeps_is_kept_behind_a_cut(graph: Graph, form: str) -> None:
    axes = analyse_axes(graph)
    small = narrow(graph, axes, KEEP, [(IMAGES,)]).graph
    made = changes(graph, form)
    assert [c.site.name for c in made] == ["middle", "line"]
    removed = axes.removed(gone_from(axes, KEEP))
    carried = requantized(made, graph, axes, removed, small)
    assert [c.site.shape for c in carried] == [(24, 16, 3, 3), (40, 24)]
    assert [tuple(product(c.factors).shape) for c in carried] == [c.site.shape for c in carried]
    wanted = small.run([IMAGES])[0]
    errors = []
    for whole, edited in ((graph, apply(graph, made)), (small, apply(small, carried))):
        gap = edited.run([IMAGES])[0] - whole.run([IMAGES])[0]
        errors.append(float(gap.square().mean() / wanted.var()))
    # Half of the inputs are gone, and with them half of what the directions were chosen for.
    assert errors[1] < 4 * errors[0] + 1e-3


def test_what_was_not_cut_keeps_its_factors(graph: Graph) -> None:
    axes = analyse_axes(graph)
    keep = {"line": list(range(30))}  # an axis of line's rows alone: the convolution stays
    small = keep_units(graph, axes, keep)
    made = changes(graph, "f32")
    carried = requantized(made, graph, axes, axes.removed(gone_from(axes, keep)), small)
    assert carried[0] is made[0]
    assert tuple(carried[1].factors[1].dense().shape) == (30, 8)


def test_more_than_two_factors_can_not_follow(graph: Graph) -> None:
    axes = analyse_axes(graph)
    small = keep_units(graph, axes, KEEP)
    made = changes(graph, "f32")[1]
    long = replace(made, factors=(*made.factors, made.factors[1]))
    with pytest.raises(ShapeError, match="line: 3 factors can't follow a width that was cut"):
        requantized([long], graph, axes, axes.removed(gone_from(axes, KEEP)), small)


@pytest.mark.parametrize("form", ["f32", "int8"])
def test_factors_are_kept_and_read_again(graph: Graph, form: str) -> None:
    made = changes(graph, form)
    records, arrays = pack(made)
    again = unpack(records, arrays, {c.site.name: c.site for c in made})
    found = apply(graph, again).run([IMAGES])[0]
    assert torch.equal(found, apply(graph, made).run([IMAGES])[0])
    assert [c.level for c in again] == [c.level for c in made]


def test_factors_that_do_not_fit_are_refused(graph: Graph) -> None:
    made = changes(graph, "f32")[1]
    with pytest.raises(ShapeError, match=r"line: factors \[\(40, 8\)\] for a weight \(40, 32\)"):
        apply(graph, [replace(made, factors=made.factors[1:])])
    with pytest.raises(ShapeError, match="bias absent; wanted at least two"):
        apply(graph, [replace(made, bias=None)])
    swapped = (made.factors[1], made.factors[0])
    with pytest.raises(ShapeError, match="wanted at least two whose product has that shape"):
        apply(graph, [replace(made, factors=swapped)])
