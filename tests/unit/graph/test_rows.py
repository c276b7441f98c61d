"""Gathered rows are the rows of the whole unfolded input."""

import pytest
import torch
from torch import nn

from tersor.capture.module import capture
from tersor.capture.samples import Samples, flatten_item
from tersor.graph.edit import run_all
from tersor.graph.operators import as_rows, row_count, weighted_ops

CASES = {
    "conv1d": (nn.Conv1d(4, 6, 3, stride=2, padding=1), (4, 11)),
    "conv2d": (nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)), (4, 9, 8)),
    "grouped": (nn.Conv2d(4, 8, 3, padding="same", groups=2), (4, 7, 6)),
    "depthwise": (nn.Conv2d(4, 4, 3, groups=4), (4, 7, 6)),
    "conv3d": (nn.Conv3d(2, 3, 2, stride=2), (2, 5, 4, 6)),
    "linear": (nn.Linear(5, 3), (7, 5)),
}


@pytest.mark.parametrize("name", CASES)
def test_gathered_rows_are_rows_of_the_whole(name: str) -> None:
    module, shape = CASES[name]
    call, flat = flatten_item(torch.randn(3, *shape), "example")
    graph = capture(module, Samples(call, flat)).graph
    (op,) = weighted_ops(graph.module)
    data = run_all(graph.module, flat)[op.data.name]
    whole = as_rows(data, op)
    assert row_count(data, op) == len(whole)
    keep = torch.randperm(len(whole))[: len(whole) // 2 + 1].sort().values
    assert torch.equal(as_rows(data, op, None, keep), whole[keep])
