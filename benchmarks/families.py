"""All families of methods under one size, against each of them alone.

    python -m benchmarks.families --case resnet20 --size-ratio 6 --quick
    python -m benchmarks.families --print

One target on the size of the saved file, and nothing else: what is compared is what each family keeps of
the model there, on a test part that no build has seen. Together means that the plan chooses among all
of them, layer by layer; "no widths" leaves prune out. A family that does not reach the size alone says how far it came.

All families of a case share one store, so that a build is priced once; together comes first, as its table
holds for fewer choices. Seconds are therefore no comparison.
"""

import argparse
import json
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn

from benchmarks import record
from benchmarks.first_light import PIPE_WIDTH
from tersor import api
from tersor.cli.demo.models import CASES, Accuracy, Case, minilm
from tersor.cli.progress import make_progress
from tersor.core.data import SPLITS, Split
from tersor.core.jsonable import to_json
from tersor.core.progress import Progress
from tersor.core.records import Status
from tersor.core.target import Target
from tersor.graph.geometry import output_error

NAME = "families"
SIZE_RATIO = 8.0
QUICK_IMAGES = 500  # of the search, whose looks are most of the time
QUICK_SENTENCES: Mapping[Split, int] = {"calibration": 96, "search": 24, "test": 120}
QUICK_TOKENS = 64
CHANGE_SAMPLES, CHANGE_BATCH = 2000, 50
ALONE = ("quantize", "codebook", "sparsify", "lowrank", "prune")
FAMILIES: Mapping[str, tuple[str, ...]] = {
    "together": ALONE,
    "together, no widths": ALONE[:-1],
    **{name: (name,) for name in ALONE},
}


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
        weight_bytes: Of the file: what holds the weights. The rest is the graph, the build, and the manifest
            with the report, which says more where more was on offer.
        manifest_bytes: Of the file: the manifest with the report.
        search_loss: Of the plan on the search part.
        metric_original, metric_result: On the test part, where the case has a metric.
        agreement: With the original on the test part, in the geometry of the output.
        agreement_p5: Its 5th percentile over samples.
        change: Mean change of the outputs on the first of the test part, by ``graph.geometry``: the divergence
            from the original's classes, or the squared error over the variance. Finer than a metric. None in
            rows from before it was worked out.
        test_samples: How many agreement is from.
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
    weight_bytes: int
    manifest_bytes: int
    search_loss: float | None
    metric_original: float | None
    metric_result: float | None
    agreement: float
    agreement_p5: float
    change: float | None
    test_samples: int
    returned_baseline: bool
    levels: Mapping[str, int]
    made_by: Mapping[str, int]
    binding: str
    seconds: float


def make_case(name: str, *, quick: bool, seed: int) -> Case:
    """One case; if ``quick`` with fewer samples to search on, and of MiniLM in all parts."""
    if name == "minilm":
        return _short(minilm(QUICK_SENTENCES, seed)) if quick else minilm(None, seed)
    case = CASES[name]()
    if not quick or not isinstance(case.metric, Accuracy):
        return case
    images, labels = case.metric.images[:QUICK_IMAGES], case.metric.labels[:QUICK_IMAGES]
    return replace(case, search=(images,), metric=Accuracy(images, labels))


def _short(case: Case) -> Case:
    """The sentences that fit into few tokens, without their padding: less than half of the time."""
    parts: dict[str, dict[str, Tensor]] = {}
    for name in SPLITS:
        inputs = case.part(name)
        assert isinstance(inputs, dict)
        short = inputs["attention_mask"].sum(1) <= QUICK_TOKENS
        parts[name] = {k: v[short][:, :QUICK_TOKENS].contiguous() for k, v in inputs.items()}
    about = f"MiniLM-L6, docstrings of at most {QUICK_TOKENS} tokens of the Python standard library"
    return replace(case, **parts, description=about)  # type: ignore[arg-type]


def row(case: Case, family: str, ratio: float, seed: int, tools: tuple[str, Progress]) -> FamilyRow:
    """Compress a case with one family; ``tools``: the folder of the store, and the progress."""
    methods, begun = FAMILIES[family], time.perf_counter()
    result = api.compress(
        case.model,
        case.data(),
        target=Target(size_ratio=ratio),
        metric=case.metric,
        test_metric=case.test_metric,
        backend="openvino",
        batch=case.batch,
        methods=methods,
        cache_dir=tools[0],
        seed=seed,
        progress=tools[1],
    )
    verdict, plan = result.verdict, result.plan
    size = next(check for check in verdict.checks if check.name == "size_ratio")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.tersor"
        result.save(path)
        parts = stored_bytes(path)
    return FamilyRow(
        case=case.name,
        family=family,
        methods=methods,
        size_ratio=ratio,
        size_check=size.status,
        size_bytes=verdict.size_bytes,
        original_bytes=verdict.original_bytes,
        weight_bytes=parts["weights.safetensors"],
        manifest_bytes=parts["manifest.json"],
        search_loss=plan.measured_error,
        metric_original=verdict.metric_original,
        metric_result=verdict.metric_result,
        agreement=verdict.agreement,
        agreement_p5=verdict.agreement_p5,
        change=change(case, result.module),
        test_samples=verdict.test_samples,
        returned_baseline=verdict.returned_baseline,
        levels=Counter(str(level) for level in plan.assignment.values()),
        made_by=Counter(plan.methods.values()),
        binding=verdict.binding,
        seconds=time.perf_counter() - begun,
    )


