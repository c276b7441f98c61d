"""Models in half precision: a graph in float32 of the same values, the caller's types outside."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tersor.build.reference import GraphExecutable
from tersor.capture.module import PARITY, capture, half_parity
from tersor.capture.samples import as_carried
from tersor.core.errors import ParityError
from tersor.graph.edit import parameters_by_name
from tersor.runtime.runner import Runner
from tests.unit.capturing import random, samples, scale_error, trained

HALVES = [torch.float16, torch.bfloat16]


class Mixed(nn.Module):
    """Half-precision layers, a float32 norm between them, an integer output."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.a = nn.Linear(6, 8, dtype=dtype)
        self.norm = nn.LayerNorm(8)
        self.b = nn.Linear(8, 4, dtype=dtype)

    def forward(self, x: Tensor, n: Tensor) -> dict[str, Tensor]:
        hidden = self.norm(self.a(x).to(self.norm.weight.dtype))
        y = self.b(hidden.to(self.b.weight.dtype))
        return {"y": y, "hidden": hidden, "n": n + 1}


def inputs(dtype: torch.dtype, size: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    return random(size, 6, seed=seed).to(dtype), torch.arange(size)


@pytest.mark.parametrize("dtype", HALVES)
def test_the_graph_is_float32_and_the_signature_is_the_callers(dtype: torch.dtype) -> None:
    model = trained(Mixed(dtype))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    data = samples(inputs(dtype))
    found = capture(model, data)
    kind = str(dtype).removeprefix("torch.")
    signature = found.graph.signature
    assert [s.dtype for s in signature.inputs] == [kind, "int64"]
    assert [s.dtype for s in signature.outputs] == [kind, "float32", "int64"]
    assert [s.carrier for s in signature.outputs] == ["float32", "float32", "int64"]
    tensors = parameters_by_name(found.graph.module)
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    assert torch.equal(tensors["a.weight"], model.a.weight.float())
    assert all(v.dtype == before[k].dtype for k, v in model.state_dict().items())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert found.graph.example[0].dtype == torch.float32
    (flat,) = as_carried(data, signature).groups
    with torch.no_grad():
        wanted = model(*inputs(dtype))
    assert scale_error(found.graph.run(flat)[0], wanted["y"].float()) <= half_parity(dtype)


@pytest.mark.parametrize("dtype", HALVES)
def test_callers_get_their_own_types(dtype: torch.dtype) -> None:
    model = trained(Mixed(dtype))
    found = capture(model, samples(inputs(dtype)))
    runner = Runner(GraphExecutable(found.graph), found.graph.signature, 4)
    x, n = inputs(dtype, 5, seed=3)
    answer, wanted = runner(x, n), found.original(x.float(), n)
    for key, tensor in wanted.items():
        assert answer[key].dtype == tensor.dtype
        assert scale_error(answer[key].float(), tensor.float()) <= half_parity(dtype)
    numbers = runner(x.float().numpy(), n.numpy())
    assert numbers["y"].dtype == (np.float16 if dtype == torch.float16 else np.float32)
    assert torch.equal(torch.from_numpy(numbers["y"]).to(dtype), answer["y"])


def test_a_type_that_torch_can_not_run_here_is_captured_as_float32() -> None:
    class Picky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            if self.a.weight.dtype != torch.float32:
                raise NotImplementedError('"kernel" not implemented for Half')
            return self.a(x)

    model = trained(Picky().half())
    found = capture(model, samples(random(6, 6).half()))
    assert [s.dtype for s in found.graph.signature.outputs] == ["float16"]
    x = random(3, 6, seed=2).half()
    assert scale_error(found.original(x), found.graph.run([x.float()])[0]) <= PARITY
    assert model.a.weight.dtype == torch.float16


def test_a_half_model_that_computes_something_else_is_refused() -> None:
    class Switches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Any:
            return self.a(x) * (2 if self.a.weight.dtype == torch.float32 else 1)

    with pytest.raises(ParityError, match="Switches: its export differs by 1"):
        capture(trained(Switches().bfloat16()), samples(random(6, 6)))


def test_the_tolerance_follows_the_type() -> None:
    assert half_parity(torch.float32) < PARITY
    assert half_parity(torch.float16) == pytest.approx(0.0283, rel=0.01)
    assert half_parity(torch.bfloat16) == 8 * half_parity(torch.float16)
