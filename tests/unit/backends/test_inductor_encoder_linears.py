"""Linears of Inductor builds with what is around them, on the CPU: what goes with one, and what stays."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.functional import gelu, layer_norm, linear

from tersor.backends.inductor import InductorBackend
from tersor.backends.inductor.encoder import layer_at
from tersor.graph.contracts import Graph
from tersor.graph.edit import parameters_by_name
from tersor.kernels.narrow_linear import narrow_linear
from tests.conformance.test_backends import random
from tests.unit.backends.encoder_graphs import (
    WIDTH,
    Of,
    X,
    alike,
    calls,
    check,
    choice,
    counts,
    made,
    one,
    using,
)

# What is around a linear, and the ops that are left.
AROUND: dict[str, tuple[Callable[..., Any], dict[str, int]]] = {
    "nothing": (lambda m, x: m.one(x), {"linears": 1}),
    "a norm in front": (lambda m, x: m.one(m.norm(x)), {"layers": 1}),
    "a norm behind alone": (lambda m, x: m.behind(m.one(x)), {"linears": 1, "norms": 1}),
    "relu": (lambda m, x: m.one(x).relu(), {"layers": 1}),
    "silu": (lambda m, x: torch.nn.functional.silu(m.one(x)), {"layers": 1}),
    "tanh gelu": (lambda m, x: gelu(m.one(x), approximate="tanh"), {"layers": 1}),
    "another activation": (lambda m, x: m.one(x).tanh(), {"linears": 1}),
    "an activation and a norm": (lambda m, x: m.behind(m.one(x).relu()), {"layers": 1}),
    "an addition": (lambda m, x: m.one(x) + x, {"layers": 1}),
    "added to": (lambda m, x: x + m.one(x), {"layers": 1}),
    "all": (lambda m, x: m.behind(gelu(m.one(m.norm(x))) + x), {"layers": 1}),
    "an activation behind an addition": (
        lambda m, x: gelu(m.one(x) + x),
        {"layers": 1, "gelus": 1},
    ),
    "two norms behind": (lambda m, x: m.norm(m.behind(m.one(x) + x)), {"layers": 1, "norms": 1}),
    "a norm that two read": (
        lambda m, x: using(m.norm(x), lambda n: (m.one(n), m.two(n).relu())),
        {"layers": 1, "linears": 1, "norms": 1},
    ),
    "a norm that is added, too": (
        lambda m, x: using(m.norm(x), lambda n: m.one(n) + n),
        {"layers": 1, "norms": 1},
    ),
    "a norm that is an output, too": (
        lambda m, x: using(m.norm(x), lambda n: (m.one(n), n)),
        {"linears": 1, "norms": 1},
    ),
    "a product that an activation and another read": (
        lambda m, x: using(m.one(x), lambda y: gelu(y) * y),
        {"linears": 1, "gelus": 1},
    ),
    "a product that is an output, too": (
        lambda m, x: using(m.one(x), lambda y: (gelu(y), y)),
        {"linears": 1, "gelus": 1},
    ),
    "an activation that is an output, too": (
        lambda m, x: using(m.one(x).relu(), lambda y: (y + x, y)),
        {"layers": 1, "adds": 1},
    ),
    "an activation that is read twice": (
        lambda m, x: using(m.one(x).relu(), lambda y: m.behind(y + x) * y),
        {"layers": 1, "adds": 1, "norms": 1},
    ),
    "a sum that is read twice": (
        lambda m, x: using(m.one(x) + x, lambda y: m.behind(y) + y),
        {"layers": 1, "norms": 1, "adds": 1},
    ),
    "a norm behind that is read twice": (
        lambda m, x: using(m.behind(m.one(x) + x), lambda y: y * y.mean((1, 2), keepdim=True)),
        {"layers": 1},
    ),
    "an output that is given twice": (
        lambda m, x: using(m.one(x).relu(), lambda y: (y, y)),
        {"layers": 1},
    ),
    "itself": (lambda m, x: using(m.one(x), lambda y: y + y), {"linears": 1, "adds": 1}),
    "an activation and itself": (
        lambda m, x: using(m.one(x).relu(), lambda y: y + y),
        {"layers": 1, "adds": 1},
    ),
    "what is made of it": (
        lambda m, x: using(m.one(x), lambda y: y + y.mean(1, keepdim=True)),
        {"linears": 1, "adds": 1},
    ),
    "an addition with a factor": (
        lambda m, x: torch.add(x, m.one(x), alpha=3),
        {"linears": 1, "adds": 1},
    ),
    "a number": (lambda m, x: m.one(x) + 2.0, {"linears": 1, "adds": 1}),
    "a constant": (lambda m, x: m.behind(m.one(x) + m.place), {"linears": 1, "adds": 1, "norms": 1}),
    "a difference": (lambda m, x: m.one(x) - x, {"linears": 1}),
    "an addition to all tokens": (lambda m, x: m.one(x) + x[:, :1], {"layers": 1}),
    "an addition of one token for all samples": (lambda m, x: m.one(x) + alike(m, x), {"layers": 1}),
    "an addition of one dimension": (lambda m, x: m.behind(m.one(x) + alike(m, x)[0, 0]), {"layers": 1}),
    "an addition of more elements": (lambda m, x: m.one(x[:, :1]) + x, {"layers": 1}),
    "an addition of more dimensions": (lambda m, x: m.one(alike(m, x)[0, 0]) + x, {"layers": 1}),
    "more elements in front of a norm": (
        lambda m, x: m.behind(m.one(x[:, :1]) + x),
        {"layers": 1},
    ),
    "an addition of integers": (lambda m, x: m.behind(m.one(x) + (x > 0).long()), {"layers": 1}),
    "two linears": (lambda m, x: m.one(x) + m.two(x), {"layers": 1, "linears": 1}),
    "a linear twice": (lambda m, x: m.one(m.one(x).relu()).relu(), {"layers": 2}),
    "a linear with two norms in front": (
        lambda m, x: m.one(m.norm(x)) * m.one(m.behind(x)),
        {"layers": 2},
    ),
    "a norm of more dimensions": (
        lambda m, x: m.one(layer_norm(x, x.shape[1:])),
        {"linears": 1, "norms": 1},
    ),
    "a norm of more dimensions behind": (
        lambda m, x: layer_norm(m.one(x).relu(), x.shape[1:]),
        {"layers": 1, "norms": 1},
    ),
    "a norm without scale and shift": (lambda m, x: m.one(layer_norm(x, (WIDTH,))), {"layers": 1}),
    "a norm with a scale alone": (
        lambda m, x: m.one(layer_norm(x, (WIDTH,), m.norm.weight, eps=1e-2)),
        {"layers": 1},
    ),
    "a norm with a shift alone behind": (
        lambda m, x: layer_norm(m.one(x).relu(), (WIDTH,), None, m.norm.bias, 1e-2),
        {"layers": 1},
    ),
    "a norm whose scale is computed": (
        lambda m, x: m.one(layer_norm(x, (WIDTH,), alike(m, x)[0, 0])),
        {"linears": 1, "norms": 1},
    ),
    "a norm of something else by the result": (
        lambda m, x: layer_norm(x, (WIDTH,), m.one(alike(m, x)[0, 0]).relu()),
        {"layers": 1, "norms": 1},
    ),
    "a weight that is computed": (
        lambda m, x: linear(x, m.one.weight * one(x), m.one.bias).relu(),
        {"linears": 1},
    ),
    "a bias that is computed": (
        lambda m, x: linear(x, m.one.weight, m.one.bias * one(x)).relu(),
        {"linears": 1},
    ),
    "no bias": (lambda m, x: linear(m.norm(x), m.one.weight).relu(), {"layers": 1}),
    "a view between": (
        lambda m, x: m.one(x).reshape(x.shape[0], -1).relu(),
        {"linears": 1},
    ),
    "one sample's token": (lambda m, x: m.one(m.norm(x[0, 0])).relu(), {"layers": 1}),
    "a multiplication": (lambda m, x: m.one(x).relu() * x, {"layers": 1}),
}  # fmt: skip


@pytest.mark.parametrize("name", AROUND)
def test_what_goes_with_a_linear(name: str) -> None:
    forward, wanted = AROUND[name]
    graph = made(Of(forward), X)
    nodes = {n.target for n in graph.module.graph.nodes if n.op == "call_function"}
    assert torch.ops.aten.linear.default in nodes
    check(graph, X, **wanted)
    tensors = parameters_by_name(graph.module)
    layers = [layer_at(n, tensors) for n in graph.module.graph.nodes]
    known = [layer for layer in layers if layer is not None]
    joined = InductorBackend().joined(graph, choice())
    assert bool(joined) == ("layers" in wanted)
    assert joined == {part.name for layer in known for part in layer.parts}


@pytest.mark.parametrize("length", [1, 9])
def test_a_sum_with_what_is_wider(length: int) -> None:
    """A product of one output, added to rows: their norm is none of the product's."""
    graph = made(Of(lambda m, x: m.norm(m.one(x) + x), inner=1), random(3, length, WIDTH))
    check(graph, random(3, length, WIDTH), layers=1, norms=1)


