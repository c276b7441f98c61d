"""Calls that read their own time, off a device's clock: on a GPU that of two events on its stream."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class SelfTimed(Protocol):
    """A callable whose work is done elsewhere, where its time is better read than here."""

    def __call__(self) -> object:
        """One call; returns when its work is done."""
        ...

    def timed_ms(self) -> float:
        """One call, and the milliseconds that the device took for it."""
        ...


def call_of(executable: Any, inputs: Mapping[str, Any]) -> Callable[[], object]:
    """One call of a build; where inputs can lie on its device they do, and the call times itself."""
    if getattr(executable, "is_resident", False):
        found: SelfTimed = executable.resident(inputs)
        return found
    return lambda: executable.run(inputs)


class InTurn:
    """Several such calls as one, one after the other."""

    def __init__(self, calls: Sequence[SelfTimed]) -> None:
        self._calls = tuple(calls)

    def __call__(self) -> object:
        """All of them."""
        return [call() for call in self._calls]

    def timed_ms(self) -> float:
        """The sum of their times."""
        return sum(call.timed_ms() for call in self._calls)
