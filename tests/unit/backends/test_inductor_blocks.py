"""Inductor builds whose narrow residual blocks are one op each, on the CPU: the same outputs as op by op."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tersor.backends.inductor import InductorBackend, options
from tersor.backends.inductor.executable import load
from tersor.backends.inductor.lowering import Form, lower
from tersor.backends.inductor.profiling import Launch, launches, traced_names
from tersor.build.build import parity
from tersor.cli.demo.zoo import Block, ResNet
from tersor.core.errors import ConfigError
from tersor.core.records import BuildChoice
from tersor.graph.contracts import Graph
from tersor.graph.shapes import input_shapes
from tersor.kernels.narrow_block import narrow_block
from tests.conformance.test_backends import graph_of, named, random, seeded

# Of a bfloat16: 2**-9 an op, squared, about ten ops in a row.
HALF = 1e-4
FUSED = Form(dtype=torch.float16, channels_last=True, blocks=True)


def choice(**fields: Any) -> BuildChoice:
    chosen = {"layout": "channels_last", "blocks": "fused", **fields}
    return BuildChoice(backend="inductor", precision="bf16", batch=4, options=chosen)


def fused(graph: Graph, form: Form = FUSED) -> list[Any]:
    return [n for n in lower(graph, form).module.graph.nodes if n.target is narrow_block]


def trained(module: nn.Module) -> nn.Module:
    """Norms that are no identity."""
    generator = torch.Generator().manual_seed(3)
    for norm in (m for m in module.modules() if isinstance(m, nn.BatchNorm2d)):
        for values in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            assert values is not None
            values.data.copy_(torch.rand(values.shape, generator=generator) + 0.5)
    return module.eval()


@pytest.fixture(scope="module")
def resnet() -> tuple[Graph, tuple[Tensor, ...]]:
    inputs = (random(4, 1, 12, 12),)
    return graph_of(trained(seeded(ResNet(blocks=2))), *inputs), inputs


@pytest.mark.parametrize("half", ["float16", "bfloat16"])
def test_every_block_is_one_op_that_computes_it(
    resnet: tuple[Graph, tuple[Tensor, ...]], half: str
) -> None:
    graph, inputs = resnet
    built = InductorBackend().build(graph, input_shapes(graph.signature, 4), choice(half=half))
    nodes = [n for n in built._lowered.module.graph.nodes if n.target is narrow_block]
    assert [n.args[-1] for n in nodes] == [1, 1, 2, 1, 2, 1]
    assert [n.args[-2] is not None for n in nodes] == [False, False, True, False, True, False]
    left = [n for n in built._lowered.module.graph.nodes if "conv2d" in str(n.target)]
    assert len(left) == 1  # the stem
    assert parity(graph, built, 4, inputs) <= HALF
    times = built.profile()
    for node in nodes:
        assert times[built._lowered.sources[node.name]] > 0


def test_a_file_brings_blocks_back(resnet: tuple[Graph, tuple[Tensor, ...]]) -> None:
    graph, inputs = resnet
    built = InductorBackend().build(graph, input_shapes(graph.signature, 4), choice())
    loaded = load(built.serialize(), choice())
    given = named(graph, inputs)
    for name, array in built.run(given).items():
        assert np.array_equal(loaded.run(given)[name], array)


class Other(nn.Module):
    """A block but for one thing."""

    def __init__(self, change: Callable[["Other"], None]) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(16, 16, 3, padding=1) for _ in range(2))
        self.short: nn.Module = nn.Identity()
        self.between: nn.Module = nn.ReLU()
        self.last: nn.Module = nn.ReLU()
        self.gives_between = False
        change(self)

    def forward(self, x: Tensor) -> Tensor:
        y = self.between(self.first(x))
        z = self.last(self.second(y) + self.short(x))
        return z + y if self.gives_between else z


CHANGES: dict[str, dict[str, Any]] = {
    "dilation": {"first": lambda: nn.Conv2d(16, 16, 3, padding=2, dilation=2)},
    "groups": {"first": lambda: nn.Conv2d(16, 16, 3, padding=1, groups=2)},
    "5x5": {"second": lambda: nn.Conv2d(16, 16, 5, padding=2)},
    "another activation": {"between": nn.SiLU},
    "no last activation": {"last": nn.Identity},
    "a shortcut with an activation": {"short": nn.ReLU},
    "a wide shortcut": {"short": lambda: nn.Conv2d(16, 16, 3, padding=1)},
    "a second reader": {"gives_between": lambda: True},
}


@pytest.mark.parametrize("name", CHANGES)
def test_other_blocks_stay_as_they_are(name: str) -> None:
    def change(block: Other) -> None:
        for field, make in CHANGES[name].items():
            setattr(block, field, make())

    x = random(2, 16, 6, 6)
    assert len(fused(graph_of(seeded(Other(lambda _: None)), x))) == 1
    assert not fused(graph_of(seeded(Other(change)), x))


@pytest.mark.parametrize(
    ("inp", "out", "count"),
    [(16, 16, 1), (16, 64, 1), (24, 24, 1), (16, 128, 0), (8, 16, 1), (20, 20, 0)],
)
def test_channels(inp: int, out: int, count: int) -> None:
    graph = graph_of(trained(seeded(Block(inp, out, 2 if inp != out else 1))), random(2, inp, 6, 6))
    assert len(fused(graph)) == count
    assert not fused(graph, Form(dtype=torch.float16, channels_last=True))


class Slim(nn.Module):
    """A block with channels of its own between its convolutions."""

    def __init__(self, inp: int, between: int, out: int) -> None:
        super().__init__()
        stride = 1 if inp == out else 2
        self.first = nn.Conv2d(inp, between, 3, stride, 1)
        self.second = nn.Conv2d(between, out, 3, 1, 1)
        self.short = nn.Identity() if inp == out else nn.Conv2d(inp, out, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = (self.second(self.first(x).relu()) + self.short(x)).relu()
        return y


@pytest.mark.parametrize(
    ("inp", "between", "out", "count"),
    [
        (32, 16, 32, 1),
        (32, 21, 32, 1),
        (16, 40, 64, 1),
        (16, 64, 16, 1),
        (24, 16, 24, 1),
        (8, 20, 40, 1),
        (16, 65, 16, 0),
        (20, 16, 20, 0),
    ],
)
def test_channels_are_filled_up(inp: int, between: int, out: int, count: int) -> None:
    inputs = (random(4, inp, 6, 6),)
    graph = graph_of(seeded(Slim(inp, between, out)), *inputs)
    nodes = fused(graph)
    assert len(nodes) == count
    built = InductorBackend().build(graph, input_shapes(graph.signature, 4), choice(half="float16"))
    assert parity(graph, built, 4, inputs) <= HALF


def test_blocks_are_for_sixteen_bits() -> None:
    for layout in ("contiguous", "channels_last"):
        given = {"blocks": "fused", "layout": layout}
        with pytest.raises(ConfigError, match=r"blocks='fused' with precision f32, wanted bf16"):
            options.read_options(
                BuildChoice(backend="inductor", precision="f32", options=given)  # type: ignore[arg-type]
            )
        assert options.read_options(choice(layout=layout)).blocks == "fused"
    for device in ("cpu", "cuda"):
        plain = options.float_choices(device, can_compile=device == "cpu")
        assert not any("blocks" in w.options for w in plain)


def test_blocks_are_for_channels_that_are_last(resnet: tuple[Graph, tuple[Tensor, ...]]) -> None:
    graph, inputs = resnet
    assert not fused(graph, Form(dtype=torch.float16, blocks=True))
    built = InductorBackend().build(
        graph, input_shapes(graph.signature, 4), choice(layout="contiguous")
    )
    assert not [n for n in built._lowered.module.graph.nodes if n.target is narrow_block]
    assert parity(graph, built, 4, inputs) <= HALF


def test_kernels_of_a_program_go_to_their_block(
    resnet: tuple[Graph, tuple[Tensor, ...]],
) -> None:
    program = """
