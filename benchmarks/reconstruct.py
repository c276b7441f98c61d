"""What label-free block reconstruction gains: ``python -m benchmarks.reconstruct [--case ...]``.

ResNet-20 on Fashion-MNIST at a half and a quarter of its multiply-accumulates (our planned widths,
and the same share of every width inside of a block), MiniLM at half of the neurons of every layer.
Each is cut and refitted in closed form, then trained towards the original's own outputs: block by
block, and then all blocks together. No labels are read but by the accuracy at the end.

    closed form  refit front to back, ReLU-aware, the classifier to the original's softmax
    blocks       and all seconds on blocks
    both         and half of them on blocks, half on all together

The clock is the wall's, or with ``--cpu-clock`` the processor time of one thread, for machines
that others use; the number of steps stands in each row. ``--steps`` makes so many of each part.
"""

import argparse
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks import record
from benchmarks.prune import SEED, Pruner, accuracy, read, total_macs, uniform
from tersor.analyse.widths import width_sites, width_statistics
from tersor.capture.module import capture
from tersor.capture.samples import Samples, flatten_item
from tersor.cli.demo.models import minilm
from tersor.core.records import OutputKind
from tersor.core.recovery import PartRecovery, Recover
from tersor.graph.axes import Axes, analyse_axes
from tersor.graph.axes.matching import counterparts
from tersor.graph.axes.slicing import gone_from
from tersor.graph.contracts import Graph
from tersor.methods.prune import Prune
from tersor.observe.statistics import observe
from tersor.recover.blocks import Hooks, reconstruct
from tersor.recover.goals import Teacher
from tersor.transform.narrow import NarrowConfig, narrow
from tests.data.zoo import load_resnet20

NAME = "reconstruct"
IMAGES, SEARCH_IMAGES = 2400, 500  # of the 4,096 that a session keeps, 60 % calibrate
SENTENCES = {"calibration": 256, "search": 64, "test": 500}
STEP = 2  # between counts of channels that are measured
WAYS: Mapping[str, float] = {"blocks": 0.0, "both": 0.5}  # share of the budget for the whole
SHARES = (0.5, 0.25)

