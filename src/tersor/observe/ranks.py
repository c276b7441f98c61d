"""The ranks of one run: who takes which share, and how all come to hold the same.

Statistics and errors are computed by all ranks, each its share; what must not be done twice at a time
(measuring, above all) or must be one (a plan) is done by rank 0 alone, while the others wait. What all
shall hold is made on rank 0 and sent out from there, so that it is equal to the bit.

Without a process group there is one rank: every function here then gives back what it was given.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from tersor.core.errors import ConfigError, RankError
from tersor.core.jsonable import from_json, to_json
from tersor.core.ranks import Ranks
from tersor.observe.links import Links, Message

RecordT = TypeVar("RecordT")
ItemT = TypeVar("ItemT")
Serve = Callable[[Any, Mapping[str, Tensor]], None]  # takes a record's JSON, and tensors
_BEAT_SECONDS = 1.0  # between two signs of life of a rank for which others wait


@dataclass(frozen=True, slots=True)
class Parcel(Generic[RecordT]):
    """What goes from one rank to others: a record, and tensors by name."""

    record: RecordT
    tensors: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What must be the same on all ranks, by name, as texts that people can compare."""

    facts: Mapping[str, str]


class RankGroup:
    """This process among the ranks of a run.

    Attributes:
        rank, world: Its number from 0, and how many there are. They stay when the run is over.
    """

    def __init__(self, links: Links | None = None) -> None:
        self._links = links
        self.rank = 0 if links is None else links.rank
        self.world = 1 if links is None else links.world
        self._last_beat = 0.0

    @property
    def is_shared(self) -> bool:
        """Whether other ranks are there to work with."""
        return self._links is not None

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that measures, decides and writes."""
        return self.rank == 0

    def share(self, items: Sequence[ItemT]) -> list[ItemT]:
        """Every so many-th item: neighbours, which cost alike, go to different ranks."""
        return list(items[self.rank :: self.world]) if self.is_shared else list(items)

    def block(self, count: int) -> range:
        """Neighbouring places of ``count``: the blocks of all ranks in order are all of them."""
        if not self.is_shared:
            return range(count)
        return range(count * self.rank // self.world, count * (self.rank + 1) // self.world)

    def first(
        self,
        cls: type[RecordT],
        make: Callable[[], Parcel[RecordT]],
        step: str,
        serve: Mapping[str, Serve] | None = None,
    ) -> Parcel[RecordT]:
        """What rank 0 makes, on all ranks; the others wait as long as it gives signs of life.

        The record is on all of them as it is read from JSON, on rank 0 too.

        Args:
            cls: Of the record.
            make: Called on rank 0 only; calls nothing that all ranks must call.
            step: What is being done, for errors.
            serve: What the other ranks do when ``make`` asks for it by ``together``, by name.

        Raises:
            RankError: Rank 0 is gone or silent; on rank 0: another one.
        """
        if self._links is None:
            return make()
        self._links.step = step
        if self.rank:
            # It is heard before anything is sent to it: one that has failed is not waiting.
            self._links.send(0, Message("ready"))
            message = _wait(self._links, serve or {})
            return Parcel(from_json(cls, message.body, step), message.tensors)
        _from_all(self._links)
        self._links.are_listening = True
        made = make()
        body = to_json(made.record)
        for peer in self._links.peers:
            self._links.send(peer, Message("data", body, made.tensors))
        self._links.are_listening = False
        return Parcel(from_json(cls, body, step), made.tensors)

    @contextmanager
    def together(self, name: str, parcel: Parcel[Any]) -> Iterator[None]:
        """What the ranks that wait for this one do along with it, called inside of ``first``'s ``make``.

        Args:
            name: Of what ``first`` was given to ``serve``.
            parcel: What they need for it.
        """
        if self._links is None:
            yield
            return
        body = {"name": name, "record": to_json(parcel.record)}
        for peer in self._links.peers:
            self._links.send(peer, Message("call", body, parcel.tensors))
        self._links.are_listening = False
        yield
        self._links.are_listening = True

    def beat(self) -> None:
        """A sign of life, where others wait for this rank; called often, sent once a second."""
        now = time.monotonic()
        links = self._links
        if links is None or not links.are_listening or now < self._last_beat + _BEAT_SECONDS:
            return
        self._last_beat = now
        for peer in links.peers:
            links.send(peer, Message("beat"))

    def collect(
        self, cls: type[RecordT], own: Parcel[RecordT], step: str
    ) -> tuple[Parcel[RecordT], ...]:
        """What each rank has, by rank, on rank 0; nothing elsewhere.

        Raises:
            RankError: A rank is gone or silent.
        """
        if self._links is None:
            return (own,)
        self._links.step = step
        if self.rank:
            self._links.send(0, Message("data", to_json(own.record), own.tensors))
            return ()
        messages = _from_all(self._links)
        return (own, *(Parcel(from_json(cls, m.body, step), m.tensors) for m in messages))

    def sum_(self, tensors: Sequence[Tensor], step: str) -> None:
        """Sum tensors over all ranks, in their own type; rank 0 then holds the sums.

        Args:
            tensors: Changed. As many, of the same shapes and type, on every rank.
            step: What is being done, for errors.

        Raises:
            RankError: A rank is gone, silent, or has other shapes.
        """
        if self._links is None:
            return
        shapes = {str(i): f"{t.dtype} {tuple(t.shape)}" for i, t in enumerate(tensors)}
        self.agree(shapes, step)  # a rank that is gone can be named here, and not below
        links = self._links

        def talk() -> None:
            for tensor in tensors:
                dist.reduce(tensor, group=links.group, group_dst=0)

        links.all_together(talk)

    def mean_(self, tensors: Sequence[Tensor]) -> None:
        """Average tensors over all ranks, on all ranks.

        Args:
            tensors: Changed. Of one type; as many, of the same shapes, on every rank.

        Raises:
            RankError: A rank is gone or silent.
        """
        if self._links is None:
            return
        flat = torch.cat([t.reshape(-1) for t in tensors])
        links = self._links
        links.all_together(lambda: dist.all_reduce(flat, group=links.group))
        flat /= self.world
        for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(part.reshape(tensor.shape))

    def of_first(self, value: float) -> float:
        """Rank 0's number, on all ranks: what they decide by must be one."""
        if self._links is None:
            return value
        links, found = self._links, torch.tensor(value, dtype=torch.float64)
        links.all_together(lambda: dist.broadcast(found, group=links.group, group_src=0))
        return float(found)

    def follow(self, values: Iterator[float]) -> Iterator[float]:
        """Rank 0's finite numbers, one after the other as they come, on all ranks."""
        if self._links is None:
            yield from values
            return
        while True:
            own = next(values, math.inf) if self.is_first else 0.0
            now = self.of_first(own)
            if now == math.inf:
                return
            yield now

    def agree(self, facts: Mapping[str, str], step: str, advice: str = "") -> None:
        """Make sure that all ranks work on the same.

        Args:
            facts: What is compared, by name.
            step: What is being done, for errors.
            advice: What the caller can do where they differ.

        Raises:
            RankError: On every rank; says which one differs from rank 0 in what.
        """
        parcels = self.collect(Facts, Parcel(Facts(facts=dict(facts))), step)
        self.first(Facts, lambda: _compared(parcels, step, advice), step)

    def leave(self, error: BaseException | None = None) -> None:
        """The run is over: tell the others why, where it failed here, and work alone from now on."""
        links, self._links = self._links, None
        if links is None:
            return
        if error is not None:
            links.stop(_reason(links, error))
        dist.destroy_process_group(links.group)


