"""Branch sites, and their statistics against one plain run."""

import pytest
import torch
from torch import Tensor, nn

from tersor.analyse.branches import branch_sites, branch_statistics, sites_inside
from tersor.analyse.sites import find_sites
from tersor.analyse.widths import width_sites
from tersor.capture.module import capture
from tersor.graph.axes import analyse_axes
from tersor.graph.edit import attribute, run_all
from tersor.graph.residuals import find_branches
from tests.unit.branching import One, encoder, pictures
from tests.unit.capturing import random, samples, scale_error, trained

# Batches of other sizes make other float32 sums, through at most six layers.
SUMS = 1e-4


def test_sites_of_branches() -> None:
    graph = pictures()
    sites = branch_sites(graph)
    assert [s.name for s in sites] == [f"branch:blocks.{i}" for i in range(3)]
    assert {(s.kind, s.units, s.pinned) for s in sites} == {("branch", 2, None)}
    first = sites[0]
    assert first.ops == tuple(op.node.name for op in find_branches(graph)[0].ops)
    named = {"blocks.0.a.bias", "blocks.0.a.weight", "blocks.0.b.weight"}
    assert named <= set(first.members)
    assert first.size_bytes == sum(4 * attribute(graph.module, n).numel() for n in first.members)
    assert not any("short" in name for site in sites for name in site.members)


@pytest.mark.parametrize(
    ("pattern", "pinned"),
    [
        ("blocks.1.a", {1}),
        ("blocks.1.short", {1}),  # which would take up a map
        ("blocks.1", {1}),
        ("branch:blocks.2", {2}),
        ("blocks", {0, 1, 2}),
        ("stem", set()),
    ],
)
def test_a_branch_around_a_kept_layer_stays(pattern: str, pinned: set[int]) -> None:
    sites = branch_sites(pictures(), keep=[pattern])
    assert {i for i, s in enumerate(sites) if s.pinned} == pinned
    assert {s.pinned for s in sites if s.pinned} <= {f"kept: matches {pattern!r}"}


IMAGES = random(4, 2, 8, 8, seed=5)
TOKENS = random(4, 5, 3, seed=5)


@pytest.mark.parametrize("net", ["pictures", "encoder"])
def test_statistics_are_those_of_one_run(net: str) -> None:
    graph = pictures() if net == "pictures" else encoder(after=True)
    given = IMAGES if net == "pictures" else TOKENS
    env = run_all(graph.module, (given,))
    found = branch_statistics(graph, branch_sites(graph), [(given[:1],), (given[1:],)])
    assert list(found) == [b.name for b in find_branches(graph)]
    for branch in find_branches(graph):
        value = env[branch.add.name] - env[branch.skip.name]
        value = value if branch.value is None else env[branch.value.name]
        f = value.movedim(branch.dim, -1).flatten(0, -2).double()
        source = env[branch.source.name]
        if branch.projection is None:
            x = source.movedim(branch.dim, -1).flatten(0, -2).double()
        else:
            window = branch.projection.window
            assert window is not None
            pad, step = window.padding[0][0], window.stride[0]
            columns = nn.functional.unfold(source, window.kernel, padding=pad, stride=step)
            x = columns.transpose(1, 2).flatten(0, 1).double()
        statistics = found[branch.name]
        moments = statistics.moments
        assert moments is not None
        assert moments.residual is not None
        assert moments.count == len(f)
        for got, wanted in (
            (statistics.mean, f.mean(0)),
            (moments.xx[0], x.T @ x),
            (moments.residual[0], f.T @ x),
        ):
            assert scale_error(got, wanted) < SUMS


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 9), nn.Linear(9, 4)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        return x + self.b(self.a(x).relu()) * attention_mask.unsqueeze(-1)


def test_only_real_tokens_count() -> None:
    mask = torch.ones(3, 5, dtype=torch.int64)
    mask[1, 2:] = 0
    given = {"x": random(3, 5, 4), "attention_mask": mask}
    graph = capture(trained(Masked()), samples(given)).graph
    (site,) = branch_sites(graph)
    flat = tuple(given.values())
    found = branch_statistics(graph, [site], [flat])[site.name]
    (branch,) = find_branches(graph)
    assert branch.value is not None
    value = run_all(graph.module, flat)[branch.value.name]
    assert torch.allclose(found.mean, value[mask.bool()].double().mean(0))
    assert found.moments is not None
    assert found.moments.count == 12


def test_means_are_of_all_rows_and_moments_of_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = pictures()
    whole = branch_statistics(graph, branch_sites(graph), [(IMAGES,)])
    monkeypatch.setattr("tersor.analyse.branches.enough_rows", lambda n: 3 * n)
    parts = [(IMAGES[:2],), (IMAGES[2:],)]
    ticks: list[int] = []
    few = branch_statistics(
        graph, branch_sites(graph), iter(parts), 2, advance=lambda: ticks.append(1)
    )
    assert len(ticks) == 2
    for branch in find_branches(graph):
        assert torch.allclose(few[branch.name].mean, whole[branch.name].mean)
        moments = few[branch.name].moments
        assert moments is not None
        rows = 4 * branch.add.meta["val"].shape[2] * branch.add.meta["val"].shape[3]
        assert moments.count == min(int(rows), 3 * branch.inputs)


def test_pinned_branches_are_left_out() -> None:
    graph = pictures()
    sites = branch_sites(graph, keep=["blocks.0"])
    assert list(branch_statistics(graph, sites, [graph.example])) == [s.name for s in sites[1:]]


def test_no_map_no_moments() -> None:
    graph = capture(trained(One()), samples((random(3, 4),))).graph
    (found,) = branch_statistics(graph, branch_sites(graph), [graph.example]).values()
    assert found.moments is None


def test_what_goes_with_a_branch() -> None:
    graph = pictures()
    axes = analyse_axes(graph)
    sites = (*find_sites(graph), *width_sites(axes), *branch_sites(graph))
    found = sites_inside(graph, sites, axes)
    assert {b: set(inside) for b, inside in found.items()} == {
        f"branch:blocks.{i}": {f"blocks.{i}.a", f"blocks.{i}.b", f"width:blocks.{i}.a"}
        for i in range(3)
    }


def test_branches_go_with_their_block() -> None:
    graph = encoder(after=False)
    sites = (*find_sites(graph), *branch_sites(graph))
    found = sites_inside(graph, sites)
    blocks = {name: own for name, own in found.items() if any(s in found for s in own)}
    assert len(blocks) == 2
    for own in blocks.values():
        inner = [name for name in own if name in found]
        assert len(inner) == 2
        assert {s for name in inner for s in found[name]} < set(own)
