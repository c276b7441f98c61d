"""Blocks end where few values pass, whatever the modules are called."""

import pytest
import torch
from torch import Tensor, nn

from tersor.core.errors import ConfigError
from tersor.graph.contracts import Graph
from tersor.graph.frontiers import Block, BlockSize, find_blocks, whole
from tersor.graph.training import leaves, map_names
from tests.unit.capturing import graph_of, random


def blocks_of(graph: Graph, size: BlockSize | None = None) -> tuple[Block, ...]:
    names = [n.name for n in graph.module.graph.nodes if n.op == "call_function"]
    trained = [leaf.target for leaf in leaves(graph)]
    return find_blocks(
        graph.module, trained, map_names(graph.module), names, size or BlockSize(least=2)
    )


def check_cover(graph: Graph, blocks: tuple[Block, ...]) -> None:
    """Every map is in one block, in order; each block reads what those before it give."""
    assert [op for b in blocks for op in b.ops] == list(map_names(graph.module))
    given: set[str] = set()
    for block in blocks:
        assert set(block.reads) <= given
        given = set(block.gives)
    assert [b.is_last for b in blocks] == [False] * (len(blocks) - 1) + [True]


def test_residual_blocks_of_a_resnet(resnet20_graph: Graph) -> None:
    blocks = blocks_of(resnet20_graph)
    check_cover(resnet20_graph, blocks)
    # The stem joins the first of nine blocks; the classifier stands alone.
    assert [len(b.ops) for b in blocks] == [3, 2, 2, 3, 2, 2, 3, 2, 2, 1]
    assert all(len(b.gives) == 1 and b.gives[0].startswith("relu") for b in blocks[:-2])


class Dense(nn.Module):
    """All results are read to the end: two or more values pass everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.maps = nn.ModuleList([nn.Linear(4, 4) for _ in range(8)])
        self.last = nn.Linear(32, 2)

    def forward(self, x: Tensor) -> Tensor:
        found: list[Tensor] = []
        for layer in self.maps:
            x = layer(x).relu()
            found.append(x)
        return self.last(torch.cat(found, 1))


def test_a_long_run_is_cut_where_fewest_values_pass() -> None:
    graph = graph_of(Dense().eval(), random(3, 4))
    blocks = blocks_of(graph, BlockSize(least=2, most=4))
    check_cover(graph, blocks)
    assert max(len(b.ops) for b in blocks) <= 5
    assert len(blocks[0].gives) == len(blocks[0].ops)  # every ReLU so far is still needed
    assert len(blocks_of(graph, BlockSize(least=2, most=12))) < len(blocks)


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(*[m for _ in range(5) for m in (nn.Linear(3, 3), nn.Tanh())])

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


@pytest.mark.parametrize("least", [1, 2, 5, 9])
def test_chains_are_cut_into_runs_of_a_least_size(least: int) -> None:
    graph = graph_of(Chain().eval(), random(3, 3))
    blocks = blocks_of(graph, BlockSize(least=least, most=max(12, least)))
    check_cover(graph, blocks)
    assert all(len(b.ops) >= least for b in blocks[:-1])
    assert all(b.gives[0].startswith("tanh") for b in blocks)


def test_blocks_end_at_known_nodes_only(resnet20_graph: Graph) -> None:
    trained = [leaf.target for leaf in leaves(resnet20_graph)]
    names = map_names(resnet20_graph.module)
    (alone,) = find_blocks(resnet20_graph.module, trained, names, ())
    assert alone.is_last
    assert alone.ops == names
    assert whole(resnet20_graph.module, trained, names) == alone


def test_nothing_to_train_gives_no_blocks(resnet20_graph: Graph) -> None:
    assert find_blocks(resnet20_graph.module, (), (), ()) == ()
    assert whole(resnet20_graph.module, (), ()) is None


def test_small_blocks_join_the_next_one(resnet20_graph: Graph) -> None:
    blocks = blocks_of(resnet20_graph, BlockSize())
    check_cover(resnet20_graph, blocks)
    assert [len(b.ops) for b in blocks] == [5, 5, 4, 5, 3]


def test_sizes_fit_each_other() -> None:
    with pytest.raises(ConfigError, match="found 3 to 2"):
        BlockSize(least=3, most=2)
