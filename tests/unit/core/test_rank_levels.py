"""Names of levels with a rank: read and written in one place, refused elsewhere."""

from dataclasses import dataclass

import pytest

from tersor.core.errors import ConfigError
from tersor.core.jsonable import dumps, from_json
from tersor.core.rank_levels import RankLevel, format_of, is_eight_bit, rank_of
from tersor.core.records import Level


@dataclass(frozen=True, kw_only=True)
class Holder:
    level: Level


@pytest.mark.parametrize(("form", "rank"), [("f32", 1), ("int8", 640)])
def test_names_are_read_as_they_were_written(form: str, rank: int) -> None:
    level = RankLevel.of(form, rank)  # type: ignore[arg-type]
    assert level == f"{form}_rank{rank}"
    assert {level: 1}[f"{form}_rank{rank}"] == 1  # keys of records are plain text
    assert (format_of(level), rank_of(level), is_eight_bit(level)) == (form, rank, form == "int8")


def test_levels_without_a_rank() -> None:
    assert [rank_of(v) for v in ("f32", "int8", "int8_weight", 64, None)] == [0] * 5
    assert [is_eight_bit(v) for v in ("int8", "int8_weight", "f32", 8, None)] == [
        True,
        *[False] * 4,
    ]
    assert [format_of(v) for v in ("bf16", "int8_weight")] == ["bf16", "int8_weight"]


@pytest.mark.parametrize("text", ["rank8", "int8_rank0", "int4_rank8", "f32_rank8 ", "int8_rank٣"])
def test_other_names_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="wanted a format and a rank such as f32_rank64"):
        RankLevel(text)
    assert rank_of(text) == 0


def test_records_hold_them() -> None:
    for level in ("f32", RankLevel("int8_rank64"), 12):
        kept = Holder(level=level)  # type: ignore[arg-type]
        found = from_json(Holder, {"level": level})
        assert found == kept
        assert type(found.level) is type(level)
        assert dumps(found) == dumps(kept)
    with pytest.raises(ConfigError, match=r"Holder\.level: found 'int7'"):
        from_json(Holder, {"level": "int7"})
