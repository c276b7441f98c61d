"""Where words go: people read standard output, unless ``--json`` gives it to a machine."""

import json
import sys
from dataclasses import dataclass
from typing import Any

import typer
from rich.console import Console, RenderableType

PIPE_WIDTH = 140  # columns of a table where no terminal says how wide it is


@dataclass(frozen=True, slots=True)
class Output:
    """One command's output: JSON on standard output, or text there; never both."""

    as_json: bool

    def console(self) -> Console:
        """Where people read: standard output, or standard error beside JSON."""
        stream = sys.stderr if self.as_json else sys.stdout
        width = None if stream.isatty() else PIPE_WIDTH
        return Console(stderr=self.as_json, width=width, highlight=False, markup=False)

    def emit(self, value: Any, *shown: RenderableType) -> None:
        """Show renderables to people and, with ``--json``, ``value`` to the machine."""
        console = self.console()
        for item in shown:
            console.print(item)
        if self.as_json:
            typer.echo(json.dumps(value, indent=2, sort_keys=True, allow_nan=False))
