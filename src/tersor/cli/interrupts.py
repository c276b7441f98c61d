"""Ctrl-C that no library can swallow.

A KeyboardInterrupt is raised wherever the interpreter happens to be. In the middle of an export
that may be code which catches everything and logs it (torch's structured trace does), and the run
would go on as if nobody had asked. So it is noted, too, and the next step raises it again.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from tersor.core.progress import Progress


class Interruptible:
    """A progress that stops a run which has been interrupted."""

    def __init__(self, inner: Progress) -> None:
        self._inner = inner
        self._asked = False

    def ask(self, signum: int = signal.SIGINT, frame: FrameType | None = None) -> None:
        """Note it, and raise it at once; a signal handler.

        Raises:
            KeyboardInterrupt: Always.
        """
        del signum, frame
        self._asked = True
        raise KeyboardInterrupt

    def check(self) -> None:
        """Stop here if somebody has asked before.

        Raises:
            KeyboardInterrupt: Somebody has.
        """
        if self._asked:
            raise KeyboardInterrupt

    def stage(self, name: str, total: int | None = None) -> None:
        """Check, and pass it on."""
        self.check()
        self._inner.stage(name, total)

    def advance(self, steps: int = 1) -> None:
        """Check, and pass it on."""
        self.check()
        self._inner.advance(steps)

    def note(self, text: str) -> None:
        """Check, and pass it on."""
        self.check()
        self._inner.note(text)

    def close(self) -> None:
        """Pass it on."""
        self._inner.close()


@contextmanager
def interruptible(inner: Progress) -> Iterator[Interruptible]:
    """A progress that carries Ctrl-C, for as long as the block lasts; then closed.

    Elsewhere than in the main thread, and where Ctrl-C is not Python's own, signals stay as they
    are.
    """
    progress = Interruptible(inner)
    is_main = threading.current_thread() is threading.main_thread()
    is_ours = is_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if is_ours:
        signal.signal(signal.SIGINT, progress.ask)
    try:
        yield progress
        progress.check()
    finally:
        if is_ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        progress.close()
