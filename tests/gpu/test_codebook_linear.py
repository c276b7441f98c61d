"""The codebook linear on a CUDA device: launches against float64, choice, compilers, builds."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tersor.backends.inductor import InductorBackend
from tersor.backends.inductor.executable import InductorExecutable
from tersor.build.build import parity
from tersor.core.packing import Packing
from tersor.core.records import BuildChoice, Site
from tersor.graph.apply import apply
from tersor.graph.contracts import Graph, SiteChange
from tersor.graph.edit import attribute
from tersor.graph.operators import weighted_ops
from tersor.kernels.codebook_linear import codebook_linear
from tersor.ops.storing import pack_nearest
from tests.conformance.test_backends import Block, graph_of, named, random, seeded

pytest.importorskip("triton")  # before what imports it
from triton.runtime.errors import OutOfResources

from tersor.kernels import codebook_linear_triton as module
from tersor.kernels.codebook_launches import Launch, launches, mma_launches
from tests.unit.kernels.interpreted_codebook import CASES, off, weight_of

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]
# Tensor cores cut what they add below its 24th bit instead of rounding it: twice, for margin of the parts.
ADDED = 2.0**-22
HALF_PRECISION = 2e-4  # normalised squared error of a short chain in bf16
SHAPE = (257, 3000)  # that divides by no tile


@pytest.fixture(scope="module", autouse=True)
def _card() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is empty is NaN, so that an output that nobody writes is seen."""
    plain = torch.Tensor.new_empty

    def filled(self: Tensor, *size: Any, **fields: Any) -> Tensor:
        return plain(self, *size, **fields).fill_(torch.nan)

    monkeypatch.setattr(torch.Tensor, "new_empty", filled)


def on_card(weight: Any) -> Any:
    return weight._replace(
        **{n: t.cuda() for n, t in weight._asdict().items() if isinstance(t, Tensor)}
    )


def drawn(rows: int, inp: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, inp, generator=generator).to("cuda", dtype)


def ends(tiles: Sequence[Launch]) -> list[Launch]:
    """The first and the last launch of each form and lookup: every one takes seconds to compile."""
    found: dict[tuple[str, int], list[Launch]] = {}
    for tile in tiles:
        found.setdefault((tile.form, tile.lookup), []).append(tile)
    return [t for same in found.values() for t in dict.fromkeys((same[0], same[-1]))]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("dtype", "bits", "kind"),
    [
        *((torch.bfloat16, 4, kind) for kind in CASES[:6]),
        *(
            (dtype, bits, kind)
            for dtype, bits in ((torch.bfloat16, 8), (torch.float16, 4), (torch.float32, 4))
            for kind in (("row", None), ("none", "group"))
        ),
    ],
)
def test_launches_stay_within_the_bound_of_their_formats(
    dtype: torch.dtype, bits: int, kind: tuple[str, str | None]
) -> None:
    ran = 0
    weight = on_card(weight_of(11, SHAPE, bits, kind, 128))
    bias = drawn(1, SHAPE[0], dtype)[0]
    for rows in (1, 7, 200):
        x = drawn(rows, SHAPE[1], dtype, seed=rows)
        few = mma_launches(rows, SHAPE[1], dtype, weight.facts)
        for launch in ends((*launches(rows, weight.facts), *few)):
            try:
                share = off(x, weight, bias, launch, ADDED)
            except OutOfResources:  # as when one is chosen
                continue
            ran += 1
            assert share <= 1, (rows, launch)
    assert ran


def arguments(weight: Any, bias: Tensor | None = None) -> tuple[Any, ...]:
    words, tables, planes, scales, bits, inputs, group = weight
    return words, tables, planes, scales, bias, bits, inputs, group


@pytest.mark.parametrize("rows", [0, 1, 16, 300])
def test_a_launch_is_chosen_once_and_gives_equal_bits(rows: int) -> None:
    weight = on_card(weight_of(1, (4096, 4096), 4, ("row", None), 32))
    x = drawn(rows, 4096, torch.bfloat16)
    first = codebook_linear(x, *arguments(weight))
    if rows:
        assert module._key(x, weight) in module._CHOSEN
    known = dict(module._CHOSEN)
    again = codebook_linear(x, *arguments(weight))
    assert torch.equal(first, again)
    assert known == module._CHOSEN
    strided = drawn(4096, rows, torch.bfloat16).t()
    assert torch.equal(
        codebook_linear(strided, *arguments(weight)),
        codebook_linear(strided.contiguous(), *arguments(weight)),
    )


class Layer(nn.Module):
    def __init__(self, weight: Any) -> None:
        super().__init__()
        self.weight, self.words = weight, nn.Buffer(weight.words)

    def forward(self, x: Tensor) -> Tensor:
        return codebook_linear(x.relu(), self.words, *arguments(self.weight)[1:]).relu()


def test_compilers_keep_the_chosen_launch_and_see_the_kernel() -> None:
    layer = Layer(on_card(weight_of(1, (512, 1024), 4, ("none", "group"), 128)))
    x = drawn(4, 1024, torch.bfloat16)
    wanted = layer(x)
    with torch.no_grad():
        assert torch.equal(torch.compile(layer, fullgraph=True)(x), wanted)
        recorded = torch.cuda.CUDAGraph()
        with torch.cuda.graph(recorded):
            kept = layer(x)
        kept.zero_()
        recorded.replay()
    assert torch.equal(kept, wanted)


def packed(graph: Graph, **layout: Any) -> Graph:
    changes = []
    for op in weighted_ops(graph.module):
        weight = attribute(graph.module, str(op.weight.target)).detach()
        site = Site(name=op.node.name, kind="format", ops=(op.node.name,), op_kind="linear",
                    weight=str(op.weight.target), shape=tuple(weight.shape))  # fmt: skip
        bits = pack_nearest(weight.double().unsqueeze(0), Packing(shape=site.shape, **layout))
        changes.append(SiteChange(site=site, level="lut4_weight", packed=bits))
    return apply(graph, changes)


@pytest.mark.parametrize("precision", ["f32", "bf16"])
@pytest.mark.parametrize("mode", ["eager", "compile", "package"])
@pytest.mark.parametrize(
    "layout",
    [{"kind": "table", "bits": 4, "per_output": True}, {"kind": "grid", "bits": 4, "group": 64}],
)
def test_builds_that_read_codes_compute_the_graph(
    mode: str, precision: str, layout: dict[str, Any]
) -> None:
    inputs = (random(4, 7, 64),)
    graph = packed(graph_of(seeded(Block(64, 256)), *inputs), **layout)
    backend = InductorBackend("cuda")
    assert {"weights": "codes"} in backend.describe().stored_choices
    choice = BuildChoice(
        backend="inductor", device="cuda", precision=precision, batch=4,  # type: ignore[arg-type]
        options={"mode": mode, "graph": True, "weights": "codes"},
    )  # fmt: skip
    shapes = {s.name: tuple(t.shape) for s, t in zip(graph.signature.inputs, inputs, strict=True)}
    built: InductorExecutable = backend.build(graph, shapes, choice)
    targets = [n.target for n in built._lowered.module.graph.nodes]
    assert targets.count(codebook_linear) == 2
    assert parity(graph, built, 4, inputs) <= (HALF_PRECISION if precision == "bf16" else 1e-10)
    built.run(named(graph, inputs))
    times = built.profile()
    assert all(times[op.node.name] > 0 for op in weighted_ops(graph.module))
