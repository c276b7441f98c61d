"""A graph called as the original: its containers, its types, and what it refuses by name."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tersor.core.errors import DataError
from tersor.graph.modules import GraphModule
from tests.unit.capturing import graph_of, random, trained

HALVES = [torch.float16, torch.bfloat16]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.rows = nn.Embedding(5, 4)

    def forward(self, x: Tensor, ids: Tensor) -> dict[str, Any]:
        y = self.linear(x + self.rows(ids))
        return {"y": y, "label": y.argmax(1)}


def module_of(dtype: torch.dtype = torch.float32) -> tuple[Net, GraphModule]:
    net = Net()
    trained(net).to(dtype)
    return net, GraphModule(graph_of(net, random(3, 4).to(dtype), torch.tensor([0, 4, 1])))


X, IDS = random(6, 4, seed=5), torch.tensor([0, 1, 2, 3, 4, 0])


@pytest.mark.parametrize("dtype", HALVES)
def test_a_half_model_takes_and_gives_its_own_type(dtype: torch.dtype) -> None:
    net, module = module_of(dtype)
    with torch.no_grad():
        found, wanted = module(X.to(dtype), ids=IDS), net(X.to(dtype), IDS)
        linear, rows = net.linear.float(), net.rows.float()
        terms = (X.to(dtype).float() + rows(IDS)).abs() @ linear.weight.abs().T + linear.bias.abs()
    assert {k: v.dtype for k, v in found.items()} == {k: v.dtype for k, v in wanted.items()}
    # Half a step for each rounding: the original's of its sum and of its products, the graph's one.
    limit = 3 / 2 * torch.finfo(dtype).eps * float(terms.max())
    assert float((found["y"].float() - wanted["y"].float()).abs().max()) <= limit


@pytest.mark.parametrize("dtype", [*HALVES, torch.float64])
def test_floats_of_another_width_are_taken(dtype: torch.dtype) -> None:
    _, module = module_of()
    assert torch.equal(module(X.to(dtype), IDS)["y"], module(X.to(dtype).float(), IDS)["y"])
    assert module(X.to(dtype), IDS)["y"].dtype == torch.float32


def test_integers_and_booleans_are_taken_as_the_model_s_integers() -> None:
    _, module = module_of()
    wanted = module(X, IDS)["y"]
    assert torch.equal(module(X, IDS.to(torch.uint8))["y"], wanted)
    flags = torch.tensor([True, False] * 3)
    assert torch.equal(module(X, flags)["y"], module(X, flags.long())["y"])
    assert module(X[:0], IDS[:0].int())["y"].shape == (0, 3)


class Narrow(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1


def test_integers_that_do_not_fit_are_refused() -> None:
    module = GraphModule(graph_of(Narrow(), torch.tensor([[1], [2]], dtype=torch.int32)))
    assert module(torch.tensor([[5]])).tolist() == [[6]]
    with pytest.raises(DataError, match=r"input 'x': found values from 0 to 2147483648, which do"):
        module(torch.tensor([[0], [2**31]]))


@pytest.mark.parametrize(
    ("x", "ids", "said"),
    [
        (IDS[:, None].expand(6, 4), IDS, r"input 'x': found int64, wanted float32; convert it"),
        (X, IDS.float(), r"input 'ids': found float32, wanted int64; convert it"),
        (X.to(torch.complex64), IDS, r"input 'x': found complex64, wanted float32"),
        (X.numpy(), IDS, r"input 'x': found a ndarray, wanted a tensor; pass torch.as_tensor"),
    ],
)
def test_another_kind_is_refused_by_name(x: Any, ids: Any, said: str) -> None:
    _, module = module_of()
    with pytest.raises(DataError, match=said):
        module(x, ids)


def test_gradients_flow_through_the_casts() -> None:
    _, module = module_of(torch.float16)
    x = X.half().requires_grad_()
    module(x, IDS)["y"].sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float16
    assert float(x.grad.abs().sum()) > 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_who_changes_the_module_s_type_gets_that_type(dtype: torch.dtype) -> None:
    _, module = module_of()
    changed = copy.deepcopy(module).to(dtype)
    assert changed(X.to(dtype), IDS)["y"].dtype == dtype
    assert changed(X, IDS)["y"].dtype == dtype


def test_its_state_is_the_graph_s_alone_and_it_is_copied() -> None:
    _, module = module_of(torch.float16)
    inner = module.graph_module.state_dict()
    assert list(module.state_dict()) == [f"graph_module.{name}" for name in inner]
    again = copy.deepcopy(module)
    assert torch.equal(again(X.half(), IDS)["y"], module(X.half(), IDS)["y"])
