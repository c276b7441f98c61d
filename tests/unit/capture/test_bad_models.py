"""Models that are unusual or broken: handled exactly, or refused by name with the way out."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, spectral_norm, weight_norm

from tersor.capture.module import capture
from tersor.capture.programs import open_model
from tersor.core.errors import CaptureError, TersorError, WeightError
from tersor.graph.contracts import Graph
from tersor.graph.edit import parameters_by_name
from tests.unit.capturing import random, samples, scale_error, targets

ROUNDINGS = 1e-5


@torch.library.custom_op("tersor_test::twice", mutates_args=())
def twice(x: Tensor) -> Tensor:
    return x * 2


@twice.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class Layered(nn.Module):
    """A linear layer inside another module, then a function."""

    def __init__(self, function: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 4))
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(self, self.inner(x))


def refused(module: nn.Module, x: Tensor, kind: type[TersorError] = CaptureError) -> str:
    with pytest.raises(kind) as caught:
        capture(module.eval(), samples(x))
    return str(caught.value)


def handled(module: nn.Module, x: Tensor) -> Graph:
    """Captured, and equal at another batch size; module and inputs are as before."""
    module.eval()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    names = {name: set(vars(m)) for name, m in module.named_modules()}
    graph = capture(module, samples(x)).graph
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    assert {name: set(vars(m)) for name, m in module.named_modules()} == names
    fresh = random(5, *x.shape[1:], seed=7)
    given = fresh.clone()
    (found,) = graph.run([fresh])
    assert torch.equal(fresh, given)
    with torch.no_grad():
        assert scale_error(found, module(given)) <= ROUNDINGS
    return graph


# --- ops


def test_custom_ops_are_named() -> None:
    message = refused(Layered(lambda _, y: twice(y)), random(4, 4))
    assert "tersor_test.twice.default is a custom op that no backend knows" in message
    assert "replace it by ops of torch" in message


def test_a_custom_op_under_no_grad_is_found() -> None:
    def function(_: Any, y: Tensor) -> Tensor:
        with torch.enable_grad():
            return twice(y)

    assert "is a custom op" in refused(Layered(function), random(4, 4))


def test_control_flow_ops_are_named() -> None:
    def function(_: Any, y: Tensor) -> Any:
        return torch.cond(y.sum() > 0, lambda v: v * 2, lambda v: v * 3, (y,))

    message = refused(Layered(function), random(4, 4))
    assert "cond has no plain form" in message
    assert "torch.where" in message


# --- in-place and state


def slices(_: Any, y: Tensor) -> Tensor:
    y[:, 0] += 1
    y[:, 1:3] = 0
    return y * 2


def test_in_place_updates_of_slices() -> None:
    graph = handled(Layered(slices), random(4, 4))
    assert "aten.slice_scatter.default" in targets(graph)


class WritesInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x[:, 0] += 1
        return self.a(x)


def test_in_place_updates_of_inputs() -> None:
    graph = capture(WritesInput().eval(), samples(random(4, 4))).graph
    x = random(3, 4)
    graph.run([x])
    assert torch.equal(x, random(3, 4))


def test_a_module_called_twice_keeps_one_weight() -> None:
    graph = handled(Layered(lambda m, y: m.inner(F.relu(y))), random(4, 4))
    assert targets(graph).count("aten.linear.default") == 2
    assert set(parameters_by_name(graph.module)) == {"inner.0.weight", "inner.0.bias"}


class Counts(nn.Module):
    """Buffers and attributes that every call changes, and no output reads."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.register_buffer("calls", torch.zeros(1))
        self.register_buffer("last", torch.zeros(4))
        self.kept = torch.zeros(2)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        y = self.a(x)
        self.last = y.mean(0)
        self.seen = y
        self.kept = y[0]
        return y


def test_mutated_buffers_are_put_back() -> None:
    model = Counts().eval()
    kept = model.kept
    capture(model, samples(random(4, 4)))
    assert model.calls.item() == 0
    assert torch.equal(model.last, torch.zeros(4))
    assert model.kept is kept
    assert not hasattr(model, "seen")


def test_the_original_is_never_changed_by_calling_it() -> None:
    """It is called and timed often; what a model counts stays as it was, and is counted from there each time."""
    model = Counts().eval()
    kept, x = model.kept, random(3, 4)
    original = capture(model, samples(random(4, 4))).original
    for _ in range(3):
        original(x)
        assert model.calls.item() == 0
        assert torch.equal(model.last, torch.zeros(4))
        assert model.kept is kept
        assert not hasattr(model, "seen")


def test_mutated_buffers_are_put_back_after_an_error() -> None:
    def function(m: Any, y: Tensor) -> Any:
        m.calls += 1
        return y if y.sum() > 0 else -y

    model = Layered(function)
    model.register_buffer("calls", torch.zeros(1))
    refused(model, random(4, 4))
    assert model.calls.item() == 0


