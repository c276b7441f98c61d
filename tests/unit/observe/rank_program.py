"""What each rank of ``test_ranks`` runs: one task, whose findings it prints as JSON."""

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from tersor.core.errors import RankError
from tersor.core.ranks import Ranks
from tersor.observe.ranks import Parcel, RankGroup, joined


@dataclass(frozen=True, kw_only=True)
class Note:
    text: str
    number: float = 0.0


def exchange() -> Any:
    """Everything that ranks can do together, twice: a second run opens links of its own."""
    found: list[Any] = []
    for turn in range(2):
        with joined() as ranks:
            found.append(_exchanged(ranks, turn))
        assert not ranks.is_shared
        assert ranks.share([1, 2, 3]) == [1, 2, 3]
    return found


def _exchanged(ranks: RankGroup, turn: int) -> Any:
    rank = ranks.rank
    sums = [torch.full((2, 3), 0.1 * (rank + 1), dtype=torch.float64), torch.tensor([rank])]
    ranks.sum_(sums, "sums")
    tensors = {
        "half": torch.full((2,), float(rank), dtype=torch.bfloat16),
        "flags": torch.tensor([True, rank > 0]),
        "nothing": torch.zeros(0, 4),
        "one": torch.tensor(rank + turn),
        "turned": torch.arange(6.0).reshape(2, 3).t(),
    }
    means = [torch.full((2,), float(rank)), torch.tensor([[float(rank * turn)]])]
    ranks.mean_(means)
    followed = list(ranks.follow(iter([0.1 + rank, 0.7] if rank < 2 else [])))
    parts = ranks.collect(Note, Parcel(Note(text=f"of {rank}"), tensors), "collect")
    calls = []

    def make() -> Parcel[Note]:
        calls.append(rank)
        for _ in range(3):
            ranks.beat()
            time.sleep(0.6)
        return Parcel(Note(text="all", number=float("inf")), {"sum": sums[0]})

    along: list[Any] = []

    def join(record: Any, tensors: Mapping[str, torch.Tensor]) -> None:
        mean = [tensors["x"] * (rank + 1)]
        ranks.mean_(mean)
        along.append([record, mean[0].tolist()])

    def make_together() -> Parcel[Note]:
        for number in (3.0, 4.0):
            parcel = Parcel(Note(text="join", number=number), {"x": torch.ones(2) * number})
            with ranks.together("join", parcel):
                join({"text": "join", "number": number}, parcel.tensors)
            ranks.beat()
        return make()

    shared = ranks.first(Note, make_together, "first", {"join": join})
    ranks.agree({"model": "same"}, "agree")
    return {
        "rank": rank,
        "world": ranks.world,
        "share": ranks.share(list(range(7))),
        "block": list(ranks.block(7)),
        "texts": [p.record.text for p in parts],
        "half": [p.tensors["half"].float().tolist() for p in parts],
        "flags": [p.tensors["flags"].tolist() for p in parts],
        "shapes": [list(p.tensors["nothing"].shape) for p in parts],
        "one": [int(p.tensors["one"]) for p in parts],
        "turned": [p.tensors["turned"].tolist() for p in parts],
        "calls": calls,
        "along": along,
        "shared": [shared.record.text, shared.record.number, shared.tensors["sum"].tolist()],
        "means": [m.tolist() for m in means],
        "followed": followed,
        "of_first": ranks.of_first(5.5 - rank),
        "count": int(sums[1]) if rank == 0 else None,
    }


def _message(run: Callable[[RankGroup], object], timeout_s: float = 20.0) -> dict[str, Any]:
    """What a run raised, and how long it took."""
    begun = time.monotonic()
    try:
        with joined(Ranks(timeout_s=timeout_s)) as ranks:
            run(ranks)
    except (RankError, ValueError) as error:
        took = time.monotonic() - begun
        return {"type": type(error).__name__, "text": str(error), "seconds": took}
    return {}


def disagree() -> Any:
    """One rank differs, then one fails, then all is well: the same processes can go on."""

    def differs(ranks: RankGroup) -> None:
        facts = {"model": "a", "seed": str(ranks.rank // 2), "data": "d"}
        ranks.agree(facts, "open", "make them equal")

    def fails(ranks: RankGroup) -> None:
        if ranks.rank == 2:
            raise ValueError("no such thing")
        ranks.collect(Note, Parcel(Note(text="")), "work")
        ranks.first(Note, lambda: Parcel(Note(text="")), "work")

    def first_fails(ranks: RankGroup) -> None:
        def make() -> Parcel[Note]:
            raise ValueError("broken")

        ranks.first(Note, make, "price")

    def shapes(ranks: RankGroup) -> None:
        ranks.sum_([torch.zeros(2 + ranks.rank)], "sums")

    runs = (differs, fails, first_fails, shapes, lambda _: None)
    return [_message(run) for run in runs]


def dies() -> Any:
    """The rank that is named ends without a word, while the others wait for it."""
    who = int(sys.argv[2])

    def run(ranks: RankGroup) -> None:
        ranks.collect(Note, Parcel(Note(text="")), "begin")
        if ranks.rank == who:
            os.kill(os.getpid(), signal.SIGKILL)
        ranks.collect(Note, Parcel(Note(text="")), "work")
        ranks.first(Note, lambda: Parcel(Note(text="")), "work")

    return _message(run)


def silent() -> Any:
    """One rank sleeps for longer than the others wait."""

    def run(ranks: RankGroup) -> None:
        if ranks.rank == 1:
            time.sleep(5)
            os._exit(7)
        ranks.collect(Note, Parcel(Note(text="")), "work")

    return _message(run, timeout_s=2.0)


def absent() -> Any:
    """One rank never makes the call."""
    if dist.get_rank() == 1:
        time.sleep(5)
        os._exit(7)
    return _message(lambda _: None, timeout_s=2.0)


if __name__ == "__main__":
    dist.init_process_group("gloo", timeout=timedelta(seconds=100))
    tasks = {f.__name__: f for f in (exchange, disagree, dies, silent, absent)}
    print(json.dumps(tasks[sys.argv[1]]()), flush=True)  # noqa: T201
    os._exit(0)  # some tasks leave the default group without one of its ranks
