"""Pruning without training, at equal multiply-accumulates, beside Torch-Pruning.

    python -m benchmarks.prune [--quick] [--only resnet20 | lenet5]

Kept counts come from the plan with MACs as its table, on a grid of one unit; weights from the
sequential refit on unlabelled images; of LeNet-5 also with the cut layer and its reader fitted
together on more of them. Torch-Pruning prunes the same model one-shot, each row also with its batch
norm statistics re-estimated on the same images. Accuracy is on the 10,000 test images, which
nothing else sees. Needs Debian's dataset-fashion-mnist.
"""

import argparse
import copy
import gzip
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import record
from tersor.analyse.widths import width_of, width_sites, width_statistics
from tersor.capture.module import capture
from tersor.capture.samples import Samples, flatten_item
from tersor.core.records import WIDTH_PREFIX, Candidate, Site
from tersor.graph.axes import Axes, analyse_axes
from tersor.graph.axes.gate import require
from tersor.graph.axes.macs import node_macs
from tersor.graph.axes.slicing import gone_from
from tersor.graph.contracts import Graph
from tersor.graph.operators import weighted_ops
from tersor.methods.prune import Prune
from tersor.observe.statistics import observe
from tersor.plan.macs import Product, least_error, macs_table
from tersor.propose.widths import measure_widths
from tersor.transform.narrow import NarrowConfig, narrow
from tersor.transform.pairs import fit_pairs
from tests.data.zoo import load_lenet5, load_resnet20

DATA = Path("/usr/share/datasets/fashion-mnist")
SEED = 0
PAIR_IMAGES, PAIR_ITERATIONS = 20_000, 100
BATCH = 250


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One pruned model."""

    model: str
    method: str
    share: float  # of the original's MACs that was asked for, or of the neurons
    macs: int
    base_macs: int
    accuracy: float  # percent of the test images
    base_accuracy: float
    seconds: float
    images: int
    widths: Mapping[str, int]


def read(kind: str) -> tuple[Tensor, Tensor]:
    """Normalised images and labels."""
    names = (f"{kind}-images-idx3-ubyte.gz", f"{kind}-labels-idx1-ubyte.gz")
    pixels, labels = (gzip.decompress((DATA / name).read_bytes()) for name in names)
    x = np.frombuffer(pixels, np.uint8, offset=16).reshape(-1, 1, 28, 28).astype(np.float32)
    y = np.frombuffer(labels, np.uint8, offset=8).astype(np.int64)
    return torch.from_numpy((x / 255 - 0.2860) / 0.3530), torch.from_numpy(y)


def accuracy(predict: object, images: Tensor, labels: Tensor) -> float:
    """Percent of images whose top class is right."""
    assert callable(predict)
    with torch.no_grad():
        hits = sum(
            int((predict(images[i : i + 500]).argmax(1) == labels[i : i + 500]).sum())
            for i in range(0, len(images), 500)
        )
    return 100 * hits / len(images)


def captured(model: nn.Module, images: Tensor) -> tuple[Graph, Axes]:
    """The model as a graph with its widths."""
    call, tensors = flatten_item(images[:2], "example")
    graph = capture(model, Samples(call, tensors)).graph
    return graph, analyse_axes(graph)


def total_macs(graph: Graph) -> int:
    """Of one sample."""
    batch = len(graph.example[0])
    return sum(node_macs(graph, n) for n in graph.module.graph.nodes) // batch


def products(axes: Axes, sites: Sequence[Site]) -> list[Product]:
    """MACs of every linear map as a product of the widths that it joins."""
    units = {s.name: s.units for s in sites}
    places: dict[tuple[str, int], str] = {}
    for site in sites:
        for coupling in width_of(axes, site).couplings:
            places[coupling.tensor, coupling.dim] = site.name
    found = []
    for op in weighted_ops(axes.graph.module):
        met = [places.get((str(op.weight.target), d)) for d in (0, 1)]
        names = tuple(dict.fromkeys(n for n in met if n is not None))
        macs = node_macs(axes.graph, op.node) / len(axes.graph.example[0])
        found.append(
            Product(op=op.node.name, factor=macs / np.prod([units[n] for n in names]), sites=names)
        )
    return found


class Pruner:
    """One model's statistics, candidates and errors: all shares are planned from them."""

    def __init__(self, model: nn.Module, calibration: Tensor, search: Tensor, step: int) -> None:
        self.graph, self.axes = captured(model, calibration)
        self.batches = [(calibration[i : i + BATCH],) for i in range(0, len(calibration), BATCH)]
        observed = observe(self.graph, self.batches, len(self.batches), seed=SEED)
        self.sites = width_sites(self.axes)
        method = Prune(
            counts=lambda s: {*range(step, s.units, step), *((50,) if s.units == 500 else ())}
        )
        statistics = {s.name: width_statistics(self.axes, s, observed) for s in self.sites}
        offered = [(s, c) for s in self.sites for c in method.propose(s, statistics[s.name])]
        changes = [(c, method.apply(s, c, statistics[s.name])) for s, c in offered]
        self.candidates = measure_widths(
            self.axes,
            changes,
            statistics,
            {name: o.moments for name, o in observed.items()},
            [(search[i : i + BATCH],) for i in range(0, len(search), BATCH)],
            kind="logits",
        )

    def planned(self, share: float) -> dict[str, list[int]]:
        """Width -> kept units of the least sum of errors within a share of the MACs."""
        by_site: dict[str, list[Candidate]] = {}
        for candidate in self.candidates:
            by_site.setdefault(candidate.site, []).append(candidate)
        native = {s.name: s.units for s in self.sites}
        table = macs_table(products(self.axes, self.sites), by_site, native)
        solution = least_error(by_site, table, share * total_macs(self.graph))
        return self.kept(solution.assignment)

    def kept(self, assignment: Mapping[str, object]) -> dict[str, list[int]]:
        """Width -> kept units of an assignment."""
        details = {(c.site, c.level): c.detail for c in self.candidates}
        return {
            site.removeprefix(WIDTH_PREFIX): list(details[site, level]["kept"])  # type: ignore[index]
            for site, level in assignment.items()
            if "kept" in details[site, level]  # type: ignore[index]
        }

    def pruned(self, keep: Mapping[str, Sequence[int]]) -> Graph:
        """Checked by the law, then cut and refitted."""
        require(self.graph, self.axes, gone_from(self.axes, keep))
        config = NarrowConfig(kind="logits")
        return narrow(self.graph, self.axes, keep, self.batches, config).graph

    def together(
        self, small: Graph, keep: Mapping[str, Sequence[int]], images: Tensor, iterations: int
    ) -> Graph:
        """Pairs of layers fitted once more, on more images."""
        batches = [(images[i : i + BATCH],) for i in range(0, len(images), BATCH)]
        return fit_pairs(self.graph, small, self.axes, keep, batches, iterations=iterations)


