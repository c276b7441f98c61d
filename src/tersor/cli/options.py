"""Options that several commands share, and the environment, which only this package reads."""

import os
from pathlib import Path
from typing import Annotated

import typer

CACHE_VARIABLE = "TERSOR_CACHE_DIR"

Json = Annotated[
    bool, typer.Option("--json", help="JSON on standard output; text goes to standard error.")
]
Model = Annotated[
    str,
    typer.Argument(help="package.module:name or file.py:name of an nn.Module or its factory."),
]
DataSource = Annotated[
    str,
    typer.Argument(
        help="file.py:name of an iterable, a tersor.Data or a factory of one; or a .npz or "
        ".safetensors file with one array an input, samples first."
    ),
]
ArtifactPath = Annotated[Path, typer.Argument(help="A .tersor file.")]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:1.")]
Backend = Annotated[str, typer.Option(help="auto or a backend's name.")]
Batch = Annotated[int, typer.Option(min=1, help="Samples in one call.")]
Keep = Annotated[
    list[str] | None, typer.Option(help="Pattern of layers to leave alone; repeatable.")
]
Seed = Annotated[int, typer.Option(help="Seed of every random choice.")]
CacheDir = Annotated[
    Path | None,
    typer.Option(
        help="Where finished stages are kept, so that an interrupted run goes on.",
        envvar=CACHE_VARIABLE,
    ),
]


def cache_directory(given: Path | None) -> Path:
    """The option or ``TERSOR_CACHE_DIR``, else ``tersor`` in the user's cache directory."""
    if given is not None:
        return given
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "tersor"