def change(case: Case, new: nn.Module) -> float:
    """How far a model's outputs are from the original's on the first samples of the test part."""
    outputs = []
    for model in (new, case.model):
        parts = []
        for start in range(0, min(CHANGE_SAMPLES, case.n_samples("test")), CHANGE_BATCH):
            part = slice(start, start + CHANGE_BATCH)
            with torch.no_grad():
                if isinstance(case.test, dict):
                    parts.append(model(**{k: v[part] for k, v in case.test.items()}))
                else:
                    parts.append(model(*(v[part] for v in case.test)))
        outputs.append(torch.cat(parts))
    return float(output_error(outputs[:1], outputs[1:], case.output).mean())


def stored_bytes(path: Path) -> dict[str, int]:
    """Entry of an artifact -> its bytes in the file."""
    with zipfile.ZipFile(path) as archive:
        return {info.filename: info.compress_size for info in archive.infolist()}


def recorded() -> Iterator[tuple[str, FamilyRow]]:
    """What a run had in common, and each of its rows; the last one of equal ones."""
    path = record.RESULTS / f"{NAME}.jsonl"
    names = [f.name for f in fields(FamilyRow)]
    found: dict[tuple[str, str], FamilyRow] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        known = json.loads(line)
        row = FamilyRow(**{name: known["row"].get(name) for name in names})
        place = f"{known['settings']['data']}; {known['settings']['search']} to search on"
        place += f"; a file {row.size_ratio:g} times smaller; seed {known['seed']}"
        found[place, row.family] = row
    for (place, _), row in found.items():
        yield place, row


def tables() -> str:
    """All that is recorded as Markdown, a part for each model and size."""
    parts: dict[str, list[FamilyRow]] = {}
    for place, found in recorded():
        parts.setdefault(place, []).append(found)
    lines: list[str] = []
    for place, rows in parts.items():
        heads = [
            "family",
            "kB",
            "of it weights",
            "metric",
            "agreement",
            "change",
            "layers by method",
        ]
        lines += [f"\n### {place}", "", "| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
        lines += [
            _line(row) for row in sorted(rows, key=lambda row: list(FAMILIES).index(row.family))
        ]
    return "\n".join(lines)


def _line(row: FamilyRow) -> str:
    missed = "" if row.size_check == "pass" else " (missed)"
    values = [
        row.family,
        f"{row.size_bytes / 1000:.0f}{missed}",
        f"{row.weight_bytes / 1000:.0f}",
        "" if row.metric_result is None else f"{row.metric_result:.4f}",
        f"{row.agreement:.4f}",
        "" if row.change is None else f"{row.change:.2e}",
        ", ".join(f"{count} {name}" for name, count in sorted(row.made_by.items())),
    ]
    return "| " + " | ".join(values) + " |"


def main() -> None:
    """Read the options and run; a JSON line after each family."""
    parser = argparse.ArgumentParser(description="All families under one size, and each alone.")
    parser.add_argument("--case", nargs="*", choices=sorted(CASES), default=["resnet20", "minilm"])
    parser.add_argument("--family", nargs="*", choices=list(FAMILIES), default=list(FAMILIES))
    parser.add_argument("--size-ratio", type=float, default=SIZE_RATIO)
    parser.add_argument("--quick", action="store_true", help="fewer samples")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache-dir", help="a store to go on from; default: a fresh one")
    parser.add_argument("--dry", action="store_true", help="write no results")
    parser.add_argument("--print", action="store_true", help="only print what is recorded")
    options = parser.parse_args()
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console = Console(highlight=False, markup=False, width=PIPE_WIDTH)
    with tempfile.TemporaryDirectory() as fresh:
        for name in () if options.print else options.case:
            case = make_case(name, quick=options.quick, seed=options.seed)
            run(case, options, options.cache_dir or fresh, console)
    print(tables())


def run(case: Case, options: argparse.Namespace, folder: str, console: Console) -> None:
    """The families that are asked for, one after the other."""
    about = {"data": case.description, "search": case.n_samples("search")}
    for family in options.family:
        with closing(make_progress(console)) as progress:
            found = row(case, family, options.size_ratio, options.seed, (folder, progress))
        console.print(json.dumps(to_json(found)))
        if not options.dry:
            record.append(NAME, [found], seed=options.seed, settings=about)


if __name__ == "__main__":
    main()