@pytest.mark.parametrize(
    ("width", "inner", "layers"),
    [(512, 2048, 2), (2048, 512, 2), (513, 520, 0), (16, 2049, 0), (2049, 16, 0), (1, 1, 2)],
)
def test_sides_of_weights(width: int, inner: int, layers: int) -> None:
    x = random(2, 2, width)
    graph = made(Of(lambda m, x: m.two(m.one(x).relu()).relu(), width, inner), x)
    found = counts(graph)
    assert found == ({"layers": layers} if layers else {"linears": 2})
    if 1 < max(width, inner) < 1000:
        check(graph, x, **found)


@pytest.mark.parametrize(
    ("width", "inner", "wanted"),
    [
        (1024, 32, {"layers": 1}), (1025, 32, {"layers": 1, "norms": 1}),
        (32, 512, {"layers": 1}), (32, 513, {"layers": 1, "norms": 1}),
    ],
)  # fmt: skip
def test_widths_of_norms(width: int, inner: int, wanted: dict[str, int]) -> None:
    x = random(2, 2, width)
    if inner == 32:
        graph = made(Of(lambda m, x: m.one(m.norm(x)).relu(), width, inner), x)
    else:
        graph = made(Of(lambda m, x: m.behind(m.one(x).relu()), width, inner), x)
    check(graph, x, **wanted)


