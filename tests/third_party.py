"""The package of docs/adding-a-method, as ``pip install`` would leave it in a folder."""

import tomllib
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"
PACKAGE = DOCS / "adding-a-method"
MODULE = "tersor_normalfloat"


def install(folder: Path) -> None:
    """The module, and beside it what package metadata says of its entry points."""
    project = tomllib.loads((PACKAGE / "pyproject.toml").read_text())["project"]
    name, version = project["name"], project["version"]
    (folder / f"{MODULE}.py").write_text((PACKAGE / f"{MODULE}.py").read_text())
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    lines = []
    for group, entries in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{key} = {value}" for key, value in entries.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
