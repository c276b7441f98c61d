"""The command line: the same words as the Python API, exit codes that scripts can act on.

0 target met; 1 target not met (the best point is saved); 2 wrong use or bad input; 3 environment;
4 verification failed; 130 interrupted, resumable; 70 a defect in Tersor.
"""

import sys
import traceback
from typing import Annotated

import typer

from tersor._version import __version__
from tersor.cli import artifacts, compressing, debugging, environment
from tersor.cli.exits import ExitCode, TersorGroup

app = typer.Typer(
    name="tersor",
    cls=TersorGroup,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Terse tensors: the smallest, fastest model that meets a target on your own hardware.",
)
for command in (
    environment.doctor,
    compressing.inspect,
    compressing.compress,
    compressing.bench,
    artifacts.run,
    artifacts.verify,
    artifacts.report,
    artifacts.explain,
    artifacts.export,
    debugging.profile,
    debugging.compare,
    environment.demo,
):
    app.command()(command)


def _version(wanted: bool) -> bool:
    if wanted:
        typer.echo(f"tersor {__version__}")
        raise typer.Exit
    return wanted


@app.callback()
def _options(
    *,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Options of every command; the group itself reads ``debug``, a callback ``version``."""
    del debug, version


def main() -> None:
    """Run the command line and leave with its exit code."""
    try:
        app()
    except Exception:  # noqa: BLE001 - the last boundary: exit code 1 means "target not met"
        traceback.print_exc()
        typer.echo("tersor: a defect; please report it with the lines above", err=True)
        sys.exit(ExitCode.CRASH)
