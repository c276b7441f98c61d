"""The two trained networks as graphs, captured once."""

import pytest

from tersor.graph.contracts import Graph
from tests.data.zoo import load_lenet5, load_resnet20
from tests.unit.capturing import graph_of, random


@pytest.fixture(scope="session")
def resnet20_graph() -> Graph:
    return graph_of(load_resnet20(), random(4, 1, 28, 28))


@pytest.fixture(scope="session")
def lenet5_graph() -> Graph:
    return graph_of(load_lenet5(), random(4, 1, 28, 28))
