"""Exit codes, and the one place where a cause becomes a code and a message.

Usage errors are Typer's own and leave with code 2 as well.
"""

import json
import shlex
import sys
import traceback
import warnings
from enum import IntEnum
from typing import Any

import typer
from typer.core import TyperGroup

from tersor.cli.interrupts import noted
from tersor.core.errors import TersorError


class ExitCode(IntEnum):
    """What the process returns."""

    MET = 0
    NOT_MET = 1  # the best point found is saved
    WRONG_USE = 2
    ENVIRONMENT = 3
    VERIFICATION = 4
    CRASH = 70  # a defect, as in sysexits.h; never 1, which would read as "not met"
    INTERRUPTED = 130


class TersorGroup(TyperGroup):
    """All commands: turns errors into one message and an exit code; ``--debug`` may stand anywhere."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put ``--debug`` before the command's name, and note whether JSON is wanted."""
        options = args[: args.index("--")] if "--" in args else args
        ctx.meta["tersor.json"] = "--json" in options
        if "--debug" in options:
            rest = [a for a in options if a != "--debug"] + args[len(options) :]
            args = ["--debug", *rest]
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run a command; errors that Tersor raises on purpose become a message and a code."""
        try:
            with noted(), warnings.catch_warnings():
                warnings.showwarning = _say_warning
                return super().invoke(ctx)
        except TersorError as error:
            if ctx.params.get("debug"):
                traceback.print_exc()
            say_error(error, as_json=ctx.meta["tersor.json"])
            raise typer.Exit(error.exit_code) from error
        except KeyboardInterrupt as error:
            typer.echo(interrupted_text(), err=True)
            raise typer.Exit(ExitCode.INTERRUPTED) from error


def _say_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    typer.echo(f"warning: {message}", err=True)


def say_error(error: TersorError, *, as_json: bool) -> None:
    """The message on standard error, and as a JSON object on standard output if wanted."""
    typer.echo(f"tersor: {error}", err=True)
    if as_json:
        body = {
            "type": type(error).__name__,
            "message": str(error),
            "exit_code": error.exit_code,
        }
        typer.echo(json.dumps({"error": body}, indent=2))


def interrupted_text() -> str:
    """What an interrupted run says: nothing finished is lost, and how to go on."""
    again = shlex.join(["tersor", *sys.argv[1:]])
    return (
        "\ntersor: interrupted; finished stages are kept in the cache directory. "
        f"To go on, run the same command again:\n  {again}"
    )
