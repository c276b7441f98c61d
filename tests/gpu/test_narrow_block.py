"""Narrow blocks on a CUDA device: every launch against float64, choice, compilers, builds."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tersor.backends.inductor import InductorBackend
from tersor.backends.inductor.executable import InductorExecutable
from tersor.build.build import parity
from tersor.cli.demo.zoo import ResNet
from tersor.core.records import BuildChoice
from tersor.kernels.narrow_block import BlockWeights, narrow_block
from tests.conformance.test_backends import graph_of, named, random, seeded

pytest.importorskip("triton")  # before what imports it
from tersor.kernels import narrow_block_triton as module
from tersor.kernels.narrow_block_triton import launches, run
from tests.unit.kernels.interpreted_narrow import Block, drawn, image, off

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]
HALF_PRECISION = 2e-4  # normalised squared error of a short chain in bf16
# Images, inputs, height, width, outputs, stride: every number of channels, with and without a stride, and
# sizes that divide by nothing. Each is four kernels to compile, seconds each.
SHAPES = ((5, 16, 28, 28, 16, 1), (5, 64, 7, 7, 64, 1), (3, 16, 29, 31, 32, 2))
# And channels between; what is no power of two is filled up.
NARROWER = (
    (5, 64, 7, 7, 64, 1, 24),
    (3, 16, 29, 31, 64, 2, 16),
    (3, 24, 14, 14, 24, 1, 40),
    (3, 8, 9, 7, 48, 2, 16),
)
CASES = [*((s, torch.float16) for s in (*SHAPES, *NARROWER)), (SHAPES[0], torch.bfloat16)]


@pytest.fixture(scope="module", autouse=True)
def _card() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is empty is NaN, so that an output that nobody writes is seen."""
    plain = torch.Tensor.new_empty

    def filled(self: Tensor, *size: Any, **fields: Any) -> Tensor:
        return plain(self, *size, **fields).fill_(torch.nan)

    monkeypatch.setattr(torch.Tensor, "new_empty", filled)


def on_card(made: BlockWeights) -> list[Tensor | None]:
    return [None if t is None else t.cuda() for t in made]


def subject(
    shape: tuple[int, ...], dtype: torch.dtype
) -> tuple[Tensor, Block, list[Tensor | None], int]:
    images, inp, height, width, out, stride, *between = shape
    block, made = drawn(sum(shape), inp, out, stride, dtype, *between)
    x = image(sum(shape), (images, inp, height, width), dtype)
    return x, block, on_card(made), stride


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("shape", "dtype"), CASES)
def test_launches_stay_within_the_bound_of_their_formats(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    x, block, parts, stride = subject(shape, dtype)
    for launch in launches(parts[2].shape[1]):  # type: ignore[union-attr]
        found = run(x.cuda(), *parts, stride, launch)  # type: ignore[arg-type]
        again = run(x.cuda(), *parts, stride, launch)  # type: ignore[arg-type]
        assert torch.equal(found, again), launch
        assert off(x, block, found.cpu()) <= 1, launch


def test_no_images() -> None:
    x, _, parts, stride = subject(SHAPES[0], torch.float16)
    assert narrow_block(x[:0].cuda(), *parts, stride).shape == (0, 16, 28, 28)  # type: ignore[arg-type]


class Layer(nn.Module):
    def __init__(self, parts: list[Tensor | None], stride: int) -> None:
        super().__init__()
        self.parts, self.stride = parts, stride

    def forward(self, x: Tensor) -> Tensor:
        return narrow_block(x.relu(), *self.parts, self.stride).relu()  # type: ignore[arg-type]


def test_compilers_keep_the_chosen_launch_and_see_the_kernel() -> None:
    x, _, parts, stride = subject(SHAPES[0], torch.float16)
    x, layer = x.cuda(), Layer(parts, stride)
    wanted = layer(x)
    assert module._key(x, (16, 16), stride, is_plain=True) in module._CHOSEN
    with torch.no_grad():
        assert torch.equal(torch.compile(layer, fullgraph=True)(x), wanted)
        recorded = torch.cuda.CUDAGraph()
        with torch.cuda.graph(recorded):
            kept = layer(x)
        kept.zero_()
        recorded.replay()
    assert torch.equal(kept, wanted)


def test_builds_with_fused_blocks_compute_the_graph() -> None:
    inputs = (random(6, 1, 12, 12),)
    graph = graph_of(seeded(ResNet(blocks=1)).eval(), *inputs)
    backend = InductorBackend("cuda")
    options = {
        "mode": "compile", "graph": True, "half": "float16", "layout": "channels_last", "blocks": "fused",
    }  # fmt: skip
    choice = BuildChoice(
        backend="inductor", device="cuda", precision="bf16", batch=6, options=options
    )  # type: ignore[arg-type]
    shapes = {s.name: tuple(t.shape) for s, t in zip(graph.signature.inputs, inputs, strict=True)}
    built: InductorExecutable = backend.build(graph, shapes, choice)
    nodes = [n for n in built._lowered.module.graph.nodes if n.target is narrow_block]
    assert len(nodes) == 3
    assert parity(graph, built, 6, inputs) <= HALF_PRECISION
    built.run(named(graph, inputs))
    times = built.profile()
    assert all(times[built._lowered.sources[n.name]] > 0 for n in nodes)
