"""An interrupt that is caught where it should not be ends the run with the next step of progress.

Signals are raised in processes of their own: in that of the tests one would end the run of all of them.
"""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
HEAD = """
import signal
from contextlib import suppress
from rich.console import Console
from tersor.cli.interrupts import check, noted
from tersor.cli.progress import Bars, Lines


def lose_one():
    with suppress(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def raises(call, *kinds):
    try:
        call()
    except kinds as error:
        return error
    raise AssertionError("nothing was raised")


before = signal.getsignal(signal.SIGINT)
"""


def passes(code: str) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", HEAD + code],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        env={"PYTHONPATH": str(ROOT / "src")},
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert ran.stdout.split() == ["end"]


@pytest.mark.parametrize("kind", ["Bars", "Lines"])
def test_a_lost_interrupt_comes_again(kind: str) -> None:
    passes(f"""
for name in ("stage", "advance", "note"):
    progress = {kind}(Console(quiet=True))
    progress.stage("price")
    steps = {{
        "stage": lambda: progress.stage("plan"), "advance": progress.advance, "note": lambda: progress.note("x"),
    }}
    with noted():
        lose_one()
        raises(steps[name], KeyboardInterrupt)
    progress.close()
    assert signal.getsignal(signal.SIGINT) is before
    progress.note("what comes after is another run")
print("end")
""")


def test_an_error_that_it_caused_is_the_interrupt() -> None:
    passes("""
def broken():
    with noted():
        lose_one()
        raise ImportError("initialization failed")


def of_its_own():
    with noted():
        raise ImportError("of its own")


assert isinstance(raises(broken, KeyboardInterrupt).__cause__, ImportError)
raises(of_its_own, ImportError)
print("end")
""")


def test_without_one_nothing_is_raised() -> None:
    passes("""
with noted():
    check()
with suppress(KeyboardInterrupt), noted():
    lose_one()
check()
print("end")
""")
