"""How long steps take, and what part of that is ours: clocks of the host, nothing waits for a device."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median

_RECENT = 64  # steps whose median is the pace


@dataclass
class Pace:
    """Times between steps, and inside of hooks.

    Attributes:
        first_s: From the making to the first step: what compiling takes, where the model is compiled.
    """

    clock: Callable[[], float]
    first_s: float = 0.0
    _made: float = field(init=False, repr=False)
    _last: float | None = None
    _total: float = 0.0
    _inside: float = 0.0
    _pending: float = field(default=0.0, repr=False)  # of the step that is running
    _recent: list[float] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        self._made = self.clock()

    def tick(self) -> None:
        """The optimizer has made a step."""
        now = self.clock()
        if self._last is None:  # what came before the first one is set-up
            self.first_s = now - self._made
        else:
            self._total += now - self._last
            self._inside += self._pending
            self._recent = [*self._recent[1 - _RECENT :], now - self._last]
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

    def saves(self, steps: int, share: float) -> float:
        """Seconds that steps which take a share of the time save, less what compiling again takes.

        Args:
            steps: That are left.
            share: Of the time of a step that is left after the cut.
        """
        step = median(self._recent) if self._recent else 0.0
        return steps * step * (1 - share) - self.first_s
