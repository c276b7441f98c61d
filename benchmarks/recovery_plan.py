"""A plan of MiniLM for a speedup, and what minutes of recovery without labels make of it.

``python -m benchmarks.recovery_plan --speedup 2 --minutes 10 [--cache FOLDER]``: ``tersor.compress`` twice on the same store,
first as it is, then with ``Recover``, which also reads sentences that nothing else has (of the modules that calibration
takes; search and test have others). A row says what each kept of the original's outputs on test sentences, and how fast it is.
"""

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tersor
from benchmarks import record
from benchmarks.outcome import levels_of, widths_of
from tersor.cli.demo.models import Case, minilm
from tersor.core.progress import Printed
from tersor.core.records import Verdict
from tersor.core.target import Target

NAME = "recovery_plan"
MORE = 2304  # sentences that recovery reads


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One result.

    Attributes:
        minutes: Of recovery; 0: none.
        score: Mean cosine with the original's outputs on test sentences.
        speedup: Over the best uncompressed build, with its 95 % bounds.
        status: Of the verdict.
        levels: Level -> how many layers have it.
        widths: Mean share of units that stay.
        said: What recovery says of itself.
        seconds: All of the call.
    """

    minutes: float
    score: float
    speedup: tuple[float, float, float]
    ms: float
    status: str
    levels: dict[str, int]
    widths: float
    said: tuple[str, ...]
    seconds: float


def row_of(result: Any, minutes: float, seconds: float) -> Row:
    """What a result says of itself."""
    verdict: Verdict = result.verdict
    return Row(
        minutes=minutes,
        score=verdict.agreement,
        speedup=(verdict.speedup, verdict.speedup_low, verdict.speedup_high),
        ms=verdict.latency.median_ms,
        status=str(verdict.status),
        levels=levels_of(result),
        widths=widths_of(result),
        said=tuple(r.describe() for r in result._made.recoveries),  # noqa: SLF001
        seconds=seconds,
    )


def run(case: Case, options: argparse.Namespace, minutes: float) -> Row:
    """One call."""
    more = minilm({"calibration": options.more}).calibration
    assert isinstance(more, dict)
    batches = [
        {n: t[i : i + 16] for n, t in more.items()} for i in range(0, options.more // 16 * 16, 16)
    ]
    begun = time.perf_counter()
    result = tersor.compress(
        case.model,
        case.data(),
        target=Target(speedup=options.speedup),
        backend="openvino",
        batch=case.batch,
        cache_dir=options.cache,
        recover=tersor.Recover(minutes=minutes, batch=16, data=batches) if minutes else None,
        progress=Printed(),
    )
    return row_of(result, minutes, time.perf_counter() - begun)


def main() -> None:
    """Print and keep two rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--speedup", type=float, default=2.0)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--more", type=int, default=MORE, help="sentences that recovery reads")
    parser.add_argument("--cache", type=Path, help="the store; default: that of tersor")
    options = parser.parse_args()
    case = minilm()
    for minutes in (0.0, options.minutes):
        row = run(case, options, minutes)
        print(row, flush=True)
        settings = {"speedup": options.speedup, "more": options.more}
        record.append(NAME, [row], seed=0, settings=settings)


if __name__ == "__main__":
    main()
