"""Commands that look at the machine: doctor and demo."""

from typing import Annotated

import typer
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from tersor.analyse.doctor import Doctor
from tersor.cli.exits import ExitCode
from tersor.cli.options import CacheDir, Json, Seed, cache_directory
from tersor.cli.output import Output

_STYLES = {"ok": "green", "missing": "yellow", "problem": "bold red"}


def doctor(*, as_json: Json = False) -> None:
    """Say what works here, what is missing and how to mend it."""
    from tersor import api
    from tersor.core.jsonable import to_json

    found = api.doctor()
    Output(as_json).emit(to_json(found), findings_table(found), abilities_text(found))
    raise typer.Exit(ExitCode.MET if found.run_on else ExitCode.ENVIRONMENT)


def findings_table(found: Doctor) -> RenderableType:
    """Everything that was looked at, with its remedy."""
    table = Table(title="this machine", title_justify="left", header_style="bold")
    for name in ("what", "status", "found", "remedy"):
        table.add_column(name, overflow="fold")
    group = ""
    for finding in found.findings:
        if group and finding.group != group:
            table.add_section()
        group = finding.group
        status = Text(finding.status, _STYLES[finding.status])
        table.add_row(Text(finding.name), status, Text(finding.found), Text(finding.remedy))
    return table


def abilities_text(found: Doctor) -> RenderableType:
    """What can be done now."""
    run = ", ".join(found.run_on) or "no (no backend is available)"
    compress = ", ".join(found.compress_on) or "no (see the packages and backends above)"
    return Text(f"run artifacts: {run}\ncompress models: {compress}")


def demo(
    *,
    quick: Annotated[bool, typer.Option(help="Fewer sentences and rounds.")] = False,
    seed: Seed = 0,
    cache_dir: CacheDir = None,
    as_json: Json = False,
) -> None:
    """Compress MiniLM-L6 for this processor and compare it with NNCF."""
    from tersor.cli.demo.compare import run_demo
    from tersor.core.jsonable import to_json

    output = Output(as_json)
    rows = run_demo(
        seed=seed, cache_dir=cache_directory(cache_dir), quick=quick, console=output.console()
    )
    output.emit(to_json(list(rows)))
