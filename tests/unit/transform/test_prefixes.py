"""Fits that begin where an earlier one left the same way: fewer steps, the same result to the bit."""

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tersor.analyse.branches import branch_sites, branch_statistics
from tersor.analyse.widths import width_of, width_sites
from tersor.capture.module import capture
from tersor.capture.samples import Samples, flatten_item
from tersor.graph.axes import Axes, analyse_axes
from tersor.graph.branches import replace_branches
from tersor.graph.contracts import Graph
from tersor.graph.edit import parameters_by_name
from tersor.methods.depth import Depth
from tersor.transform import narrow as narrow_file
from tersor.transform.narrow import Narrowed, narrow
from tersor.transform.prefixes import Chain, Prefixes, State
from tests.data.zoo import load_resnet20
from tests.unit.branching import Pictures

Keep = dict[str, list[int]]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(24, 4, 48, 0.0, "gelu", batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.layers(x))
        return y


class Twins(nn.Module):
    """Layers that two inputs share."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 16), nn.Linear(16, 12)
        self.third, self.last = nn.Linear(12, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        parts = [torch.relu(self.second(torch.relu(self.first(t)))) for t in (x, y)]
        z: Tensor = self.last(torch.relu(self.third(parts[0] - parts[1])))
        return z


def analysed(model: nn.Module, *inputs: Tensor) -> tuple[Graph, Axes]:
    call, tensors = flatten_item(tuple(t[:2] for t in inputs), "example")
    graph = capture(model.eval(), Samples(call, tensors)).graph
    return graph, analyse_axes(graph)


def some_cuts(axes: Axes, count: int) -> list[Keep]:
    """Each differs from one before it in one width."""
    draw = random.Random(0)  # noqa: S311 - which cuts are tried
    widths = {width_of(axes, site).name: site.units for site in width_sites(axes)}
    cuts: list[Keep] = [{n: list(range(0, units, 2)) for n, units in widths.items()}]
    for _ in range(count):
        name = draw.choice(sorted(widths))
        kept = draw.randint(1, widths[name])
        cuts.append(draw.choice(cuts) | {name: sorted(draw.sample(range(widths[name]), k=kept))})
    return cuts


def is_same(one: Narrowed, other: Narrowed) -> bool:
    mine, others = (parameters_by_name(n.graph.module) for n in (one, other))
    nodes = [[str(n) for n in x.graph.module.graph.nodes] for x in (one, other)]
    return (
        mine.keys() == others.keys()
        and all(torch.equal(mine[n], others[n]) for n in mine)
        and nodes[0] == nodes[1]
        and one.losses == other.losses
    )


@pytest.fixture
def n_fits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts the fits that were done and not taken over."""
    count, real = [0], narrow_file.fit_rectified

    def counted(*args: Any, **named: Any) -> Any:
        count[0] += 1
        return real(*args, **named)

    monkeypatch.setattr(narrow_file, "fit_rectified", counted)
    return count


CASES = {
    "resnet20": (load_resnet20, [(8, 1, 12, 12)]),
    "encoder": (Encoder, [(40, 7, 24)]),
    "twins": (Twins, [(60, 6), (60, 6)]),
}


@pytest.mark.parametrize("name", CASES)
def test_a_fit_that_goes_on_from_another_is_the_same(name: str, n_fits: list[int]) -> None:
    make, shapes = CASES[name]
    inputs = [noise(*shape, seed=i) for i, shape in enumerate(shapes)]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        graph, axes = analysed(make(), *inputs)
    half = len(inputs[0]) // 2
    batches = [tuple(t[:half] for t in inputs), tuple(t[half:] for t in inputs)]
    prefixes, done, needed = Prefixes(), 0, 0
    for keep in some_cuts(axes, 8):
        n_fits[0] = 0
        found = narrow(graph, axes, keep, batches, prefixes=prefixes)
        done, n_fits[0] = done + n_fits[0], 0
        assert is_same(found, narrow(graph, axes, keep, batches))
        needed += n_fits[0]
    assert done < needed
    n_fits[0], steps = 0, [0]

    def advance() -> None:
        steps[0] += 1

    again = narrow(graph, axes, keep, batches, advance=advance, prefixes=prefixes)
    assert n_fits[0] == 0
    assert steps[0] > 0  # told of what was taken over
    assert is_same(again, found)


