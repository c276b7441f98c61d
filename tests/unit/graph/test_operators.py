"""Every weighted op as rows: rows @ W^T + b is its output."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tersor.graph.contracts import Graph
from tersor.graph.edit import attribute, run_all
from tersor.graph.operators import (
    WeightedOp,
    as_rows,
    grouped_weight,
    input_channels,
    output_rows,
    weighted_ops,
)
from tersor.observe.statistics import op_bias, op_weight
from tests.unit.capturing import graph_of, random, scale_error, trained

# Sums of at most 36 products, in float32 on one side and float64 on the other.
ROUNDINGS = 36 * torch.finfo(torch.float32).eps

CASES: list[tuple[nn.Module, tuple[int, ...]]] = [
    (nn.Linear(4, 6), (3, 4)),
    (nn.Linear(4, 6, bias=False), (3, 5, 4)),
    (nn.Linear(4, 6), (3, 2, 5, 4)),
    (nn.Conv1d(4, 6, 3, stride=2, padding=1), (3, 4, 9)),
    (nn.Conv1d(4, 6, 4, padding="same", dilation=3), (3, 4, 9)),  # 9 zeros: 4 before, 5 after
    (nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(0, 2), dilation=(1, 2)), (3, 4, 9, 7)),
    (nn.Conv2d(4, 6, 3, padding="same", groups=2, bias=False), (3, 4, 5, 5)),
    (nn.Conv2d(4, 6, (2, 4), padding="same"), (3, 4, 5, 5)),
    (nn.Conv2d(4, 8, 3, groups=4), (3, 4, 5, 5)),  # depthwise, two outputs a channel
    (nn.Conv2d(4, 6, 3, padding="valid"), (3, 4, 5, 5)),
    (nn.Conv2d(4, 6, 3, padding=2, padding_mode="reflect"), (3, 4, 5, 5)),
    (nn.Conv3d(4, 6, 2, stride=2, padding=1, groups=2), (2, 4, 3, 4, 5)),
]


def one_op(module: nn.Module, shape: tuple[int, ...]) -> tuple[Graph, WeightedOp, Tensor, Tensor]:
    graph = graph_of(trained(nn.Sequential(module, nn.Tanh())), random(*shape))
    (op,) = weighted_ops(graph.module)
    env = run_all(graph.module, [random(*shape, seed=2)])
    return graph, op, env[op.data.name], env[op.node.name]


@pytest.mark.parametrize(("module", "shape"), CASES, ids=str)
def test_rows_times_weight_is_the_output(module: nn.Module, shape: tuple[int, ...]) -> None:
    graph, op, data, output = one_op(module, shape)
    bias = op_bias(graph, op)
    found = torch.einsum("tgn,gmn->tgm", as_rows(data, op).double(), op_weight(graph, op))
    found = found if bias is None else found + bias
    assert scale_error(found, output_rows(output, op)) <= ROUNDINGS
    assert (bias is None) == (getattr(module, "bias", None) is None)
    weight = attribute(graph.module, str(op.weight.target))
    assert input_channels(op, weight) == data.shape[op.channel_dim] == 4


@pytest.mark.parametrize(
    ("padding", "is_padded"), [(0, False), ("valid", False), (1, True), ("same", True)]
)
def test_is_padded(padding: Any, is_padded: bool) -> None:
    _, op, _, _ = one_op(nn.Conv2d(1, 1, 3, padding=padding), (2, 1, 5, 5))
    assert op.window is not None
    assert op.window.is_padded == is_padded


def test_a_mask_keeps_real_tokens_only() -> None:
    _graph, op, data, output = one_op(nn.Linear(4, 6), (2, 3, 4))
    mask = torch.tensor([[True, True, False], [True, False, False]])
    real = torch.stack([data[0, 0], data[0, 1], data[1, 0]])
    assert torch.equal(as_rows(data, op, mask)[:, 0], real)
    assert torch.equal(output_rows(output, op, mask)[:, 0], output[mask])
    other = torch.ones(2, 2, dtype=torch.bool)  # pooled: not the shape of the tokens
    assert len(as_rows(data, op, other)) == 6


def test_grouped_weight_by_hand() -> None:
    weight = torch.arange(24.0).reshape(4, 2, 3)
    assert grouped_weight(weight, 2).shape == (2, 2, 6)
    assert grouped_weight(weight, 2)[1, 0].tolist() == [12, 13, 14, 15, 16, 17]


class Computed(nn.Module):
    """Weights that depend on the input are no sites."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.embed = nn.Linear(4, 4), nn.Embedding(5, 4)

    def forward(self, x: Tensor, i: Tensor) -> Tensor:
        dynamic = self.a.weight * x.mean()
        return nn.functional.linear(self.embed(i), dynamic, self.a.bias) + self.a(x)


def test_only_stored_weights_count() -> None:
    graph = graph_of(trained(Computed()), random(4, 4), torch.tensor([0, 1, 2, 3]))
    ops = weighted_ops(graph.module)
    assert [(op.kind, str(op.weight.target)) for op in ops] == [
        ("embedding", "embed.weight"),
        ("linear", "a.weight"),
    ]
