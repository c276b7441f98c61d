"""Inductor builds whose linears read codes, on the CPU: the same outputs as from the floats."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tersor.backends.inductor import InductorBackend, options
from tersor.backends.inductor.coding import coded_of
from tersor.backends.inductor.executable import InductorExecutable, load
from tersor.backends.inductor.lowering import lower
from tersor.backends.inductor.profiling import Launch, launches, traced_names
from tersor.backends.inductor.trust import BuildCache
from tersor.backends.inductor.work import Form
from tersor.build.build import parity
from tersor.core.errors import ArtifactError, ConfigError
from tersor.core.packing import Packing
from tersor.core.records import BuildChoice, Precision, Site
from tersor.graph.apply import apply
from tersor.graph.contracts import Graph, SiteChange
from tersor.graph.edit import attribute
from tersor.graph.operators import weighted_ops
from tersor.graph.shapes import input_shapes
from tersor.kernels.codebook_linear import codebook_linear
from tersor.kernels.codebook_weight import expanded
from tersor.ops.storing import pack_nearest
from tests.conformance.test_backends import Block, compressed, graph_of, named, random, seeded

# Of a bfloat16: 2**-9 an op, squared, about ten ops in a row.
HALF = 1e-4
LAYOUTS: dict[str, dict[str, Any]] = {
    "lut4_weight": {"kind": "table", "bits": 4, "per_output": True},
    "lut8_weight": {"kind": "table", "bits": 8},
    "int4_weight": {"kind": "grid", "bits": 4, "group": 32},
    "int3_weight": {"kind": "grid", "bits": 3},
    "int2_weight": {"kind": "grid", "bits": 2, "group": 64},
}


def packed(graph: Graph, level: str, **layout: Any) -> Graph:
    """Every weight at its nearest codes."""
    changes = []
    for op in weighted_ops(graph.module):
        weight = attribute(graph.module, str(op.weight.target)).detach()
        site = Site(
            name=op.node.name,
            kind="format",
            ops=(op.node.name,),
            op_kind=op.kind,  # type: ignore[arg-type]
            weight=str(op.weight.target),
            shape=tuple(weight.shape),
        )
        packing = Packing(shape=tuple(weight.shape), **layout)
        bits = pack_nearest(weight.double().reshape(1, len(weight), -1), packing)
        changes.append(SiteChange(site=site, level=level, packed=bits))  # type: ignore[arg-type]
    return apply(graph, changes)


@pytest.fixture(scope="module")
def block() -> tuple[Graph, tuple[Tensor, ...]]:
    inputs = (random(4, 7, 40),)
    return graph_of(seeded(Block(40, 80)), *inputs), inputs


def built(
    graph: Graph, cache: Path, precision: Precision = "f32", **fields: str | bool
) -> InductorExecutable:
    choice = BuildChoice(
        backend="inductor", precision=precision, batch=4, options={"weights": "codes", **fields}
    )
    return InductorExecutable(
        graph, input_shapes(graph.signature, 4), choice, cache=BuildCache(cache)
    )


def coded_nodes(module: torch.fx.GraphModule) -> list[torch.fx.Node]:
    return [n for n in module.graph.nodes if n.target is codebook_linear]


@pytest.mark.parametrize("level", LAYOUTS)
def test_codes_compute_what_their_floats_do(
    block: tuple[Graph, tuple[Tensor, ...]], level: str, tmp_path: Path
) -> None:
    graph, inputs = packed(block[0], level, **LAYOUTS[level]), block[1]
    made = built(graph, tmp_path)
    nodes = coded_nodes(made._lowered.module)
    assert [made._lowered.sources[n.name] for n in nodes] == ["linear", "linear_1"]
    held = dict(made._lowered.module.named_buffers()) | dict(
        made._lowered.module.named_parameters()
    )
    assert not [
        n for n, t in held.items() if t.dim() == 2 and t.dtype == torch.float32 and "coded" not in n
    ]
    found = made.run(named(graph, inputs))
    floats = InductorExecutable(
        graph,
        input_shapes(graph.signature, 4),
        BuildChoice(backend="inductor", batch=4),
        cache=BuildCache(tmp_path),
    )
    assert not coded_nodes(floats._lowered.module)
    wanted = floats.run(named(graph, inputs))
    assert all(np.array_equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("half", ["bfloat16", "float16"])
def test_sixteen_bit_floats_keep_scales_in_float32(
    block: tuple[Graph, tuple[Tensor, ...]], half: str, tmp_path: Path
) -> None:
    graph, inputs = packed(block[0], "int4_weight", **LAYOUTS["int4_weight"]), block[1]
    made = built(graph, tmp_path, "bf16", half=half)
    held = dict(made._lowered.module.named_buffers()) | dict(
        made._lowered.module.named_parameters()
    )
    assert {t.dtype for n, t in held.items() if n.endswith("_scales")} == {torch.float32}
    assert {t.dtype for n, t in held.items() if n.endswith("_words")} == {torch.int32}
    assert parity(graph, made, 4, inputs) <= HALF


def test_integer_weights_stay_codes(
    block: tuple[Graph, tuple[Tensor, ...]], tmp_path: Path
) -> None:
    graph, inputs = compressed(block[0], "int8_weight", 127), block[1]
    made = built(graph, tmp_path)
    assert len(coded_nodes(made._lowered.module)) == 2
    assert parity(graph, made, 4, inputs) <= 1e-12
    both = compressed(block[0], "int8", 127)  # whose inputs are codes as well: another kernel's
    assert not coded_nodes(lower(both, Form(codes=True)).module)


@pytest.mark.parametrize(
    "layout", [{"kind": "grid", "bits": 4, "group": 24}, {"kind": "sparse", "bits": 8, "kept": 900}]
)
def test_other_layouts_stay_floats(
    block: tuple[Graph, tuple[Tensor, ...]], layout: dict[str, Any], tmp_path: Path
) -> None:
    graph = packed(block[0], "int4_weight", **layout)
    made = built(graph, tmp_path)
    assert not coded_nodes(made._lowered.module)
    assert parity(graph, made, 4, block[1]) <= 1e-12
    if layout["kind"] == "sparse":
        with pytest.raises(ConfigError, match="found the kind sparse"):
            coded_of(next(iter(graph.packed.values())))


class Tied(nn.Module):
    """One weight that two linears and an embedding read."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 32)
        self.first, self.second = nn.Linear(32, 11, bias=False), nn.Linear(32, 11)
        self.first.weight = self.second.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        h = self.table(ids)
        return self.first(h) + self.second(h.relu())


