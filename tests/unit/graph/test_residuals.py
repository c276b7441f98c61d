"""Which additions are residual, and what would go with their branch."""

import pytest
import torch
from torch import Tensor, nn

from tersor.graph.contracts import Graph
from tersor.graph.residuals import Branch, find_branches
from tests.unit.branching import One, channels_last, encoder, pictures
from tests.unit.capturing import graph_of, random, trained


def by_name(graph: Graph) -> dict[str, Branch]:
    return {b.name.removeprefix("branch:"): b for b in find_branches(graph)}


def weights(branch: Branch) -> list[str]:
    return [str(op.weight.target).removesuffix(".weight") for op in branch.ops]


def test_identity_and_projection_shortcuts() -> None:
    found = by_name(pictures())
    assert list(found) == ["blocks.0", "blocks.1", "blocks.2"]
    assert [weights(b) for b in found.values()] == [
        [f"blocks.{i}.{c}" for c in "ab"] for i in range(3)
    ]
    first, second, third = found.values()
    assert first.projection is None
    assert first.source is first.skip
    assert (first.dim, first.channels, first.inputs) == (1, 4, 4)
    assert first.macs == 64 * 2 * 4 * 4 * 9
    assert second.projection is not None
    assert second.projection.node is second.skip
    assert second.source is first.add.users.__iter__().__next__()
    assert (second.channels, second.inputs) == (6, 4)
    assert second.macs == 16 * (6 * 4 * 9 + 6 * 6 * 9)
    assert (third.channels, third.inputs) == (5, 6 * 9)  # what the 3x3 kernel covers
    assert all(b.has_map and b.value is not None for b in found.values())


@pytest.mark.parametrize("after", [False, True])
def test_both_branches_of_a_layer_and_the_whole(after: bool) -> None:
    found = by_name(encoder(after=after))
    wanted = [f"layers.{i}{part}" for i in range(2) for part in (".mix", ".up", "")]
    assert list(found) == wanted
    whole, tokens, neurons = (found[n] for n in ("layers.1", "layers.1.mix", "layers.1.up"))
    assert whole.value is None
    assert weights(whole) == [*weights(tokens), *weights(neurons)]
    assert tokens.body < whole.body
    assert neurons.body < whole.body
    assert (whole.add, whole.skip) == (neurons.add, tokens.skip)
    assert tokens.add.name in whole.body
    assert whole.macs == tokens.macs + neurons.macs == 5 * (2 * 6 * 6 + 2 * 6 * 24)
    assert whole.dim == 2


def test_channels_are_followed_through_permutations() -> None:
    (branch,) = by_name(channels_last()).values()
    assert branch.dim == 1  # the sizes are 8 in all directions
    assert branch.ops[-1].kind == "linear"


class Sum(nn.Module):
    """y = s + f with s and f as a case says."""

    def __init__(self, case: str) -> None:
        super().__init__()
        self.case = case
        self.a, self.b = nn.Linear(4, 9), nn.Linear(9, 4)
        self.c, self.d = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, z: Tensor) -> object:  # noqa: C901, PLR0911, PLR0912 - a case a line
        x = x.tanh()
        f = self.b(self.a(x).relu())
        match self.case:
            case "plain":
                return f + x
            case "context":
                return x + self.b(self.a(x).relu() * self.c(z).sum(-1, keepdim=True))
            case "part of the body is an output":
                h = self.a(x).relu()
                return x + self.b(h), h
            case "the branch is read twice":
                return x + f, f
            case "x by another way":
                h = self.c(x)
                return x + f * h, h.tanh()
            case "two streams":
                return z + f
            case "scaled":
                return torch.add(x, f, alpha=2)
            case "broadcast":
                return x + f.mean(1, keepdim=True)
            case "no weights":
                return x + x.exp()
            case "a long way round":
                return self.d(self.c(x).relu()) + f
            case "two projections":
                return self.c(x) + f


def found(case: str) -> list[Branch]:
    return list(
        find_branches(graph_of(trained(Sum(case)), random(3, 5, 4), random(3, 5, 4, seed=1)))
    )


@pytest.mark.parametrize("case", ["plain", "context"])
def test_an_identity(case: str) -> None:
    (branch,) = found(case)
    assert branch.skip.name == "tanh"
    assert weights(branch)[-1] == "b"
    assert ("c" in weights(branch)) == (case == "context")


@pytest.mark.parametrize(
    "case",
    [
        "the branch is read twice",
        "x by another way",
        "two streams",
        "scaled",
        "broadcast",
        "no weights",
        "a long way round",
    ],
)
def test_no_branch(case: str) -> None:
    assert found(case) == []


def test_what_is_read_elsewhere_stays() -> None:
    """The body begins after it, and is no function of x alone, but of a tensor that depends on x."""
    assert found("part of the body is an output") == []


def test_of_two_ways_the_one_with_more_work_is_the_branch() -> None:
    (branch,) = found("two projections")
    assert weights(branch) == ["a", "b"]
    assert branch.projection is not None
    assert branch.projection.weight.target == "c.weight"


class Shared(nn.Module):
    """A projection whose weight is used again."""

    def __init__(self, *, reader: bool) -> None:
        super().__init__()
        self.short, self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 9), nn.Linear(9, 4)
        self.reader = reader

    def forward(self, x: Tensor) -> object:
        s = self.short(x)
        y = s + self.b(self.a(x).relu())
        return (y, s.exp()) if self.reader else self.short(y)


@pytest.mark.parametrize("reader", [False, True])
def test_a_projection_that_others_see_takes_up_nothing(reader: bool) -> None:
    (branch,) = find_branches(graph_of(trained(Shared(reader=reader)), random(3, 5, 4)))
    assert branch.projection is None
    assert branch.source is branch.skip
    assert branch.has_map  # a map of its own: 16 against 72 multiply-accumulates a row


def test_a_map_that_costs_as_much_is_not_offered() -> None:
    (branch,) = find_branches(graph_of(trained(One()), random(3, 4)))
    assert not branch.has_map


class Written(nn.Module):
    """The stream is written to through a view after the branch has read it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 9), nn.Linear(9, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x * 2
        view = x.view(-1, 2)
        f = self.b(self.a(x).relu())
        view[0] += 1
        return x + f


def test_what_is_written_in_place_is_left_alone() -> None:
    assert find_branches(graph_of(trained(Written()), random(3, 4))) == ()


def test_names_are_unique_where_modules_are_called_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 4))

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.f(x)
            return x + self.f(x)

    names = [b.name for b in find_branches(graph_of(trained(Twice()), random(3, 4)))]
    assert names == ["branch:f.0", "branch:f.0 add_1", "branch:f"]


def test_resnet20(resnet20_graph: Graph) -> None:
    branches = by_name(resnet20_graph)
    assert list(branches) == [f"layers.{i}" for i in range(9)]
    assert [i for i, b in enumerate(branches.values()) if b.projection] == [3, 6]
