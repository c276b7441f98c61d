"""Inductor on 8-bit floats: lowering and its chains, builds on the CPU, files, which cards have them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tersor.backends.inductor import InductorBackend, host
from tersor.backends.inductor.lowering import Form, lower
from tersor.build.build import parity
from tersor.core.records import Candidate
from tersor.graph.contracts import Graph
from tersor.kernels.linear8 import linear8, quantize_floats
from tests.conformance.test_backends import Block, graph_of, random, seeded
from tests.unit.backends.test_inductor import Fake, built
from tests.unit.graph.test_float8 import in_float8

FLOAT8 = torch.float8_e4m3fn
# Float32 sums in another order; what lies on the border of two codes may go either way.
SINGLE = 1e-5
# Squared: such codes are many in another precision, each 2**-4 off at most.
HALF = 1e-3


class Heads(nn.Module):
    """Three readers of one tensor, and a layer behind a ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(16, 8), nn.Linear(16, 8, bias=False), nn.Linear(16, 24)
        self.last = nn.Linear(24, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.q(x) * self.k(x) + self.last(torch.relu(self.v(x)))
        return y


def made(module: nn.Module, *shape: int) -> tuple[Graph, tuple[Tensor, ...]]:
    inputs = (random(*shape),)
    return in_float8(graph_of(seeded(module), *inputs), inputs), inputs


def calls(module: torch.fx.GraphModule, target: Any) -> list[torch.fx.Node]:
    return [n for n in module.graph.nodes if n.target is target]


def test_a_chain_stays_in_eight_bits() -> None:
    graph, inputs = made(Block(), 4, 7, 16)
    module = lower(graph, Form()).module
    first, second = calls(module, linear8)
    assert len(calls(module, quantize_floats)) == 1
    assert first.args[4:6] == (FLOAT8, "gelu")
    assert second.args[0] is first
    wanted, found = graph.run(inputs)[0], module(*inputs)[0]
    assert float((found - wanted).abs().max()) <= SINGLE * float(wanted.abs().max()) + 2.0**-6


def test_readers_of_one_tensor_are_one_product() -> None:
    graph, inputs = made(Heads(), 4, 16)
    wanted = graph.run(inputs)[0]
    for joins, count in ((False, 4), (True, 3)):
        module = lower(graph, Form(joins=joins)).module
        assert len(calls(module, linear8)) == count
        assert len(calls(module, quantize_floats)) == 1
        assert torch.allclose(module(*inputs)[0], wanted, rtol=SINGLE, atol=SINGLE)


def test_without_products_of_codes_weights_are_expanded() -> None:
    graph, inputs = made(Heads(), 4, 16)
    module = lower(graph, Form(integers=False)).module
    assert not calls(module, linear8)
    stored = dict(module.named_parameters()) | dict(module.named_buffers())
    assert all(t.dtype == torch.float32 for t in stored.values())
    assert torch.allclose(module(*inputs)[0], graph.run(inputs)[0], rtol=SINGLE, atol=SINGLE)


@pytest.mark.parametrize("precision", ["f32", "bf16"])
def test_builds_and_files_of_one(tmp_path: Path, precision: Any) -> None:
    graph, inputs = made(Block(), 4, 7, 16)
    executable = built(graph, tmp_path, precision)
    limit = SINGLE if precision == "f32" else HALF
    assert parity(graph, executable, 4, inputs) <= limit
    sections = executable.serialize()
    codes = sum(t.numel() for t in graph.module.state_dict().values() if t.dtype == FLOAT8)
    assert codes == 2 * 16 * 48
    again = InductorBackend().load(sections, executable._choice)
    assert parity(graph, again, 4, inputs) <= limit


def test_only_cards_that_multiply_them_have_the_format(monkeypatch: pytest.MonkeyPatch) -> None:
    candidate = Candidate(site="s", level="fp8", method="quantize", size_bytes=1)
    assert not InductorBackend("cpu").supports(candidate).ok
    for capability, has in (((8, 0), False), ((8, 6), False), ((8, 9), True), ((9, 0), True)):
        fake = Fake()
        monkeypatch.setattr(fake, "capability", lambda _index, found=capability: found)
        monkeypatch.setattr(host, "DRIVER", fake)
        monkeypatch.setattr(host, "problem", lambda _device: ("", ""))
        backend = InductorBackend("cuda")
        assert (backend.describe().format("fp8") is not None) == has
        assert backend.supports(candidate).ok == has
