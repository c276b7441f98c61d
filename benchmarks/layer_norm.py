"""Two forms of layer norm behind a cut of the residual stream: ``python -m benchmarks.layer_norm``.

An eighth of MiniLM's stream goes. Its norms then either normalise what is left (one fused op, but
the statistics change) or keep the statistics of the whole width (exact: the cut computes what zeros
in its place would). Both are judged without any refit, by the cosine with the original's sentence
embeddings on sentences that chose nothing, and by the latency of their OpenVINO builds.

MiniLM's output is its stream, which may not shrink; an identity layer behind the pooling reads it.
Units are chosen at random, and by group OBS over all that read the stream.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks import record
from tersor.analyse.widths import width_of, width_sites, width_statistics
from tersor.backends.openvino import OpenVINOBackend
from tersor.build.build import shapes_of
from tersor.capture.module import capture
from tersor.capture.samples import Samples, flatten_item
from tersor.cli.demo.models import SEQUENCE, Case, minilm
from tersor.core.records import BuildChoice, Site, Timing
from tersor.graph.axes import Axes, analyse_axes, keep_units
from tersor.graph.axes.gate import check, random_share
from tersor.graph.contracts import Graph
from tersor.methods.prune import Prune
from tersor.observe.statistics import observe
from tersor.timing.protocol import Protocol, measure

NAME = "layer_norm"
SEED = 0
SHARE = 1 / 8  # of the stream's units that go
BATCH = 16
SENTENCES = {"calibration": 128, "search": 8, "test": 500}
FEW = {"calibration": 32, "search": 8, "test": 32}
CAREFUL = Protocol(rounds=9, runs=15, max_seconds=60.0)
QUICK = Protocol(rounds=3, runs=3, max_seconds=10.0)
FORMS = {"fused": False, "exact": True}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One build.

    Attributes:
        form: "whole": nothing is cut; "fused": norms of what is left; "exact": of the whole width.
        order: How the units were chosen.
        cosine: Mean over the test sentences, with the original.
        difference: From the masked model, of the output's scale.
        ops: Nodes that compute.
    """

    form: str
    order: str
    units: int
    cosine: float
    difference: float
    ops: int
    timing: Timing


class Read(nn.Module):
    """A sentence encoder of which the pooled stream is read by a layer: the identity."""

    def __init__(self, bert: nn.Module, width: int) -> None:
        super().__init__()
        self.bert = bert
        self.read = nn.Linear(width, width)
        with torch.no_grad():
            self.read.weight.copy_(torch.eye(width))
            self.read.bias.zero_()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        pooled = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1e-9)
        return functional.normalize(self.read(pooled), dim=1)


def batches(inputs: object) -> list[tuple[Tensor, ...]]:
    """Flat inputs, in the order of the model's arguments."""
    assert isinstance(inputs, dict)
    found = [inputs["input_ids"], inputs["attention_mask"]]
    return [tuple(t[i : i + BATCH] for t in found) for i in range(0, len(found[0]), BATCH)]


def captured(case: Case) -> Graph:
    """The encoder with its reader as a graph."""
    encoder = case.model.get_submodule("bert")
    width = encoder.get_parameter("embeddings.word_embeddings.weight").shape[1]
    assert isinstance(case.calibration, dict)
    call, tensors = flatten_item({k: v[:2] for k, v in case.calibration.items()}, "example")
    return capture(Read(encoder, width).eval(), Samples(call, tensors)).graph


def stream(axes: Axes) -> Site:
    """The widest width that norms run over."""
    sites = width_sites(axes, approximate=True)
    return max((s for s in sites if s.exactness == "approximate"), key=lambda s: s.units)


def chosen(graph: Graph, axes: Axes, site: Site, case: Case) -> dict[str, list[int]]:
    """The units that stay, by each order."""
    width = width_of(axes, site)
    gone = random_share(axes, SHARE, SEED, exact_only=False)[width.name]
    calibration = batches(case.calibration)
    observed = observe(graph, calibration, len(calibration), seed=SEED)
    statistics = width_statistics(axes, site, observed)
    count = site.units - len(gone)
    (best,) = (
        c for c in Prune(counts=lambda _: [count]).propose(site, statistics) if c.level == count
    )
    return {
        "random": [i for i in range(site.units) if i not in set(gone)],
        "OBS": list(best.detail["kept"]),
    }


def cosine(graph: Graph, original: Graph, case: Case) -> float:
    """Mean over the test sentences."""
    found = [
        functional.cosine_similarity(graph.run(flat)[0], original.run(flat)[0], dim=1)
        for flat in batches(case.test)
    ]
    return float(torch.cat(found).mean())


def latencies(graphs: Mapping[str, Graph], case: Case, protocol: Protocol) -> dict[str, Timing]:
    """All builds in one interleaved measurement: one sentence, one thread, float32."""
    choice = BuildChoice(backend="openvino")
    assert isinstance(case.test, dict)
    arrays = {k: v[:1].numpy() for k, v in case.test.items()}
    calls = {}
    for name, graph in graphs.items():
        built = OpenVINOBackend().build(graph, shapes_of(graph.signature, 1), choice)
        calls[name] = partial(built.run, arrays)
    return measure(calls, protocol)


def ops(graph: Graph) -> int:
    return sum(n.op == "call_function" for n in graph.module.graph.nodes)


def rows(case: Case, protocol: Protocol) -> Sequence[Row]:
    """The original and both forms of both choices."""
    graph = captured(case)
    axes = analyse_axes(graph)
    site = stream(axes)
    keep = chosen(graph, axes, site, case)
    graphs = {("whole", ""): graph}
    differences = {("whole", ""): 0.0}
    for order, units in keep.items():
        for form, exact in FORMS.items():
            name = site.width
            cut = keep_units(graph, axes, {name: units}, exact_norms=exact)
            gone = {name: [i for i in range(site.units) if i not in set(units)]}
            report = check(graph, axes, gone, exact_norms=exact, inputs=batches(case.test)[0])
            graphs[form, order] = cut
            differences[form, order] = report.difference
    timings = latencies({" ".join(k): g for k, g in graphs.items()}, case, protocol)
    return [
        Row(
            form=form,
            order=order,
            units=len(keep[order]) if order else site.units,
            cosine=cosine(found, graph, case),
            difference=differences[form, order],
            ops=ops(found),
            timing=timings[f"{form} {order}"],
        )
        for (form, order), found in graphs.items()
    ]


def main() -> None:
    """Print and keep all rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few sentences and runs; keeps no row")
    quick = parser.parse_args().quick
    case = minilm(FEW if quick else SENTENCES, SEED)
    found = rows(case, QUICK if quick else CAREFUL)
    for row in found:
        print(
            f"{row.form:6s} {row.order:7s} {row.units:4d} units  cosine {row.cosine:.4f}  "
            f"from the mask {row.difference:.1e}  {row.ops:4d} ops  "
            f"{row.timing.median_ms:.2f} ms ({row.timing.low_ms:.2f} to {row.timing.high_ms:.2f})"
        )
    if not quick:
        settings = {"share": SHARE, "sequence": SEQUENCE, "sentences": SENTENCES}
        record.append(NAME, found, seed=SEED, settings=settings)


if __name__ == "__main__":
    main()
