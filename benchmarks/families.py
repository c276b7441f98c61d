"""All families of methods under one size, against each of them alone: ``python -m benchmarks.families``.

One target on the size of the saved file, and nothing else: what is compared is what each family keeps of
the model there, on a test part that no build has seen. Together means that the plan chooses among all
of them, layer by layer. A family that does not reach the size alone says how far it came.
"""

import argparse
import json
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass

from rich.console import Console

from benchmarks import record
from benchmarks.first_light import PIPE_WIDTH, make_case
from tersor import api
from tersor.cli.demo.models import CASES, Case
from tersor.cli.progress import make_progress
from tersor.core.jsonable import to_json
from tersor.core.progress import Progress
from tersor.core.records import Status
from tersor.core.target import Target

NAME = "families"
SIZE_RATIO = 8.0
ALONE = ("quantize", "prune", "sparsify", "codebook", "lowrank")
FAMILIES: Mapping[str, tuple[str, ...]] = {**{name: (name,) for name in ALONE}, "together": ALONE}


@dataclass(frozen=True, slots=True, kw_only=True)
class FamilyRow:
    """One family at one size.

    Attributes:
        case: The model.
        family: Its name; "together": all of them.
        methods: As ``tersor.compress`` was asked.
        size_ratio: What was asked for.
        size_check: Whether the file is that small.
        size_bytes, original_bytes: Of the saved file, and of the model's parameters.
        metric_original, metric_result: On the test part, where the case has a metric.
        agreement: With the original on the test part, in the geometry of the output.
        agreement_p5: Its 5th percentile over samples.
        test_samples: How many.
        returned_baseline: Whether no plan was better than the best uncompressed build.
        levels: How many sites have each level.
        made_by: How many sites each method has made.
        binding: The constraint that stopped it.
        seconds: Of the whole call.
    """

    case: str
    family: str
    methods: tuple[str, ...]
    size_ratio: float
    size_check: Status
    size_bytes: int
    original_bytes: int
    metric_original: float | None
    metric_result: float | None
    agreement: float
    agreement_p5: float
    test_samples: int
    returned_baseline: bool
    levels: Mapping[str, int]
    made_by: Mapping[str, int]
    binding: str
    seconds: float


def row(case: Case, family: str, ratio: float, seed: int, progress: Progress) -> FamilyRow:
    """Compress a case with one family, from an empty cache."""
    methods, begun = FAMILIES[family], time.perf_counter()
    with tempfile.TemporaryDirectory() as fresh:
        result = api.compress(
            case.model,
            case.data(),
            target=Target(size_ratio=ratio),
            metric=case.metric,
            test_metric=case.test_metric,
            backend="openvino",
            batch=case.batch,
            methods=methods,
            cache_dir=fresh,
            seed=seed,
            progress=progress,
        )
        verdict, plan = result.verdict, result.plan
    size = next(check for check in verdict.checks if check.name == "size_ratio")
    return FamilyRow(
        case=case.name,
        family=family,
        methods=methods,
        size_ratio=ratio,
        size_check=size.status,
        size_bytes=verdict.size_bytes,
        original_bytes=verdict.original_bytes,
        metric_original=verdict.metric_original,
        metric_result=verdict.metric_result,
        agreement=verdict.agreement,
        agreement_p5=verdict.agreement_p5,
        test_samples=verdict.test_samples,
        returned_baseline=verdict.returned_baseline,
        levels=Counter(str(level) for level in plan.assignment.values()),
        made_by=Counter(plan.methods.values()),
        binding=verdict.binding,
        seconds=time.perf_counter() - begun,
    )


def main() -> None:
    """Read the options and run; a JSON line after each family."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", nargs="*", choices=sorted(CASES), default=["resnet20", "minilm"])
    parser.add_argument("--family", nargs="*", choices=list(FAMILIES), default=list(FAMILIES))
    parser.add_argument("--size-ratio", type=float, default=SIZE_RATIO)
    parser.add_argument("--quick", action="store_true", help="fewer sentences")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dry", action="store_true", help="write no results")
    options = parser.parse_args()
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console = Console(highlight=False, markup=False, width=PIPE_WIDTH)
    for name in options.case:
        case = make_case(name, quick=options.quick, seed=options.seed)
        for family in options.family:
            with closing(make_progress(console)) as progress:
                found = row(case, family, options.size_ratio, options.seed, progress)
            console.print(json.dumps(to_json(found)))
            if not options.dry:
                about = {"quick": options.quick, "data": case.description}
                record.append(NAME, [found], seed=options.seed, settings=about)


if __name__ == "__main__":
    main()
