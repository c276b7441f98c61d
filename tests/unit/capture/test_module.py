"""Calling conventions that are captured, and models that are refused with the way out."""

from collections import OrderedDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tersor.capture.module import capture, evaluation_mode, relative_difference
from tersor.capture.samples import collect
from tersor.capture.structures import describe
from tersor.core.data import Data
from tersor.core.errors import CaptureError, DataError, ParityError, TersorError, WeightError
from tersor.core.structure import bind, count_leaves, unflatten
from tersor.graph.contracts import Graph
from tests.unit.capturing import graph_of, random, samples, scale_error, trained

HERE = Path(__file__).name
# The same float32 ops in the same order, but for a folded batch norm.
ROUNDINGS = 1e-5


def captured(module: nn.Module, item: Any) -> Graph:
    return capture(trained(module), samples(item)).graph


def agrees(graph: Graph, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """What the graph gives in the original's containers, after it was compared with the original."""
    with torch.no_grad():
        wanted = module(*args, **kwargs)
    found = graph.run(bind(graph.signature, args, kwargs))
    flat: list[Tensor] = []
    describe(wanted, flat)
    for one, other in zip(found, flat, strict=True):
        assert scale_error(one, other) <= ROUNDINGS
    assert count_leaves(graph.signature.result) == len(flat) == len(graph.signature.outputs)
    return unflatten(graph.signature.result, list(found))


class Everything(nn.Module):
    """Positional, default, keyword-only and nested arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 3)

    def forward(
        self,
        x: Tensor,
        pair: tuple[Tensor, Tensor] | None = None,
        scale: float = 2.0,
        *,
        mask: Tensor | None = None,
        extra: dict[str, Tensor] | None = None,
    ) -> Tensor:
        y = self.a(x) * scale
        y = y if pair is None else y + pair[0] - 2 * pair[1]
        y = y if mask is None else y * mask
        return y if extra is None else y + extra["shift"] / (1 + extra["size"].abs())


def batch(size: int, seed: int = 0) -> dict[str, Any]:
    x, a, b, m, s, t = (random(size, n, seed=seed + i) for i, n in enumerate((4, 3, 3, 3, 3, 3)))
    return {"x": x, "pair": (a, b), "mask": m, "extra": {"shift": s, "size": t}}


ITEMS: dict[str, Callable[[dict[str, Any]], tuple[tuple[Any, ...], dict[str, Any]]]] = {
    "tensor": lambda b: ((b["x"],), {}),
    "tuple": lambda b: ((b["x"], b["pair"]), {}),
    "constant": lambda b: ((b["x"], None, 3.0), {}),
    "dict": lambda b: ((), b),
    "dict in another order": lambda b: ((), {k: b[k] for k in ("mask", "extra", "x")}),
    "keyword-only": lambda b: ((), {"x": b["x"], "mask": b["mask"]}),
}


@pytest.mark.parametrize("name", ITEMS)
def test_inputs(name: str) -> None:
    module = trained(Everything())
    args, kwargs = ITEMS[name](batch(1))
    item = kwargs or (args[0] if len(args) == 1 else args)
    graph = captured(module, item)
    assert [len(t) for t in graph.example] == [2] * len(graph.example)  # one sample, repeated
    for size in (1, 3, 5):
        args, kwargs = ITEMS[name](batch(size, seed=7))
        agrees(graph, module, *args, **kwargs)
    assert graph.signature.parameter_names == ("x", "pair", "scale", "mask", "extra")
    assert all(spec.shape[0] is None for spec in graph.signature.inputs)


Named = namedtuple("Named", ["first", "second"])  # noqa: PYI024 - as old models have it


class Typed(NamedTuple):
    logits: Tensor
    hidden: Tensor | None


@dataclass
class Record:
    logits: Tensor
    hidden: Tensor | None = None


torch.export.register_dataclass(Record)


@dataclass
class Unregistered:
    logits: Tensor
    hidden: Tensor | None = None


OUTPUTS: dict[str, Callable[[Tensor], Any]] = {
    "tensor": lambda x: x,
    "list": lambda x: [x, x * 2],
    "tuple": lambda x: (x, (x + 1, [x - 1])),
    "dict": lambda x: {"b": x, "a": {"c": x + 1}},
    "ordered dict": lambda x: OrderedDict(z=x, a=x + 1),
    "namedtuple": lambda x: Named(x, x + 1),
    "NamedTuple with None": lambda x: Typed(x, None),
    "dataclass": lambda x: Record(x, x + 1),
    "dataclass with None": Record,
    "dataclass that torch does not know": Unregistered,
    "dataclass in a dict": lambda x: {"a": x, "b": [Unregistered(x + 1, x - 1)]},
    "constants": lambda x: {"n": 3, "x": x, "name": "a", "none": None, "f": 0.5, "flag": True},
    "one tensor twice": lambda x: (x, x),
    "its input": lambda x: (x, x + 1),
}


class Gives(nn.Module):
    def __init__(self, make: Callable[[Tensor], Any], *, direct: bool = False) -> None:
        super().__init__()
        self.a, self.make, self.direct = nn.Linear(4, 4), make, direct

    def forward(self, x: Tensor) -> Any:
        return self.make(x if self.direct else self.a(x))


@pytest.mark.parametrize("name", OUTPUTS)
def test_outputs(name: str) -> None:
    module = trained(Gives(OUTPUTS[name], direct=name == "its input"))
    graph = captured(module, random(4, 4))
    x = random(3, 4, seed=5)
    found = agrees(graph, module, x)
    wanted = module(x)
    if name in ("tensor", "tuple", "list", "dict", "constants"):
        assert type(found) is type(wanted)
    if name == "constants":
        assert {k: v for k, v in found.items() if k != "x"} == {
            "n": 3, "name": "a", "none": None, "f": 0.5, "flag": True,
        }  # fmt: skip
        assert list(found) == list(wanted)
    if name == "dataclass in a dict":
        assert torch.equal(found["b"][0].hidden, wanted["b"][0].hidden)
    elif name.startswith("dataclass"):
        assert torch.equal(found.logits, found[0])
        assert (found.hidden is None) == (wanted.hidden is None)
    assert [spec.shape for spec in graph.signature.outputs] == [(None, 4)] * len(
        graph.signature.outputs
    )


def test_outputs_of_hugging_face() -> None:
    outputs = pytest.importorskip("transformers.modeling_outputs")

    def make(x: Tensor) -> Any:
        return outputs.BaseModelOutputWithPooling(last_hidden_state=x.unsqueeze(1), pooler_output=x)

    module = trained(Gives(make))
    found = agrees(captured(module, random(4, 4)), module, random(3, 4))
    assert list(found) == ["last_hidden_state", "pooler_output"]
    assert found.hidden_states is None
    assert torch.equal(found[1], found.pooler_output)


def test_names_of_nested_outputs() -> None:
    graph = captured(Gives(lambda x: {"a": x, "b": [x + 1, (x - 1,)]}), random(4, 4))
    names = [spec.name for spec in graph.signature.outputs]
    assert names == ["a", "b.output_0", "b.output_1.output_0"]
    reduced = captured(Gives(lambda x: (x.sum(0), x.sum(), (x > 0).long())), random(4, 4))
    assert [spec.shape for spec in reduced.signature.outputs] == [(4,), (), (None, 4)]
    assert [spec.dtype for spec in reduced.signature.outputs] == ["float32", "float32", "int64"]


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        if y.sum() > 0:  # the line that the message must name
            return y
        return -y


class Literal(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.view(2, 2, 2).sum(-1)


class Randomised(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.5, training=True)


class Stateful(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.calls


class Odd(nn.Module):
    def forward(self, x: Tensor) -> Any:
        return {"x": x, "set": {1, 2}}


def refused(kind: type[TersorError], module: nn.Module, item: Any) -> str:
    with pytest.raises(kind) as caught:
        capture(module.eval(), samples(item))
    return str(caught.value)


def test_data_dependent_control_flow_names_the_line(capfd: pytest.CaptureFixture[str]) -> None:
    message = refused(CaptureError, Branch(), random(4, 4))
    assert capfd.readouterr().err == ""  # torch's own graph says nothing to a caller
    lines = Path(__file__).read_text(encoding="utf-8").splitlines()
    number = next(i for i, line in enumerate(lines, 1) if "if y.sum() > 0:" in line)
    assert "Branch can't be exported: control flow depends on the values of tensors" in message
    assert f"{HERE}:{number}" in message
    assert "torch.where" in message


def test_a_static_batch_is_refused() -> None:
    message = refused(CaptureError, Literal(), random(2, 4))
    assert "the batch size is fixed by the code" in message
    assert "x.shape[0] or use -1" in message


@pytest.mark.parametrize("module", [Randomised, Stateful])
def test_models_that_do_not_repeat_are_refused(module: Callable[[], nn.Module]) -> None:
    message = refused(ParityError, module(), random(4, 4))
    assert "random or keeps state between calls" in message
    assert "wanted at most 0.0001" in message


def test_items_by_other_names_are_told_how_to_pick_one() -> None:
    message = refused(DataError, nn.Linear(4, 4), {"x": random(4, 4), "y": torch.zeros(4)})
    assert "to_inputs=lambda batch: batch['x']" in message


def test_single_samples_are_told_that_items_are_batches() -> None:
    assert "one sample alone is x[None]" in refused(DataError, nn.Linear(4, 4), random(3))


def test_a_labelled_loader_is_told_about_to_inputs() -> None:
    message = refused(DataError, nn.Linear(4, 4), [random(4, 4), torch.zeros(4, dtype=torch.long)])
    assert "2 positional input(s)" in message
    assert "to_inputs=lambda batch: batch[0]" in message
    message = refused(DataError, nn.Bilinear(4, 4, 4), (random(4, 4), torch.zeros(4).long()))
    assert "to_inputs=lambda batch: batch[0]" in message  # taken, but then the model fails


def test_names_that_forward_does_not_take_are_refused() -> None:
    message = refused(DataError, Everything(), {"x": random(4, 4), "labels": random(4, 4)})
    assert "the names ['labels', 'x'], but Everything.forward(" in message
    assert "unexpected keyword argument 'labels'" in message


def test_weights_that_are_not_finite_are_named() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    with torch.no_grad():
        module[0].weight[1, 2] = float("nan")
        module[0].weight[0, 0] = float("inf")
    message = refused(WeightError, module, random(4, 4))
    assert message.startswith("0.weight: 2 of 16 values are NaN or infinite")
    with torch.no_grad():
        module[0].weight.zero_()
        module[1].running_var[3] = float("nan")
    assert refused(WeightError, module, random(4, 4)).startswith("1.running_var: 1 of 4")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn])
def test_weights_of_another_type_are_refused(dtype: torch.dtype) -> None:
    message = refused(WeightError, nn.Linear(4, 4).to(dtype), random(4, 4))
    assert message.startswith("weight: ")
    assert str(dtype).removeprefix("torch.") in message
    assert "model.float()" in message


def test_weights_without_values_are_refused() -> None:
    message = refused(WeightError, nn.Linear(4, 4, device="meta"), random(4, 4))
    assert "weight has no values (meta device); load the weights first" in message


def test_inputs_of_another_type() -> None:
    images = torch.zeros(4, 1, 5, 5, dtype=torch.uint8)
    message = refused(DataError, nn.Conv2d(1, 2, 3), images)
    assert "the model failed on the first inputs uint8(2, 1, 5, 5)" in message
    assert "a float model needs float inputs" in message
    double = capture(trained(nn.Linear(4, 4)), samples(random(4, 4).double())).graph
    assert [spec.dtype for spec in double.signature.inputs] == ["float32"]


def test_outputs_without_plain_form_are_refused() -> None:
    message = refused(CaptureError, Odd(), random(4, 4))
    assert message.startswith("output.set: found set, wanted tensors in tuples, lists, dicts or")
    assert "return those from forward()" in message


def test_the_mode_is_restored(resnet20: nn.Module) -> None:
    resnet20.train()
    first = next(iter(resnet20.children()))
    first.eval()
    found = capture(resnet20, samples(random(4, 1, 28, 28)))
    assert resnet20.training
    assert not first.training
    x = random(3, 1, 28, 28)
    answer = found.original(x)
    assert resnet20.training
    assert not first.training
    assert len(answer) == 3
    assert scale_error(found.graph.run([x])[0], answer) <= ROUNDINGS
    with pytest.raises(ZeroDivisionError), evaluation_mode(resnet20):  # noqa: PT012 - its inside
        assert not resnet20.training
        raise ZeroDivisionError
    assert resnet20.training


def test_parameters_keep_their_gradient_flags() -> None:
    module = trained(nn.Linear(4, 4))
    module.bias.requires_grad_(False)
    module.weight.grad = torch.ones(4, 4)
    captured(module, random(4, 4))
    assert module.weight.requires_grad
    assert not module.bias.requires_grad
    assert torch.equal(module.weight.grad, torch.ones(4, 4))


def test_a_loader_all_the_way(images: dict[str, Tensor], lenet5: nn.Module) -> None:
    dataset = torch.utils.data.TensorDataset(images["train"][:60], images["train_labels"][:60])
    loader = torch.utils.data.DataLoader(dataset, batch_size=7)
    parts = collect(Data(loader, to_inputs=lambda batch: batch[0]), seed=0)
    graph = capture(lenet5, parts["calibration"]).graph
    agrees(graph, lenet5, parts["test"].tensors[0])


def test_relative_difference() -> None:
    wanted = torch.tensor([1.0, -4.0])
    assert relative_difference(wanted + torch.tensor([0.0, 1.0]), wanted) == 0.25
    assert relative_difference(torch.zeros(2), torch.zeros(2)) == 0
    assert relative_difference(torch.zeros(3), torch.zeros(2)) == float("inf")
    assert relative_difference(torch.zeros(0), torch.zeros(0)) == 0
    assert not relative_difference(torch.full((2,), float("nan")), wanted) <= 1


def test_graph_of_is_what_the_other_tests_use() -> None:
    assert graph_of(trained(nn.Linear(4, 4)), random(4, 4)).signature.inputs[0].shape == (None, 4)


def test_an_autocast_of_the_models_own() -> None:
    """The graph is float32, where the model rounds to bfloat16."""

    class Rounds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 32), nn.Linear(32, 4)

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                y = self.a(x).relu()
            z: Tensor = self.b(y.float())
            return z

    module, x = trained(Rounds()), random(4, 8)
    (found,) = captured(module, x).module(x)
    wanted = module.b((x @ module.a.weight.T + module.a.bias).relu())
    assert torch.allclose(found, wanted, atol=1e-5)
