"""Attentions of Inductor builds as one op, on the CPU: what goes with one, and which stay as they are."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention

from tersor.backends.inductor.lowering import lower
from tests.conformance.test_backends import random
from tests.unit.backends.encoder_graphs import (
    TOKENS,
    WIDTH,
    Attention,
    X,
    check,
    counts,
    form,
    made,
    one,
)


def found_in(module: nn.Module, *inputs: Tensor) -> dict[str, int]:
    graph = made(module, *inputs)
    found = counts(graph)
    check(graph, *inputs, **found)
    return {n: found.get(n, 0) for n in ("attentions", "plain")}


FUSED, LEFT = {"attentions": 1, "plain": 0}, {"attentions": 0, "plain": 1}


@pytest.mark.parametrize("sizes", [(8, 8), (5, 7), (20, 12), (64, 64), (128, 100)])
@pytest.mark.parametrize(
    "given", [{}, {"scale": 0.1}, {"is_causal": True}, {"dropout_p": 0.0}], ids=str
)
def test_attentions(sizes: tuple[int, int], given: dict[str, Any]) -> None:
    graph = made(Attention(sizes=sizes, **given), X)
    check(graph, X, attentions=1, linears=1)
    if not given:  # its sizes may be filled up before
        with torch.no_grad():
            found = lower(graph, form(eights=True)).module(X)[0]
            wanted = lower(graph, form()).module(X)[0]
        torch.testing.assert_close(found, wanted, rtol=2**-8, atol=2**-8)


def test_an_attention_without_a_scale_has_that_of_its_size() -> None:
    """A capture says it; a graph that was written elsewhere need not."""
    graph = made(Attention(sizes=(5, 7)), X)
    target = torch.ops.aten.scaled_dot_product_attention.default
    (node,) = [n for n in graph.module.graph.nodes if n.target is target]
    assert node.kwargs == {"scale": 5**-0.5}
    node.kwargs = {}
    check(graph, X, attentions=1, linears=1)
    node.args = (*node.args, None, 0.0, True)  # causal
    check(graph, X, attentions=1, linears=1)
    node.args = (*node.args[:4], 0.5, False)  # it drops
    assert counts(graph) == {"plain": 1, "linears": 4}


class Masked(Attention):
    """With a mask, which is the second input."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
        y: Tensor = self.out(self.found(x, attn_mask=self.mask(mask)))
        return y

    def mask(self, mask: Tensor) -> Tensor:
        return mask


class Lengths(Masked):
    def mask(self, mask: Tensor) -> Tensor:
        return (1.0 - mask[:, None, None, :].float()) * -1e4


