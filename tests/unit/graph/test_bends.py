"""Who sees a value: a ReLU alone, with or without a ceiling, or anything else."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tersor.graph.bends import ceiling_behind
from tersor.graph.operators import weighted_ops
from tests.unit.capturing import graph_of, random

F = nn.functional


class Net(nn.Module):
    def __init__(self, behind: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.behind = nn.Conv2d(2, 3, 1), behind

    def forward(self, x: Tensor) -> Tensor:
        return self.behind(self.conv(x))


@pytest.mark.parametrize(
    ("behind", "wanted"),
    [
        (lambda y: y.relu(), math.inf),
        (F.relu6, 6.0),
        (lambda y: F.hardtanh(y, 0.0, 2.0), 2.0),
        (lambda y: y.clamp(min=0.0), math.inf),
        (lambda y: y.clamp(0.0, 3.0), 3.0),
        (lambda y: F.max_pool2d(y, 2).flatten(1).relu(), math.inf),
        (lambda y: y[:, :1].sum() + y.relu(), None),
        (lambda y: y.relu() + F.relu6(y), None),
        (lambda y: F.hardtanh(y, -1.0, 1.0), None),
        (lambda y: y.clamp(max=1.0), None),
        (lambda y: F.avg_pool2d(y, 2).relu(), None),
        (lambda y: y, None),
    ],
)
def test_what_a_value_is_seen_through(
    behind: Callable[[Tensor], Tensor], wanted: float | None
) -> None:
    graph = graph_of(Net(behind).eval(), random(2, 2, 4, 4))
    (op,) = weighted_ops(graph.module)
    assert ceiling_behind(op.node) == wanted


def test_several_relus_are_one() -> None:
    graph = graph_of(
        Net(lambda y: torch.cat([y.relu(), y.relu() * 2], 1)).eval(), random(2, 2, 4, 4)
    )
    (op,) = weighted_ops(graph.module)
    assert ceiling_behind(op.node) == math.inf
