"""Graphs decomposed op by op, against torch's own way: export again and decompose as a whole."""

import warnings
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from tersor.graph.contracts import Graph
from tersor.graph.decompose import Decomposed, Decomposer
from tersor.graph.floats import exported_floats, weight_names
from tersor.graph.split import Split, split
from tests.unit.capturing import graph_of, random, trained

KEPT = (torch.ops.aten.linear.default, torch.ops.aten.gelu.default, torch.ops.aten.relu.default)


def table() -> Any:
    found = torch.export.default_decompositions()
    for op in KEPT:
        found.pop(op, None)
    return found


@pytest.fixture(scope="module")
def decompose() -> Decomposer:
    return Decomposer(table())


class Attention(nn.Module):
    """Views, transposes, norms and fused products; heads and neurons as given."""

    def __init__(self, heads: int = 2, hidden: int = 12) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 3 * heads * 4), nn.Linear(heads * 4, 8)
        self.norm, self.heads = nn.LayerNorm(8), heads
        self.up, self.down = nn.Linear(8, hidden), nn.Linear(hidden, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, 4)).unbind(2)
        read = [t.transpose(1, 2) for t in (q, k, v)]
        mixed = nn.functional.scaled_dot_product_attention(*read)
        x = self.norm(x + self.out(mixed.transpose(1, 2).flatten(2)))
        out: Tensor = self.down(nn.functional.gelu(self.up(x))).flatten(1)
        return out


class Convolutions(nn.Module):
    """Ops with several results, pools, groups, sizes that follow the batch."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, channels, 3, padding=1)
        self.b = nn.Conv2d(channels, channels, 3, groups=channels)
        self.c = nn.Linear(channels, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.max_pool2d(self.a(x).relu(), 2)
        x = torch.cat(x.chunk(2, 1)[::-1], 1)
        x = nn.functional.adaptive_avg_pool2d(nn.functional.hardswish(self.b(x)), 1).flatten(1)
        out: Tensor = self.c(x.reshape(x.shape[0], -1)).view(x.shape[0] * 5)
        return out


CASES = {
    "attention": (Attention, random(3, 6, 8)),
    "convolutions": (Convolutions, random(3, 3, 12, 12)),
}


def whole(graph: Graph, parts: Split) -> fx.GraphModule:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own export internals
        program, _ = exported_floats(graph, parts)
        module: fx.GraphModule = program.run_decompositions(table()).module(check_guards=False)
    return module


def ops(module: fx.GraphModule) -> Counter[str]:
    found = (str(n.target) for n in module.graph.nodes if n.op == "call_function")
    return Counter(t for t in found if "sym_size" not in t and "assert" not in t)


def weights(parts: Split) -> list[Tensor]:
    values = {o.weight_input: o.weight.values for o in parts.operations}
    return [torch.from_numpy(values[name]) for name in weight_names(parts)]


def made(decompose: Decomposer, graph: Graph) -> tuple[Split, Decomposed]:
    parts = split(graph.module)
    found = decompose(graph, parts)
    assert found is not None
    return parts, found


@pytest.mark.parametrize("name", CASES)
def test_equals_decomposing_the_whole(name: str, decompose: Decomposer) -> None:
    kind, x = CASES[name]
    graph = graph_of(trained(kind()), x)
    parts, found = made(decompose, graph)
    assert ops(found.module) == ops(whole(graph, parts))
    other = random(5, *x.shape[1:], seed=9)  # the batch is open
    wanted = parts.module(other, *weights(parts))
    for value, want in zip(found.module(other, *weights(parts)), wanted, strict=True):
        torch.testing.assert_close(value, want)


def test_another_size_is_another_graph(decompose: Decomposer) -> None:
    x = random(3, 6, 8)
    for heads, hidden in ((2, 12), (1, 12), (2, 7), (2, 12)):
        graph = graph_of(trained(Attention(heads, hidden)), x)
        parts, found = made(decompose, graph)
        assert ops(found.module) == ops(whole(graph, parts))
        wanted = parts.module(x, *weights(parts))[0]
        torch.testing.assert_close(found.module(x, *weights(parts))[0], wanted)


def test_what_is_kept_and_where_the_rest_is_from(decompose: Decomposer) -> None:
    graph = graph_of(trained(Attention()), random(3, 6, 8))
    parts, found = made(decompose, graph)
    names = {n.name: str(n.target) for n in parts.module.graph.nodes}
    for node in found.module.graph.nodes:
        if node.target in KEPT:
            assert names[found.sources[node.name]] == str(node.target)
    from_norms = {found.sources[n.name] for n in found.module.graph.nodes
                  if "native_layer_norm" in str(n.target)}  # fmt: skip
    assert {names[n] for n in from_norms} == {"aten.layer_norm.default"}


def test_equal_inputs_of_one_op_stay_apart(decompose: Decomposer) -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return torch.hstack([x, 2 * y]) - torch.hstack([y, x])

    graph = graph_of(Two(), random(3, 4), random(3, 4, seed=2))
    _, found = made(decompose, graph)
    x, y = random(2, 4), random(2, 4, seed=5)
    torch.testing.assert_close(found.module(x, y)[0], Two()(x, y))


def test_leaves_to_torch_what_it_cannot_do(decompose: Decomposer) -> None:
    graph = graph_of(trained(nn.Sequential(nn.Linear(4, 4), nn.ReLU())), random(3, 4))
    parts = split(graph.module)
    relu = next(n for n in parts.module.graph.nodes if n.target is torch.ops.aten.relu.default)
    relu.target = torch.ops.aten.relu_.default  # writes to what it reads
    assert decompose(graph, parts) is None
    relu.target = torch.ops.aten.relu.default
    assert decompose(graph, parts) is not None
    alone = replace(graph, example=(random(1, 4),))  # torch takes a batch of 1 as fixed
    assert decompose(alone, parts) is None


def test_sizes_that_depend_on_the_data_are_left_to_torch(decompose: Decomposer) -> None:
    """What is known of ops is kept by their inputs' sizes, which say nothing of such outputs."""

    class Masked(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[x[:, 0] > 0]

    graph = graph_of(Masked(), random(3, 4))
    assert decompose(graph, split(graph.module)) is None


def test_a_size_that_an_op_fixes_is_left_to_torch(decompose: Decomposer) -> None:
    """A graph that holds for one batch only is none for all."""

    class Beside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", random(1, 4))

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([x, self.table.repeat(x.shape[0], 1)], 1)

    graph = graph_of(Beside(), random(3, 4))
    parts = split(graph.module)
    assert decompose(graph, parts) is not None
    nodes = parts.module.graph.nodes
    (holder,) = (n for n in nodes if n.op == "get_attr")
    joined = next(n for n in nodes if n.target is torch.ops.aten.cat.default)
    size = len(graph.example[0])
    setattr(parts.module, str(holder.target), random(size, 4))  # fits the example alone
    joined.args = ([joined.args[0][0], holder], 1)
    assert decompose(graph, parts) is None
