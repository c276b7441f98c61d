"""Narrow transformers on a CUDA device: every tile and launch against float64, choice, compilers, builds."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tersor.backends.inductor import InductorBackend
from tersor.backends.inductor.executable import InductorExecutable, load
from tersor.build.build import parity
from tersor.core.records import BuildChoice
from tersor.graph.contracts import Graph
from tersor.kernels.narrow_attention import narrow_attention
from tersor.kernels.narrow_linear import narrow_linear
from tests.conformance.test_backends import graph_of, named, random, seeded

pytest.importorskip("triton")  # before what imports it
from tersor.kernels import narrow_attention_triton, narrow_linear_triton
from tersor.kernels.narrow_attention_triton import launches
from tersor.kernels.narrow_linear_triton import tiles
from tests.unit.kernels import interpreted_encoder8 as eight
from tests.unit.kernels.interpreted_encoder import (
    ATTENTIONS,
    FIRST_EPS,
    LAST_EPS,
    LINEARS,
    AttentionCase,
    LinearCase,
    attention_parts,
    attention_result,
    drawn,
    linear_parts,
    linear_result,
    poisoned,
    share,
)

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]
HALF_PRECISION = 2e-4  # normalised squared error of a short chain in bf16
HALVES = (torch.float16, torch.bfloat16)
BORDER = 0.02  # of codes that lie on the border of two
# As wide as rows are normed; as many tokens and numbers of a head as there may be; all of a ViT's and MiniLM's kinds.
WIDE_LINEARS = (
    LinearCase(3000, 192, 768, True, False, False), LinearCase(3000, 768, 192, False, True, False),
    LinearCase(2000, 1536, 384, False, True, True, "none"), LinearCase(1500, 520, 512, True, True, True, "silu"),
    LinearCase(1030, 1024, 100, True, False, False, "gelu_tanh"),
)  # fmt: skip
WIDE_ATTENTIONS = (
    AttentionCase(49, 192, 3, 64, 64), AttentionCase(128, 384, 12, 32, 32, False, "float"),
    AttentionCase(128, 512, 2, 128, 128, True, "scores"), AttentionCase(97, 100, 2, 70, 128, False, "none", True),
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _card() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")


@pytest.fixture
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is empty is NaN, so that an output that nobody writes is seen."""
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))


@pytest.mark.usefixtures("_poisoned")
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("case", [*LINEARS, *WIDE_LINEARS], ids=str)
def test_tiles_stay_within_the_bound_of_their_formats(case: LinearCase, dtype: torch.dtype) -> None:
    case = case._replace(dtype=dtype)
    known = tiles(case.rows, case.out, is_normed=case.last)
    for tile in dict.fromkeys((*known, *tiles(10**6, case.out, is_normed=case.last))):
        found, wanted = linear_result(case, tile)
        again, _ = linear_result(case, tile)
        assert torch.equal(found, again), tile
        assert share(found, wanted) <= 1, tile


