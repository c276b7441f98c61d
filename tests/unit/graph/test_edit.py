"""Copies of graphs, and what nobody needs any more."""

import pytest
import torch
from torch import nn

from tersor.graph.edit import (
    attribute,
    copy_graph,
    execute,
    last_uses,
    rebuild,
)
from tests.unit.capturing import graph_of, random


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