def _wait(links: Links, serve: Mapping[str, Serve]) -> Message:
    """What rank 0 sends, after its signs of life and whatever it wants done along with it."""
    while (message := links.receive(0)).kind != "data":
        if message.kind == "call":
            serve[message.body["name"]](message.body["record"], message.tensors)
    return message


def _from_all(links: Links) -> list[Message]:
    """A message from each other rank. Where one is gone, the others are heard nevertheless.

    A rank that is sending could not be told why all stop.
    """
    found, errors = [], []
    for peer in links.peers:
        try:
            found.append(links.receive(peer))
        except RankError as error:
            errors.append(error)
    if errors:
        raise errors[0]
    return found


def _compared(parcels: Sequence[Parcel[Facts]], step: str, advice: str) -> Parcel[Facts]:
    first = parcels[0].record.facts
    for rank, parcel in enumerate(parcels):
        other = parcel.record.facts
        names = [n for n in (*first, *(n for n in other if n not in first))
                 if first.get(n) != other.get(n)]  # fmt: skip
        if names:
            shown = "; ".join(f"{n}: {other.get(n)}, on rank 0: {first.get(n)}" for n in names)
            raise RankError(
                f"rank {rank} of {len(parcels)} differs from rank 0 ({step}): {shown}"
                + (f"; {advice}" if advice else "")
            )
    return Parcel(Facts(facts={}))


def _reason(links: Links, error: BaseException) -> str:
    """What the other ranks are told: an error that already names a rank is passed on as it is."""
    if isinstance(error, RankError):
        return str(error)
    text = f": {error}" if str(error) else ""
    return f"rank {links.rank} of {links.world} stopped while {links.step}: {type(error).__name__}{text}"


ALONE = RankGroup()


@contextmanager
def joined(config: Ranks | None = None) -> Iterator[RankGroup]:
    """The ranks that share a run, which must all begin it; one rank where there is no process group.

    An error that leaves the block, an interruption too, is told to the other ranks, which then
    raise a ``RankError`` with its text.

    Raises:
        ConfigError: The process was started by torchrun, and no process group was opened.
        RankError: Some ranks did not come.
    """
    config = config or Ranks()
    group = _join(config) if config.join and dist.is_available() else RankGroup()
    try:
        yield group
    except BaseException as error:
        group.leave(error)
        raise
    group.leave()


def _join(config: Ranks) -> RankGroup:
    if not dist.is_initialized():
        if dist.is_torchelastic_launched():
            raise ConfigError(
                "this process was started by torchrun, but there is no process group: call "
                "torch.distributed.init_process_group('gloo') first, to share the work with the other "
                "ranks, or pass ranks=tersor.Ranks(join=False), to work alone"
            )
        return RankGroup()
    if dist.get_world_size() == 1:
        return RankGroup()
    timeout = timedelta(seconds=config.timeout_s)
    try:
        group: Any = dist.new_group(backend="gloo", timeout=timeout)
        links = Links(group, config.timeout_s)
    except RuntimeError as error:
        raise RankError(
            f"rank {dist.get_rank()} of {dist.get_world_size()}: not all ranks came within "
            f"{config.timeout_s:g} s; every rank must make the same call, or this one pass "
            "ranks=tersor.Ranks(join=False)"
        ) from error
    return RankGroup(links)
