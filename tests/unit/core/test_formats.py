"""Where a level stands among those that a price knows."""

import pytest

from tersor.core.errors import ConfigError
from tersor.core.formats import Level, place_of
from tersor.core.rank_levels import RankLevel
from tersor.core.records import Term


@pytest.mark.parametrize(
    ("level", "levels", "place"),
    [
        ("int8", ("bf16", "int8"), 1),
        (RankLevel("int8_rank16"), ("bf16", "int8"), 1),
        (RankLevel("f32_rank16"), ("bf16", "int8"), 0),
        (RankLevel("f32_rank16"), (8, "int8", "int8_weight"), 2),
        (RankLevel("f32_rank16"), ("bf16", RankLevel("f32_rank16"), "int8"), 1),
        (RankLevel("int8_rank16"), ("bf16", RankLevel("int8_rank8")), None),
        (RankLevel("int8_rank16"), ("bf16",), None),
        ("fp8", ("bf16", "int8"), None),
        (None, ("bf16",), None),
    ],
)
def test_whole_layers_stand_for_ranks_that_are_not_listed(
    level: Level | None, levels: tuple[Level, ...], place: int | None
) -> None:
    assert place_of(level, levels) == place


def test_a_term_that_knows_no_ranks_of_a_layer_beside_it() -> None:
    rank = RankLevel("f32_rank16")
    term = Term(
        name="op",
        sites=("op", "next"),
        levels=(("bf16", rank, "int8"), ("bf16", "int8")),
        values=(0.0, 1.0, 2.0, 3.0, 4.0, 5.0),
    )
    assert term.at({"op": rank, "next": rank}) == 2.0
    assert term.at({"op": rank, "next": RankLevel("int8_rank16")}) == 3.0
    with pytest.raises(ConfigError, match="has no price"):
        term.at({"op": "fp8", "next": "bf16"})