Score = Callable[[Graph], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One model after one way.

    Attributes:
        score: Percent of the test images that are right, or mean cosine over the test sentences.
        base_score: Of the original.
        error_before, error_after: On calibration samples that no step read.
        seconds: Of the reconstruction, by the clock that the settings name.
        wall_seconds: What it took beside whatever else ran.
    """

    model: str
    widths_by: str
    share: float
    macs_share: float
    way: str
    score: float
    base_score: float
    error_before: float | None = None
    error_after: float | None = None
    seconds: float = 0.0
    wall_seconds: float = 0.0
    steps: int = 0
    samples: int = 0
    parts: tuple[PartRecovery, ...] = ()
    units: Mapping[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """A model that lost units, refitted in closed form.

    Attributes:
        inputs: Flat inputs of the calibration part.
        apart: Those that decide what is kept: the refit has not read them.
        score: What is reported of a graph.
    """

    model: str
    widths_by: str
    share: float
    graph: Graph
    axes: Axes
    keep: Mapping[str, Sequence[int]]
    small: Graph
    kind: OutputKind
    inputs: tuple[Tensor, ...]
    apart: tuple[Tensor, ...]
    score: Score
    base_score: float


def reconstructed(cut: Cut, config: Recover, *, cpu_clock: bool = False) -> tuple[Graph, Row]:
    """A cut model after reconstruction, and its row; ``config.whole`` says which way."""
    known = counterparts(cut.axes, cut.axes.removed(gone_from(cut.axes, cut.keep)))
    teacher = Teacher(graph=cut.graph, kind=cut.kind, counterparts=known)
    count, size = len(cut.inputs[0]), config.batch
    batches = [tuple(t[i : i + size] for t in cut.inputs) for i in range(0, count, size)]
    others = range(0, len(cut.apart[0]), size)
    apart = [tuple(t[i : i + size] for t in cut.apart) for i in others]
    hooks = Hooks(clock=time.process_time if cpu_clock else time.monotonic)
    begun = time.monotonic()
    found = reconstruct(teacher, cut.small, batches, config, seed=SEED, hooks=hooks, apart=apart)
    wall = time.monotonic() - begun
    done = found.recovery
    way = next((w for w, share in WAYS.items() if share == config.whole), f"{config.whole} whole")
    row = Row(
        model=cut.model,
        widths_by=cut.widths_by,
        share=cut.share,
        macs_share=total_macs(cut.small) / total_macs(cut.graph),
        way=way,
        score=cut.score(found.graph),
        base_score=cut.base_score,
        error_before=done.before,
        error_after=done.after,
        seconds=done.seconds,
        wall_seconds=wall,
        steps=done.steps,
        samples=done.samples + done.held_out,
        parts=done.parts,
        units={name: len(units) for name, units in cut.keep.items()},
    )
    return found.graph, row


def closed_form(cut: Cut) -> Row:
    """The row of a cut model as it is."""
    return Row(
        model=cut.model,
        widths_by=cut.widths_by,
        share=cut.share,
        macs_share=total_macs(cut.small) / total_macs(cut.graph),
        way="closed form",
        score=cut.score(cut.small),
        base_score=cut.base_score,
        samples=len(cut.inputs[0]),
        units={name: len(units) for name, units in cut.keep.items()},
    )


def resnet_cuts(images: int = IMAGES) -> Iterator[Cut]:
    """ResNet-20 at every share, by both ways to choose its widths."""
    train, _ = read("train")
    train = train[torch.randperm(len(train), generator=torch.Generator().manual_seed(SEED))]
    test = read("t10k")
    calibration = train[:images]
    pruner = Pruner(load_resnet20(), calibration, train[images : images + SEARCH_IMAGES], step=STEP)

    def score(graph: Graph) -> float:
        return accuracy(lambda x: graph.run([x])[0], *test)

    base = score(pruner.graph)
    for share in SHARES:
        ways = {"plan": pruner.planned(share), "uniform": uniform(pruner, share)}
        for name, keep in ways.items():
            yield Cut(
                model="resnet20",
                widths_by=name,
                share=share,
                graph=pruner.graph,
                axes=pruner.axes,
                keep=keep,
                small=pruner.pruned(keep),
                kind="logits",
                inputs=(calibration,),
                apart=(train[images : images + SEARCH_IMAGES],),
                score=score,
                base_score=base,
            )


def minilm_cuts(sentences: Mapping[str, int] = SENTENCES, share: float = 0.5) -> Iterator[Cut]:
    """MiniLM with a share of the neurons of every layer."""
    case = minilm(sentences, SEED)  # type: ignore[arg-type]
    assert isinstance(case.calibration, dict)
    call, example = flatten_item({k: v[:2] for k, v in case.calibration.items()}, "example")
    graph = capture(case.model, Samples(call, example)).graph
    axes = analyse_axes(graph)
    inputs = flatten_item(case.calibration, "calibration")[1]
    tests = flatten_item(case.test, "test")[1]
    apart = flatten_item(case.search, "search")[1]
    batches = [tuple(t[i : i + 32] for t in inputs) for i in range(0, len(inputs[0]), 32)]
    observed = observe(graph, batches, len(batches), seed=SEED)
    keep: dict[str, list[int]] = {}
    for site in width_sites(axes):
        if site.unit_kind != "neurons" or len(site.ops) != 1:
            continue
        count = round(share * site.units)
        offered = Prune(counts=lambda _, count=count: (count,)).propose(
            site, width_statistics(axes, site, observed)
        )
        keep[site.width] = list(next(c for c in offered if c.level == count).detail["kept"])
    small = narrow(graph, axes, keep, batches, NarrowConfig(kind="embedding")).graph

    def score(found: Graph) -> float:
        cosines = []
        for i in range(0, len(tests[0]), 32):
            flat = tuple(t[i : i + 32] for t in tests)
            pair = found.run(flat)[0], graph.run(flat)[0]
            cosines.append(functional.cosine_similarity(*pair, dim=1))
        return float(torch.cat(cosines).mean())

    yield Cut(
        model="minilm",
        widths_by="half of every layer" if share == 0.5 else f"{share} of every layer",
        share=share,
        graph=graph,
        axes=axes,
        keep=keep,
        small=small,
        kind="embedding",
        inputs=inputs,
        apart=apart,
        score=score,
        base_score=1.0,
    )


def shown(row: Row) -> str:
    """One line."""
    text = (
        f"{row.model:9s} {row.widths_by:20s} {row.macs_share:6.1%} of MACs  {row.way:12s} "
        f"{row.score:8.4f} (base {row.base_score:.4f})"
    )
    if row.steps:
        text += f"  {row.steps} steps, {row.seconds:.0f} s ({row.wall_seconds:.0f} s wall)"
    return text


def main() -> None:
    """Print and keep all rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", choices=("resnet20", "minilm"), help="default: both")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--steps", type=int, help="of each part, in place of seconds")
    parser.add_argument("--cpu-clock", action="store_true", help="seconds of processor time")
    parser.add_argument("--quick", action="store_true", help="few samples; keeps no row")
    options = parser.parse_args()
    cases: dict[str, Callable[[], Iterator[Cut]]] = {
        "resnet20": lambda: resnet_cuts(256 if options.quick else IMAGES),
        "minilm": lambda: minilm_cuts(
            {"calibration": 32, "search": 8, "test": 32} if options.quick else SENTENCES
        ),
    }
    batch = {"resnet20": 64, "minilm": 16}
    clock = "processor time" if options.cpu_clock else "wall"
    for name, cuts in cases.items():
        if options.case not in (None, name):
            continue
        for cut in cuts():
            rows = [closed_form(cut)]
            print(shown(rows[0]), flush=True)
            for share in WAYS.values():
                config = Recover(
                    seconds=options.seconds, steps=options.steps, batch=batch[name], whole=share
                )
                rows.append(reconstructed(cut, config, cpu_clock=options.cpu_clock)[1])
                print(shown(rows[-1]), flush=True)
            if not options.quick:
                assert all(math.isfinite(row.score) for row in rows)
                settings = {"seconds": options.seconds, "steps": options.steps, "clock": clock}
                record.append(NAME, rows, seed=SEED, settings=settings)


if __name__ == "__main__":
    main()