class Places(Masked):
    """One score for two places, a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(TOKENS, TOKENS))

    def mask(self, mask: Tensor) -> Tensor:
        del mask
        return self.bias


class Seen(Masked):
    def mask(self, mask: Tensor) -> Tensor:
        return mask[:, None, None, :] > 0


SEEN = (torch.arange(TOKENS)[None] < torch.tensor([[6], [3], [1]])).long()
MASKS: dict[str, tuple[type[Masked], Tensor]] = {
    "lengths": (Lengths, SEEN),
    "seen": (Seen, SEEN),
    "scores": (Masked, random(3, 2, TOKENS, TOKENS)),
    "a head": (Masked, random(3, 1, TOKENS, TOKENS)),
    "a constant": (Places, SEEN),
}


@pytest.mark.parametrize("name", MASKS)
def test_masks(name: str) -> None:
    module, mask = MASKS[name]
    assert found_in(module(), X, mask) == FUSED


class Normed(Attention):
    """With a norm in front."""

    def __init__(self, *, is_read: bool) -> None:
        super().__init__()
        self.norm, self.is_read = nn.LayerNorm(WIDTH), is_read

    def forward(self, x: Tensor) -> Tensor:
        n = self.norm(x)
        y: Tensor = self.out(self.found(n))
        return y + n if self.is_read else y + x


def test_a_norm_in_front_of_an_attention() -> None:
    check(made(Normed(is_read=False), X), X, attentions=1, layers=1)
    check(made(Normed(is_read=True), X), X, attentions=1, layers=1, norms=1)


class Cross(Attention):
    def read(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        other = x * 2
        return self.split(self.q(x)), self.split(self.k(other)), self.split(self.v(other))


class Once(Attention):
    """One product for keys and values."""

    def read(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        key = self.k(x)
        return self.split(self.q(x)), self.split(key), self.split(key)


class Tied(Attention):
    """One weight for queries and keys, two products."""

    def read(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.split(self.q(x)), self.split(self.q(x)), self.split(self.v(x))


class Queries(Attention):
    """A query that something else reads, too."""

    def forward(self, x: Tensor) -> Tensor:
        query = self.q(x)
        y = scaled_dot_product_attention(
            self.split(query), self.split(self.k(x)), self.split(self.v(x))
        )
        found: Tensor = self.out(y.transpose(1, 2).reshape(x.shape[0], x.shape[1], -1))
        return found * query.mean((1, 2), keepdim=True)


class ReadTwice(Attention):
    """What comes out of it is read as heads, too."""

    def forward(self, x: Tensor) -> Tensor:
        y = scaled_dot_product_attention(*self.read(x))
        found: Tensor = self.out(y.transpose(1, 2).reshape(x.shape[0], x.shape[1], -1))
        return found * y.square().mean((1, 2, 3))[:, None, None]


class Apart(Attention):
    """Heads are samples of their own behind it: three sizes, as many tokens, and other numbers."""

    def forward(self, x: Tensor) -> Tensor:
        y = scaled_dot_product_attention(*self.read(x)).transpose(1, 2)
        return y.reshape(-1, x.shape[1], self.size)


class ApartOpen(Attention):
    def forward(self, x: Tensor) -> Tensor:
        y = scaled_dot_product_attention(*self.read(x)).transpose(1, 2)
        return y.reshape(x.shape[0] * self.heads, x.shape[1], -1)


class Turned(Attention):
    """Heads attend to each other, token by token."""

    def split(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], x.shape[1], self.heads, -1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out(scaled_dot_product_attention(*self.read(x)).flatten(2))
        return y


class Grouped(Attention):
    def __init__(self) -> None:
        super().__init__(heads=2, enable_gqa=True)
        self.k, self.v = nn.Linear(WIDTH, 8), nn.Linear(WIDTH, 8)

    def read(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.split(self.q(x)), *(
            f(x).view(x.shape[0], x.shape[1], 1, 8).transpose(1, 2) for f in (self.k, self.v)
        )  # type: ignore[return-value]


class Scaled(Attention):
    """A weight that is computed."""

    def read(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        key = linear(x, self.k.weight * one(x), self.k.bias)
        return self.split(self.q(x)), self.split(key), self.split(self.v(x))


@pytest.mark.parametrize(
    "module",
    [
        Cross(), Once(), Queries(), ReadTwice(), Apart(), ApartOpen(), Turned(), Grouped(),
        Attention(enable_gqa=True), Scaled(),
        Attention(sizes=(132, 8)), Attention(sizes=(8, 132)),
    ],
    ids=lambda m: type(m).__name__,
)  # fmt: skip
def test_other_attentions_stay_as_they_are(module: Attention) -> None:
    assert found_in(module, X) == LEFT


def test_products_may_share_a_weight() -> None:
    assert found_in(Tied(), X) == FUSED


@pytest.mark.parametrize(("tokens", "wanted"), [(1, FUSED), (128, FUSED), (129, LEFT)])
def test_tokens(tokens: int, wanted: dict[str, int]) -> None:
    assert found_in(Attention(), random(2, tokens, WIDTH)) == wanted


@pytest.mark.parametrize(("width", "wanted"), [(512, FUSED), (513, LEFT)])
def test_channels_of_an_attention(width: int, wanted: dict[str, int]) -> None:
    assert found_in(Attention(width), random(2, 4, width)) == wanted


class Windows(Attention):
    """The view as heads makes samples of parts of the tokens, or of tokens in more dimensions."""

    def __init__(self, *inside: int) -> None:
        super().__init__()
        self.inside = inside

    def split(self, x: Tensor) -> Tensor:
        return x.reshape(-1, *self.inside, self.heads, 8).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = scaled_dot_product_attention(*self.read(x)).transpose(1, 2)
        found: Tensor = self.out(y.reshape(-1, *self.inside, self.heads * 8))
        return found.reshape(x.shape)


@pytest.mark.parametrize(
    ("shape", "tokens"),
    [((3, 6, WIDTH), 3), ((3, 6, WIDTH), 2), ((2, 4, 5, WIDTH), 5), ((2, 4, 5, WIDTH), 20)],
)
def test_a_view_may_make_other_samples(shape: tuple[int, ...], tokens: int) -> None:
    x = random(*shape)
    assert found_in(Windows(tokens), x) == FUSED


def test_tokens_in_one_dimension() -> None:
    class Flat(Windows):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.flatten(0, 1))

    assert found_in(Flat(6), X) == FUSED
