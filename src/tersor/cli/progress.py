"""How far a long run is: bars with time left in a terminal, a line now and then elsewhere."""

import time
from collections.abc import Callable

from rich.console import Console

from tersor.cli.interrupts import check

LINE_SECONDS = 10.0  # between two plain lines of one stage


def make_progress(console: Console) -> "Bars | Lines":
    """Bars if the console is a terminal, plain lines if not."""
    return Bars(console) if console.is_terminal else Lines(console)


class Bars:
    """One bar a stage: name, steps, elapsed time and time left."""

    def __init__(self, console: Console) -> None:
        from rich import progress

        self._bars = progress.Progress(
            progress.TextColumn("{task.description}", markup=False),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TimeElapsedColumn(),
            progress.TextColumn("left"),
            progress.TimeRemainingColumn(),
            console=console,
        )
        self._task: progress.TaskID | None = None
        self._bars.start()

    def stage(self, name: str, total: int | None = None) -> None:
        """End the current bar and begin the next."""
        check()
        self._finish()
        self._task = self._bars.add_task(name, total=total)

    def advance(self, steps: int = 1) -> None:
        """Move the current bar."""
        check()
        if self._task is not None:
            self._bars.advance(self._task, steps)

    def note(self, text: str) -> None:
        """A line above the bars."""
        check()
        self._bars.console.print(text, markup=False)

    def close(self) -> None:
        """End the last bar; a second call does nothing."""
        self._finish()
        self._bars.stop()

    def _finish(self) -> None:
        if self._task is None:
            return
        task = self._bars.tasks[self._bars.task_ids.index(self._task)]
        done = task.total if task.total is not None else max(task.completed, 1)
        self._bars.update(self._task, total=done, completed=done)
        self._task = None


class Lines:
    """A line when a stage begins, and at most one every ten seconds while it lasts."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._clock = clock
        self._begun = clock()
        self._name = ""
        self._total: int | None = None
        self._done = 0
        self._stage_begun = self._said = self._begun

    def stage(self, name: str, total: int | None = None) -> None:
        """Say the stage's name and the time since the start."""
        check()
        self._name, self._total, self._done = name, total, 0
        self._stage_begun = self._said = self._clock()
        steps = "" if total is None else f" ({total} steps)"
        self._say(f"{name}{steps}")

    def advance(self, steps: int = 1) -> None:
        """Count, and now and then say how many and how long it will take."""
        check()
        self._done += steps
        now = self._clock()
        if now - self._said < LINE_SECONDS:
            return
        self._said = now
        if self._total is None:
            self._say(f"{self._name}: {self._done}")
            return
        left = (now - self._stage_begun) / self._done * max(self._total - self._done, 0)
        self._say(f"{self._name}: {self._done}/{self._total}, {left:.0f} s left")

    def note(self, text: str) -> None:
        """A line of its own."""
        check()
        self._say(f"  {text}")

    def close(self) -> None:
        """Nothing to end."""

    def _say(self, text: str) -> None:
        elapsed = self._clock() - self._begun
        self._console.print(f"[{elapsed:7.1f} s] {text}", markup=False, soft_wrap=True)
