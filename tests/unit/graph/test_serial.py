"""Graphs as JSON: what comes back computes the same; nothing in a file is run as Python."""

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tersor.core.errors import ArtifactError
from tersor.graph.apply import apply
from tersor.graph.contracts import Graph, Quantizer, SiteChange
from tersor.graph.serial import graph_from_json, graph_tensors, graph_to_json, structure_text
from tests.unit.capturing import graph_of, random, site_of, trained


class Literals(nn.Module):
    """Infinity, slices, a type, a device, a memory format, strings, lists and None as literals."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.linear(x).masked_fill(x > 0.5, float("-inf"))
        z = torch.ones(x.shape[0], 2, dtype=torch.float64, device=x.device).to(torch.float32)
        image = x.reshape(-1, 1, 2, 3).contiguous(memory_format=torch.channels_last)
        image = nn.functional.interpolate(image, scale_factor=2.0, mode="bilinear")
        tail = x[..., None, 1:5:2].clone(memory_format=torch.contiguous_format)
        return {
            "y": y.softmax(-1),
            "z": z.expand(-1, 2) / float("inf") + torch.full_like(z, 1e-300),
            "image": torch.nn.functional.gelu(image, approximate="tanh"),
            "tail": tail * x.shape[0] // 2,
        }


def again(graph: Graph) -> Graph:
    text = json.dumps(graph_to_json(graph))
    return graph_from_json(json.loads(text), graph_tensors(graph))


def equal_outputs(graph: Graph, flat: list[Tensor]) -> None:
    for found, wanted in zip(again(graph).run(flat), graph.run(flat), strict=True):
        assert found.dtype == wanted.dtype
        assert torch.equal(found, wanted)


@pytest.fixture(scope="module")
def literals() -> Graph:
    return graph_of(trained(Literals()), random(4, 6))


def test_all_kinds_of_literals_come_back(literals: Graph) -> None:
    equal_outputs(literals, [random(5, 6)])
    text = json.dumps(graph_to_json(literals))
    for kind in ('{"float": "-inf"}', '{"dtype": "float64"}', '{"device": "cpu"}', "memory_format"):
        assert kind in text


def test_quantised_graphs_come_back(lenet5: nn.Module) -> None:
    graph = graph_of(lenet5, random(4, 1, 28, 28))
    site = site_of(graph, "f1")
    changed = SiteChange(
        site=site,
        level="int8",
        codes=torch.ones(site.shape, dtype=torch.int8),
        scale=torch.rand(site.shape[0]),
        quantizer=Quantizer(step=0.1, low=0, high=255, shift=0.25),
    )
    edited = apply(graph, [changed])
    equal_outputs(edited, [random(3, 1, 28, 28)])
    assert again(edited).signature == edited.signature
    assert [t.shape for t in again(edited).example] == [(2, 1, 28, 28)]


def test_one_structure_has_one_text(literals: Graph) -> None:
    same = graph_of(trained(Literals(), seed=5), random(4, 6))
    assert structure_text(same) == structure_text(literals)
    assert structure_text(again(literals)) == structure_text(literals)


Edit = Callable[[dict[str, Any], dict[str, Tensor]], None]


def call(data: dict[str, Any]) -> dict[str, Any]:
    return next(n for n in data["nodes"] if n["op"] == "call_function")


def target(name: str) -> Edit:
    return lambda data, _: call(data).update(target=name)


def argument(value: Any) -> Edit:
    return lambda data, _: call(data).update(args=[value, *call(data)["args"][1:]])


def node(position: int, **fields: Any) -> Edit:
    return lambda data, _: data["nodes"][position].update(fields)


def renamed(name: str) -> Edit:
    """A tensor and its reader under a name that closes a string and goes on as code."""

    def edit(data: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        row = next(n for n in data["nodes"] if n["op"] == "get_attr")
        tensors[name] = tensors[row["target"]]
        row["target"] = name

    return edit


def placeholder(name: str) -> Edit:
    return lambda data, _: next(n for n in data["nodes"] if n["op"] == "placeholder").update(
        target=name
    )


def signature(**fields: Any) -> Edit:
    return lambda data, _: data["signature"]["inputs"][0].update(fields)


CODE = "__import__('os').system('true')"
REFUSED: dict[str, tuple[Edit, str]] = {
    "Python function": (target("os.system"), "'os.system' is not allowed"),
    "class of the namespace": (target("aten.__class__.x"), "has no op 'aten.__class__.x'"),
    "method of the namespace": (target("aten.__class__.__getattr__"), "has no op"),
    "method of an op": (target("aten.add.__call__"), "has no op 'aten.add.__call__'"),
    "string of the namespace": (target("aten.name.lower"), "has no op"),
    "deeper attribute": (target("aten.add.Tensor.__globals__"), "is not allowed"),
    "other built-in": (target("operator.attrgetter"), "is not allowed"),
    "other namespace": (target("prim.Print.default"), "is not allowed"),
    "op that opens files": (target("aten.from_file.default"), "is not allowed"),
    "op that torch lacks": (target("aten.no_such_op.default"), "has no op"),
    "no target": (target(""), "is not allowed"),
    "call of a module": (node(0, op="call_module"), "op 'call_module' is not allowed"),
    "tensor that is absent": (node(0, target="gone"), "tensor 'gone' is absent"),
    "unknown node": (argument({"node": "nobody"}), "is no value"),
    "node that comes later": (argument({"node": "output"}), "is no value"),
    "node that is a list": (argument({"node": []}), "describes no graph"),
    "unknown kind": (argument({"lambda": "x"}), "is no value"),
    "two kinds": (argument({"float": "1", "node": "x"}), "is no value"),
    "type that is none": (argument({"dtype": "load"}), "is no value"),
    "no number": (argument({"float": "one"}), "describes no graph"),
    "no device": (argument({"device": "nowhere"}), "describes no graph"),
    "name given twice": (node(1, name="linear_weight"), "given twice or is no name"),
    "name that is code": (node(1, name=f"x={CODE}"), "is no name"),
    "argument that is code": (placeholder(f"x={CODE}"), "is no name of an argument"),
    "argument that is a word of Python": (placeholder("lambda"), "is no name of an argument"),
    "keyword that is code": (
        lambda data, _: call(data).update(kwargs={f"a={CODE}, b": 1}),
        "is no name of an argument",
    ),
    "tensor that is code": (renamed(f'x"), {CODE}, ("'), "is no name of a tensor"),
    "tensor that hides a method": (renamed("linear.forward.x"), "describes no graph"),
    "row without a name": (lambda data, _: data["nodes"][0].pop("name") and None, "no graph"),
    "no rows": (lambda data, _: data.pop("nodes") and None, "no graph"),
    "another version": (lambda data, _: data.update(version=2), "version 2, wanted 1"),
    "input of no type": (signature(dtype="load"), "is no input"),
    "input beyond memory": (signature(shape=[None, 1 << 40]), "at most 268435456 values"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_plain_graph_is_refused(literals: Graph, name: str) -> None:
    edit, words = REFUSED[name]
    data, tensors = copy.deepcopy(graph_to_json(literals)), graph_tensors(literals)
    graph_from_json(data, tensors)
    edit(data, tensors)
    with pytest.raises(ArtifactError, match=words):
        graph_from_json(data, tensors)


def test_a_node_without_plain_form_is_named(literals: Graph) -> None:
    module = copy.deepcopy(literals.module)
    victim = next(n for n in module.graph.nodes if n.op == "call_function")
    victim.target = len
    with pytest.raises(ArtifactError, match=f"node {victim.name}: .*len.* no registered op"):
        graph_to_json(replace(literals, module=module))
    victim.target = torch.ops.aten.linear.default
    victim.args = (victim.args[0], 1j)
    with pytest.raises(ArtifactError, match="complex 1j can't be saved"):
        graph_to_json(replace(literals, module=module))
