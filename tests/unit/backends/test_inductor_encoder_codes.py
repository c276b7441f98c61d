"""Layers on 8-bit codes of Inductor builds, on the CPU: what becomes one op, and the same outputs as op by op."""

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tersor.analyse.sites import find_sites
from tersor.api.tiles import rounded
from tersor.backends.inductor import InductorBackend
from tersor.backends.inductor.lowering import Form, lower
from tersor.graph.apply import apply
from tersor.graph.contracts import Graph, Quantizer
from tersor.graph.shapes import input_shapes
from tersor.kernels.linear8 import linear8, quantize_codes, quantize_floats
from tersor.kernels.narrow_attention import narrow_attention
from tersor.kernels.narrow_linear import narrow_linear
from tersor.kernels.narrow_linear8 import narrow_linear8
from tests.conformance.test_backends import named
from tests.unit.backends.encoder_graphs import Layer, Of, Two, X, calls, choice, form, made, using
from tests.unit.graph.test_float8 import in_float8

QUANTIZERS = (quantize_codes, quantize_floats)
OWN = {
    narrow_attention: "attention",
    narrow_linear: "layer",
    narrow_linear8: "codes",
    linear8: "product",
}
WRITTEN, CODES = 13, 14  # arguments
# Codes on the border of two, of two layers behind each other, beside what rounding to codes changes at all.
BORDERS = 0.5


def coded(graph: Graph, *names: str) -> Graph:
    """With some linears in int8."""
    quantizers: dict[str | None, Quantizer] = {}
    sites: list[Any] = [s for s in find_sites(graph) if s.name.rpartition(".")[2] in names]
    return apply(graph, [rounded(graph, s, 127, quantizers, after=False) for s in sites])


def kinds(graph: Graph) -> list[str]:
    return [OWN[n.target] for n in calls(graph) if n.target in OWN]


def left(graph: Graph, *targets: Any) -> int:
    return sum(n.target in targets for n in calls(graph))


def check(plain: Graph, graph: Graph, x: Tensor = X) -> None:
    """Fused and unfused modules differ by less than codes and floats do."""
    with torch.no_grad():
        floats, ops = (lower(g, Form(dtype=torch.float16)).module(x) for g in (plain, graph))
        found = lower(graph, form()).module(x)
    for one, other, usual in zip(found, ops, floats, strict=True):
        assert one.shape == other.shape
        assert one.dtype == other.dtype
        off, coarse = ((other.double() - t.double()).norm() for t in (one, usual))
        assert float(off) <= BORDERS * float(coarse)


@pytest.mark.parametrize("in_front", [True, False])
def test_feed_forward_layers_hand_on_codes(in_front: bool) -> None:
    plain = made(Two(in_front=in_front), X)
    graph = coded(plain, "up", "down")
    found = [n for n in calls(graph) if n.target in OWN]
    a_layer = {
        # A norm that is in front of codes is none of a layer: the projection adds, and no more.
        True: ["attention", "layer", "product", "codes"],
        False: ["attention", "codes", "product", "codes"],
    }[in_front]
    assert [OWN[n.target] for n in found] == 2 * a_layer
    assert left(graph, *QUANTIZERS) == (2 if in_front else 0)
    if not in_front:
        first, up, down = found[1:4]
        assert first.args[WRITTEN : CODES + 1] == (True, torch.int8)  # the sum reads it, too
        assert up.args[0].target is operator.getitem
        assert up.args[0].args == (first, 1)
        assert down.args[0] is up
        assert down.args[CODES] is None
    check(plain, graph)


def test_the_first_layer_of_codes_writes_them_alone() -> None:
    plain = made(Layer(in_front=False), X)
    graph = coded(plain, "down")
    assert kinds(graph) == ["attention", "layer", "codes", "codes"]
    up = next(n for n in calls(graph) if n.target is narrow_linear8)
    assert up.args[9] == "gelu"
    assert up.args[WRITTEN : CODES + 1] == (False, torch.int8)
    assert all(u.args[1] == 1 for u in up.users)
    check(plain, graph)


def test_what_reads_codes_may_give_floats() -> None:
    plain = made(Layer(in_front=False), X)
    graph = coded(plain, "up")
    assert kinds(graph) == ["attention", "codes", "codes", "layer"]
    assert left(graph, torch.ops.aten.gelu.default, *QUANTIZERS) == 0
    check(plain, graph)


def test_eight_bit_floats_are_handed_on_as_well() -> None:
    plain = made(Layer(in_front=False), X)
    graph = in_float8(plain, (X,))
    # Queries, keys and values in 8 bits have no kernel with their attention.
    assert kinds(graph) == ["product"] * 3 + ["codes", "product", "codes"]
    codes = [n.args[CODES] for n in calls(graph) if n.target is narrow_linear8]
    assert codes == [torch.float8_e4m3fn, None]
    assert left(graph, *QUANTIZERS) == 2  # of what comes in, and of the attention's result
    check(plain, graph)


AROUND: dict[str, tuple[Callable[..., Any], list[str], int]] = {
    "nothing": (lambda m, x: m.two(m.one(x)), ["product", "product"], 1),
    "an output": (
        lambda m, x: using((m.one(x) + x).relu(), lambda y: (m.two(y), y)), ["codes", "product"], 2,
    ),
    "a sum that is an output": (
        lambda m, x: using(m.one(x) + x, lambda y: (m.two(y), y)), ["codes", "product"], 1,
    ),
    "a sum that is read as codes alone": (lambda m, x: m.two(m.one(x) + x), ["codes", "product"], 1),
    "a norm": (lambda m, x: m.two(m.behind(m.one(x) + x)), ["codes", "product"], 1),
    "another activation": (lambda m, x: m.two(m.one(x).tanh()), ["product", "product"], 2),
}  # fmt: skip


@pytest.mark.parametrize("around", AROUND)
def test_what_is_around_a_product_of_codes(around: str) -> None:
    forward, wanted, quantizers = AROUND[around]
    plain = made(Of(forward), X)
    graph = coded(plain, "one", "two")
    assert kinds(graph) == wanted
    assert left(graph, *QUANTIZERS) == quantizers
    check(plain, graph)


@pytest.mark.parametrize("mode", ["eager", "compile", "package"])
def test_builds_give_what_the_module_does(mode: str) -> None:
    graph = coded(made(Two(in_front=False), X), "up", "down")
    built = InductorBackend().build(
        graph, input_shapes(graph.signature, 3), choice(half="float16", mode=mode)
    )
    with torch.no_grad():
        wanted = lower(graph, form()).module(X)
    found = built.run(named(graph, (X,)))
    for (name, array), tensor in zip(found.items(), wanted, strict=True):
        assert array.shape == tensor.shape, name
        assert abs(array - tensor.float().numpy()).max() <= 2e-2 * float(tensor.abs().max())


def test_eight_bits_are_offered_where_products_take_their_time() -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out, self.up, self.down = (
                nn.Linear(256, 256),
                nn.Linear(256, 1024),
                nn.Linear(1024, 256),
            )
            self.norm = nn.LayerNorm(256)

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(self.out(x) + x)
            y: Tensor = self.down(torch.nn.functional.gelu(self.up(x))) + x
            return y

    graph = made(Wide(), torch.randn(2, 3, 256))
    linears = [
        n.name for n in graph.module.graph.nodes if n.target is torch.ops.aten.linear.default
    ]
    joined = InductorBackend().joined(graph, choice())
    assert joined & {*linears} == {linears[0]}
    assert len(joined) == 3  # and both additions