def uniform(pruner: Pruner, share: float) -> dict[str, list[int]]:
    """The same share of every width inside a block; the streams stay whole."""
    inner = [s for s in pruner.sites if len(s.ops) == 1]
    return pruner.kept({s.name: max(1, round(s.units * share)) for s in inner})


def torch_pruning_rows(
    model: nn.Module, ratio: float, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]
) -> Iterable[tuple[str, float, int, float]]:
    """(method, accuracy, MACs, seconds): one-shot, and with batch norm re-estimated.

    Its Taylor importance needs labels, which ours does without: it gets the true ones.
    """
    import torch_pruning as tp

    for name in ("group norm", "Taylor"):
        start = time.perf_counter()
        net = copy.deepcopy(model)
        images, labels = train
        example = images[:2]
        importance = (
            tp.importance.GroupMagnitudeImportance(p=2)
            if name == "group norm"
            else tp.importance.GroupTaylorImportance()
        )
        head = [m for m in net.modules() if isinstance(m, nn.Linear)][-1:]
        base, _ = tp.utils.count_ops_and_params(net, example[:1])
        pruner = tp.pruner.BasePruner(
            net,
            example,
            importance=importance,
            pruning_ratio=0.95,
            iterative_steps=100,
            ignored_layers=head,
            global_pruning=True,
        )
        macs = base
        while macs > base * ratio and pruner.current_step < 100:
            if name == "Taylor":
                net.zero_grad()
                for i in range(0, 1000, BATCH):
                    logits = net(images[i : i + BATCH])
                    nn.functional.cross_entropy(logits, labels[i : i + BATCH]).backward()
            pruner.step()
            macs, _ = tp.utils.count_ops_and_params(net, example[:1])
        net.eval()
        yield f"Torch-Pruning {name}", accuracy(net, *test), int(macs), time.perf_counter() - start
        reestimate_(net, images)
        seconds = time.perf_counter() - start
        yield f"Torch-Pruning {name} + batch norm", accuracy(net, *test), int(macs), seconds