def widths(graph: Graph) -> list[int]:
    return [n.args[7] for n in calls(graph) if n.target is narrow_linear]


@pytest.mark.parametrize(
    ("forward", "wanted"),
    [
        (lambda m, x: m.two(gelu(m.one(x))) + x, [24, 24]),
        (lambda m, x: m.behind(m.two(gelu(m.one(x))).relu() @ m.one.weight.T), [24, 24]),
        (lambda m, x: using(gelu(m.one(x)), lambda h: m.two(h).relu() * (m.two(h) + x)), [24, 24, 24]),
        # A plain linear, an output, an addition, a norm, another op: they take what there is.
        (lambda m, x: m.two(gelu(m.one(x))), [21]),
        (lambda m, x: using(gelu(m.one(x)), lambda h: (m.two(h).relu(), m.two(h))), [21, 24]),
        (lambda m, x: using(gelu(m.one(x)), lambda h: (m.two(h) + x, h)), [21, 24]),
        (lambda m, x: using(gelu(m.one(x)), lambda h: m.one(m.two(h) + x).relu() + h), [21, 24, 21]),
        (lambda m, x: using(gelu(m.one(x)), lambda h: m.two(h).relu() + h.mean((1, 2), keepdim=True)), [21, 24]),
        (lambda m, x: m.two(layer_norm(gelu(m.one(x)), (21,))) + x, [21, 24]),
        # Two products of one tensor that are added: one of them stays a linear.
        (lambda m, x: using(m.one(x).relu(), lambda h: m.two(h) + m.two(h * 1.0) + m.two(h)), [21, 24, 24]),
        (lambda m, x: using(m.one(x).relu(), lambda h: m.two(h) + linear(h, m.two.weight)), [21, 24]),
    ],
)  # fmt: skip
def test_outputs_that_are_no_eights(forward: Callable[..., Any], wanted: list[int]) -> None:
    graph = made(Of(forward, inner=21), X)
    assert widths(graph) == wanted
    check(graph, X, **counts(graph))


def test_what_is_added_has_its_own_width() -> None:
    """The one reader multiplies it, and adds it as it is."""
    x = random(2, 3, 21)
    graph = made(Of(lambda m, x: using(m.one(x).relu(), lambda h: m.two(h) + h), 21, 21), x)
    assert widths(graph) == [21, 21]
    check(graph, x, layers=2)


def test_a_norm_of_a_wide_product_counts_its_own() -> None:
    """Too wide to be normed behind the product, so that it is normed in front of the next one."""
    x = random(2, 3, WIDTH)
    graph = made(Of(lambda m, x: m.two(m.behind(gelu(m.one(x)))) + x, inner=603), x)
    assert widths(graph) == [603, WIDTH]
    check(graph, x, layers=2)