def test_other_weights_are_another_way() -> None:
    x = noise(40, 7, 24)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Encoder()
        cases = []
        for _ in range(2):
            cases.append(analysed(model, x))
            model.head.weight.data *= 2  # behind all that the fits share
            model.layers.layers[1].linear1.weight.data *= 2
    prefixes = Prefixes()
    for graph, axes in cases:
        keep = some_cuts(axes, 0)[0]
        found = narrow(graph, axes, keep, [(x,)], prefixes=prefixes)
        assert is_same(found, narrow(graph, axes, keep, [(x,)]))


def test_a_branch_that_goes_later_reads_other_values() -> None:
    """What stands in front of it is the same, and is not all that is read behind it."""
    images = noise(24, 2, 8, 8)
    graph, whole = analysed(Pictures(), images)
    batches, prefixes = [(images,)], Prefixes()
    keep = {"blocks.0.a": [0, 2, 3]}
    method = Depth()
    bases = [whole]
    for site in branch_sites(graph):
        known = branch_statistics(graph, [site], batches)[site.name]
        bases += [
            analyse_axes(replace_branches(graph, [method.apply(site, candidate, known)]))
            for candidate in method.propose(site, known)
            if candidate.level in {0, 1}
        ]
    assert len(bases) > 3
    for axes in (*bases, *reversed(bases)):
        cut = keep if any(w.name in keep for w in axes.widths) else {}  # it may have gone, too
        found = narrow(graph, axes, cut, batches, prefixes=prefixes)
        assert is_same(found, narrow(graph, axes, cut, batches))


@pytest.mark.parametrize("side", ["original", "new"])
def test_a_state_without_what_is_read_behind_it_is_passed_over(side: str) -> None:
    images = noise(24, 2, 8, 8)
    graph, axes = analysed(Pictures(), images)
    prefixes, keep = Prefixes(), {"blocks.0.a": [0, 2, 3]}
    found = narrow(graph, axes, keep, [(images,)], prefixes=prefixes)
    for key, kept in prefixes._kept.items():
        prefixes._kept[key] = replace(kept, **{side: ({},)})
    assert is_same(narrow(graph, axes, keep, [(images,)], prefixes=prefixes), found)


def state(size: int) -> State:
    values = {"a": torch.zeros(size, dtype=torch.uint8)}
    return State(original=(values,), new=(values,), dirty=frozenset(), fitted=())


def test_what_was_not_used_for_long_goes_first() -> None:
    prefixes = Prefixes(most_bytes=1200)
    for i in range(13):
        prefixes.keep(str(i), state(100))
        prefixes.latest(["0"], lambda *_: True)
    assert len(prefixes) == 12
    assert prefixes.latest(["0"], lambda *_: True) is not None
    assert prefixes.latest(["1"], lambda *_: True) is None
    prefixes.keep("large", state(101))
    assert prefixes.latest(["large"], lambda *_: True) is None
    assert prefixes.latest(["0", "2"], lambda place, _: place == 0) == (0, prefixes._kept["0"])


def test_keys_tell_values_apart_whose_memory_is_used_again() -> None:
    chains = [Chain("start"), Chain("start")]
    for chain in chains:
        for i in range(50):
            chain.add("step", torch.full((1000,), float(i)))
    assert chains[0].keys == chains[1].keys
    assert len(set(chains[0].keys)) == 50
    other = Chain("start")
    other.add("step", torch.full((1000,), 0.0))
    other.add("step", torch.full((1000,), 0.0))
    assert other.keys[0] == chains[0].keys[0]
    assert other.keys[1] != chains[0].keys[1]
