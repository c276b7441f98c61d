"""Candidates of branches: what they cost is measured on the graph that they make."""

from collections.abc import Mapping, Sequence

import pytest
from torch import Tensor, nn

from tersor.analyse.branches import branch_sites, branch_statistics
from tersor.core.records import Site
from tersor.graph.branches import BranchStatistics, replace_branches
from tersor.graph.contracts import Graph
from tersor.graph.geometry import output_error, output_spreads
from tersor.methods.depth import Depth
from tersor.propose.branches import Proposal, measure_branches
from tests.unit.branching import encoder, pictures
from tests.unit.capturing import graph_of, random, trained

# Damping of 1e-4 leaves the square of 1e-4 times the condition number, which is below 100 here.
EXACT = 1e-4
# Samples in another order in a batch, in float32.
FLOATS = 1e-5


def proposed(sites: Sequence[Site], statistics: Mapping[str, BranchStatistics]) -> list[Proposal]:
    method = Depth()
    return [
        (candidate, method.apply(site, candidate, statistics[site.name]))
        for site in sites
        if site.pinned is None
        for candidate in method.propose(site, statistics[site.name])
    ]


def measured(graph: Graph, search: Tensor, calibration: Tensor) -> dict[tuple[str, int], Proposal]:
    sites = branch_sites(graph)
    statistics = branch_statistics(graph, sites, [(calibration,)])
    ticks: list[int] = []
    proposals = proposed(sites, statistics)
    found = measure_branches(
        graph,
        proposals,
        [(search[:9],), (search[9:],)],
        kind="values",
        advance=lambda: ticks.append(1),
    )
    assert len(ticks) == len(found)
    changes = [change for _, change in proposals]
    pairs = zip(found, changes, strict=True)
    return {(c.site.removeprefix("branch:"), int(c.level)): (c, x) for c, x in pairs}


def test_each_level_has_the_error_of_its_own_graph() -> None:
    graph = encoder(after=True)
    search = random(16, 5, 3, seed=3)
    found = measured(graph, search, random(64, 5, 3, seed=4))
    assert len(found) == 3 * len(branch_sites(graph))
    wanted = graph.run([search])
    for candidate, change in found.values():
        assert (candidate.site, candidate.level) == (change.site.name, change.level)
        if change.level == 2:
            assert (candidate.error, candidate.size_bytes) == (0.0, change.site.size_bytes)
            continue
        edited = replace_branches(graph, [change])
        errors = output_error(edited.run([search]), wanted, "values", output_spreads([wanted]))
        assert candidate.error == pytest.approx(float(errors.mean()), rel=FLOATS)
        assert candidate.error_se == pytest.approx(float(errors.std()) / 4, rel=FLOATS)
        assert candidate.samples == 16
        saved = graph.parameter_bytes() - edited.parameter_bytes()
        assert candidate.size_bytes == change.site.size_bytes - saved


def test_the_best_map_beats_the_mean() -> None:
    found = measured(pictures(), random(32, 2, 8, 8, seed=3), random(64, 2, 8, 8, seed=4))
    for i in range(3):
        assert found[f"blocks.{i}", 1][1].report["loss"] < 1
        assert found[f"blocks.{i}", 1][0].error < found[f"blocks.{i}", 0][0].error
    assert [found[f"blocks.{i}", 1][0].size_bytes for i in range(3)] == [4 * (4 * 4 + 4), 4 * 6, 0]
    assert [found[f"blocks.{i}", 0][0].size_bytes for i in range(3)] == [0, 4 * 6, 0]


class Linear(nn.Module):
    """Branches that are linear maps in truth: by one, and by a strided convolution in the shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 1)
        self.a, self.b = nn.Conv2d(4, 9, 1), nn.Conv2d(9, 4, 1)
        self.c, self.d = nn.Conv2d(4, 6, 1), nn.Conv2d(6, 5, 1, stride=2)
        self.short = nn.Conv2d(4, 5, 1, stride=2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = (x + self.b(self.a(x))).tanh()
        return self.short(x) + self.d(self.c(x))


def test_a_branch_that_is_linear_is_replaced_exactly() -> None:
    graph = graph_of(trained(Linear()), random(4, 2, 6, 6))
    found = measured(graph, random(16, 2, 6, 6, seed=3), random(64, 2, 6, 6, seed=4))
    mapped = [c for (_, level), (c, _) in found.items() if level == 1]
    assert len(mapped) == 2
    for candidate in mapped:
        assert candidate.error < EXACT
        assert candidate.detail["loss"] < EXACT
    assert all(c.error > 1e-2 for (_, level), (c, _) in found.items() if level == 0)


def test_pinned_branches_have_no_candidates() -> None:
    graph = pictures()
    sites = branch_sites(graph, keep=["blocks.0", "blocks.2"])
    statistics = branch_statistics(graph, sites, [graph.example])
    proposals = proposed(sites, statistics)
    found = measure_branches(graph, proposals, [graph.example], kind="values")
    assert {c.site for c in found} == {"branch:blocks.1"}