# --- numbers


def test_complex_numbers_inside() -> None:
    def function(m: Any, y: Tensor) -> Tensor:
        return torch.fft.irfft(torch.fft.rfft(y, dim=1) * torch.view_as_complex(m.w), n=4, dim=1)

    model = Layered(function)
    model.w = nn.Parameter(random(3, 2))
    graph = handled(model, random(4, 4))
    assert not any(t.is_complex() for t in parameters_by_name(graph.module).values())


def test_complex_outputs_and_constants_are_named() -> None:
    message = refused(Layered(lambda _, y: torch.fft.rfft(y, dim=1)), random(4, 4))
    assert "output 'output' is complex64" in message
    assert "torch.view_as_real" in message

    def function(m: Any, y: Tensor) -> Tensor:
        return torch.view_as_real(torch.view_as_complex(y.reshape(-1, 2, 2)) * m.turns).flatten(1)

    model = Layered(function)
    model.turns = torch.polar(torch.ones(2), torch.arange(2.0))
    message = refused(model, random(4, 4))
    assert message.startswith("tensor turns is complex64")
    assert "torch.view_as_complex in forward()" in message


@pytest.mark.filterwarnings("ignore:Sparse CSR:UserWarning")
@pytest.mark.parametrize("layout", ["complex", "coo", "csr"])
def test_complex_and_sparse_weights_are_named(layout: str) -> None:
    makers = {
        "complex": lambda: torch.ones(4, 4, dtype=torch.complex64),
        "coo": lambda: torch.eye(4).to_sparse(),
        "csr": lambda: torch.eye(4).to_sparse_csr(),
    }
    model = Layered(lambda _, y: y)
    model.w = nn.Parameter(makers[layout]())
    message = refused(model, random(4, 4), WeightError)
    assert message.startswith("w: complex and sparse weights are not supported; make it dense")


def test_masks_of_infinity_are_no_broken_weights() -> None:
    model = Layered(lambda m, y: y + m.mask.clamp(min=-10))
    model.register_buffer("mask", torch.tensor([0.0, -torch.inf, 0.0, -torch.inf]))
    handled(model, random(4, 4))
    model.mask[0] = torch.inf
    assert refused(model, random(4, 4), WeightError).startswith("mask: 3 of 4 values")


# --- weights that are computed

NORMS: dict[str, Callable[[], nn.Module]] = {
    "weight_norm": lambda: parametrizations.weight_norm(nn.Linear(4, 3)),
    "spectral_norm": lambda: parametrizations.spectral_norm(nn.Linear(4, 3)),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(4, 4)),
    "weight_norm of old": lambda: weight_norm(nn.Linear(4, 3)),
    "spectral_norm of old": lambda: spectral_norm(nn.Linear(4, 3)),
    "conv": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 4)), parametrizations.weight_norm(nn.Conv1d(1, 3, 2))
    ),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_computed_weights_are_stored_as_weights(name: str, dtype: torch.dtype) -> None:
    module = nn.Sequential(NORMS[name](), nn.ReLU()).eval()
    if dtype == torch.float32:
        graph = handled(module, random(4, 4))
    else:  # the copy in float32 must be possible, too
        graph = capture(module.to(dtype), samples(random(4, 4))).graph
    names = set(parameters_by_name(graph.module))
    assert {n.rpartition(".")[2] for n in names} == {"weight", "bias"}
    assert not any("norm" in t for t in targets(graph))


# --- sizes


class Narrow(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c, self.b, self.a = nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1), nn.Linear(1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(self.b(self.c(x)).mean((2, 3)))


def test_a_width_of_one() -> None:
    assert handled(Narrow(), random(4, 1, 5, 5)).signature.outputs[0].shape == (None, 1)
    handled(nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 3)), random(4, 1))
    handled(Narrow(), random(1, 1, 1, 1))


@pytest.mark.filterwarnings("ignore:Initializing zero-element:UserWarning")
def test_zero_size_dimensions() -> None:
    module = nn.Sequential(nn.Linear(4, 0), nn.Linear(0, 3))
    message = refused(module, random(4, 4), WeightError)
    assert message.startswith("0.weight: found shape (0, 4), which holds no value")
    assert "remove that layer" in message
    handled(Layered(lambda _, y: torch.cat([y, y[:, :0]], 1)), random(4, 4))
    model = Layered(lambda m, y: torch.cat([y, m.none]))
    model.register_buffer("none", torch.zeros(0, 4))
    handled(model, random(4, 4))


@pytest.mark.parametrize("within", [False, True])
def test_torchscript_is_refused_with_the_way_out(*, within: bool) -> None:
    script: nn.Module = torch.jit.trace(nn.Linear(4, 2), torch.zeros(1, 4))
    with pytest.raises(CaptureError, match=r"TorchScript.*nn\.Module.*state_dict"):
        open_model(nn.Sequential(script) if within else script)