def reestimate_(net: nn.Module, images: Tensor) -> None:
    """Batch norm statistics of the images themselves."""
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    net.train()
    with torch.no_grad():
        for i in range(0, len(images), BATCH):
            net(images[i : i + BATCH])
    net.eval()


def resnet_rows(
    labelled: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], shares: Sequence[float]
) -> Iterable[Row]:
    """ResNet-20 at half and at a quarter of its MACs."""
    model, train = load_resnet20(), labelled[0]
    base = accuracy(model, *test)
    start = time.perf_counter()
    pruner = Pruner(model, train[:1000], train[1000:1500], step=1)
    prepared = time.perf_counter() - start
    whole = total_macs(pruner.graph)
    for share in shares:
        ways = {"ours, planned": pruner.planned(share), "ours, uniform": uniform(pruner, share)}
        for method, keep in ways.items():
            start = time.perf_counter()
            graph = pruner.pruned(keep)
            yield Row(
                model="resnet20",
                method=method,
                share=share,
                macs=total_macs(graph),
                base_macs=whole,
                accuracy=accuracy(lambda x, g=graph: g.run([x])[0], *test),
                base_accuracy=base,
                seconds=time.perf_counter() - start + prepared,
                images=1500,
                widths={name: len(units) for name, units in keep.items()},
            )
        for method, found, macs, seconds in torch_pruning_rows(
            model, share, (train[:4000], labelled[1][:4000]), test
        ):
            yield Row(
                model="resnet20",
                method=method,
                share=share,
                macs=macs,
                base_macs=whole,
                accuracy=found,
                base_accuracy=base,
                seconds=seconds,
                images=4000,
                widths={},
            )


def lenet_rows(train: Tensor, test: tuple[Tensor, Tensor]) -> Iterable[Row]:
    """LeNet-5 without most of its 500 neurons."""
    model = load_lenet5()
    base = accuracy(model, *test)
    pruner = Pruner(model, train[:4000], train[4000:4500], step=25)
    (site,) = [s for s in pruner.sites if s.units == 500]
    more = train[:PAIR_IMAGES]
    for count in (250, 125, 50):
        keep = pruner.kept({site.name: count})
        begun = time.perf_counter()
        small = pruner.pruned(keep)
        cut = time.perf_counter()
        both = pruner.together(small, keep, more, PAIR_ITERATIONS)
        done = time.perf_counter()
        for method, graph, seconds, images in (
            ("ours", small, cut - begun, 4000),
            ("ours, layers fitted together", both, done - begun, len(more)),
        ):
            yield Row(
                model="lenet5",
                method=method,
                share=count / 500,
                macs=total_macs(graph),
                base_macs=total_macs(pruner.graph),
                accuracy=accuracy(lambda x, g=graph: g.run([x])[0], *test),
                base_accuracy=base,
                seconds=seconds,
                images=images,
                widths={name: len(units) for name, units in keep.items()},
            )


def main() -> None:
    """Print and keep all rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="2,000 test images")
    parser.add_argument("--only", choices=("resnet20", "lenet5"), help="one model; default: both")
    options = parser.parse_args()
    quick = options.quick
    train, train_labels = read("train")
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(SEED))
    train, train_labels = train[order], train_labels[order]
    few = train[:6000], train_labels[:6000]
    images, labels = read("t10k")
    test = (images[:2000], labels[:2000]) if quick else (images, labels)
    found: list[Iterable[Row]] = []
    if options.only != "lenet5":
        found.append(resnet_rows(few, test, (0.5, 0.25)))
    if options.only != "resnet20":
        found.append(lenet_rows(train, test))
    for row in chain(*found):
        print(
            f"{row.model:9s} {row.method:36s} {row.macs / row.base_macs:6.1%} of MACs "
            f"{row.accuracy:6.2f} % (base {row.base_accuracy:.2f}) {row.seconds:6.1f} s",
            flush=True,
        )
        if not quick:  # a row at a time: an interruption loses one
            record.append("prune", [row], seed=SEED)


if __name__ == "__main__":
    main()
