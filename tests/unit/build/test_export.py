"""A .pt2 is called as the original was, and stock torch reads it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tersor.build.export import called_program, exported_program, write_pt2
from tersor.capture.module import capture
from tersor.graph.contracts import Graph
from tersor.graph.modules import GraphModule
from tests.unit.capturing import graph_of, random, samples, trained


class Nested(nn.Module):
    """Everything that a result may hold, and arguments of every kind."""

    offset: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("offset", torch.ones(4))

    def forward(
        self, x: Tensor, pair: Any = None, *, word: str = "s", flag: bool = True
    ) -> dict[str, Any]:
        del word, flag
        y = self.linear(x) + self.offset * torch.tensor([1.0, 2.0, 3.0, 4.0])
        parts = [y * 2] if pair is None else [pair["a"] + y, pair["b"] * y]
        return {"y": y, "parts": (y.sigmoid(), parts), "none": None, "count": 3}


def graph_for(item: Any, module: nn.Module | None = None) -> Graph:
    return capture(trained(module or Nested()), samples(item)).graph


def reloaded(graph: Graph, folder: Path) -> nn.Module:
    write_pt2(graph, folder / "m.pt2")
    return torch.export.load(folder / "m.pt2").module()


def assert_same(found: Any, wanted: Any) -> None:
    assert type(found) is type(wanted)
    if isinstance(wanted, Tensor):
        assert found.dtype == wanted.dtype
        assert torch.equal(found, wanted)
    elif isinstance(wanted, dict):
        assert list(found) == list(wanted)
        assert_same([*found.values()], [*wanted.values()])
    elif isinstance(wanted, list | tuple):
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted, strict=True):
            assert_same(one, other)
    else:
        assert found == wanted


def test_a_tensor_comes_back_as_a_tensor(tmp_path: Path) -> None:
    graph = graph_of(trained(nn.Linear(4, 3)), random(2, 4))
    program = reloaded(graph, tmp_path)
    for size in (1, 5):
        assert_same(program(random(size, 4)), GraphModule(graph)(random(size, 4)))


def test_containers_and_constants_come_back_nested(tmp_path: Path) -> None:
    graph = graph_for((random(3, 4),))
    found = reloaded(graph, tmp_path)(random(5, 4))
    assert list(found) == ["y", "parts", "none", "count"]
    assert_same(found, GraphModule(graph)(random(5, 4)))


def test_inputs_are_passed_by_name_and_nested(tmp_path: Path) -> None:
    item = {"x": random(3, 4), "pair": {"a": random(3, 4, seed=2), "b": random(3, 4, seed=3)}}
    graph = graph_for(item)
    fresh = {"x": random(6, 4), "pair": {"a": random(6, 4, seed=4), "b": random(6, 4, seed=5)}}
    assert_same(reloaded(graph, tmp_path)(**fresh), GraphModule(graph)(**fresh))


def test_inputs_without_tensors_are_passed_as_they_were(tmp_path: Path) -> None:
    constants = {"word": "t", "flag": False, "pair": None}
    graph = graph_for({"x": random(3, 4)} | constants)
    found = reloaded(graph, tmp_path)(x=random(5, 4), **constants)
    assert_same(found, GraphModule(graph)(x=random(5, 4), **constants))


class Several(nn.Module):
    def forward(self, *items: Tensor) -> tuple[Tensor, ...]:
        return tuple(2 * item for item in items)


def test_any_number_of_arguments(tmp_path: Path) -> None:
    graph = graph_of(Several(), random(2, 4), random(2, 3))
    fresh = (random(5, 4), random(5, 3))
    assert_same(reloaded(graph, tmp_path)(*fresh), GraphModule(graph)(*fresh))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_model_takes_and_gives_its_own_type(dtype: torch.dtype, tmp_path: Path) -> None:
    graph = graph_of(trained(nn.Linear(4, 3)).to(dtype), random(2, 4).to(dtype))
    fresh = random(5, 4).to(dtype)
    found = reloaded(graph, tmp_path)(fresh)
    assert found.dtype == dtype
    assert_same(found, GraphModule(graph)(fresh))


@dataclass
class Output:
    y: Tensor
    loss: Tensor | None = None


class Objects(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Output:
        return Output(self.linear(x))


def test_an_object_is_a_dict_of_its_fields(tmp_path: Path) -> None:
    """Its class may not be there where the file is read."""
    graph = graph_for((random(3, 4),), Objects())
    found = reloaded(graph, tmp_path)(random(5, 4))
    assert_same(found, {"y": GraphModule(graph)(random(5, 4)).y})


def test_tensors_and_layers_keep_the_names_of_the_graph() -> None:
    graph = graph_for((random(3, 4),))
    program = called_program(graph)
    assert {*program.state_dict} == {*graph.module.state_dict()}
    (linear,) = (n for n in program.graph.nodes if str(n.target) == "aten.linear.default")
    assert [path for path, _ in linear.meta["nn_module_stack"].values()] == ["", "linear"]


def test_the_flat_program_stays_flat() -> None:
    """What ONNX is made from: inputs and outputs in the signature's order."""
    found = exported_program(graph_for((random(3, 4),))).module()(random(5, 4))
    assert [tuple(t.shape) for t in found] == [(5, 4)] * 3
