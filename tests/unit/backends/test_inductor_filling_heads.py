"""Heads that are filled up to one size, a multiple of eight: the same outputs, in floats and in codes."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tersor.analyse.sites import find_sites
from tersor.api.tiles import rounded
from tersor.backends.inductor.lowering import Form, lower
from tersor.graph.apply import apply
from tersor.graph.contracts import Graph, Quantizer
from tests.conformance.test_backends import graph_of, random, seeded

EIGHTS = Form(eights=True)
HEADS, WIDTH, TOKENS = 3, 24, 6


class Attention(nn.Module):
    """Attention whose queries and keys have another size than its values."""

    def __init__(
        self,
        score: int,
        value: int,
        *,
        scale: float | None = 0.3,
        groups: int = 1,
        open_size: bool = False,
    ) -> None:
        super().__init__()
        self.open_size = open_size
        self.score, self.value, self.scale, self.groups = score, value, scale, groups
        self.q = nn.Linear(WIDTH, HEADS * score)
        self.k = nn.Linear(WIDTH, HEADS // groups * score, bias=False)
        self.v = nn.Linear(WIDTH, HEADS // groups * value)
        self.out = nn.Linear(HEADS * value, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        sizes = (self.score, self.score, self.value)
        q, k, v = (
            f(x).view(batch, tokens, *((HEADS, -1) if self.open_size else (-1, n))).transpose(1, 2)
            for f, n in zip((self.q, self.k, self.v), sizes, strict=True)
        )
        found = functional.scaled_dot_product_attention(
            q, k, v, scale=self.scale, enable_gqa=self.groups > 1
        )
        y: Tensor = self.out(self.flat(found.transpose(1, 2), batch, tokens))
        return x + y

    def flat(self, found: Tensor, batch: int, tokens: int) -> Tensor:
        return found.reshape(batch, tokens, HEADS * self.value)


def sizes_of(graph: Graph, form: Form = EIGHTS) -> list[int]:
    """The size of a head of every view as heads."""
    nodes = lower(graph, form).module.graph.nodes
    views = [
        n for n in nodes if n.op == "call_function" and n.target is torch.ops.aten.view.default
    ]
    return [n.args[1][-1] for n in views if len(n.args[1]) == 4]


def check(graph: Graph, x: Tensor, *, tolerance: float = 1e-5) -> None:
    """The filled module gives what the plain one gives."""
    with torch.no_grad():
        found, wanted = (lower(graph, f).module(x)[0] for f in (EIGHTS, Form()))
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("score", "value", "size"), [(5, 7, 8), (8, 5, 8), (12, 8, 16), (8, 20, 24), (16, 16, 16)]
)
@pytest.mark.parametrize("fields", [{"scale": None}, {"scale": 0.3}, {"open_size": True}], ids=str)
def test_all_sizes_become_one(score: int, value: int, size: int, fields: dict[str, Any]) -> None:
    x = random(2, TOKENS, WIDTH)
    graph = graph_of(seeded(Attention(score, value, **fields)).eval(), x)
    check(graph, x)
    if score == value == size:
        assert sizes_of(graph) == sizes_of(graph, Form())
        return
    if "open_size" in fields:  # where nothing had to change, it stays open
        assert {*sizes_of(graph)} <= {size, -1}
        return
    assert sizes_of(graph) == [size] * 3
    assert sizes_of(graph, Form()) == [score, score, value]


def test_values_that_heads_share() -> None:
    x = random(2, TOKENS, WIDTH)
    graph = graph_of(seeded(Attention(6, 5, groups=3)).eval(), x)
    check(graph, x)
    assert sizes_of(graph) == [8] * 3


class Scored(Attention):
    """What comes out is read by something else, too."""

    def flat(self, found: Tensor, batch: int, tokens: int) -> Tensor:
        flat = super().flat(found, batch, tokens)
        return flat * flat.mean()


class Apart(Attention):
    """Heads stay apart."""

    def __init__(self) -> None:
        super().__init__(5, 7)
        self.out = nn.Linear(7, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(2, (HEADS, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        found: Tensor = self.out(functional.scaled_dot_product_attention(q, k, v, scale=1.0))
        return found


@pytest.mark.parametrize("module", [Scored(5, 7), Apart()], ids=["read twice", "apart"])
def test_others_stay_as_they_are(module: nn.Module) -> None:
    x = random(2, TOKENS, WIDTH)
    graph = graph_of(seeded(module).eval(), x)
    check(graph, x)
    assert sizes_of(graph) == sizes_of(graph, Form())


@pytest.mark.parametrize("names", [("q", "k", "v"), ("out",), ("q", "k", "v", "out")], ids="+".join)
def test_products_of_codes(names: tuple[str, ...]) -> None:
    x = random(2, TOKENS, WIDTH)
    graph = graph_of(seeded(Attention(6, 5)).eval(), x)
    quantizers: dict[str | None, Quantizer] = {}
    sites: list[Any] = [s for s in find_sites(graph) if s.name in names]
    coded = apply(graph, [rounded(graph, s, 127, quantizers, after=False) for s in sites])
    check(coded, x)
    assert sizes_of(coded) == [8] * 3
    nodes = lower(coded, EIGHTS).module.graph.nodes
    assert sum("linear8" in n.name for n in nodes if n.op == "call_function") == len(names)


def test_a_scale_that_goes_without_saying_is_that_of_the_size_before() -> None:
    """A capture says it; a graph that was written elsewhere need not."""
    x = random(2, TOKENS, WIDTH)
    graph = graph_of(seeded(Attention(5, 7, scale=None)).eval(), x)
    target = torch.ops.aten.scaled_dot_product_attention.default
    (node,) = [n for n in graph.module.graph.nodes if n.target is target]
    node.kwargs = {k: v for k, v in node.kwargs.items() if k != "scale"}
    check(graph, x)
    assert sizes_of(graph) == [8] * 3
