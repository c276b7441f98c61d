"""Ctrl-C that is not lost: Python drops a KeyboardInterrupt that comes while a callback of the collector runs.

Tracing a model runs thousands of those, so that an interrupt may be raised where nobody can catch it; the run
would go on. It is noted here as well, and raised again with the next step of progress.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_seen = False


@contextmanager
def noted() -> Iterator[None]:
    """Note interrupts while it lasts; outside of the main thread nothing is changed."""
    global _seen  # noqa: PLW0603 - a signal belongs to the process
    try:
        before = signal.signal(signal.SIGINT, _note)
    except ValueError:  # another thread, which no signal reaches
        yield
        return
    try:
        yield
    except Exception as error:  # such as an extension whose import it broke off
        check(error)
        raise
    finally:
        signal.signal(signal.SIGINT, before)
        _seen = False


def check(cause: Exception | None = None) -> None:
    """Raise what was noted.

    Raises:
        KeyboardInterrupt: An interrupt came, and the run went on.
    """
    if _seen:
        raise KeyboardInterrupt from cause


def _note(number: int, frame: FrameType | None) -> None:
    global _seen  # noqa: PLW0603
    _seen = True
    signal.default_int_handler(number, frame)
