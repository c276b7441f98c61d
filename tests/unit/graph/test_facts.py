"""Sizes of nodes by hand on small networks, and that they follow what is cut."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from tersor.graph.axes import analyse_axes, keep_units
from tersor.graph.contracts import Graph
from tersor.graph.facts import NodeFacts, node_facts
from tests.unit.capturing import graph_of, random, trained


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Conv2d(3, 8, 3, padding=1)
        self.deep = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.last = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.deep(self.wide(x).relu())
        return self.last(hidden.mean((2, 3)))


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.qkv = nn.Embedding(11, 12), nn.Linear(12, 36)
        self.norm, self.out = nn.LayerNorm(12), nn.Linear(12, 4)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        q, k, v = (t.unflatten(-1, (3, 4)).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1))
        mixed = functional.scaled_dot_product_attention(q, k, v)
        return self.out(self.norm(x + mixed.transpose(1, 2).flatten(2)))


def by_kind(facts: dict[str, NodeFacts], kind: str) -> list[NodeFacts]:
    return [f for f in facts.values() if f.kind == kind]


def mixed() -> Graph:
    return graph_of(trained(Mixed()), random(2, 3, 6, 6))


def test_convolutions_and_linear() -> None:
    facts = node_facts(mixed(), batch=1)
    (wide,), (deep,), (last,) = (by_kind(facts, k) for k in ("conv", "depthwise", "linear"))
    assert wide == NodeFacts(
        kind="conv",
        macs=36 * 27 * 8,
        weight_elements=27 * 8 + 8,
        in_elements=3 * 36,
        out_elements=8 * 36,
        inputs=27,
        outputs=8,
        window=9,
    )
    assert (deep.macs, deep.inputs, deep.outputs, deep.window) == (36 * 9 * 8, 9, 8, 9)
    assert (last.macs, last.weight_elements, last.inputs, last.outputs) == (40, 45, 8, 5)
    assert [f.kind for f in facts.values()] == [
        "conv", "activation", "depthwise", "pool", "linear",
    ]  # fmt: skip


def test_activations_grow_with_the_batch_and_weights_do_not() -> None:
    one, four = node_facts(mixed(), batch=1), node_facts(mixed(), batch=4)
    for name, facts in one.items():
        big = four[name]
        assert (big.macs, big.in_elements, big.out_elements) == (
            4 * facts.macs, 4 * facts.in_elements, 4 * facts.out_elements,
        )  # fmt: skip
        assert (big.weight_elements, big.inputs, big.outputs) == (
            facts.weight_elements, facts.inputs, facts.outputs,
        )  # fmt: skip


def test_attention_embedding_and_norm() -> None:
    ids = torch.randint(0, 11, (2, 7), generator=torch.Generator().manual_seed(0))
    facts = node_facts(graph_of(trained(Attends()), ids), batch=1)
    (attention,), (table,), (norm,) = (
        by_kind(facts, k) for k in ("attention", "embedding", "norm")
    )
    assert attention.macs == 3 * (7 * 7 * 4 + 7 * 7 * 4)
    assert (attention.in_elements, attention.out_elements) == (3 * 84, 84)
    assert (attention.inputs, attention.outputs) == (4, 4)
    assert (table.weight_elements, table.out_elements, table.macs) == (132, 84, 0)
    assert (norm.inputs, norm.in_elements) == (12, 84)


def test_facts_follow_a_cut() -> None:
    graph = mixed()
    axes = analyse_axes(graph)
    (name,) = (w.name for w in axes.widths if w.name == "wide")
    facts = node_facts(keep_units(graph, axes, {name: [0, 2, 5]}), batch=1)
    (wide,), (deep,), (last,) = (by_kind(facts, k) for k in ("conv", "depthwise", "linear"))
    assert (wide.outputs, wide.out_elements, wide.macs) == (3, 108, 36 * 27 * 3)
    assert (deep.outputs, deep.inputs, deep.macs) == (3, 9, 36 * 27)
    assert (last.inputs, last.macs) == (3, 15)
