"""Ctrl-C stops a run also where a library swallows it."""

import signal
import threading

import pytest

from tersor.cli.interrupts import interruptible
from tersor.core.progress import Silent


class Closed(Silent):
    """Knows whether it was closed."""

    is_closed = False

    def close(self) -> None:
        self.is_closed = True


def swallowed() -> None:
    """What torch's structured trace does to an exception."""
    try:
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:
        return
    pytest.fail("nothing was raised")


def run(inner: Closed, step: str, words: tuple[str, ...]) -> None:
    with interruptible(inner) as progress:
        swallowed()
        getattr(progress, step)(*words)
        pytest.fail("went on")


@pytest.mark.parametrize("step", ["stage", "note", "advance"])
def test_a_swallowed_interrupt_stops_the_next_step(step: str) -> None:
    inner = Closed()
    words = () if step == "advance" else ("price",)
    with pytest.raises(KeyboardInterrupt):
        run(inner, step, words)
    assert inner.is_closed


def test_one_that_no_step_follows_stops_the_run_at_its_end() -> None:
    with pytest.raises(KeyboardInterrupt), interruptible(Silent()):
        swallowed()


def test_the_handler_lasts_as_long_as_the_run() -> None:
    with interruptible(Silent()) as progress:
        assert signal.getsignal(signal.SIGINT) == progress.ask
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_signals_of_others_stay() -> None:
    own = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interruptible(Silent()):
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, own)


def test_other_threads_set_no_handler() -> None:
    done: list[bool] = []

    def stage() -> None:
        with interruptible(Silent()) as progress:
            progress.stage("price")
        done.append(True)

    thread = threading.Thread(target=stage)
    thread.start()
    thread.join()
    assert done == [True]