WIDE_EIGHTS = (
    eight.Case(2000, 1536, 384), eight.Case(2000, 1536, 384, eight.FLOAT8, eight.FLOAT8),
    eight.Case(2000, 384, 384, torch.float16), eight.Case(3000, 384, 1536, last=False, activation="gelu"),
)  # fmt: skip


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("case", [*eight.CASES, *WIDE_EIGHTS], ids=str)
def test_layers_of_codes_compute_their_definition(
    case: eight.Case, half: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tersor.kernels.narrow_linear8_triton import tiles as coded_tiles

    filled = eight.poisoned(torch.Tensor.new_empty)
    monkeypatch.setattr(torch.Tensor, "new_empty", filled)
    read = half if case.read == torch.float16 else case.read
    case = case._replace(half=half, read=read)
    for rows in (case.rows, 10**6):
        x = torch.empty(rows, case.inp, dtype=case.read, device="meta")
        for tile in coded_tiles(x, case.out, is_normed=case.last):
            error, code, different = eight.result_of(case, tile)
            assert error <= 1, tile
            assert code <= 1, tile
            assert different <= BORDER, tile


@pytest.mark.usefixtures("_poisoned")
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("case", [*ATTENTIONS, *WIDE_ATTENTIONS], ids=str)
def test_launches_stay_within_the_bound_of_their_formats(
    case: AttentionCase, dtype: torch.dtype
) -> None:
    case = case._replace(dtype=dtype)
    for launch in launches(case.tokens, max(case.size, case.value), case.heads):
        found, wanted = attention_result(case, launch)
        again, _ = attention_result(case, launch)
        assert torch.equal(found, again), launch
        assert share(found, wanted) <= 1, launch


class Linear(nn.Module):
    def __init__(self, case: LinearCase) -> None:
        super().__init__()
        self.case = case
        self.made = [None if t is None else t.cuda() for t in linear_parts(case)[-1]]

    def forward(self, x: Tensor, added: Tensor) -> Tensor:
        made: list[Any] = self.made
        return narrow_linear(
            x.relu(), *made[:3], added, *made[3:], self.case.out, "gelu", FIRST_EPS, LAST_EPS
        ).relu()


class Attention(nn.Module):
    def __init__(self, case: AttentionCase) -> None:
        super().__init__()
        self.case = case
        self.made = [t.cuda() for t in attention_parts(case)[-1]]

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        size, eps = self.case.value, FIRST_EPS if self.case.norm else None
        seen = mask[:, None, None, :] > 0
        weight, bias = self.made
        return narrow_attention(
            x.relu(), weight, bias, seen, size, self.case.scale, eps, False
        ).relu()


def agree(layer: nn.Module, *inputs: Tensor) -> None:
    """Compiled and recorded calls give what a plain one does, to the bit."""
    wanted = layer(*inputs)
    with torch.no_grad():
        assert torch.equal(torch.compile(layer, fullgraph=True)(*inputs), wanted)
        recorded = torch.cuda.CUDAGraph()
        with torch.cuda.graph(recorded):
            kept = layer(*inputs)
        kept.zero_()
        recorded.replay()
    assert torch.equal(kept, wanted)


def test_compilers_keep_the_chosen_tile_and_see_the_kernel() -> None:
    for case in WIDE_LINEARS[:3]:
        full = case._replace(added=True, activation="gelu")
        x, added = (drawn(s, case.rows, n).half().cuda() for s, n in ((1, case.inp), (2, case.out)))
        agree(Linear(full), x, added)
        flags = {"has_first": case.first, "has_added": True, "has_last": case.last}
        key = narrow_linear_triton._key(x, case.out, "gelu", **flags)
        assert key in narrow_linear_triton._CHOSEN


def test_compilers_keep_the_chosen_launch_and_see_the_kernel() -> None:
    for case in WIDE_ATTENTIONS[:2]:
        x = drawn(1, 8, case.tokens, case.inp).half().cuda()
        lengths = torch.arange(8)[:, None] * 7  # one sample sees nothing
        mask = (torch.arange(case.tokens)[None] < lengths).long().cuda()
        layer = Attention(case)
        agree(layer, x, mask)
        assert any(
            key[1] == case.tokens and key[4] == layer.made[0].shape[3]
            for key in narrow_attention_triton._CHOSEN
        )


def test_no_rows_and_no_samples() -> None:
    linear, attention = Linear(WIDE_LINEARS[0]), Attention(WIDE_ATTENTIONS[0])
    x = torch.zeros(0, 192, device="cuda").half()
    assert linear(x, torch.zeros(0, 768, device="cuda").half()).shape == (0, 768)
    mask = torch.zeros(0, 49, device="cuda")
    assert attention(x.reshape(0, 49, 192), mask).shape == (0, 49, 192)


class Layer(nn.Module):
    """A transformer's layer, norms in front (ViT) or behind (BERT)."""

    def __init__(self, width: int, heads: int, *, in_front: bool) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width + 3), nn.Linear(4 * width + 3, width)
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.heads, self.in_front = heads, in_front

    def attend(self, x: Tensor, mask: Tensor | None) -> Tensor:
        batch, tokens, _ = x.shape
        q, k, v = (
            f(x).view(batch, tokens, self.heads, -1).transpose(1, 2)
            for f in (self.q, self.k, self.v)
        )
        found = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        y: Tensor = self.out(found.transpose(1, 2).reshape(batch, tokens, -1))
        return y

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        def feed(x: Tensor) -> Tensor:
            y: Tensor = self.down(nn.functional.gelu(self.up(x)))
            return y

        if self.in_front:
            x = x + self.attend(self.first(x), mask)
            return x + feed(self.second(x))
        x = self.first(x + self.attend(x, mask))
        y: Tensor = self.second(x + feed(x))
        return y


