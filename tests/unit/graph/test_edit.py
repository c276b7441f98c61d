"""Copies, and partial runs that must equal full runs."""

import pytest
import torch
from torch import Tensor, nn

from tersor.analyse.sites import find_sites
from tersor.graph.apply import apply
from tersor.graph.contracts import Graph, SiteChange
from tersor.graph.edit import (
    attribute,
    copy_graph,
    execute,
    last_uses,
    rebuild,
    run_all,
    run_changed,
)
from tests.unit.capturing import graph_of, random, trained


class Residual(nn.Module):
    """In-place adds, a constant that is written to through a view, several readers."""

    def __init__(self, *, writes: bool) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(4, 4) for _ in range(3))
        self.writes = writes

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        out = self.a(x)
        early = self.b(out)
        out += early
        if self.writes:
            out[:, 0] = self.c(early)[:, 1]
        return out.relu_(), self.c(out)


@pytest.mark.parametrize("writes", [False, True])
@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_a_partial_run_equals_a_full_run(name: str, writes: bool) -> None:
    graph = graph_of(trained(Residual(writes=writes)), random(4, 4))
    flat = [random(6, 4)]
    env = run_all(graph.module, flat)
    before = {node.name for node in graph.module.graph.nodes}
    for seed in (3, 4):  # the second one shows whether the first one left traces
        site = next(s for s in find_sites(graph) if s.name == name)
        new = random(4, 4, seed=seed)
        edited = apply(graph, [SiteChange(site=site, level="f32", weight=new)])
        found = run_changed(
            edited.module, env, lambda n, s=site: n.name in s.ops or n.name not in before
        )
        for value, wanted in zip(found, edited.run(flat), strict=True):
            assert torch.equal(value, wanted)
        assert not torch.equal(found[1], graph.run(flat)[1])


def test_only_what_follows_is_computed(resnet20: nn.Module) -> None:
    graph = graph_of(resnet20, random(4, 1, 28, 28))
    env = run_all(graph.module, [random(4, 1, 28, 28)])
    last = find_sites(graph)[-1]
    for node in graph.module.graph.nodes:  # whatever is read from before the last op is poison
        if node.op == "call_function" and node.name not in {
            s.name for s in last_inputs(graph, last.ops[0])
        }:
            env[node.name] = None
    (found,) = run_changed(graph.module, env, lambda n: n.name in last.ops)
    assert torch.equal(found, graph.run([random(4, 1, 28, 28)])[0])


def last_inputs(graph: Graph, name: str) -> list[torch.fx.Node]:
    return next(n for n in graph.module.graph.nodes if n.name == name).all_input_nodes


def test_no_change_gives_the_outputs_before(resnet20: nn.Module) -> None:
    graph = graph_of(resnet20, random(4, 1, 28, 28))
    env = run_all(graph.module, [random(4, 1, 28, 28)])
    assert run_changed(graph.module, env, lambda _: False)[0] is env["output"][0]


def test_copies_keep_names_and_share_tensors(lenet5: nn.Module) -> None:
    graph = graph_of(lenet5, random(4, 1, 28, 28))
    copied, tensors = copy_graph(graph.module)
    rows = [(n.name, n.op, str(n.target), str(n.args)) for n in graph.module.graph.nodes]
    assert [(n.name, n.op, str(n.target), str(n.args)) for n in copied.nodes] == rows
    assert not set(copied.nodes) & set(graph.module.graph.nodes)
    assert all(tensors[k].data_ptr() == attribute(graph.module, k).data_ptr() for k in tensors)
    x = random(3, 1, 28, 28)
    assert torch.equal(rebuild(copied, tensors)(x)[0], graph.run([x])[0])


def test_values_are_dropped_after_their_last_use(lenet5: nn.Module) -> None:
    module = graph_of(lenet5, random(4, 1, 28, 28)).module
    nodes = list(module.graph.nodes)
    order = {n.name: i for i, n in enumerate(nodes)}
    done = {source: reader for reader, sources in last_uses(module).items() for source in sources}
    for node in nodes:
        readers = [order[user.name] for user in node.users]
        assert (order[done[node.name]] if readers else None) == max(readers, default=None)


def test_what_is_no_tensor_or_has_no_place_is_refused(lenet5: nn.Module) -> None:
    graph = graph_of(lenet5, random(4, 1, 28, 28))
    with pytest.raises(TypeError, match="training is bool, not a tensor"):
        attribute(graph.module, "training")
    node = torch.fx.Graph().create_node("call_module", "conv1")
    with pytest.raises(TypeError, match="op call_module has no place in a normalised graph"):
        execute(graph.module, node, {})
