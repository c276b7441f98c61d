"""Results as JSON lines: one line a row, each complete without the others."""

import json
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tersor._version import __version__
from tersor.core.jsonable import to_json
from tersor.core.machine import describe_machine

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "openvino", "nncf", "numpy", "transformers")


def versions() -> dict[str, str]:
    """Installed packages that take part in a figure."""
    found = {"tersor": __version__}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    return found


def append(
    name: str, rows: Iterable[Any], *, seed: int, settings: Any = None, folder: Path = RESULTS
) -> Path:
    """Add rows to ``benchmarks/results/<name>.jsonl``, with what a reader needs to repeat them.

    ``folder``: another one than ``benchmarks/results``.
    """
    around = {
        "benchmark": name,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": to_json(describe_machine()),
        "versions": versions(),
        "seed": seed,
        "settings": to_json(settings),
    }
    path = folder / f"{name}.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        for row in rows:
            line = json.dumps({**around, "row": to_json(row)}, sort_keys=True, allow_nan=False)
            file.write(line + "\n")
    return path
