"""Inductor builds whose narrow transformer layers are few ops, on the CPU: the same outputs as op by op."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tersor.analyse.sites import find_sites
from tersor.api.tiles import rounded
from tersor.backends.inductor import InductorBackend, options
from tersor.backends.inductor.executable import load
from tersor.backends.inductor.lowering import Form, lower
from tersor.backends.inductor.profiling import Launch, launches, traced_names
from tersor.build.build import parity
from tersor.cli.demo.zoo import ResNet
from tersor.core.records import BuildChoice
from tersor.graph.apply import apply
from tersor.graph.contracts import Graph, Quantizer
from tersor.graph.shapes import input_shapes
from tersor.kernels.narrow_attention import narrow_attention
from tersor.kernels.narrow_linear import narrow_linear
from tests.conformance.test_backends import graph_of, named, random
from tests.unit.backends.encoder_graphs import (
    HALF,
    NAMES,
    TOKENS,
    WIDTH,
    Layer,
    Of,
    Two,
    X,
    calls,
    check,
    choice,
    counts,
    drawn,
    form,
    made,
)


@pytest.fixture(scope="module", params=[True, False], ids=["in front", "behind"])
def two(request: pytest.FixtureRequest) -> tuple[Graph, bool]:
    return made(Two(in_front=request.param), X), request.param


def test_layers_are_one_attention_and_three_linears(two: tuple[Graph, bool]) -> None:
    graph, in_front = two
    # The head has nothing around it; its norm goes with a sum, or follows another norm.
    left = {} if in_front else {"norms": 1}
    check(graph, X, attentions=2, layers=6, linears=1, **left)
    assert counts(graph, Form(dtype=torch.float16)) == {
        "plain": 2, "linears": 13, "norms": 5, "adds": 4, "gelus": 2,
    }  # fmt: skip
    nodes = [n for n in calls(graph) if n.target in (narrow_linear, narrow_attention)]
    kinds = [
        n.args[6] is not None if n.target is narrow_attention else _kinds(n) for n in nodes[:4]
    ]
    if in_front:
        assert kinds == [True, (0, "none", 1, 0), (1, "gelu", 0, 0), (0, "none", 1, 0)]
    else:
        assert kinds == [False, (0, "none", 1, 1), (0, "gelu", 0, 0), (0, "none", 1, 1)]
        assert [n.args[10] for n in nodes[:4] if n.target is narrow_linear] == [1e-5, 0.0, 1e-3]


def _kinds(node: Any) -> tuple[int, str, int, int]:
    """What a linear has: a norm in front, its activation, an addition, a norm behind."""
    has = [node.args[i] is not None for i in (3, 4, 5)]
    return int(has[0]), node.args[8], int(has[1]), int(has[2])


def test_one_batch_for_all() -> None:
    """Other numbers of samples than the captured one."""
    graph = made(Two(in_front=True), X)
    module = lower(graph, form()).module
    exact = lower(graph, Form()).module
    for batch in (1, 7):
        x = random(batch, TOKENS, WIDTH)
        with torch.no_grad():
            torch.testing.assert_close(module(x)[0], exact(x)[0], rtol=2**-7, atol=2**-7)


def test_graphs_that_write_stay_as_they_are() -> None:
    """A norm's source may be another value by the time that a product would read it."""

    def forward(m: Any, x: Tensor) -> Tensor:
        y = x * 1.0
        flat = y.view(-1)
        n = m.norm(y)
        flat.add_(1.0)
        z: Tensor = m.one(n) + y
        return z

    graph = made(Of(forward), X)
    if not any("add_" in str(n.target) for n in graph.module.graph.nodes):
        pytest.skip("this torch writes it without a write")
    check(graph, X, linears=1, norms=1, adds=1)
    assert not InductorBackend().joined(graph, choice())


@pytest.mark.parametrize("names", [("up",), ("q", "k", "v"), ("up", "down", "q", "k", "v", "out")])
def test_products_of_codes_stay(names: tuple[str, ...]) -> None:
    graph = made(Layer(in_front=True), X)
    quantizers: dict[str | None, Quantizer] = {}
    sites: list[Any] = [s for s in find_sites(graph) if s.name.rpartition(".")[2] in names]
    assert len(sites) == len(names)
    coded = apply(graph, [rounded(graph, s, 127, quantizers, after=False) for s in sites])
    found = calls(coded)
    assert sum("linear8" in str(n.target) for n in found) == len(names)
    fused = Counter(NAMES[n.target] for n in found if n.target in NAMES)
    assert fused["layers"] == sum(n not in names for n in ("out", "up", "down"))
    assert fused["attentions"] == ("q" not in names)
    with torch.no_grad():
        plain, exact, other = (
            lower(g, f).module(X)[0].double()
            for g, f in ((graph, Form()), (coded, Form()), (coded, form()))
        )
    # 16 bits move fewer numbers to another code than rounding them to one moved at all.
    assert float((other - exact).norm()) <= float((exact - plain).norm())


def built(graph: Graph, **fields: Any) -> Any:
    return InductorBackend().build(graph, input_shapes(graph.signature, 3), choice(**fields))


