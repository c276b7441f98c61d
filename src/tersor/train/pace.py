"""How long steps take, and what part of that is ours: clocks of the host, nothing waits for a device."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class Pace:
    """Times between steps, and inside of hooks."""

    clock: Callable[[], float]
    _last: float | None = None
    _total: float = 0.0
    _inside: float = 0.0
    _pending: float = field(default=0.0, repr=False)  # of the step that is running

    def tick(self) -> None:
        """The optimizer has made a step."""
        now = self.clock()
        if self._last is not None:  # what came before the first one is set-up
            self._total += now - self._last
            self._inside += self._pending
        self._last, self._pending = now, 0.0

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Time in here is ours."""
        start = self.clock()
        try:
            yield
        finally:
            self._pending += self.clock() - start

    def share(self) -> float:
        """Share of the time between steps that was spent in hooks; 0 before two steps."""
        return self._inside / self._total if self._total > 0 else 0.0
