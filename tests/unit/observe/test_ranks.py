"""Real processes that work together, and what the others say when one does not."""

import signal

import pytest
import torch

from tersor.core.errors import ConfigError
from tersor.core.ranks import Ranks
from tersor.observe.links import Links
from tersor.observe.ranks import ALONE, Parcel, RankGroup, joined
from tests.ranks import Ended, start_ranks, wait_for
from tests.unit.observe.rank_program import Note

PROGRAM = ("-m", "tests.unit.observe.rank_program")


def run(world: int, *words: str) -> list[Ended]:
    return wait_for(start_ranks(world, *PROGRAM, *words), 110)


def test_one_rank_gives_back_what_it_was_given() -> None:
    with joined() as ranks:
        assert (ranks.rank, ranks.world, ranks.is_shared, ranks.is_first) == (0, 1, False, True)
    note = Parcel(Note(text="x"), {"t": torch.ones(2)})
    assert ALONE.first(Note, lambda: note, "step") is note
    assert ALONE.collect(Note, note, "step") == (note,)
    assert ALONE.share([3, 4, 5]) == [3, 4, 5]
    assert list(ALONE.block(3)) == [0, 1, 2]
    total = torch.ones(2)
    ALONE.sum_([total], "step")
    ALONE.agree({"a": "b"}, "step")
    ALONE.beat()
    assert total.tolist() == [1, 1]
    with pytest.raises(ValueError, match="as it was"), joined():
        raise ValueError("as it was")


def one_of_four(rank: int) -> RankGroup:
    links = Links.__new__(Links)  # no connection is needed to share things out
    links.rank, links.world = rank, 4
    return RankGroup(links)


@pytest.mark.parametrize("count", [0, 1, 3, 4, 5, 17])
def test_shares_and_blocks_are_all_of_it(count: int) -> None:
    groups = [one_of_four(rank) for rank in range(4)]
    shares = [group.share(list(range(count))) for group in groups]
    assert sorted(i for share in shares for i in share) == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    blocks = [list(group.block(count)) for group in groups]
    assert [i for block in blocks for i in block] == list(range(count))
    assert max(map(len, blocks)) - min(map(len, blocks)) <= 1


def test_under_torchrun_a_process_group_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")
    with pytest.raises(ConfigError, match=r"init_process_group\('gloo'\) first"), joined():
        pass
    with joined(Ranks(join=False)) as ranks:
        assert ranks.world == 1


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("inf"), float("nan")])
def test_a_time_is_positive(seconds: float) -> None:
    with pytest.raises(ConfigError, match="timeout_s"):
        Ranks(timeout_s=seconds)


def test_three_ranks_exchange() -> None:
    ended = run(3, "exchange")
    assert [e.code for e in ended] == [0, 0, 0], ended[0].errors
    for turn in range(2):
        said = [e.said[turn] for e in ended]
        assert [s["rank"] for s in said] == [0, 1, 2]
        assert [s["world"] for s in said] == [3, 3, 3]
        assert [s["share"] for s in said] == [[0, 3, 6], [1, 4], [2, 5]]
        assert [i for s in said for i in s["block"]] == list(range(7))
        first = said[0]
        assert first["texts"] == ["of 0", "of 1", "of 2"]
        assert first["half"] == [[0.0, 0.0], [1.0, 1.0], [2.0, 2.0]]
        assert first["flags"] == [[True, False], [True, True], [True, True]]
        assert first["shapes"] == [[0, 4]] * 3
        assert first["one"] == [turn, turn + 1, turn + 2]
        assert first["turned"] == [[[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]] * 3
        assert first["count"] == 3
        assert said[1]["texts"] == said[2]["texts"] == []
        assert [s["calls"] for s in said] == [[0], [], []]
        called = [[{"text": "join", "number": n}, [2.0 * n, 2.0 * n]] for n in (3.0, 4.0)]
        assert [s["along"] for s in said] == [called] * 3
        assert [s["means"] for s in said] == [[[1.0, 1.0], [[float(turn)]]]] * 3
        assert [s["followed"] for s in said] == [[0.1, 0.7]] * 3
        assert [s["of_first"] for s in said] == [5.5] * 3
        text, number, total = first["shared"]
        assert (text, number) == ("all", float("inf"))
        assert torch.allclose(torch.tensor(total), torch.full((2, 3), 0.6), rtol=1e-12)
        assert said[0]["shared"] == said[1]["shared"] == said[2]["shared"]


def test_ranks_that_differ_or_fail_are_named_on_all_ranks() -> None:
    ended = run(3, "disagree")
    assert [e.code for e in ended] == [0, 0, 0], ended[0].errors
    differs, fails, first_fails, shapes, well = zip(*(e.said for e in ended), strict=True)
    for error in differs:
        assert error["type"] == "RankError"
        assert (
            "rank 2 of 3 differs from rank 0 (open): seed: 1, on rank 0: 0; make" in error["text"]
        )
    assert [e["type"] for e in fails] == ["RankError", "RankError", "ValueError"]
    for error in fails[:2]:
        assert error["text"].startswith("rank 2 of 3 stopped while ")
        assert error["text"].endswith("ValueError: no such thing")
    assert [e["type"] for e in first_fails] == ["ValueError", "RankError", "RankError"]
    for error in first_fails[1:]:
        assert error["text"] == "rank 0 of 3 stopped while price: ValueError: broken"
    for error in shapes:
        assert "rank 1 of 3 differs from rank 0 (sums): 0: torch.float32 (3,)" in error["text"]
    assert well == ({}, {}, {})


@pytest.mark.parametrize("who", [0, 1])
def test_a_rank_that_is_killed_is_named_at_once(who: int) -> None:
    ended = run(3, "dies", str(who))
    assert ended[who].code == -signal.SIGKILL
    others = [e for rank, e in enumerate(ended) if rank != who]
    for other in others:
        assert other.said["type"] == "RankError", other.errors
        assert f"rank {who} is gone" in other.said["text"]
        assert "goes on from there" in other.said["text"]
        assert other.said["seconds"] < 10  # of the 20 that they would wait


@pytest.mark.slow
def test_a_silent_rank_is_given_up() -> None:
    first, _ = run(2, "silent")
    assert first.said["type"] == "RankError"
    assert "rank 1 has not answered for 2 s" in first.said["text"]
    assert "timeout_s" in first.said["text"]
    assert first.said["seconds"] < 6


@pytest.mark.slow
def test_a_rank_that_never_makes_the_call_is_waited_for_as_long_as_said() -> None:
    first, _ = run(2, "absent")
    assert first.said["type"] == "RankError"
    assert "not all ranks came within 2 s" in first.said["text"]
    assert first.said["seconds"] < 5
