"""Messages between the ranks of one run, over a gloo group on the CPU.

Every message goes to or comes from rank 0, so that a rank that is gone can be named: of a collective
over all ranks only its failure is known. A message is its length, a JSON header and the tensors that
the header lists, as bytes; no pickle.
"""

import json
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from tersor.core.errors import RankError

Kind = Literal["data", "ready", "beat", "call", "stop"]
_FAREWELL = timedelta(seconds=5)  # for a last word that the other one may not be waiting for
_DTYPES = {
    str(t): t
    for t in (
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32,
        torch.int16, torch.int8, torch.uint8, torch.bool,
    )
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Message:
    """What one rank tells another: JSON values, and tensors by name."""

    kind: Kind
    body: Any = None
    tensors: Mapping[str, Tensor] = field(default_factory=dict)


class Links:
    """The connections of one rank.

    Args:
        group: A gloo group of all ranks.
        timeout_s: Seconds that a message may take.
    """

    def __init__(self, group: Any, timeout_s: float) -> None:
        self.group, self.timeout_s = group, timeout_s
        self.rank, self.world = dist.get_rank(group), dist.get_world_size(group)
        self.step = "the start"  # what is being done, for errors
        self.are_listening = False  # whether the others wait for rank 0, rather than it for them
        self._broken: set[int] = set()  # ranks with which a message was begun and not ended

    @property
    def peers(self) -> tuple[int, ...]:
        """The ranks with which this one talks."""
        return tuple(range(1, self.world)) if self.rank == 0 else (0,)

    def send(self, to: int, message: Message) -> None:
        """Send a message; returns when it is on its way.

        Raises:
            RankError: The other rank is gone or silent.
        """
        pieces = _pieces(message)

        def talk() -> None:
            for piece in pieces:
                dist.send(piece, group=self.group, group_dst=to)

        self._with(to, talk)

    def receive(self, source: int) -> Message:
        """Wait for the next message of a rank.

        Raises:
            RankError: It is gone, silent, or says that it stops.
        """
        found: list[Message] = []
        self._with(source, lambda: found.append(self._read(source)))
        message = found[0]
        if message.kind == "stop":
            self._broken.add(source)  # it listens no longer
            raise RankError(str(message.body))
        return message

    def _read(self, source: int, patience: timedelta | None = None) -> Message:
        def take(tensor: Tensor) -> Tensor:
            work = dist.irecv(tensor, group=self.group, group_src=source)
            assert work is not None, "this rank is in the group"
            work.wait() if patience is None else work.wait(patience)
            return tensor

        length = int(take(torch.zeros(1, dtype=torch.int64)))
        header = json.loads(take(torch.empty(length, dtype=torch.uint8)).numpy().tobytes())
        tensors = {}
        for name, dtype, shape in header["tensors"]:
            tensor = torch.empty(shape, dtype=_DTYPES[dtype])
            if tensor.numel():
                take(tensor.view(-1).view(torch.uint8))
            tensors[name] = tensor
        return Message(header["kind"], header["body"], tensors)

    def stop(self, text: str) -> None:
        """Tell the ranks that can still be told that this one stops, as far as they listen.

        One that is busy for longer than a few seconds will see the closed connection.
        """
        pieces = _pieces(Message("stop", text))
        for peer in self.peers:
            if peer in self._broken:
                continue
            with suppress(RuntimeError):
                if (
                    self.rank == 0 and not self.are_listening
                ):  # it sends first, and can't be told before
                    self._read(peer, _FAREWELL)
                for work in [dist.isend(p, group=self.group, group_dst=peer) for p in pieces]:
                    if work is not None:
                        work.wait(_FAREWELL)

    def all_together(self, talk: Callable[[], None]) -> None:
        """Run a collective; one that fails can't say whose fault it was.

        Raises:
            RankError: A rank is gone or silent.
        """
        try:
            talk()
        except RuntimeError as error:
            self._broken |= set(self.peers)
            raise RankError(
                f"rank {self.rank} of {self.world}: a rank stopped while all exchanged tensors "
                f"({self.step}): {_first_line(error)}; {_WAY_OUT}"
            ) from error

    def _with(self, peer: int, talk: Callable[[], None]) -> None:
        self._broken.add(peer)
        begun = time.monotonic()
        try:
            talk()
        except RuntimeError as error:
            waited = time.monotonic() - begun
            is_silent = waited >= 0.9 * self.timeout_s
            what = (
                f"has not answered for {waited:.0f} s (ranks=tersor.Ranks(timeout_s=...) allows more)"
                if is_silent
                else f"is gone ({_first_line(error)})"
            )
            raise RankError(
                f"rank {self.rank} of {self.world}: rank {peer} {what} while {self.step}; {_WAY_OUT}"
            ) from error
        self._broken.discard(peer)


_WAY_OUT = (
    "see that rank's own output for the cause; what was finished is kept in the cache directory, "
    "and the same command goes on from there, on any number of ranks"
)


def _first_line(error: RuntimeError) -> str:
    text = str(error).strip().splitlines()
    return text[0][:160] if text else type(error).__name__


def _pieces(message: Message) -> list[Tensor]:
    """What is sent one after the other: the header's length, the header, each tensor's bytes."""
    flat = {name: t.detach().contiguous() for name, t in message.tensors.items()}
    listed = [[name, str(t.dtype), list(t.shape)] for name, t in flat.items()]
    header = {"kind": message.kind, "body": message.body, "tensors": listed}
    text = json.dumps(header, allow_nan=False).encode()
    return [
        torch.tensor([len(text)], dtype=torch.int64),
        torch.frombuffer(bytearray(text), dtype=torch.uint8),
        *(t.view(-1).view(torch.uint8) for t in flat.values() if t.numel()),
    ]