class Vit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches, self.places = (
            nn.Conv2d(1, 64, 4, 4),
            nn.Parameter(torch.zeros(1, 49, 64)),
        )
        self.layers = nn.ModuleList(Layer(64, 2, in_front=True) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(64), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = self.patches(x).flatten(2).transpose(1, 2) + self.places
        for layer in self.layers:
            y = layer(y, None)
        found: Tensor = self.head(self.norm(y).mean(1))
        return found


class Bert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.norm = nn.Embedding(100, 96), nn.LayerNorm(96)
        self.layers = nn.ModuleList(Layer(96, 3, in_front=False) for _ in range(2))

    def forward(self, ids: Tensor, seen: Tensor) -> Tensor:
        mask = (1.0 - seen[:, None, None, :].float()) * -1e4
        x = self.norm(self.words(ids))
        for layer in self.layers:
            x = layer(x, mask)
        return x


def subject(name: str) -> tuple[Graph, tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(5)
    if name == "vit":
        inputs: tuple[Tensor, ...] = (random(6, 1, 28, 28),)
        return graph_of(seeded(Vit()), *inputs), inputs
    ids = torch.randint(0, 100, (6, 40), generator=generator)
    lengths = torch.tensor([40, 1, 17, 8, 33, 40])
    inputs = (ids, (torch.arange(40)[None] < lengths[:, None]).long())
    return graph_of(seeded(Bert()), *inputs), inputs


def built(
    graph: Graph, inputs: tuple[Tensor, ...], half: str, **fields: Any
) -> tuple[InductorExecutable, BuildChoice]:
    choice = BuildChoice(
        backend="inductor",
        device="cuda",
        precision="bf16",
        batch=6,
        options={"half": half, **fields},
    )
    shapes = {s.name: tuple(t.shape) for s, t in zip(graph.signature.inputs, inputs, strict=True)}
    return InductorBackend("cuda").build(graph, shapes, choice), choice


@pytest.mark.parametrize("half", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", ["vit", "bert"])
def test_builds_with_fused_layers_compute_the_graph(name: str, half: str) -> None:
    graph, inputs = subject(name)
    given = named(graph, inputs)
    plain, _ = built(graph, inputs, half, mode="compile", graph=True)
    executable, _ = built(graph, inputs, half, mode="compile", graph=True, blocks="fused")
    lowered = executable._lowered
    own = (narrow_attention, narrow_linear)
    nodes = [n for n in lowered.module.graph.nodes if n.target in own]
    # Each layer: an attention, and linears behind it, to its hidden units and from them.
    assert [n.target for n in nodes] == [narrow_attention, *[narrow_linear] * 3] * 2
    for each in (plain, executable):
        assert parity(graph, each, 6, inputs) <= HALF_PRECISION
    one, other = (e.run(given) for e in (plain, executable))
    for key, array in one.items():
        error = np.square(array - other[key]).sum() / np.square(array).sum()
        assert error <= 2 * HALF_PRECISION
    again = executable.run(given)
    assert all(np.array_equal(again[key], array) for key, array in other.items())
    times = executable.profile()
    assert all(times[lowered.sources[n.name]] > 0 for n in nodes)


@pytest.mark.parametrize("name", ["vit", "bert"])
def test_a_package_brings_fused_layers_back(name: str) -> None:
    graph, inputs = subject(name)
    given = named(graph, inputs)
    fields: dict[str, Any] = {"mode": "package", "graph": True, "blocks": "fused"}
    executable, choice = built(graph, inputs, "float16", **fields)
    assert parity(graph, executable, 6, inputs) <= HALF_PRECISION
    found = executable.run(given)
    loaded = load(executable.serialize(), choice)
    for key, array in loaded.run(given).items():
        assert np.array_equal(found[key], array)