@pytest.mark.parametrize("half", ["float16", "bfloat16"])
def test_builds_compute_the_graph_and_know_where_time_goes(
    two: tuple[Graph, bool], half: str
) -> None:
    graph, _ = two
    executable = built(graph, half=half)
    assert parity(graph, executable, 3, (X,)) <= HALF[getattr(torch, half)]
    nodes = {n.name: n.target for n in graph.module.graph.nodes}
    fused = [
        n for n in executable._lowered.module.graph.nodes
        if n.target in (narrow_attention, narrow_linear)
    ]  # fmt: skip
    assert len(fused) == 8
    times = executable.profile()
    for node in fused:
        source = executable._lowered.sources[node.name]
        attention = torch.ops.aten.scaled_dot_product_attention.default
        plain = attention if node.target is narrow_attention else torch.ops.aten.linear.default
        assert nodes[source] is plain
        assert times[source] > 0


def test_a_file_brings_layers_back(two: tuple[Graph, bool]) -> None:
    graph, _ = two
    executable = built(graph)
    loaded = load(executable.serialize(), choice())
    given = named(graph, (X,))
    for name, array in executable.run(given).items():
        assert np.array_equal(loaded.run(given)[name], array)


def test_what_layers_take_in_is_named(two: tuple[Graph, bool]) -> None:
    graph, backend = two[0], InductorBackend()
    nodes = [n for n in graph.module.graph.nodes if n.op == "call_function"]
    kinds = [
        n.name for n in nodes
        if NAMES.get(n.target) in ("linears", "plain", "adds")  # type: ignore[call-overload]
    ]  # fmt: skip
    head = [n.name for n in nodes if NAMES.get(n.target) == "linears"][-1]  # type: ignore[call-overload]
    assert backend.joined(graph, choice()) == {*kinds} - {head}
    assert not backend.joined(graph, choice(blocks="ops"))
    assert not backend.idle(graph, choice())
    assert not backend.idle(graph, choice(blocks="ops"))


def test_weights_that_two_layers_share_are_found() -> None:
    """By any of their names."""
    module = Of(lambda m, x: m.two(m.one(x).relu()).relu())
    module.two.weight = module.one.weight
    graph = made(module, X)
    assert len(InductorBackend().joined(graph, choice())) == 2
    check(graph, X, layers=2)


def test_a_graph_without_such_layers_is_idle() -> None:
    graph = made(Of(lambda m, x: m.one(x)), X)
    for layout in ("contiguous", "channels_last"):
        reason = InductorBackend().idle(graph, choice(layout=layout))
        assert (
            reason == "inductor: blocks='fused', but there is no narrow block and no narrow layer"
        )
        assert not InductorBackend().idle(graph, choice(layout=layout, blocks="ops"))


def test_blocks_of_convolutions_are_for_channels_that_are_last() -> None:
    x = random(2, 1, 12, 12)
    graph = graph_of(drawn(ResNet(blocks=1)), x)
    backend = InductorBackend()
    last, first = choice(layout="channels_last"), choice()
    assert backend.joined(graph, last)
    assert not backend.idle(graph, last)
    assert not backend.joined(graph, first)
    assert "no narrow block" in backend.idle(graph, first)
    blocks = [n for n in calls(graph) if "narrow_block" in str(n.target)]
    assert not blocks
    assert [n for n in calls(graph, form(channels_last=True)) if "narrow_block" in str(n.target)]


def test_ways_that_are_worth_measuring() -> None:
    ways = [w for w in options.float_choices("cuda", can_compile=True) if "blocks" in w.options]
    found = {
        (w.options.get("half", "bfloat16"), w.options.get("layout", "contiguous")) for w in ways
    }
    assert found == {
        (half, layout)
        for half in ("bfloat16", "float16")
        for layout in ("contiguous", "channels_last")
    }
    assert len(ways) == len(found)
    for way in ways:
        assert way.precision == "bf16"
        assert way.options["mode"] == "compile"
        assert way.options["graph"]
        fields: Mapping[str, Any] = {"precision": way.precision, "options": dict(way.options)}
        options.read_options(BuildChoice(backend="inductor", device="cuda", **fields))


def test_kernels_of_a_program_go_to_their_layer(two: tuple[Graph, bool]) -> None:
    program = """
def call(args):
        # Topologically Sorted Source Nodes: [p], Original ATen: [tersor.narrow_attention]
        narrow_attention_kernel_0.run(arg0_1, buf0, stream=s)
        # Topologically Sorted Source Nodes: [q], Original ATen: [tersor.narrow_linear]
        narrow_linear_kernel_1.run(buf0, buf1, stream=s)
"""
    assert launches(program) == [
        Launch("narrow_attention_kernel_0", "p"),
        Launch("narrow_linear_kernel_1", "q"),
    ]
    lowered = lower(two[0], form())
    own = (narrow_attention, narrow_linear)
    nodes = [n for n in lowered.module.graph.nodes if n.target in own]
    traced = [(f"t{i}", f"tersor.{n.target.__name__}.default") for i, n in enumerate(nodes)]
    found = traced_names(lowered.module, traced)
    assert [found[name] for name, _ in traced] == [n.name for n in nodes]
