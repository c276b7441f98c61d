"""Three real models against their peers: ``python -m benchmarks.first_light [--case ...] [--quick]``.

Every build of a case runs in one interleaved measurement, with the same threads, shapes and
calibration samples; quality is judged on a test part that no build has seen.
"""

import argparse
import tempfile
from collections.abc import Sequence
from contextlib import closing

from rich.console import Console

from benchmarks import record
from tersor.cli.demo.compare import CAREFUL, QUICK, QUICK_SENTENCES, Settings, compare
from tersor.cli.demo.models import CASES, Case, minilm
from tersor.cli.demo.pictures import DEBIAN
from tersor.cli.demo.table import Row, comparison_table
from tersor.cli.progress import make_progress

NAME = "first_light"
PIPE_WIDTH = 180  # columns where no terminal says how wide it is


def make_case(name: str, *, quick: bool, seed: int) -> Case:
    """One case, smaller if ``quick``."""
    if name == "minilm":
        return minilm(QUICK_SENTENCES if quick else None, seed)
    return CASES[name]()


def run(names: Sequence[str], settings: Settings, console: Console, *, quick: bool) -> list[Row]:
    """Compare the cases one after the other; a table and JSON lines after each."""
    rows: list[Row] = []
    for name in names:
        case = make_case(name, quick=quick, seed=settings.seed)
        console.print(f"\n{case.description}")
        with closing(make_progress(console)) as progress:
            found = compare(case, settings, progress)
        console.print(comparison_table(case.description, found))
        about = {"quick": quick, "protocol": settings.protocol, "data": case.description}
        path = record.append(NAME, found, seed=settings.seed, settings=about)
        console.print(f"added to {path}")
        rows += found
    return rows


def main() -> None:
    """Read the options and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", choices=sorted(CASES), help="one case; default: all")
    parser.add_argument("--quick", action="store_true", help="fewer sentences and rounds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache-dir", help="a store to resume from; default: a fresh one")
    options = parser.parse_args()
    names = [options.case] if options.case else list(CASES)
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console = Console(highlight=False, markup=False, width=PIPE_WIDTH)
    if "resnet20" in names and not DEBIAN.is_dir():
        console.print(
            "Fashion-MNIST: apt package dataset-fashion-mnist is absent, so resnet20 is judged on "
            "the packed 800 test images in place of 8,000, and searched on training images"
        )
    with tempfile.TemporaryDirectory() as fresh:
        settings = Settings(
            seed=options.seed,
            cache_dir=options.cache_dir or fresh,
            protocol=QUICK if options.quick else CAREFUL,
        )
        run(names, settings, console, quick=options.quick)


if __name__ == "__main__":
    main()
