"""Captures models of the zoo and counts their ops.

``python -m tests.conformance.zoo.run [--ops FILE] [--captured FILE] [names, patterns, sources]``
"""

import argparse
import gc
import operator
import time
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tersor.capture.module import Captured, capture
from tersor.capture.samples import Samples, flatten_item
from tersor.graph.contracts import Graph
from tests.conformance.zoo.entry import ZooModel
from tests.conformance.zoo.models import select


@dataclass(frozen=True, slots=True)
class Capturing:
    """What came of one capture."""

    name: str
    error: str  # empty: captured
    seconds: float
    nodes: int
    ops: frozenset[str]


def captured(entry: ZooModel) -> Captured:
    """Build and capture one model."""
    call, tensors = flatten_item(entry.inputs(), entry.name)
    return capture(entry.build(), Samples(call, tensors))


def ops_of(graph: Graph) -> frozenset[str]:
    """Names of all functions that a graph calls."""
    found = {n.target for n in graph.module.graph.nodes if n.op == "call_function"}
    return frozenset(
        f"operator.{f.__name__}" if f in vars(operator).values() else str(f) for f in found
    )


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


def main() -> None:
    """Read the options and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="names, patterns or sources; default: all")
    parser.add_argument("--ops", type=Path, help="file for the histogram; rewritten all the time")
    parser.add_argument("--captured", type=Path, help="file to add one line a model to")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    results: list[Capturing] = []
    for entry in select(options.names):
        results.append(attempt(entry))
        print(line(results[-1]), flush=True)
        gc.collect()
        if options.captured:
            with options.captured.open("a", encoding="utf-8") as file:
                file.write(line(results[-1]) + "\n")
        if options.ops:
            options.ops.write_text("\n".join(histogram(results)) + "\n", encoding="utf-8")
    if not options.ops:
        print("\n".join(histogram(results)))


if __name__ == "__main__":
    main()