def test_a_shared_weight_is_coded_once(tmp_path: Path) -> None:
    inputs = (torch.arange(20).reshape(4, 5) % 11,)
    graph = graph_of(seeded(Tied()), *inputs)
    weight = attribute(graph.module, "table.weight").detach()
    bits = pack_nearest(weight.double().unsqueeze(0), Packing(kind="table", shape=(11, 32), bits=4))
    site = Site(
        name="table",
        kind="format",
        ops=tuple(op.node.name for op in weighted_ops(graph.module)),
        op_kind="embedding",
        weight="table.weight",
        shape=(11, 32),
    )
    coded = apply(graph, [SiteChange(site=site, level="lut4_weight", packed=bits)])
    made = built(coded, tmp_path)
    nodes = coded_nodes(made._lowered.module)
    assert len(nodes) == 2
    assert len({n.args[1].target for n in nodes}) == 1  # type: ignore[union-attr]
    assert parity(coded, made, 4, inputs) <= 1e-12


@pytest.mark.parametrize("level", LAYOUTS)
def test_the_same_values_to_the_last_bit(level: str) -> None:
    packing = Packing(shape=(30, 200), **LAYOUTS[level])
    found = pack_nearest(random(1, 30, 200).double(), packing)
    weight = coded_of(found)
    values = expanded(
        weight.words, weight.tables, weight.scales, weight.bits, weight.inputs, weight.group
    )
    assert np.array_equal(values.numpy(), found.expand())


