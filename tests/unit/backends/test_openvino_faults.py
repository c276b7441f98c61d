"""Models that crash OpenVINO's own code generator are compiled without it, and no others."""

import pytest
import torch
from torch import Tensor, nn

from tersor.core.records import BuildChoice
from tests.conformance.test_backends import graph_of

pytest.importorskip("openvino")
from tersor.backends.openvino import OpenVINOBackend, to_openvino_model
from tersor.backends.openvino.faults import options_around
from tersor.build.build import shapes_of

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
