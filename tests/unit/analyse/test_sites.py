"""What may be chosen: names, sharing, patterns, costs, and what is left out and why."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tersor.analyse.sites import find_sites, matches, unsupported
from tersor.core.errors import SiteNotFoundError
from tersor.graph.contracts import Graph
from tests.unit.capturing import graph_of, random, site_of, trained


def test_sites_of_a_real_network(resnet20: nn.Module) -> None:
    graph = graph_of(resnet20, random(4, 1, 28, 28))
    sites = find_sites(graph)
    convs = [n for n, m in resnet20.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert sorted(s.name for s in sites) == sorted(convs)
    modules = dict(resnet20.named_modules())
    assert all(s.shape == modules[s.name].weight.shape for s in sites)
    assert sum(s.macs for s in sites) == macs(resnet20)
    # Every weight, and a bias each: batch norm's is folded in.
    assert all(s.size_bytes == 4 * (modules[s.name].weight.numel() + s.shape[0]) for s in sites)
    assert unsupported(graph) == {}
    assert {s.pinned for s in sites} == {None}
    names = [n.name for n in graph.module.graph.nodes]
    assert [names.index(s.ops[0]) for s in sites] == sorted(names.index(s.ops[0]) for s in sites)


def macs(model: nn.Module) -> int:
    """By hooks: outputs x (inputs of a group) x kernel, for one sample."""
    total = 0

    def count(module: nn.Module, _: object, output: Tensor) -> None:
        nonlocal total
        total += output[0].numel() * module.weight[0].numel()

    hooks = [
        m.register_forward_hook(count)
        for m in model.modules()
        if isinstance(m, nn.Conv2d | nn.Linear)
    ]
    model(random(1, 1, 28, 28))
    for hook in hooks:
        hook.remove()
    return total


class Mixed(nn.Module):
    """Shared weights, a tied embedding, tokens, a transposed convolution, a bilinear form."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(9, 4), nn.Linear(4, 9)
        self.head.weight = self.embed.weight
        self.twice, self.up = nn.Linear(4, 4), nn.ConvTranspose1d(4, 4, 2)
        self.other_bias = nn.Parameter(torch.zeros(4))
        self.shared = nn.Parameter(torch.zeros(4, 4))
        self.form = nn.Bilinear(4, 4, 4)

    def forward(self, i: Tensor) -> Tensor:
        x = self.embed(i)
        x = self.twice(self.twice(x).tanh())
        x = F.linear(x, self.shared) + F.linear(x, self.shared, self.other_bias)
        x = self.up(x.transpose(1, 2)).transpose(1, 2)[:, :5]
        return self.head(self.form(x, x))


@pytest.fixture(scope="module")
def mixed() -> Graph:
    return graph_of(trained(Mixed()), torch.arange(20).reshape(4, 5) % 9)


def test_shared_weights_are_one_site(mixed: Graph) -> None:
    sites = {site.name: site for site in find_sites(mixed)}
    assert list(sites) == ["embed", "twice", "shared"]
    twice = sites["twice"]
    assert len(twice.ops) == 2
    assert twice.tensor is None  # two tensors: no single quantiser
    assert twice.macs == 2 * 5 * 16
    assert twice.pinned is None
    assert sites["shared"].tensor is not None
    assert sites["shared"].pinned == "the weight is shared by ops with different biases"
    assert sites["embed"].pinned == "the weight is shared by ops of different kinds"


def test_ops_without_a_rule_are_reported(mixed: Graph) -> None:
    reasons = unsupported(mixed)
    assert reasons["conv_transpose1d"] == "transposed convolutions have no integer form yet"
    assert any(r.endswith("has no integer form") for n, r in reasons.items() if "bilinear" in n)
    assert len(reasons) == 2


def test_readers_of_one_tensor_and_groups() -> None:
    module = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.Flatten(), nn.Linear(8, 3))
    graph = graph_of(trained(module), random(4, 4, 3, 3))
    conv, linear = find_sites(graph)
    assert (conv.groups, conv.op_kind, conv.tensor) == (2, "conv", "input_1")
    assert (linear.groups, linear.op_kind, linear.tensor) == (1, "linear", "flatten")


@pytest.mark.parametrize(
    ("pattern", "kept"),
    [
        ("f1", {"f1"}),
        ("c?", {"c1", "c2"}),
        ("f*", {"f1", "f2"}),
        ("[cf]1", {"c1", "f1"}),
    ],
)
def test_patterns_pin(lenet5: nn.Module, pattern: str, kept: set[str]) -> None:
    sites = find_sites(graph_of(lenet5, random(4, 1, 28, 28)), keep=(pattern,))
    assert {s.name for s in sites if s.pinned} == kept
    assert {s.pinned for s in sites if s.pinned} == {f"kept: matches {pattern!r}"}


def test_a_pattern_covers_what_is_below_a_module() -> None:
    assert matches("encoder.layer.1.dense", "encoder.layer.1")
    assert matches("encoder.layer.1.dense", "encoder.layer.?")
    assert not matches("encoder.layer.10.dense", "encoder.layer.1")
    assert not matches("Encoder", "encoder")


def test_a_pattern_that_matches_nothing_is_refused(lenet5: nn.Module) -> None:
    graph = graph_of(lenet5, random(4, 1, 28, 28))
    with pytest.raises(
        SiteNotFoundError, match="keep='fc' matches no layer; there are c1, c2, f1, f2"
    ):
        find_sites(graph, keep=("c1", "fc"))


def test_helper_names_the_same_site(lenet5: nn.Module) -> None:
    assert site_of(graph_of(lenet5, random(4, 1, 28, 28)), "c2").weight == "c2.weight"