def call(args):
        # Topologically Sorted Source Nodes: [p], Original ATen: [tersor.narrow_block]
        narrow_first_kernel_0.run(arg0_1, buf0, stream=s)
        # Topologically Sorted Source Nodes: [p], Original ATen: [tersor.narrow_block]
        narrow_second_kernel_1.run(buf0, buf1, stream=s)
"""
    assert launches(program) == [
        Launch("narrow_first_kernel_0", "p"),
        Launch("narrow_second_kernel_1", "p"),
    ]
    lowered = lower(resnet[0], FUSED)
    wanted = [n.name for n in lowered.module.graph.nodes if n.target is narrow_block]
    traced = [(name, "tersor.narrow_block.default") for name in "abcdef"]
    assert [traced_names(lowered.module, traced)[name] for name in "abcdef"] == wanted


def test_what_blocks_take_in_is_named(resnet: tuple[Graph, tuple[Tensor, ...]]) -> None:
    graph, backend = resnet[0], InductorBackend()
    nodes = [n for n in graph.module.graph.nodes if n.op == "call_function"]
    convs = {n.name for n in nodes if n.target is torch.ops.aten.conv2d.default}
    adds = {n.name for n in nodes if n.target is torch.ops.aten.add.Tensor}
    assert len(convs) == 15
    assert (
        backend.joined(graph, choice()) == convs | adds
    )  # the stem writes what the first one reads
    assert not backend.joined(graph, choice(blocks="ops"))
    wide = graph_of(trained(seeded(Block(16, 128, 2))), random(2, 16, 6, 6))
    assert not backend.joined(wide, choice())
