"""A cut graph is fitted again: exact where that is possible, better than cutting elsewhere."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from tersor.analyse.branches import branch_sites, branch_statistics
from tersor.analyse.widths import width_of, width_sites, width_statistics
from tersor.capture.module import capture
from tersor.capture.samples import Samples, flatten_item
from tersor.core.errors import ConfigError
from tersor.graph.axes import Axes, analyse_axes, keep_units
from tersor.graph.branches import replace_branches
from tersor.graph.contracts import Graph
from tersor.graph.edit import parameters_by_name, run_all
from tersor.graph.geometry import output_error
from tersor.graph.operators import weighted_ops
from tersor.graph.residuals import find_branches
from tersor.methods.depth import Depth
from tersor.methods.prune import Prune
from tersor.observe.statistics import Observed, observe
from tersor.propose.widths import measure_widths, replaced
from tersor.transform.narrow import NarrowConfig, narrow
from tests.data.zoo import load_resnet20
from tests.unit.branching import Pictures


class Twins(nn.Module):
    """Every channel twice: half of them can go without any loss."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(2, 8, 3, padding=1), nn.Conv2d(8, 3, 3, bias=False)
        for tensor in (self.first.weight, self.first.bias):
            tensor.data[4:] = 2 * tensor.data[:4]

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).relu())


def captured(model: nn.Module, images: Tensor) -> tuple[Graph, Axes]:
    call, tensors = flatten_item(images[:2], "example")
    graph = capture(model.eval(), Samples(call, tensors)).graph
    return graph, analyse_axes(graph)


def observed(graph: Graph, batches: list[tuple[Tensor, ...]]) -> dict[str, Observed]:
    return observe(graph, batches, len(batches), seed=0)


@pytest.fixture(autouse=True)
def _same_networks() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(0)
        yield


@pytest.fixture
def noise() -> Tensor:
    return torch.randn(64, 2, 6, 6, generator=torch.Generator().manual_seed(0))


