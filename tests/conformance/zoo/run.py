"""Captures models of the zoo and counts their ops; with ``--judge``, cuts them and compares.

``python -m tests.conformance.zoo.run [--judge] [--ops FILE] [names, patterns, sources]``; rows for
the table come from ``python -m benchmarks.coverage``.
"""

import argparse
import gc
import time
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tests.conformance.zoo.capturing import captured, ops_of
from tests.conformance.zoo.entry import ZooModel
from tests.conformance.zoo.judge import judge, summary
from tests.conformance.zoo.models import select


@dataclass(frozen=True, slots=True)
class Capturing:
    """What came of one capture."""

    name: str
    error: str  # empty: captured
    seconds: float
    nodes: int
    ops: frozenset[str]


def attempt(entry: ZooModel) -> Capturing:
    """Capture one model; a failure is a result, too."""
    start = time.perf_counter()
    try:
        graph = captured(entry).graph
    except Exception as e:  # noqa: BLE001 - whatever a model raises is what we want to know
        error = f"{type(e).__name__}: {' '.join(str(e).split())}"
        return Capturing(entry.name, error, time.perf_counter() - start, 0, frozenset())
    seconds = time.perf_counter() - start
    return Capturing(entry.name, "", seconds, len(graph.module.graph.nodes), ops_of(graph))


def line(found: Capturing) -> str:
    """One model as a line of text."""
    status = f"ERR  {found.error}" if found.error else f"ok   {found.nodes} nodes"
    return f"{found.name:48} {found.seconds:7.1f} s  {status}"


def histogram(results: Iterable[Capturing]) -> list[str]:
    """Ops, the most frequent first: number of models and one of them."""
    counts: Counter[str] = Counter()
    example: dict[str, str] = {}
    for found in results:
        counts.update(found.ops)
        for op in found.ops:
            example.setdefault(op, found.name)
    return [f"{n:5}  {op:56} {example[op]}" for op, n in counts.most_common()]


def judged(entries: Iterable[ZooModel]) -> None:
    """Print a line for each model: is cutting zeroing there, and what is held."""
    for entry in entries:
        row = judge(entry, each=True)
        print(summary(row), flush=True)
        if row.held_by:
            print(f"{'':46} held by {row.held_by}", flush=True)
        gc.collect()


def counted(entries: Iterable[ZooModel], path: Path | None) -> None:
    """Print a line for each model, then the histogram of ops (to a file where one is given)."""
    results: list[Capturing] = []
    for entry in entries:
        results.append(attempt(entry))
        print(line(results[-1]), flush=True)
        gc.collect()
        if path:
            path.write_text("\n".join(histogram(results)) + "\n", encoding="utf-8")
    if not path:
        print("\n".join(histogram(results)))


def main() -> None:
    """Read the options and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="names, patterns or sources; default: all")
    parser.add_argument("--judge", action="store_true", help="cut 30 %% of every exact width")
    parser.add_argument("--ops", type=Path, help="file for the histogram; rewritten all the time")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    entries = select(options.names)
    if options.judge:
        judged(entries)
    else:
        counted(entries, options.ops)


if __name__ == "__main__":
    main()
