"""Which formats beside a layer a term of what changes format has: as many as can be written out."""

from unittest.mock import Mock

import pytest

from tersor.core.rank_levels import RankLevel
from tersor.core.records import Level
from tersor.price.costs import WidthCosts
from tersor.price.facts import WidthFacts
from tersor.price.node_costs import NodeCost

FORMATS: tuple[Level, ...] = ("bf16", "int8", "int8_weight")
RANKS: tuple[Level, ...] = (*FORMATS, *(RankLevel(f"f32_rank{n}") for n in (8, 16, 24, 32)),
                            *(RankLevel(f"int8_rank{n}") for n in (8, 16, 24, 32)))  # fmt: skip


@pytest.mark.parametrize(
    ("formats", "counts", "wanted"),
    [
        (FORMATS, 8, ["own", "next", "query", "key"]),  # 64 * 3 ** 4
        (RANKS, 8, ["own", "next"]),  # 64 * 11 ** 3 would be too many
        (RANKS, 2, ["own", "next", "query", "key"]),  # 4 * 11 ** 4
        (RANKS, 6, ["own", "next", "query"]),
    ],
)
def test_layers_beside_it_are_listed_while_they_can_be(
    formats: tuple[Level, ...], counts: int, wanted: list[str]
) -> None:
    costs = Mock(WidthCosts)
    costs.facts = Mock(WidthFacts)
    costs.facts.widths.return_value = ("heads", "size")
    costs.facts.levels = {w: tuple(range(counts)) for w in ("heads", "size")}
    cost = Mock(NodeCost)
    cost.nodes, cost.rivals = ("op",), ("query", "key")
    cost.choices.side_effect = lambda others: dict.fromkeys(("own", *others), formats)
    found = WidthCosts._few(costs, cost, "next")
    assert list(found) == wanted
    assert set(found.values()) == {formats}
    costs.facts.widths.assert_called_with(("op",), "out_elements")
