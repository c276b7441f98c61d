"""An interrupt that is caught where it should not be ends the run with the next step of progress."""

import signal
from contextlib import suppress
from typing import Literal

import pytest
from rich.console import Console

from tersor.cli.interrupts import check, noted
from tersor.cli.progress import Bars, Lines


@pytest.mark.parametrize("step", ["stage", "advance", "note"])
@pytest.mark.parametrize("kind", [Bars, Lines])
def test_a_lost_interrupt_comes_again(
    kind: type[Bars | Lines], step: Literal["stage", "advance", "note"]
) -> None:
    progress = kind(Console(quiet=True))
    progress.stage("price")
    before = signal.getsignal(signal.SIGINT)
    steps = {
        "stage": lambda: progress.stage("plan"),
        "advance": progress.advance,
        "note": lambda: progress.note("x"),
    }
    with noted():
        lose_one()
        with pytest.raises(KeyboardInterrupt):
            steps[step]()
    progress.close()
    assert signal.getsignal(signal.SIGINT) is before
    progress.note("what comes after is another run")


def test_an_error_that_it_caused_is_the_interrupt() -> None:
    with pytest.raises(KeyboardInterrupt) as ended, noted():
        raise_as_an_import_does()
    assert isinstance(ended.value.__cause__, ImportError)
    with pytest.raises(ImportError), noted():
        raise ImportError("of its own")


def raise_as_an_import_does() -> None:
    lose_one()
    raise ImportError("initialization failed")


def test_without_one_nothing_is_raised() -> None:
    with noted():
        check()
    with suppress(KeyboardInterrupt), noted():
        lose_one()
    check()


def lose_one() -> None:
    with suppress(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
