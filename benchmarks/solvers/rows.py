"""Rows of the tables: what is recorded, what is recorded already, and how it is printed."""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

from benchmarks import record

NAME = "solvers"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One method in one setting of one model.

    Attributes:
        table: rounding | lowrank | structured | sparsity | cost.
        model: Of the model.
        setting: What all methods of a cell share, such as "3 bits, groups of 64, symmetric".
        method: Name; "ours" begins those of this project.
        mode: "layer": each weight on the original's own inputs; "sequential": behind a compressed prefix.
        layers: Error of each layer's output on held-out rows, in units of its variance.
        quality: Of the whole model on held-out samples, by name of the measure.
        source: Where the method's arithmetic comes from: a package with its version, or "reference".
        detail: What else a reader needs.
    """

    table: str
    model: str
    setting: str
    method: str
    mode: str = "layer"
    layers: Mapping[str, float] = field(default_factory=dict)
    quality: Mapping[str, float] = field(default_factory=dict)
    source: str = "tersor"
    detail: Mapping[str, object] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, ...]:
        """What makes a row another one than all others of its seed."""
        return self.table, self.model, self.setting, self.method, self.mode

    @property
    def error(self) -> float:
        """Mean over layers; nan without any."""
        return fmean(self.layers.values()) if self.layers else float("nan")


def results_path() -> Path:
    """Where rows are."""
    return record.RESULTS / f"{NAME}.jsonl"


def read(path: Path | None = None) -> Iterator[tuple[int, Row]]:
    """Recorded (seed, row), the last one of equal keys only."""
    path = path or results_path()
    found: dict[tuple[object, ...], tuple[int, Row]] = {}
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            entry = json.loads(line)
            row = Row(**entry["row"])
            found[entry["seed"], *row.key] = entry["seed"], row
    yield from found.values()


class Recorder:
    """Appends rows, and knows which ones are there."""

    def __init__(self, seed: int, settings: object = None) -> None:
        self.seed, self.settings = seed, settings
        self.known = {row.key for known_seed, row in read() if known_seed == seed}

    def has(self, *key: str) -> bool:
        """Whether a row of this seed is recorded."""
        return key in self.known

    def add(self, row: Row) -> None:
        """Record a row and print it in a line."""
        record.append(NAME, [row], seed=self.seed, settings=self.settings)
        self.known.add(row.key)
        quality = ", ".join(f"{k} {v:.5g}" for k, v in row.quality.items())
        print(
            f"[{self.seed}] {row.model} | {row.setting} | {row.method} ({row.mode}) | "
            f"error {row.error:.5f} | {quality}",
            flush=True,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """A method's rows of all seeds in one setting."""

    rows: Sequence[Row]
    seeds: Sequence[int]

    def error(self) -> tuple[float, float]:
        """Mean over seeds, and half of the range."""
        return middle([row.error for row in self.rows])

    def quality(self) -> dict[str, tuple[float, float]]:
        """The same of every measure that all rows have."""
        names = [n for n in self.rows[0].quality if all(n in row.quality for row in self.rows)]
        return {n: middle([row.quality[n] for row in self.rows]) for n in names}


def middle(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half of the range."""
    return fmean(values), (max(values) - min(values)) / 2


def cells(
    found: Iterable[tuple[int, Row]],
) -> dict[tuple[str, str, str], dict[tuple[str, str], Cell]]:
    """(table, model, setting) -> (method, mode) -> rows of all seeds."""
    grouped: dict[tuple[str, str, str], dict[tuple[str, str], list[tuple[int, Row]]]] = {}
    for seed, row in found:
        cell = grouped.setdefault((row.table, row.model, row.setting), {})
        cell.setdefault((row.method, row.mode), []).append((seed, row))
    return {
        place: {
            name: Cell(rows=[row for _, row in rows], seeds=sorted(seed for seed, _ in rows))
            for name, rows in methods.items()
        }
        for place, methods in grouped.items()
    }


def layer_ratio(ours: Cell, theirs: Cell) -> float:
    """Geometric mean over seeds and layers of one error over the other; nan where none is shared."""
    logs = []
    by_seed = dict(zip(theirs.seeds, theirs.rows, strict=True))
    for seed, row in zip(ours.seeds, ours.rows, strict=True):
        other = by_seed.get(seed)
        for name, error in row.layers.items():
            reference = 0.0 if other is None else other.layers.get(name, 0.0)
            if error > 0 and reference > 0:
                logs.append(math.log(error / reference))
    return math.exp(fmean(logs)) if logs else float("nan")


def table_text(
    found: Iterable[tuple[int, Row]],
    table: str | None = None,
    model: str | None = None,
    reference: str = "GPTQ",
) -> str:
    """The tables as Markdown, a part for each setting."""
    lines: list[str] = []
    for (name, of, setting), methods in sorted(cells(found).items()):
        if (table and name != table) or (model and of != model):
            continue
        base = methods.get((reference, "layer"))
        measures = list(dict.fromkeys(m for cell in methods.values() for m in cell.quality()))
        lines += [f"\n### {name}, {of}: {setting}", ""]
        heads = ["method", "mode", "layer error", f"/ {reference}", *measures, "seeds"]
        lines += ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
        for (method, mode), cell in sorted(methods.items(), key=_order):
            ratio = float("nan") if base is None else layer_ratio(cell, base)
            quality = cell.quality()
            values = [
                method,
                mode,
                _shown(cell.error(), 5),
                "" if math.isnan(ratio) else f"{ratio:.3f}",
                *[_shown(quality[m], 4) if m in quality else "" for m in measures],
                str(len(cell.seeds)),
            ]
            lines.append("| " + " | ".join(values) + " |")
    return "\n".join(lines)


def _order(item: tuple[tuple[str, str], Cell]) -> tuple[object, ...]:
    (method, mode), _ = item
    return mode, method.startswith("ours"), method


def _shown(value: tuple[float, float], digits: int) -> str:
    mean, half = value
    if math.isnan(mean):
        return ""
    return f"{mean:.{digits}f}" + (f" ± {half:.{digits}f}" if half else "")
