"""Commands that look into builds: profile and compare."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tersor.cli.exits import ExitCode
from tersor.cli.options import Backend, Batch, Device, Json
from tersor.cli.output import Output
from tersor.core.units import BYTES_PER_MB

if TYPE_CHECKING:
    from tersor.analyse.roofline import Profile
    from tersor.api.comparing import Comparison

_SOURCE_HELP = "A .tersor file, or a model as for compress."
_DATA_HELP = "Data as for compress, whose first item is run; a .tersor file needs none."
_SHOWN = 25  # rows of a table; --json and traces have all


def profile(
    source: Annotated[str, typer.Argument(help=_SOURCE_HELP)],
    data: Annotated[str | None, typer.Argument(help=_DATA_HELP)] = None,
    *,
    device: Device = "cpu",
    backend: Backend = "auto",
    batch: Batch = 1,
    trace: Annotated[
        Path | None, typer.Option(help="Write a trace for chrome://tracing or Perfetto.")
    ] = None,
    ceilings: Annotated[
        bool, typer.Option(help="Measure what the device can do at most, for the bounds.")
    ] = True,
    as_json: Json = False,
) -> None:
    """Show where a build spends its time, op by op, and what bounds each of them."""
    from tersor import api
    from tersor.cli.compressing import check_writable
    from tersor.core.jsonable import to_json

    if trace is not None:
        check_writable(trace)
    found = api.profile(
        _source(source),
        _data(source, data, whole=True),
        device=device,
        backend=backend,
        batch=batch,
        ceilings=ceilings,
    )
    saved = []
    if trace is not None:
        _write_trace(trace, found)
        saved = [f"saved {trace}"]
    Output(as_json).emit(to_json(found), profile_view(found), *saved)


def compare(
    one: Annotated[str, typer.Argument(help=f"What is right: {_SOURCE_HELP}")],
    other: Annotated[
        str | None,
        typer.Argument(help="What is compared with it; without it, ONE's builds with its graph."),
    ] = None,
    data: Annotated[str | None, typer.Argument(help=_DATA_HELP)] = None,
    *,
    limit: Annotated[
        float, typer.Option(help="Normalised squared error above which two values differ.")
    ] = 1e-2,
    as_json: Json = False,
) -> None:
    """Find the first value at which two models, or a build and its graph, differ."""
    from tersor import api
    from tersor.core.jsonable import to_json

    found = api.compare(
        _source(one),
        None if other is None else _source(other),
        inputs=_data(one, data, whole=False),
        limit=limit,
    )
    Output(as_json).emit(to_json(found), comparison_view(found))
    raise typer.Exit(ExitCode.MET if found.is_equal else ExitCode.VERIFICATION)


def _source(spec: str) -> Any:
    from tersor.api.comparing import SUFFIX
    from tersor.cli.sources import load_model

    return spec if spec.endswith(SUFFIX) else load_model(spec)


def _data(source: str, spec: str | None, *, whole: bool) -> Any:
    """Data of a model, or one batch of it."""
    from tersor.api.comparing import SUFFIX
    from tersor.cli.sources import ARRAY_SUFFIXES, first_inputs, load_arrays, load_data

    if spec is None:
        return None
    if spec.endswith(ARRAY_SUFFIXES) and source.endswith(SUFFIX):
        return load_arrays(Path(spec))
    found = load_data(spec)
    return found if whole and not source.endswith(SUFFIX) else first_inputs(found)


def _write_trace(path: Path, found: "Profile") -> None:
    from tersor.core.store import write_atomic
    from tersor.report.trace import chrome_trace

    events = chrome_trace(f"{found.name}, {found.build}", found.rows, found.outside_ms)
    write_atomic(path, json.dumps(events).encode())


def profile_view(found: "Profile") -> RenderableType:
    """The summary, and the rows that take most."""
    rows = sorted(found.rows, key=lambda row: -row.ms)
    table = Table(title="where a call's time goes", title_justify="left", header_style="bold")
    for name in ("layer", "kind", "format"):
        table.add_column(name, overflow="fold")
    for name in ("ms", "share", "GMAC/s", "GB/s", "of ceiling", "bound"):
        table.add_column(name, justify="right")
    for row in rows[:_SHOWN]:
        table.add_row(
            Text(row.layer),
            row.kind,
            row.format,
            f"{row.ms:.3f}",
            f"{row.share:.1%}",
            _rate(row.macs, row.ms),
            _rate(row.bytes, row.ms),
            "" if row.of_ceiling is None else f"{row.of_ceiling:.0%}",
            row.bound,
        )
    rest = rows[_SHOWN:]
    if rest:
        ms = sum(row.ms for row in rest)
        table.add_row(f"{len(rest)} more", "", "", f"{ms:.3f}", "", "", "", "", "")
    return Group(table, Text("\n".join(_summary(found))))


def _rate(amount: int, ms: float) -> str:
    return f"{amount / ms / 1e6:.1f}" if amount and ms > 0 else ""


def _summary(found: "Profile") -> list[str]:
    call = found.call
    lines = [
        f"{found.name}, {found.build}",
        f"a call: {call.median_ms:.3f} ms ({call.low_ms:.3f} to {call.high_ms:.3f})",
        f"outside of all ops: {found.outside_ms:.3f} ms of it",
    ]
    if found.floor_ms is not None:
        lines.append(f"at the device's ceilings its ops would take {found.floor_ms:.3f} ms")
    if found.ceilings is not None:
        own = found.ceilings
        rates = [f"{name} {rate / 1e9:.1f} GMAC/s" for name, rate in own.macs_per_s.items()]
        if own.bytes_per_s is not None:
            rates.append(f"memory {own.bytes_per_s / 1e9:.1f} GB/s")
        lines.append(f"ceilings, measured here: {', '.join(rates)}")
    peak = (
        ""
        if found.peak_bytes is None
        else f", {found.peak_bytes / BYTES_PER_MB:.2f} MB more at a call's peak"
    )
    lines.append(f"stored tensors: {found.weight_bytes / BYTES_PER_MB:.2f} MB{peak}")
    return lines


def comparison_view(found: "Comparison") -> RenderableType:
    """What differs first, and the ops that add most."""
    lines = [f"{found.one} and {found.other}; above {found.limit:g} values differ"]
    lines += [f"output {name}: {error:.3g}" for name, error in found.outputs.items()]
    if found.points:
        lines.append(f"{len(found.points)} values are in both graphs")
        lines.append(f"first that differs: {found.first or 'none'}")
        lines.append(f"first whose own op makes that difference: {found.introduced or 'none'}")
    elif found.outputs:
        lines.append("the graphs share no value that can be compared: only outputs were")
    for build in found.builds:
        where = "" if build.first is None else f"; it leaves its graph at {build.first}"
        asked = f" ({len(build.looked)} builds that end early)" if build.looked else ""
        lines.append(f"{build.build} against its graph: {build.error:.3g}{where}{asked}")
    lines += [f"not compared: {note}" for note in found.notes]
    shown: list[RenderableType] = [Text("\n".join(lines))]
    worst = sorted(found.points, key=lambda p: -p.own)[:_SHOWN]
    if worst:
        table = Table(title="what adds most", title_justify="left", header_style="bold")
        for name in ("value", "op"):
            table.add_column(name, overflow="fold")
        for name in ("its own error", "with all before"):
            table.add_column(name, justify="right")
        for point in worst:
            table.add_row(
                Text(point.node), Text(point.op), f"{point.own:.3g}", f"{point.error:.3g}"
            )
        shown.append(table)
    return Group(*shown)