def test_what_others_can_do_is_taken_over_exactly(noise: Tensor):
    graph, axes = captured(Twins(), noise)
    batches = [(noise[:32],), (noise[32:],)]
    (site,) = width_sites(axes)
    statistics = width_statistics(axes, site, observed(graph, batches), damping=1e-8)
    whole, half = Prune(counts=lambda s: (s.units // 2,)).propose(site, statistics)
    assert (whole.level, half.level) == (8, 4)
    assert half.detail["loss"] < 1e-5
    kept = half.detail["kept"]
    assert {k % 4 for k in kept} == {0, 1, 2, 3}  # one of each pair of twins
    small = narrow(
        graph, axes, {width_of(axes, site).name: kept}, batches, NarrowConfig(damping=1e-9)
    )
    wanted = graph.run([noise])[0]
    cut_only = keep_units(graph, axes, {"first": kept}).run([noise])[0]
    found = small.graph.run([noise])[0]
    assert (found - wanted).abs().max() < 1e-3 * wanted.abs().max()
    assert (cut_only - wanted).abs().max() > 0.1 * wanted.abs().max()


def test_the_original_is_not_changed(noise: Tensor):
    graph, axes = captured(Twins(), noise)
    before = {n: t.clone() for n, t in parameters_by_name(graph.module).items()}
    narrow(graph, axes, {"first": [0, 1, 2]}, [(noise,)])
    after = parameters_by_name(graph.module)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_fixed_ops_are_not_fitted(images: dict[str, Tensor]):
    graph, axes = captured(load_resnet20(), images["train"])
    names = {op.node.name: str(op.weight.target) for op in weighted_ops(graph.module)}
    node = next(n for n, target in names.items() if target == "layers.2.conv2.weight")
    keep = {"layers.0.conv1": list(range(0, 16, 2))}
    small = narrow(
        graph, axes, keep, [(images["train"][:32],)], NarrowConfig(fixed=frozenset({node}))
    )
    assert node not in small.losses
    assert len(small.losses) > 10
    old, new = (parameters_by_name(g.module) for g in (graph, small.graph))
    assert torch.equal(old["layers.2.conv2.weight"], new["layers.2.conv2.weight"])
    assert not torch.equal(old["layers.2.conv1.weight"], new["layers.2.conv1.weight"])


def test_kept_counts_must_lie_within_the_width(noise: Tensor):
    graph, axes = captured(Twins(), noise)
    (site,) = width_sites(axes)
    statistics = width_statistics(axes, site, observed(graph, [(noise,)]))
    with pytest.raises(ConfigError, match=r"found a count of 0, wanted 1\.\.8"):
        Prune(counts=lambda _: (0,)).propose(site, statistics)


def test_errors_of_widths_grow_as_units_go(images: dict[str, Tensor]):
    """Real network, real pictures: each width alone, its readers refitted."""
    graph, axes = captured(load_resnet20(), images["train"])
    batches = [(images["train"][:64],)]
    seen = observed(graph, batches)
    site = next(s for s in width_sites(axes) if s.name == "width:layers.3.conv1")
    statistics = {site.name: width_statistics(axes, site, seen)}
    method = Prune(counts=lambda s: (s.units // 4, s.units // 2))
    offered = method.propose(site, statistics[site.name])
    found = measure_widths(
        axes,
        [(c, method.apply(site, c, statistics[site.name])) for c in offered],
        statistics,
        {name: o.moments for name, o in seen.items()},
        batches,
        kind="logits",
    )
    errors = [c.error for c in found]
    assert errors[0] == 0.0
    assert 0 < errors[1] < errors[2]
    assert found[1].error_se > 0
    assert set(found[2].detail["kept"]) < set(found[1].detail["kept"])  # nested
    sizes = [c.size_bytes for c in found]
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_half_of_a_real_network_keeps_its_predictions(images: dict[str, Tensor]):
    graph, axes = captured(load_resnet20(), images["train"])
    pictures = images["train"][:500]
    batches = [(pictures[i : i + 100],) for i in range(0, 500, 100)]
    seen = observed(graph, batches)
    keep = {}
    for site in width_sites(axes):
        if len(site.ops) == 1:
            method = Prune(counts=lambda s: (s.units // 2,))
            _, half = method.propose(site, width_statistics(axes, site, seen))
            keep[width_of(axes, site).name] = half.detail["kept"]
    test = images["test"][:300]
    wanted = graph.run([test])[0].argmax(1)
    found = narrow(graph, axes, keep, batches).graph.run([test])[0].argmax(1)
    cut_only = keep_units(graph, axes, keep).run([test])[0].argmax(1)
    assert (found == wanted).float().mean() > 0.9
    assert (cut_only == wanted).float().mean() < 0.6


def test_a_relu_behind_the_op_counts(noise: Tensor):
    """Fitting behind the ReLU is no worse there than fitting before it."""
    torch_model = nn.Sequential(
        nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Conv2d(6, 3, 1)
    )
    graph, axes = captured(torch_model, noise)
    keep = {"0": [0, 3, 5]}
    wanted = graph.run([noise])
    errors = [
        float(
            output_error(
                narrow(graph, axes, keep, [(noise,)], NarrowConfig(iterations=n)).graph.run(
                    [noise]
                ),
                wanted,
                "values",
            ).mean()
        )
        for n in (0, 6)
    ]
    assert errors[1] < 0.99 * errors[0]


class Branch(nn.Module):
    """A 1 x 1 convolution joins a stream that a cut has changed."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.wide = nn.Conv2d(2, 10, 3, padding=1), nn.Conv2d(10, 4, 1)
        self.a, self.b = nn.Conv2d(4, 6, 1), nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.wide(self.stem(x).relu())
        return x + self.b(self.a(x).relu())


def test_what_the_stream_lost_is_part_of_the_target(noise: Tensor):
    """At the least squares of the sum, what is left is uncorrelated with the op's inputs."""
    graph, axes = captured(Branch(), noise)
    small = narrow(graph, axes, {"stem": [0, 1, 2]}, [(noise,)], NarrowConfig(damping=0.0)).graph
    env = run_all(small.module, [noise])
    left = (graph.run([noise])[0] - small.run([noise])[0]).double().movedim(1, -1).flatten(0, 2)
    inputs = env["relu_1"].double().movedim(1, -1).flatten(0, 2)
    covariance = (inputs - inputs.mean(0)).T @ left / len(left)
    assert left.std() > 0.01  # there is a loss
    assert left.mean(0).abs().max() < 1e-4 * left.std()
    assert covariance.abs().max() < 1e-3 * left.std() * inputs.std()


def one_width(model: nn.Module, noise: Tensor, count: int) -> tuple[Graph, Axes, Tensor, Graph]:
    """A model's first width alone, kept to a count: (graph, axes, kept, with readers refitted)."""
    graph, axes = captured(model, noise)
    seen = observed(graph, [(noise,)])
    site = width_sites(axes)[0]
    statistics = width_statistics(axes, site, seen, damping=1e-8)
    method = Prune(counts=lambda _: (count,))
    change = method.apply(site, method.propose(site, statistics)[1], statistics)
    assert change.kept is not None
    moments = {name: o.moments for name, o in seen.items()}
    return graph, axes, change.kept, replaced(axes, change, statistics, moments)


def test_readers_of_a_width_alone_are_refitted_with_their_mean(noise: Tensor):
    model = nn.Sequential(nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Conv2d(8, 3, 1))
    first = model[0].weight.data
    first[4:] = first[:4] + 0.3 * first[4:]  # near twins
    graph, axes, kept, alone = one_width(model, noise, 4)
    wanted, found = graph.run([noise])[0], alone.run([noise])[0]
    cut_only = keep_units(graph, axes, {"0": kept.tolist()}).run([noise])[0]
    assert (found - wanted).square().mean() < 0.5 * (cut_only - wanted).square().mean()
    drift = (found - wanted).mean((0, 2, 3)).abs().max()
    assert drift < 1e-4 * wanted.std()


def test_the_units_that_nobody_needs_go_first(noise: Tensor):
    model = nn.Sequential(nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Conv2d(8, 3, 1))
    model[2].weight.data[:, [1, 4, 6]] *= 1e-3
    *_, kept, _ = one_width(model, noise, 5)
    assert kept.tolist() == [0, 2, 3, 5, 7]


def test_losses_are_in_units_of_the_readers_variance(noise: Tensor):
    model = nn.Sequential(nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Conv2d(8, 3, 1))
    graph, axes = captured(model, noise)
    site = width_sites(axes)[0]
    (reader,) = width_statistics(axes, site, observed(graph, [(noise,)]), damping=0.0).consumers
    variance = graph.run([noise])[0].double().var((0, 2, 3), correction=0).sum()
    assert reader.scale == pytest.approx(float(variance), rel=1e-4)


class Straight(nn.Module):
    """A branch without a bend: the head behind it can do its work exactly."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 9), nn.Linear(9, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).tanh()
        return self.head(x + self.down(self.up(x)))


@pytest.mark.parametrize("level", [0, 1])
def test_what_a_branch_did_is_taken_over(level: int) -> None:
    x = torch.randn(256, 4, generator=torch.Generator().manual_seed(0))
    graph, _ = captured(Straight(), x)
    (site,) = branch_sites(graph)
    known = branch_statistics(graph, [site], [(x,)])[site.name]
    method = Depth()
    candidate = next(c for c in method.propose(site, known) if c.level == level)
    small = replace_branches(graph, [method.apply(site, candidate, known)])
    fitted = narrow(graph, analyse_axes(small), {}, [(x[:100],), (x[100:],)]).graph
    (wanted,) = graph.run([x])
    (found,), (unfitted,) = fitted.run([x]), small.run([x])
    assert float((found - wanted).abs().max()) < 1e-3 * float(wanted.abs().max())
    if level == 0:
        assert float((unfitted - wanted).abs().max()) > 0.1 * float(wanted.abs().max())


def test_a_projection_alone_takes_over_its_branch() -> None:
    """The addition is gone with the branch: what it added is part of what a refit wants."""
    images = torch.randn(64, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    graph, _ = captured(Pictures(), images)
    site = branch_sites(graph)[1]
    known = branch_statistics(graph, [site], [(images,)])[site.name]
    method = Depth()
    mapped = next(c for c in method.propose(site, known) if c.level == 1)
    small = replace_branches(graph, [method.apply(site, mapped, known)])
    axes = analyse_axes(small)
    # Widths in front of the projection make what it reads differ, so that it is fitted.
    keep = {"blocks.0.a": [0, 2, 3]}
    fitted = narrow(graph, axes, keep, [(images,)]).graph
    branch = find_branches(graph)[1]
    assert branch.projection is not None
    wanted = run_all(graph.module, (images,))[branch.add.name]

    def error(other: Graph) -> float:
        found = run_all(other.module, (images,))[branch.projection.node.name]
        return float((found - wanted).square().mean() / wanted.var())

    assert error(fitted) < error(keep_units(small, axes, keep))


class Tied(nn.Module):
    """A decoder's ends: the table of the tokens is what makes the scores as well."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm = nn.Embedding(12, 8), nn.RMSNorm(8)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.scores = nn.Linear(8, 12, bias=False)
        self.scores.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        return self.scores(self.norm(x + self.down(self.up(x).relu())))


def test_a_tied_table_counts_as_a_reader_once_and_is_not_refitted() -> None:
    ids = torch.randint(0, 12, (32, 5))
    call, tensors = flatten_item(ids[:2], "example")
    graph = capture(Tied().eval(), Samples(call, tensors)).graph
    axes, statistics = analyse_axes(graph), observed(graph, [(ids,)])
    stream = next(site for site in width_sites(axes) if "table.weight" in site.members)
    assert all("embedding" not in name for name in stream.ops)
    found = width_statistics(axes, stream, statistics)
    assert len(found.consumers) == len(stream.ops)
    method = Prune(counts=lambda _: (5,))
    change = method.apply(stream, method.propose(stream, found)[1], found)
    kept = change.kept
    assert kept is not None
    moments = {name: statistics[name].moments for name in stream.ops}
    cut = parameters_by_name(replaced(axes, change, found, moments).module)
    whole = parameters_by_name(graph.module)
    assert torch.equal(cut["table.weight"], whole["table.weight"][:, kept])
    assert not torch.equal(cut["up.weight"], whole["up.weight"][:, kept])  # that one is


class Counted(nn.Module):
    """A layer whose width stands in an op that reads no tensor: the state that it starts from."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.last = nn.GRU(4, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.inner(x)[0])
        return y


def test_an_op_that_only_names_the_width_runs_with_the_cut_one() -> None:
    x = torch.randn(16, 5, 4)
    call, tensors = flatten_item(x[:2], "example")
    graph = capture(Counted().eval(), Samples(call, tensors)).graph
    axes = analyse_axes(graph)
    keep = {width_of(axes, next(s for s in width_sites(axes) if s.units == 8)).name: [0, 2, 4, 5]}
    wanted = graph.run((x,))
    small, cut_only = narrow(graph, axes, keep, [(x,)]).graph, keep_units(graph, axes, keep)
    errors = [output_error(g.run((x,)), wanted, "values").mean() for g in (small, cut_only)]
    assert errors[0] < errors[1]


class Mixer(nn.Module):
    """The channels of the stem are what the layers over places have as their tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.places, self.last = nn.Conv2d(2, 8, 2, 2), nn.Linear(4, 4), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x).flatten(2)
        y = y + self.places(y.relu())
        z: Tensor = self.last(y.transpose(1, 2).relu().mean(1))
        return z


def test_a_width_that_is_another_layers_tokens() -> None:
    images = torch.randn(64, 2, 4, 4)
    graph, axes = captured(Mixer(), images)
    keep = {
        width_of(axes, next(s for s in width_sites(axes) if s.units == 8)).name: [0, 2, 3, 5, 7]
    }
    wanted = graph.run((images,))
    small, cut_only = narrow(graph, axes, keep, [(images,)]).graph, keep_units(graph, axes, keep)
    errors = [output_error(g.run((images,)), wanted, "values").mean() for g in (small, cut_only)]
    assert errors[0] < errors[1]


class Bare(nn.Module):
    """A product with a parameter of its own, without a layer and a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.matrix = nn.Linear(4, 8), nn.Parameter(torch.randn(3, 8))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.first(x).relu(), self.matrix)


def test_a_bare_parameter_gets_its_bias_beside_it() -> None:
    x = torch.randn(64, 4)
    graph, axes = captured(Bare(), x)
    keep = {
        width_of(axes, next(s for s in width_sites(axes) if s.units == 8)).name: [0, 2, 3, 5, 7]
    }
    small = narrow(graph, axes, keep, [(x,)]).graph
    assert parameters_by_name(small.module)["matrix_refitted_bias"].shape == (3,)
