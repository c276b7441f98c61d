"""Models that crash OpenVINO's own code generator are compiled without it, and no others."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from tersor.analyse.sites import find_sites
from tersor.api.tiles import rounded
from tersor.build.build import parity, shapes_of
from tersor.core.records import BuildChoice, Precision
from tersor.graph.apply import apply
from tersor.graph.contracts import Graph, Quantizer
from tests.conformance.test_backends import graph_of

pytest.importorskip("openvino")
from tersor.backends.openvino import OpenVINOBackend, faults, to_openvino_model
from tersor.backends.openvino.faults import options_around

CHOICE = BuildChoice(backend="openvino", device="cpu", precision="f32", threads=1, batch=1)
WIDTH = 64


class Residual(nn.Module):
    """Blocks of two linear layers around a shortcut."""

    def __init__(self, blocks: int, *, is_joined: bool = True) -> None:
        super().__init__()
        self.first, self.is_joined = nn.Linear(16, WIDTH), is_joined
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))
            for _ in range(blocks)
        )
        self.last = nn.Linear(WIDTH, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x) if self.is_joined else block(x)
        out: Tensor = self.last(x)
        return out


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_residual_layers_of_few_samples_compile_and_are_right(blocks: int) -> None:
    """A segmentation fault in OpenVINO 2026.4 otherwise."""
    torch.manual_seed(0)
    model = Residual(blocks).eval()
    x = torch.randn(4, 16)
    graph = graph_of(model, x)
    executable = OpenVINOBackend().build(graph, shapes_of(graph.signature, 1), CHOICE)
    ((_, found),) = executable.run({graph.signature.inputs[0].name: x[:1].numpy()}).items()
    torch.testing.assert_close(torch.from_numpy(found), model(x[:1]).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("model", "example", "choice", "expected"),
    [
        (Residual(2), (4, 16), CHOICE, True),
        (Residual(2, is_joined=False), (4, 16), CHOICE, False),
        (Residual(2), (4, 5, 16), CHOICE, False),
    ],
)
def test_only_such_models_lose_the_generator(
    model: nn.Module, example: tuple[int, ...], choice: BuildChoice, expected: bool
) -> None:
    graph = graph_of(model.eval(), torch.randn(example))
    compiled = to_openvino_model(graph, shapes_of(graph.signature, 1), choice)
    assert bool(options_around(compiled, choice)) == expected


def in_int8(graph: Graph) -> Graph:
    grids: dict[str | None, Quantizer] = {}
    return apply(graph, [rounded(graph, s, 127, grids, after=False) for s in find_sites(graph)])


@pytest.mark.parametrize("precision", ["f32", "bf16"])
@pytest.mark.parametrize("widths", [(16, 32, 8), (16, 32, 32, 32, 8), (64, 256, 12)])
def test_chains_of_codes_are_right_on_one_thread(
    widths: tuple[int, ...], precision: Precision
) -> None:
    """OpenVINO 2026.4 loses their scale otherwise: results are 1e4 times too large."""
    if precision not in OpenVINOBackend().describe().precisions:
        pytest.skip("not computed on this processor")
    torch.manual_seed(0)
    layers = [m for a, b in pairwise(widths) for m in (nn.Linear(a, b), nn.ReLU())]
    x = torch.randn(8, widths[0])
    graph = in_int8(graph_of(nn.Sequential(*layers[:-1]).eval(), x))
    choice = replace(CHOICE, precision=precision, options={"int8_linear": "linear"})
    executable = OpenVINOBackend().build(graph, shapes_of(graph.signature, 1), choice)
    assert parity(graph, executable, 1, (x[:1],)) <= 1e-3


def test_a_file_for_two_threads_is_right_where_one_processor_is_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = torch.randn(8, 16)
    graph = in_int8(
        graph_of(nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)).eval(), x)
    )
    choice = replace(CHOICE, threads=2, options={"int8_linear": "linear"})
    compiled = to_openvino_model(graph, shapes_of(graph.signature, 1), choice)
    for cores, expected in ((2, False), (1, True)):
        monkeypatch.setattr(faults, "usable_cores", lambda n=cores: n)
        assert bool(options_around(compiled, choice)) == expected
    one = graph_of(nn.Sequential(nn.Linear(16, 8), nn.ReLU()).eval(), x)
    alone = to_openvino_model(in_int8(one), shapes_of(one.signature, 1), choice)
    assert not options_around(alone, choice)
