"""Channels of images that are filled up to eights: the same outputs, and what stays as it is."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tersor.backends.inductor.executable import _form
from tersor.backends.inductor.lowering import Form, lower
from tersor.backends.inductor.options import read_options
from tersor.core.records import BuildChoice, Precision
from tersor.graph.contracts import Graph
from tersor.kernels.narrow_block import narrow_block
from tests.conformance.test_backends import graph_of, random, seeded
from tests.unit.backends.test_inductor_blocks import Slim

EIGHTS = Form(eights=True)


def channels(graph: Graph, form: Form = EIGHTS) -> list[tuple[int, int]]:
    """Inputs and outputs of each convolution."""
    module = lower(graph, form).module
    convs = [n for n in module.graph.nodes if n.target is torch.ops.aten.conv2d.default]
    weights = [module.state_dict()[str(n.args[1].target)] for n in convs]
    return [(w.shape[1], w.shape[0]) for w in weights]


class Net(nn.Module):
    """A stream of 12 channels with a block of 5, a pool, one more convolution and a classifier."""

    def __init__(self, **changes: Callable[[], Any]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.first = nn.Conv2d(12, 5, 3, padding=1, bias=False)
        self.act: nn.Module = nn.Sigmoid()
        self.second = nn.Conv2d(5, 12, 3, padding=1)
        self.pool: nn.Module = nn.MaxPool2d(2)
        self.last = nn.Conv2d(12, 20, 1)
        self.head = nn.Linear(20, 4)
        for name, make in changes.items():
            setattr(self, name, make())

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = (x + self.second(self.act(self.first(x)))).relu()
        x = self.last(self.pool(x)).relu().mean((2, 3))
        found: Tensor = self.head(x)
        return found


def same(module: nn.Module, x: Tensor) -> list[tuple[int, int]]:
    """The channels of a module's convolutions, whose outputs are as they were."""
    graph = graph_of(seeded(module).eval(), x)
    built = lower(graph, EIGHTS).module
    with torch.no_grad():
        torch.testing.assert_close(built(x)[0], module(x), rtol=1e-5, atol=1e-5)
    return channels(graph)


def test_what_shares_channels_is_filled_together() -> None:
    assert same(Net(), random(2, 3, 8, 8)) == [(3, 16), (16, 8), (8, 16), (16, 24)]


def test_nothing_is_filled_unless_asked() -> None:
    graph = graph_of(seeded(Net()).eval(), random(2, 3, 8, 8))
    assert channels(graph, Form()) == [(3, 12), (12, 5), (5, 12), (12, 20)]


class Attention(nn.Module):
    """Squeeze and excitation: a factor for each channel, of a mean that keeps its plane."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(12, 3, 1), nn.Conv2d(3, 12, 1)

    def forward(self, x: Tensor) -> Tensor:
        part = self.up(self.down(x.mean((2, 3), keepdim=True)).relu()).sigmoid()
        return x * part


def test_factors_a_channel() -> None:
    found = same(Net(act=nn.Identity, pool=Attention), random(2, 3, 8, 8))
    assert found == [(3, 16), (16, 8), (8, 16), (16, 8), (8, 16), (16, 24)]


class Norm(nn.Module):
    """Reads all channels at once."""

    def forward(self, x: Tensor) -> Tensor:
        return x / x.square().sum(1, keepdim=True).add(1e-3).sqrt()


class Flat(nn.Module):
    """Channels and pixels in one dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(12 * 16, 12)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x.flatten(1))[:, :, None, None]


CLOSED: dict[str, tuple[dict[str, Callable[[], Any]], list[tuple[int, int]]]] = {
    "a sum over channels": ({"pool": Norm}, [(3, 12), (12, 8), (8, 12), (12, 24)]),
    "a softmax": ({"pool": lambda: nn.Softmax(1)}, [(3, 12), (12, 8), (8, 12), (12, 24)]),
    "flattened": (
        {"pool": lambda: nn.Sequential(nn.MaxPool2d(2), Flat())},
        [(3, 12), (12, 8), (8, 12), (12, 24)],
    ),
    "groups": (
        {"last": lambda: nn.Conv2d(12, 20, 1, groups=2)},
        [(3, 12), (12, 8), (8, 12), (6, 20)],
    ),
    "the output": (
        {"last": lambda: nn.Conv2d(12, 4, 1), "head": nn.Identity},
        [(3, 16), (16, 8), (8, 16), (16, 4)],
    ),
}


@pytest.mark.parametrize("name", CLOSED)
def test_what_others_read_stays(name: str) -> None:
    changes, wanted = CLOSED[name]
    assert same(Net(**changes), random(2, 3, 8, 8)) == wanted


class Shared(nn.Module):
    """One convolution of 12 channels called twice, of which one call's result is an output."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.next = nn.Conv2d(3, 12, 1), nn.Conv2d(12, 16, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.next(self.conv(x)), self.conv(x.flip(3))


def test_a_weight_of_two_calls_is_filled_for_one() -> None:
    module, x = seeded(Shared()).eval(), random(2, 3, 4, 4)
    graph = graph_of(module, x)
    built = lower(graph, EIGHTS).module
    with torch.no_grad():
        for found, wanted in zip(built(x), module(x), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert sorted(channels(graph)) == [(3, 12), (3, 16), (16, 16)]


def test_cut_streams_stay_blocks() -> None:
    class Cut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.block = nn.Conv2d(1, 12, 3, padding=1), Slim(12, 5, 12)
            self.block.short = nn.Identity()
            self.head = nn.Linear(12, 3)

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.head(self.block(self.stem(x).relu()).mean((2, 3)))
            return found

    graph = graph_of(seeded(Cut()).eval(), random(2, 1, 6, 6))
    for eights, count in ((True, 1), (False, 0)):
        form = Form(dtype=torch.float16, channels_last=True, blocks=True, eights=eights)
        nodes = [n for n in lower(graph, form).module.graph.nodes if n.target is narrow_block]
        assert len(nodes) == count


@pytest.mark.parametrize(
    ("device", "precision", "eights"),
    [
        ("cuda", "bf16", True),
        ("cuda:1", "bf16", True),
        ("cuda", "f32", False),
        ("cpu", "bf16", False),
    ],
)
def test_sixteen_bits_on_a_card_are_filled(device: str, precision: Precision, eights: bool) -> None:
    choice = BuildChoice(backend="inductor", device=device, precision=precision)
    form = _form(choice, read_options(choice), channels_last=False, is_open=False)
    assert form.eights == eights