def test_a_file_brings_the_codes_back(
    block: tuple[Graph, tuple[Tensor, ...]], tmp_path: Path
) -> None:
    graph, inputs = packed(block[0], "lut4_weight", **LAYOUTS["lut4_weight"]), block[1]
    made = built(graph, tmp_path)
    sections = made.serialize()
    loaded = load(sections, made._choice, BuildCache(tmp_path))
    assert len(coded_nodes(loaded._lowered.module)) == 2
    found, wanted = (e.run(named(graph, inputs)) for e in (loaded, made))
    assert all(np.array_equal(found[name], wanted[name]) for name in wanted)
    plain = InductorExecutable(
        graph, made._shapes, replace(made._choice, options={}), cache=BuildCache(tmp_path)
    )
    assert "packed" not in json.loads(plain.serialize()["tensors.json"])


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        (0, "nothing", "shape None"),
        (1, {"kind": "table", "shape": [80, 40], "bits": 3}, "damaged"),
        (1, {"kind": "table", "shape": [80, 41], "bits": 4}, "packed bits of"),
        (1, {"kind": "table", "shape": [80, 40], "bits": 8}, "found .* bytes, wanted"),
        (2, 10**9, "packed bits of"),
        (2, -1, "packed bits of"),
        (3, 17, "found 17 bytes"),
    ],
)
def test_damaged_bits_are_refused(
    block: tuple[Graph, tuple[Tensor, ...]], place: int, value: Any, said: str, tmp_path: Path
) -> None:
    graph = packed(block[0], "lut4_weight", **LAYOUTS["lut4_weight"])
    made = built(graph, tmp_path)
    sections = made.serialize()
    index = json.loads(sections["tensors.json"])
    rows = [row for row in index["packed"] if row[1]["shape"] == [80, 40]]
    rows[0][place] = value
    broken = {**sections, "tensors.json": json.dumps({**index, "packed": rows}).encode()}
    with pytest.raises(ArtifactError, match=said):
        load(broken, made._choice, BuildCache(tmp_path))


def test_the_choice_is_offered_on_cuda_alone_and_off_by_default() -> None:
    assert options.stored_choices("cuda", has_kernels=True) == ({"weights": "codes"},)
    assert options.stored_choices("cuda", has_kernels=False) == ()
    assert options.stored_choices("cpu", has_kernels=True) == ()
    assert InductorBackend("cpu").describe().stored_choices == ()
    assert options.read_options(BuildChoice(backend="inductor")).weights == "floats"
    with pytest.raises(ConfigError, match="weights='bits'"):
        options.read_options(BuildChoice(backend="inductor", options={"weights": "bits"}))


PROGRAM = """
class Runner:
    def call(self, args):
        # Topologically Sorted Source Nodes: [p], Original ATen: []
        codebook_dot_kernel_0.run(arg0_1, buf0, stream=s)
        # Topologically Sorted Source Nodes: [p], Original ATen: []
        codebook_sum_kernel_1.run(buf0, buf1, stream=s)
"""


def test_times_of_its_kernels_go_to_the_linear(block: tuple[Graph, tuple[Tensor, ...]]) -> None:
    assert launches(PROGRAM) == [
        Launch("codebook_dot_kernel_0", "p"), Launch("codebook_sum_kernel_1", "p"),
    ]  # fmt: skip
    graph = packed(block[0], "lut4_weight", **LAYOUTS["lut4_weight"])
    lowered = lower(graph, Form(codes=True))
    traced = [(name, "tersor.codebook_linear.default") for name in ("p", "q")]
    names = traced_names(lowered.module, traced)
    assert [lowered.sources[names[n]] for n in ("p", "q")] == ["linear", "linear_1"]


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("mode", ["compile", "package"])
def test_compiled_builds(
    block: tuple[Graph, tuple[Tensor, ...]], mode: Literal["compile", "package"], tmp_path: Path
) -> None:
    graph, inputs = packed(block[0], "int4_weight", **LAYOUTS["int4_weight"]), block[1]
    made = built(graph, tmp_path, mode=mode)
    assert parity(graph, made, 4, inputs) <= 1e-10
    assert set(made.profile()) >= {"linear", "linear_1"}
