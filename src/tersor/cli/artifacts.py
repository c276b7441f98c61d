"""Commands that take an artifact: run, verify, explain, report and export."""

import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from tersor.cli.exits import ExitCode
from tersor.cli.options import ArtifactPath, Device, Json
from tersor.cli.output import Output
from tersor.core.errors import ConfigError

EXPORT_SUFFIXES = (".xml", ".onnx", ".pt2")
_INPUTS_HELP = "A .npz or .safetensors file with one array an input, samples first."


def run(
    artifact: ArtifactPath,
    inputs: Annotated[Path, typer.Argument(help=_INPUTS_HELP)],
    *,
    out: Annotated[Path | None, typer.Option(help="Write the outputs as .npz.")] = None,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Run an artifact on arrays."""
    from tersor import api
    from tersor.cli.compressing import check_writable
    from tersor.cli.sources import as_call, load_arrays
    from tersor.core.jsonable import to_json

    if out is not None:
        check_writable(out)
    args, kwargs = as_call(load_arrays(inputs))
    runner = api.load(artifact, device=device)
    outputs = dict(flat_outputs(runner(*args, **kwargs)))
    lines = [f"{n}: {a.dtype} {list(a.shape)}" for n, a in outputs.items()]
    if out is not None:
        _save_npz(out, outputs)
        lines.append(f"saved {out}")
    described = {n: {"dtype": str(a.dtype), "shape": list(a.shape)} for n, a in outputs.items()}
    stats = to_json(runner.stats())
    Output(as_json).emit({"outputs": described, "stats": stats}, *lines)


def flat_outputs(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Arrays of nested outputs by dotted name; a lone array is called ``output``.

    Raises:
        ConfigError: Something that is neither an array nor a container of arrays.
    """
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from flat_outputs(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, tuple | list):
        for index, item in enumerate(value):
            yield from flat_outputs(item, f"{name}.{index}" if name else f"output_{index}")
    elif hasattr(value, "dtype") and hasattr(value, "shape"):
        yield name or "output", value
    elif value is not None:
        raise ConfigError(f"output {name or 'output'}: a {type(value).__name__} is no array")


def _save_npz(path: Path, arrays: Mapping[str, Any]) -> None:
    import numpy as np

    from tersor.core.store import write_atomic

    stream = io.BytesIO()
    np.savez(stream, **dict(arrays))
    write_atomic(path, stream.getvalue())


def verify(
    artifact: ArtifactPath,
    *,
    model: Annotated[
        str | None, typer.Option(help="The original, as for compress, to compare with.")
    ] = None,
    inputs: Annotated[Path | None, typer.Option(help=_INPUTS_HELP)] = None,
    as_json: Json = False,
) -> None:
    """Check every hash of an artifact, and its build against its graph and the original."""
    from tersor import api
    from tersor.cli.sources import load_arrays, load_model
    from tersor.core.jsonable import to_json

    checked = api.verify(
        artifact,
        model=None if model is None else load_model(model),
        inputs=None if inputs is None else load_arrays(inputs),
    )
    failed = any(check.status == "fail" for check in checked.checks)
    Output(as_json).emit(to_json(checked), *(_check_line(check) for check in checked.checks))
    raise typer.Exit(ExitCode.VERIFICATION if failed else ExitCode.MET)


def _check_line(check: Any) -> Text:
    from tersor.report.terminal import short_status

    found = f": found {check.found:.4g}, wanted {check.wanted:.4g}"
    note = f" ({check.note})" if check.note else ""
    return Text.assemble(short_status(check.status), f"  {check.name}{found}{note}")


def explain(
    artifact: ArtifactPath,
    site: Annotated[str | None, typer.Argument(help="A site's name; without it, all.")] = None,
    *,
    as_json: Json = False,
) -> None:
    """Say why a site is as it is, and what undoing it would change."""
    from tersor import api
    from tersor.core.jsonable import to_json
    from tersor.report.explain import explain as explain_site
    from tersor.report.facts import site_lines
    from tersor.report.terminal import explained, sites_view

    record = api.read_report(artifact)
    if site is None:
        lines = site_lines(record)
        Output(as_json).emit(to_json(lines), sites_view(lines))
        return
    facts = explain_site(record, site)
    Output(as_json).emit(facts, explained(facts))


def report(artifact: ArtifactPath, *, as_json: Json = False) -> None:
    """Show what was asked, measured and decided when an artifact was made."""
    from tersor import api
    from tersor.report.form import report_json
    from tersor.report.terminal import render_report

    record = api.read_report(artifact)
    Output(as_json).emit(report_json(record), render_report(record))


def export(
    artifact: ArtifactPath,
    out: Annotated[Path, typer.Argument(help="A file that ends in .xml, .onnx or .pt2.")],
    *,
    as_json: Json = False,
) -> None:
    """Write an artifact's model for another runtime."""
    from tersor import api
    from tersor.cli.compressing import check_writable

    if out.suffix not in EXPORT_SUFFIXES:
        raise ConfigError(f"{out}: wanted a name that ends in {', '.join(EXPORT_SUFFIXES)}")
    check_writable(out)
    api.export(artifact, out)
    Output(as_json).emit({"saved": str(out), "size_bytes": out.stat().st_size}, f"saved {out}")
