"""Commands that take a model: compress, bench and inspect."""

from contextlib import closing
from pathlib import Path
from typing import Annotated

import typer

from tersor.cli.exits import ExitCode
from tersor.cli.options import (
    Backend,
    Batch,
    CacheDir,
    DataSource,
    Device,
    Json,
    Keep,
    Model,
    Seed,
    cache_directory,
)
from tersor.cli.output import Output
from tersor.core.errors import ConfigError


def compress(
    model: Model,
    data: DataSource,
    *,
    target: Annotated[str, typer.Option(help="Budgets: '2x, 0.5 pt', '5 ms, 10 MB'.")],
    out: Annotated[Path, typer.Option(help="The artifact to write.")],
    metric: Annotated[
        str | None, typer.Option(help="file.py:name of a function of predict, higher is better.")
    ] = None,
    test_metric: Annotated[
        str | None, typer.Option(help="The same on data that nothing else saw.")
    ] = None,
    device: Device = "cpu",
    backend: Backend = "auto",
    batch: Batch = 1,
    methods: Annotated[
        list[str] | None, typer.Option(help="A method to use; repeatable. Default: all.")
    ] = None,
    recover: Annotated[
        float | None,
        typer.Option(help="Seconds of training towards the original's outputs. Default: none."),
    ] = None,
    keep: Keep = None,
    cache_dir: CacheDir = None,
    seed: Seed = 0,
    plan_out: Annotated[Path | None, typer.Option(help="Write the plan as JSON.")] = None,
    as_json: Json = False,
) -> None:
    """Compress a model for this machine under a target, and prove it."""
    from tersor.core.recovery import Recover
    from tersor.core.target import Target

    budgets = Target.parse(target)
    recovery = None if recover is None else Recover(seconds=recover)
    for path in filter(None, (out, plan_out)):
        check_writable(path)
    from tersor import api
    from tersor.cli.progress import make_progress
    from tersor.cli.sources import load_data, load_function, load_model
    from tersor.report.form import report_json
    from tersor.report.terminal import render_summary

    output = Output(as_json)
    network, inputs = load_model(model), load_data(data)
    with closing(make_progress(output.console())) as progress:
        result = api.compress(
            network,
            inputs,
            target=budgets,
            metric=load_function(metric),
            test_metric=load_function(test_metric),
            device=device,
            backend=backend,
            batch=batch,
            methods=tuple(methods) if methods else "all",
            recover=recovery,
            keep=tuple(keep or ()),
            cache_dir=cache_directory(cache_dir),
            seed=seed,
            progress=progress,
        )
    result.save(out)
    if plan_out is not None:
        result.plan.save(str(plan_out))
    output.emit(report_json(result.record), render_summary(result.record), f"saved {out}")
    raise typer.Exit(ExitCode.MET if result.verdict.status == "pass" else ExitCode.NOT_MET)


def check_writable(path: Path) -> None:
    """See before the work that its result can be written.

    Raises:
        ConfigError: The folder does not exist, or the path is a folder.
    """
    if path.is_dir():
        raise ConfigError(f"{path}: is a folder; wanted a file's name")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"{path}: the folder {path.absolute().parent} does not exist; make it")


def bench(
    model: Model,
    data: DataSource,
    *,
    device: Device = "cpu",
    backend: Backend = "auto",
    batch: Batch = 1,
    as_json: Json = False,
) -> None:
    """Time the model as given and every uncompressed build, interleaved."""
    from tersor import api
    from tersor.cli.sources import load_data, load_model
    from tersor.core.jsonable import to_json
    from tersor.report.terminal import baselines_table

    network, inputs = load_model(model), load_data(data)
    rows = api.bench(network, inputs, device=device, backend=backend, batch=batch)
    Output(as_json).emit(to_json(list(rows)), baselines_table(rows))


def inspect(
    source: Annotated[str, typer.Argument(help="A model as for compress, or a .tersor file.")],
    data: Annotated[
        str | None, typer.Argument(help="Data as for compress; its first item is the example.")
    ] = None,
    *,
    keep: Keep = None,
    time: Annotated[
        bool, typer.Option("--time", help="Profile a pass: each branch's share of the time.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show what may be chosen in a model as a tree, and what is pinned and why."""
    from tersor import api
    from tersor.core.jsonable import to_json

    if data is None:
        if ":" in source and not Path(source).exists():
            raise ConfigError(f"{source}: a model needs DATA beside it; its first item is run")
        from tersor.report.terminal import inspected_table

        record = api.read_report(Path(source))
        found = {"sites": to_json(record.sites), "machine": to_json(record.machine)}
        Output(as_json).emit(found, inspected_table(record.sites))
        return
    from tersor.cli.inspected import render_inspection
    from tersor.cli.sources import first_inputs, load_data, load_model

    network, example = load_model(source), first_inputs(load_data(data))
    inspection = api.inspect(network, example, keep=tuple(keep or ()), time=time)
    Output(as_json).emit(to_json(inspection), render_inspection(inspection))
