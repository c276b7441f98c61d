"""Partial runs of edited graphs, which must equal full runs."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from tersor.analyse.sites import find_sites
from tersor.graph.apply import apply
from tersor.graph.axes import analyse_axes, keep_units
from tersor.graph.contracts import Graph, SiteChange
from tersor.graph.edit import copy_graph, rebuild
from tersor.graph.suffix import Original
from tests.unit.capturing import graph_of, random, trained


class Residual(nn.Module):
    """In-place adds, writes to a slice or through a reshape, several readers."""

    def __init__(self, writes: str) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(4, 4) for _ in range(3))
        self.writes = writes

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        out = self.a(x)
        early = self.b(out)
        out += early
        if self.writes == "a slice":
            out[:, 0] = self.c(early)[:, 1]
        if self.writes == "through a reshape":
            out.view(-1, 2, 2).mul_(2)
        return out.relu_(), self.c(out)


@pytest.mark.parametrize("writes", ["nothing", "a slice", "through a reshape"])
@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_a_partial_run_equals_a_full_run(name: str, writes: str) -> None:
    graph = graph_of(trained(Residual(writes)), random(4, 4))
    flat = [random(6, 4)]
    original = Original(graph)
    for seed in (3, 4):  # the second one shows whether the first one left traces
        site = next(s for s in find_sites(graph) if s.name == name)
        new = random(4, 4, seed=seed)
        edited = apply(graph, [SiteChange(site=site, level="f32", weight=new)])
        suffix = original.suffix(edited)
        assert suffix.is_whole == (writes == "through a reshape")
        assert suffix.own_bytes == 4 * 4 * 4
        found = suffix.run(flat, original.values(flat, suffix.reads))
        for value, wanted in zip(found, edited.run([flat[0].clone()]), strict=True):
            assert torch.equal(value, wanted)
        assert not torch.equal(found[1], graph.run([flat[0].clone()])[1])
    assert torch.equal(flat[0], random(6, 4))


def test_only_what_follows_is_computed(resnet20_graph: Graph) -> None:
    graph = resnet20_graph
    flat = [random(4, 1, 28, 28)]
    original, last = Original(graph), find_sites(graph)[-1]
    (op,) = last.ops
    edited = apply(graph, [SiteChange(site=last, level="f32", bias=torch.zeros(10))])
    suffix = original.suffix(edited)
    new = f"{op}_bias_f32"
    assert [n.name for n in suffix.nodes] == [new, op, original.output]
    reader = next(n for n in graph.module.graph.nodes if n.name == op)
    assert suffix.reads == {n.name for n in reader.all_input_nodes[:2]}
    before = original.values(flat, suffix.reads)
    assert set(before) == {*suffix.reads, original.output}  # the rest is not kept
    (found,) = suffix.run(flat, before)
    assert torch.equal(found, edited.run(flat)[0])


def test_no_change_gives_the_outputs_before(resnet20_graph: Graph) -> None:
    flat, original = [random(4, 1, 28, 28)], Original(resnet20_graph)
    same, tensors = copy_graph(resnet20_graph.module)
    suffix = original.suffix(replace(resnet20_graph, module=rebuild(same, tensors)))
    assert (suffix.nodes, suffix.own_bytes) == ((), 0)
    before = original.values(flat, ())
    assert suffix.run(flat, before) is before[original.output]


def test_a_cut_width_is_run_from_its_producer(lenet5_graph: Graph) -> None:
    axes = analyse_axes(lenet5_graph)
    width = next(w for w in axes.widths if w.kind == "neurons")
    keep = {width.name: range(0, width.units, 3)}
    cut = keep_units(lenet5_graph, axes, keep, meta=False)
    flat = [random(5, 1, 28, 28)]
    original = Original(lenet5_graph)
    suffix = original.suffix(cut)
    before = original.values(flat, suffix.reads)
    (found,) = suffix.run(flat, before)
    assert torch.equal(found, keep_units(lenet5_graph, axes, keep).run(flat)[0])
    convs = [n.name for n in suffix.nodes if n.target is torch.ops.aten.conv2d.default]
    assert len(convs) < 2
