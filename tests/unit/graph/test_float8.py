"""8-bit floats in a graph: what is computed, what is found again, files, changes, refusals."""

from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from tersor.analyse.sites import find_sites
from tersor.core.errors import BackendError, ShapeError
from tersor.core.records import BuildChoice, Candidate
from tersor.core.registry import backend
from tersor.graph.apply import apply
from tersor.graph.changes import pack, unpack
from tersor.graph.contracts import Graph, Quantizer, SiteChange
from tersor.graph.edit import attribute, run_all
from tersor.graph.float8 import float8_read, float8_weight, refuse_float8
from tersor.graph.operators import weighted_ops
from tersor.graph.quantizer import rounded
from tersor.graph.serial import graph_from_json, graph_tensors, graph_to_json
from tersor.ops.float8 import FLOAT8, FLOAT8_LIMIT, float8_codes
from tests.conformance.test_backends import Block, graph_of, random, seeded

GRID = Quantizer(step=0.01, low=-FLOAT8_LIMIT, high=FLOAT8_LIMIT, kind="fp8")


def changes(graph: Graph, inputs: tuple[Tensor, ...]) -> list[SiteChange]:
    """Every linear: a scale a row, a step a tensor, both from the largest value seen."""
    seen = run_all(graph.module, inputs)
    sites = {s.ops[0]: s for s in find_sites(graph)}
    found = []
    for op in weighted_ops(graph.module):
        weight = attribute(graph.module, str(op.weight.target)).detach()
        scale = weight.abs().amax(1) / FLOAT8_LIMIT
        step = float(seen[op.data.name].abs().max()) / FLOAT8_LIMIT
        found.append(
            SiteChange(
                site=sites[op.node.name],
                level="fp8",
                codes=float8_codes(weight / scale[:, None]),
                scale=scale,
                quantizer=replace(GRID, step=step),
            )
        )
    return found


def in_float8(graph: Graph, inputs: tuple[Tensor, ...]) -> Graph:
    return apply(graph, changes(graph, inputs))


@pytest.fixture(scope="module")
def block() -> tuple[Graph, tuple[Tensor, ...]]:
    inputs = (random(4, 7, 16),)
    return graph_of(seeded(Block()), *inputs), inputs


def test_a_linear_computes_what_the_format_means(block: tuple[Graph, tuple[Tensor, ...]]) -> None:
    graph, inputs = block
    first = changes(graph, inputs)[0]
    assert first.codes is not None
    assert first.scale is not None
    assert first.quantizer is not None
    edited = apply(graph, [first])
    (name,) = first.site.ops
    op = next(o for o in weighted_ops(graph.module) if o.node.name == name)
    data, bias = (run_all(graph.module, inputs)[op.data.name], op.bias)
    assert bias is not None
    x = rounded(data, first.quantizer)
    units = data.double() / first.quantizer.step
    assert torch.equal(x, units.float().to(FLOAT8).float() * first.quantizer.step)
    w = first.codes.float() * first.scale[:, None]
    wanted = torch.nn.functional.linear(x, w, attribute(graph.module, str(bias.target)))
    assert torch.equal(run_all(edited.module, inputs)[name], wanted)
    # Weight and input, each off by 2**-4 of a value at most, a third of that squared on average.
    error = (edited.run(inputs)[0] - graph.run(inputs)[0]).norm() / graph.run(inputs)[0].norm()
    assert 0 < float(error) <= 2.0**-4


def test_backends_find_what_was_written(block: tuple[Graph, tuple[Tensor, ...]]) -> None:
    graph, inputs = block
    edited = in_float8(graph, inputs)
    tensors = graph_tensors(edited)
    linears = [n for n in edited.module.graph.nodes if "linear" in str(n.target)]
    assert len(linears) == 2
    for node, change in zip(linears, changes(graph, inputs), strict=True):
        read, weight = float8_read(node.args[0]), float8_weight(node.args[1], tensors)
        assert read is not None
        assert weight is not None
        assert change.quantizer is not None
        assert change.codes is not None
        assert read.step == change.quantizer.step
        assert torch.equal(tensors[weight.codes].float(), change.codes.float())
        assert float8_read(node.args[1]) is None
        assert float8_weight(node.args[0], tensors) is None
    assert all(float8_read(n) is None for n in graph.module.graph.nodes)


def test_json_and_records_keep_it(block: tuple[Graph, tuple[Tensor, ...]]) -> None:
    graph, inputs = block
    made = changes(graph, inputs)
    edited = apply(graph, made)
    again = graph_from_json(graph_to_json(edited), graph_tensors(edited))
    assert torch.equal(again.run(inputs)[0], edited.run(inputs)[0])
    records, arrays = pack(made)
    read = unpack(records, arrays, {c.site.name: c.site for c in made})
    assert torch.equal(apply(graph, read).run(inputs)[0], edited.run(inputs)[0])
    assert all(c.codes is not None and c.codes.dtype == FLOAT8 for c in read)
    assert all(a.dtype.itemsize == 1 for name, a in arrays.items() if name.endswith("codes"))


def test_one_tensor_read_in_two_formats() -> None:
    class Two(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = torch.nn.Linear(8, 4), torch.nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.left(x) + self.right(x)
            return y

    inputs = (random(3, 8),)
    graph = graph_of(seeded(Two()), *inputs)
    floats, other = changes(graph, inputs)
    integers = replace(
        other,
        level="int8",
        codes=torch.ones(4, 8, dtype=torch.int8),
        quantizer=Quantizer(step=0.02, low=-128, high=127),
    )
    edited = apply(graph, [floats, integers])
    alone = run_all(apply(graph, [floats]).module, inputs)
    both = run_all(edited.module, inputs)
    (name,) = floats.site.ops
    assert torch.equal(both[name], alone[name])


def test_scales_and_shifts_are_refused(block: tuple[Graph, tuple[Tensor, ...]]) -> None:
    graph, inputs = block
    first = changes(graph, inputs)[0]
    with pytest.raises(ShapeError, match="neither"):
        apply(graph, [replace(first, quantizer=replace(GRID, shift=0.5))])
    with pytest.raises(ShapeError, match="neither"):
        apply(graph, [replace(first, quantizer=replace(GRID, inverse_scale=torch.ones(16)))])


@pytest.mark.parametrize("name", ["openvino", "onnxruntime"])
def test_other_backends_refuse_it_by_name(
    name: str, block: tuple[Graph, tuple[Tensor, ...]]
) -> None:
    if find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    graph, inputs = block
    edited, found = in_float8(graph, inputs), backend(name)
    candidate = Candidate(site="s", level="fp8", method="quantize", size_bytes=1)
    assert not found.supports(candidate).ok
    assert "fp8" in found.supports(candidate).reason
    with pytest.raises(BackendError, match=f"{name} has no fp8"):
        found.build(edited, {graph.signature.inputs[0].name: (4, 7, 16)}, BuildChoice(backend=name))
    refuse_float8(graph.module, name)  # nothing to refuse
