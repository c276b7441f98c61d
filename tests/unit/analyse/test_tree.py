"""What ``inspect`` says of a model: widths, the tree and times, against sums done by hand."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tersor
from tersor.analyse import profiling
from tersor.analyse.inspection import Branch, Inspection, WidthInfo
from tersor.analyse.profiling import profile_nodes
from tersor.analyse.sites import find_sites
from tersor.analyse.tree import grow, sample_macs, width_infos
from tersor.core.jsonable import from_json, to_json
from tersor.graph.axes import analyse_axes
from tersor.graph.axes.rulebook import RULES
from tersor.graph.contracts import Graph
from tests.conformance.zoo import families, hf_zoo
from tests.conformance.zoo.entry import ZooModel
from tests.unit.capturing import graph_of, random, trained

# Shares are sums of a few thousand quotients, each rounded to 2**-53.
ROUNDING = 1e-9


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.q, self.k, self.v = (nn.Linear(8, 12, bias=False) for _ in range(3))
        self.out = nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = (p(y).unflatten(-1, (3, 4)).transpose(1, 2) for p in (self.q, self.k, self.v))
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return x + self.out(y.transpose(1, 2).flatten(2))


class Net(nn.Module):
    """Two blocks, a layer that is called twice, a transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.twice = nn.Linear(8, 8)
        self.up = nn.ConvTranspose1d(8, 6, 2, stride=2)
        self.last = nn.Conv1d(6, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        x = self.twice(self.twice(x).relu())
        return self.last(self.up(x.transpose(1, 2)).relu())


TOKENS = 7
LINEAR = TOKENS * 8 * 12  # multiply-accumulates of q, k, v and out
ATTENTION = 2 * 3 * TOKENS * TOKENS * 4
UP, LAST = TOKENS * 8 * 6 * 2, 2 * TOKENS * 6 * 5


@pytest.fixture(scope="module")
def net() -> Inspection:
    return tersor.inspect(trained(Net()), random(2, TOKENS, 8))


def branches(tree: Branch) -> Iterator[Branch]:
    yield tree
    for child in tree.children:
        yield from branches(child)


def by_path(found: Inspection) -> dict[str, Branch]:
    assert found.tree is not None
    return {branch.path: branch for branch in branches(found.tree)}


def widths_of(found: Inspection) -> dict[str, WidthInfo]:
    return {width.name: width for width in found.widths}


def test_macs_of_modules_ops_and_layers_called_twice(net: Inspection) -> None:
    tree = by_path(net)
    wanted = {
        "": 2 * (4 * LINEAR + ATTENTION) + 2 * TOKENS * 64 + UP + LAST,
        "blocks": 2 * (4 * LINEAR + ATTENTION),
        "blocks.0": 4 * LINEAR + ATTENTION,
        "blocks.0.norm": 0,
        "blocks.0.q": LINEAR,
        "blocks.0.(scaled_dot_product_attention)": ATTENTION,
        "blocks.1.out": LINEAR,
        "twice": 2 * TOKENS * 64,
        "up": UP,
        "last": LAST,
    }
    assert {path: tree[path].macs for path in wanted} == wanted


def test_bytes_and_kinds(net: Inspection) -> None:
    tree = by_path(net)
    assert tree[""].size_bytes == net.size_bytes == 4 * sum(p.numel() for p in Net().parameters())
    assert tree["blocks.0.norm"].size_bytes == 4 * 2 * 8
    assert tree["blocks.0.out"].size_bytes == 4 * (8 * 12 + 8)
    kinds = {
        "": "Net",
        "blocks.1": "Block",
        "blocks.0.norm": "LayerNorm",
        "blocks.0.q": "linear",
        "blocks.0.(scaled_dot_product_attention)": "op",
        "up": "ConvTranspose1d",
        "last": "conv",
    }
    assert {path: tree[path].kind for path in kinds} == kinds
    assert tree["last"].shape == (5, 6, 1)


class Bare(nn.Module):
    """A weight that no layer of its own holds."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix, self.shift = nn.Parameter(torch.zeros(6, 4)), nn.Parameter(torch.zeros(6))
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(nn.functional.linear(x, self.matrix, self.shift).relu())


def test_a_bare_weight_is_a_leaf_under_its_own_name() -> None:
    found = tersor.inspect(trained(Bare()), random(2, 4))
    tree = by_path(found)
    assert (tree["matrix"].size_bytes, tree["matrix"].macs) == (4 * 24, 24)
    assert tree["matrix"].makes == tree["head"].reads == ("matrix",)
    assert tree[""].size_bytes == 4 * (24 + 6 + 12 + 2)


def test_branches_stand_in_the_order_of_the_graph(net: Inspection) -> None:
    assert net.tree is not None
    assert [c.name for c in net.tree.children] == ["blocks", "twice", "up", "last"]
    block = by_path(net)["blocks.0"]
    assert [c.name for c in block.children] == [
        "norm", "q", "k", "v", "(scaled_dot_product_attention)", "out",
    ]  # fmt: skip


def test_a_width_says_what_it_takes_part_in(net: Inspection) -> None:
    up = widths_of(net)["up"]
    assert (up.kind, up.exactness, up.units) == ("channels", "exact", 6)
    assert {(c.tensor, c.dim, c.role) for c in up.coupled} == {
        ("up.weight", 1, "producer"),
        ("up.bias", 0, "follower"),
        ("last.weight", 1, "consumer"),
    }
    assert up.size_bytes == 4 * (8 * 6 * 2 + 6 + 5 * 6)
    assert up.macs == UP + LAST
    assert by_path(net)["up"].makes == ("up",)
    assert "up" in by_path(net)["last"].reads


def test_heads_take_part_in_attention_and_its_layers(net: Inspection) -> None:
    (heads,) = [w for w in net.widths if w.kind == "heads" and "blocks.1" in w.name]
    assert heads.units == 3
    assert heads.macs == 4 * LINEAR + ATTENTION
    assert heads.size_bytes == 4 * 4 * 96
    assert {c.per_unit for c in heads.coupled} == {4}


def test_pinned_dimensions_name_op_and_reason(net: Inspection) -> None:
    found = {(p.tensor, p.dim): p for p in net.pinned}
    assert found["last.weight", 0].op == "output"
    assert found["last.weight", 0].size == 5
    kernel = found["up.weight", 2]
    assert (kernel.op, kernel.node, kernel.reason) == (
        "aten.conv_transpose1d", "conv_transpose1d", "kernel",
    )  # fmt: skip


def test_the_record_reads_back_from_json(net: Inspection) -> None:
    assert from_json(Inspection, json.loads(json.dumps(to_json(net)))) == net


def test_kept_layers_pin_the_widths_through_them() -> None:
    found = tersor.inspect(trained(Net()), random(2, TOKENS, 8), keep=("last",))
    widths = widths_of(found)
    assert widths["up"].pinned == "kept: runs through last.weight, which matches 'last'"
    assert all(w.pinned is None for name, w in widths.items() if name.startswith("blocks.0.q"))
    assert by_path(found)["last"].pinned == "kept: matches 'last'"


def test_an_op_without_a_rule_is_named_and_pins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(RULES, "relu")
    found = tersor.inspect(trained(Net()), random(2, TOKENS, 8))
    assert found.unknown == {"aten.relu": 2}
    assert "up" not in widths_of(found)
    held = next(p for p in found.pinned if (p.tensor, p.dim) == ("up.weight", 1))
    assert (held.op, held.reason) == ("aten.relu", "there is no rule for this op")
    assert found.mac_share < 1


def test_times_are_shares_of_the_pass() -> None:
    graph = graph_of(trained(Net()), random(2, TOKENS, 8))
    axes, sites, macs = analyse_axes(graph), find_sites(graph), sample_macs(graph)
    ops = [n for n in graph.module.graph.nodes if n.op == "call_function"]
    times = {node.name: 0.0 for node in ops}
    relus = [n.name for n in ops if str(n.target) == "aten.relu.default"]
    times[next(s for s in sites if s.name == "blocks.1.out").ops[0]] = 2.0
    times |= dict.fromkeys(relus, 1.0)  # in no module that stores anything: the model's own time
    tree = {b.path: b.time_percent for b in branches(grow(graph, axes, sites, macs, times))}
    assert tree[""] == 100
    assert tree["blocks"] == tree["blocks.1"] == tree["blocks.1.out"] == 50
    assert tree["blocks.0"] == tree["up"] == 0
    assert {b.time_percent for b in branches(grow(graph, axes, sites, macs))} == {None}


def test_profile_counts_every_call_of_the_last_pass_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    graph = graph_of(trained(Net()), random(2, TOKENS, 8))
    before = [t.clone() for t in graph.example]
    ticks = iter(range(10**9))
    monkeypatch.setattr(profiling.time, "perf_counter_ns", lambda: next(ticks) * 10**6)
    calls = [n.name for n in graph.module.graph.nodes if n.op == "call_function"]
    assert profile_nodes(graph) == dict.fromkeys(calls, 1.0)  # two readings a node
    assert all(torch.equal(a, b) for a, b in zip(before, graph.example, strict=True))


def test_inspect_with_time_measures_the_pass(lenet5: nn.Module) -> None:
    found = tersor.inspect(lenet5, random(2, 1, 28, 28), time=True)
    assert found.pass_ms is not None
    assert found.pass_ms > 0
    assert found.tree is not None
    assert found.tree.time_percent == pytest.approx(100, abs=ROUNDING)
    check(found)
    assert tersor.inspect(lenet5, random(2, 1, 28, 28)).pass_ms is None


def check(found: Inspection) -> None:
    """What is true of every model."""
    tree = by_path(found)
    root = tree[""]
    assert len(tree) == sum(1 for _ in branches(root))  # no path twice
    for site in found.sites:
        assert tree[site.name].shape == site.shape
        assert tree[site.name].pinned == site.pinned
    assert root.size_bytes == found.size_bytes
    _check_sums(root)
    names = [w.name for w in found.widths]
    assert len(set(names)) == len(names)
    assert {name for b in tree.values() for name in (*b.makes, *b.reads)} <= set(names)
    for width in found.widths:
        assert 0 <= width.macs <= root.macs
        assert 0 < width.size_bytes <= found.size_bytes
    free = {(c.tensor, c.dim) for w in found.widths for c in w.coupled}
    assert all(p.reason and p.op for p in found.pinned)
    assert free or found.pinned
    json.dumps(to_json(found), allow_nan=False)


def _check_sums(branch: Branch) -> None:
    assert branch.macs >= sum(c.macs for c in branch.children)
    assert branch.size_bytes >= sum(c.size_bytes for c in branch.children)
    if branch.time_percent is not None:
        below = sum(c.time_percent or 0 for c in branch.children)
        assert branch.time_percent >= below - ROUNDING
    for child in branch.children:
        _check_sums(child)


def test_trained_networks(resnet20: nn.Module, lenet5: nn.Module) -> None:
    for model, widths, share in ((resnet20, 12, 1.0), (lenet5, 3, 1.0)):
        found = tersor.inspect(model, random(2, 1, 28, 28))
        check(found)
        assert len(found.widths) == widths
        assert found.mac_share == share
        assert found.unknown == {}
        tree = by_path(found)
        assert {s.name: tree[s.name].macs for s in found.sites} == {
            s.name: s.macs for s in found.sites
        }
        assert tree[""].macs == found.macs


def test_macs_of_a_width_by_hand(resnet20_graph: Graph) -> None:
    axes = analyse_axes(resnet20_graph)
    macs = sample_macs(resnet20_graph)
    stem = width_infos(resnet20_graph, axes, macs)[0]
    assert stem.name == "stem"
    # The stem, three blocks of two convolutions, and the two convolutions that leave it.
    one = 28 * 28 * 16 * 16 * 9
    assert stem.macs == 28 * 28 * 16 * 9 + 6 * one + 14 * 14 * (32 * 16 * 9 + 32 * 16)


def family(entry: ZooModel) -> Any:
    is_fast = entry.name.partition("/")[2] in ("residual", "translator", "experts", "unet", "gpt")
    return pytest.param(entry, id=entry.name, marks=() if is_fast else pytest.mark.slow)


@pytest.mark.parametrize("entry", [family(entry) for entry in families.entries()])
def test_families(entry: ZooModel) -> None:
    check(tersor.inspect(entry.build(), entry.inputs()))


@pytest.mark.zoo
@pytest.mark.parametrize("entry", list(hf_zoo.entries()), ids=lambda e: e.name)
def test_transformers(entry: ZooModel) -> None:
    check(tersor.inspect(entry.build(), entry.inputs()))
