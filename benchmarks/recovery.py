"""What recovery without labels gains in some minutes: ``python -m benchmarks.recovery --minutes 10``.

MiniLM with half of the neurons of every layer, and ResNet-20 at a half and a quarter of its
multiply-accumulates, refitted in closed form, before and after ``--minutes`` of recovery. Minutes are
processor time of this process (``--wall``: of the wall's clock). What is kept is decided on samples
that neither the refit nor a step has read; the score is of test samples that decide nothing.

Rows are JSON lines in ``results/recovery.jsonl``; what is there already for the same settings is not
run again, so that a run that was stopped goes on with the next model.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks import record
from benchmarks.prune import SEED
from benchmarks.reconstruct import (
    IMAGES,
    SENTENCES,
    Cut,
    closed_form,
    minilm_cuts,
    reconstructed,
    resnet_cuts,
    shown,
)
from tersor.core.recovery import Recover

NAME = "recovery"
BATCH = {"minilm": 16, "resnet20": 64}
WORK = tuple(BATCH)


def cuts_of(work: str, *, is_quick: bool) -> Iterator[Cut]:
    """The cut models of a name; ``is_quick``: of few samples."""
    few = {"calibration": 64, "search": 16, "test": 64}
    makers: Mapping[str, Callable[[], Iterator[Cut]]] = {
        "minilm": lambda: minilm_cuts(few if is_quick else SENTENCES),
        "resnet20": lambda: resnet_cuts(256 if is_quick else IMAGES),
    }
    return makers[work]()


def finished(folder: Path, settings: Mapping[str, Any]) -> set[tuple[str, str, float]]:
    """Models, ways and shares that a file has rows of, with the same settings."""
    path = folder / f"{NAME}.jsonl"
    if not path.is_file():
        return set()
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    rows = [line["row"] for line in lines if line["settings"] == dict(settings)]
    return {(row["model"], row["widths_by"], row["share"]) for row in rows}


def main() -> None:
    """Print and keep a row before and a row after, for each model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", default=",".join(WORK), help="minilm, resnet20, or both")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--rate", type=float, default=Recover().rate)
    parser.add_argument("--wall", action="store_true", help="minutes of the wall's clock")
    parser.add_argument("--quick", action="store_true", help="few samples")
    parser.add_argument("--folder", type=Path, default=record.RESULTS)
    options = parser.parse_args()
    names = options.work.split(",")
    if strange := sorted(set(names) - set(WORK)):
        parser.error(f"--work: found {', '.join(strange)}, wanted some of {', '.join(WORK)}")
    settings = {
        "minutes": options.minutes,
        "rate": options.rate,
        "clock": "wall" if options.wall else "processor time",
        "quick": options.quick,
    }
    for name in names:
        done = finished(options.folder, settings)
        if name == "minilm" and any(model == name for model, _, _ in done):
            continue  # it has one cut, which takes a while to make
        for cut in cuts_of(name, is_quick=options.quick):
            if (cut.model, cut.widths_by, cut.share) in done:
                continue
            before = closed_form(cut)
            print(shown(before), flush=True)
            config = Recover(minutes=options.minutes, batch=BATCH[name], rate=options.rate)
            begun = time.process_time()
            _, after = reconstructed(cut, config, cpu_clock=not options.wall)
            used = time.process_time() - begun
            print(f"{shown(after)}, {used:.0f} s of processor time with evaluation", flush=True)
            record.append(
                NAME, [before, after], seed=SEED, settings=settings, folder=options.folder
            )


if __name__ == "__main__":
    main()
