"""How far prices are off: ``python -m benchmarks.prices [--case ...] [--backend ...]``.

Builds that no fit saw, of random widths (whole tiles and others) and formats, are drawn by seed
before anything is measured. The table comes from as many builds as ``tersor.compress`` makes, all
on the grid of kept counts that it offers; most counts of the tests are on no such grid. Latency
does not depend on the values of weights, so that models of torchvision have random ones, and units
are cut and weights rounded in the simplest way.

Beside it: the noise floor (the same models compiled three times), and what the literature does, a
sum of layers measured one by one, which gets the best common scale on the builds of the fit.
"""

import argparse
import gc
import pickle
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

import tersor
from benchmarks import record
from tersor.analyse.additions import own_operands
from tersor.api.latency import measure_calls
from tersor.api.session import Session, Settings, open_session
from tersor.api.shrink import Changes, facts_of, sketched
from tersor.api.stages import PRICING, Runs
from tersor.build.build import shapes_of
from tersor.core.records import BuildChoice, Level, Precision, PriceTable, Site
from tersor.graph.apply import quantize_node_name
from tersor.graph.contracts import Executable, Quantizer, SiteChange
from tersor.graph.edit import attribute
from tersor.ops.grids import round_nearest
from tersor.price.facts import WidthFacts
from tersor.price.observation import Observation
from tersor.price.observing import observe_builds
from tersor.price.price import PriceConfig, between_offers, width_facts
from tersor.price.table import fit_table
from tersor.price.tools import PriceTools
from tersor.price.variants import Variant, draw_variants
from tersor.timing.protocol import Protocol, measure
from tests.conformance.zoo.torchvision_shim import import_torchvision

NAME = "prices"
SEED = 0
TESTS = 24
EXTRA = 6  # counts of a width beside its grid, half of them on whole tiles
# Of a test's counts, from the least to the largest: mostly narrow, of all kinds, mostly wide, so that
# the tests span a factor of two in latency also where little of a model has widths.
PARTS = (
    (slice(0, 2), 0.05),
    (slice(None), 0.3),
    (slice(-2, None), 0.5),
)  # counts, share of full widths
COMPILES = 3
EXTREMES = 6  # builds of the fit that scale a sum of single layers: native and int8, three counts
CAREFUL = Protocol(rounds=7, runs=11, max_seconds=14.0, one_speed=True)
ISOLATED = Protocol(rounds=3, runs=15, max_seconds=5.0)
IMAGES = (3, 224, 224)
STORE = Path(tempfile.gettempdir()) / "tersor-prices"  # nothing of it is found again


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One model on one backend.

    Attributes:
        median, p90: Of |predicted / measured - 1| over the tests.
        isolated_median, isolated_p90, isolated_spearman: The same of a sum of single layers.
        span: The slowest test over the fastest.
        unseen: Share of the kept counts below full that no build of the fit has.
        noise: Median and largest difference of a build compiled again, of its latency.
        seconds: To make the table, without the tests.
    """

    model: str
    backend: str
    choice: str
    fitted: int
    tests: int
    median: float
    p90: float
    spearman: float
    span: float
    unseen: float
    noise: tuple[float, float] = (0.0, 0.0)
    seconds: float = 0.0
    isolated_median: float | None = None
    isolated_p90: float | None = None
    isolated_spearman: float | None = None
    predicted_ms: tuple[float, ...] = ()
    measured_ms: tuple[float, ...] = ()


def resnet18() -> tuple[nn.Module, Any]:
    """torchvision's, random weights."""
    models = import_torchvision().models

    return models.resnet18(), torch.randn(40, *IMAGES)


def resnet50() -> tuple[nn.Module, Any]:
    """torchvision's, random weights."""
    models = import_torchvision().models

    return models.resnet50(), torch.randn(40, *IMAGES)


def mobilenet_v2() -> tuple[nn.Module, Any]:
    """torchvision's, random weights."""
    models = import_torchvision().models

    return models.mobilenet_v2(), torch.randn(40, *IMAGES)


def vit_s() -> tuple[nn.Module, Any]:
    """ViT-S/16 of torchvision's class, random weights."""
    model = import_torchvision().models.VisionTransformer(
        image_size=224, patch_size=16, num_layers=12, num_heads=6, hidden_dim=384, mlp_dim=1536
    )
    return model, torch.randn(40, *IMAGES)


def minilm() -> tuple[nn.Module, Any]:
    """MiniLM-L6's architecture, random weights, at a sequence of 128."""
    from transformers import BertConfig, BertModel

    from tersor.cli.demo.models import SEQUENCE, SentenceEncoder

    config = BertConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
    )
    ids = torch.randint(1000, config.vocab_size, (40, SEQUENCE))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return SentenceEncoder(BertModel(config, add_pooling_layer=False)), inputs


def resnet20() -> tuple[nn.Module, Any]:
    """The small one for Fashion-MNIST: a fraction of a millisecond a call."""
    from tersor.cli.demo import models

    return models.resnet20().model, torch.randn(40, 1, 28, 28)


def encoder() -> tuple[nn.Module, Any]:
    """MiniLM-L6 without the package of its architecture, random weights: for a card."""
    from benchmarks.gpu_compress import LENGTH, WORDS, MiniLM

    ids = torch.randint(1000, WORDS, (64, LENGTH))
    return MiniLM(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def vit() -> tuple[nn.Module, Any]:
    """The ViT of ``gpu_compress``, 192 wide, random weights: for a card."""
    from benchmarks.gpu_compress import Vit

    return Vit(), torch.randn(64, 1, 28, 28)


CASES: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "resnet18": resnet18,
    "mobilenet_v2": mobilenet_v2,
    "resnet50": resnet50,
    "vit_s": vit_s,
    "minilm": minilm,
    "resnet20": resnet20,
    "encoder": encoder,
    "vit": vit,
}
ON_CARDS = ("encoder", "vit")
DEFAULT = [name for name in CASES if name not in ON_CARDS]


def opened(name: str, backend: str, device: str, batch: int) -> Session:
    """A session on a model with a few samples."""
    torch.manual_seed(SEED)
    model, inputs = CASES[name]()
    data = tersor.Data(inputs if isinstance(inputs, list) else [inputs], output="values")
    settings = Settings(
        backend=backend, device=device, batch=batch, progress=False, cache_dir=STORE
    )
    return open_session(model.eval(), data, settings)


def format_levels(session: Session, choice: BuildChoice) -> dict[str, tuple[Level, ...]]:
    """Formats of the layers and additions that ``compress`` prices in int8 on this build."""
    runs = Runs(session.backends, session.graph, session.sites)
    found: dict[str, tuple[Level, ...]] = {}
    for site in (*session.formats, *session.additions):
        is_layer = site.pinned is None and site.op_kind != "embedding"
        if is_layer and runs(choice, site.name, "int8"):
            found[site.name] = (choice.precision, "int8")
    return found


def grid_levels(session: Session) -> dict[str, tuple[Level, ...]]:
    """The kept counts that ``compress`` offers."""
    counts = session.methods["prune"].counts  # type: ignore[attr-defined]
    return {s.name: counts(s) for s in session.widths if s.pinned is None and len(counts(s)) > 1}


def other_levels(
    grid: Mapping[str, Sequence[Level]], rng: np.random.Generator
) -> dict[str, tuple[int, ...]]:
    """Counts between the grid's: half on multiples of eight, half on none."""
    found: dict[str, tuple[int, ...]] = {}
    for width, counts in grid.items():
        known = [int(c) for c in counts]
        rest = sorted(set(range(min(known), max(known))) - set(known))
        even = [n for n in rest if n % 8 == 0]
        odd = [n for n in rest if n % 8]
        picked: list[int] = []
        for pool in (even, odd):
            size = min(len(pool), EXTRA // 2)
            picked += [int(n) for n in rng.choice(pool, size, replace=False)] if size else []
        found[width] = tuple(sorted(picked)) or tuple(known[1:])
    return found


def draw_tests(
    session: Session,
    formats: Mapping[str, Sequence[Level]],
    grid: Mapping[str, Sequence[Level]],
    others: Mapping[str, Sequence[int]],
    choice: BuildChoice,
    seed: int,
) -> list[Variant]:
    """Formats as pricing draws them, counts from between the grid."""
    rng = np.random.default_rng([seed, 77])
    drawn = draw_variants(
        session.sites, formats, choice.precision, k=2, held_out=TESTS, seed=seed + 1000
    )
    rows = [v.assignment for v in drawn if v.held_out]
    pure = [{s: levels[-1] for s, levels in formats.items()}, {}]  # plans often are one of these
    assignments: list[dict[str, Level]] = []
    for i in range(TESTS):
        base: dict[str, Level] = dict(drawn[0].assignment)
        base |= pure[i % 2] if i % 4 == 0 or not rows else dict(rows[i % len(rows)])
        part, full_share = PARTS[int(rng.integers(len(PARTS)))]
        for width, counts in others.items():
            full = int(grid[width][0])  # type: ignore[arg-type]
            some = counts[part] or counts
            base[width] = full if rng.random() < full_share else int(rng.choice(some))
        assignments.append(base)
    return [Variant(assignment=a, held_out=True) for a in assignments]


def ranges(session: Session) -> dict[str, tuple[float, float]]:
    """Smallest and largest value of every node's tensor, on one batch."""
    found: dict[str, tuple[float, float]] = {}

    class Watch(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            out = super().run_node(n)
            if isinstance(out, Tensor) and out.is_floating_point() and out.numel():
                found[n.name] = (float(out.min()), float(out.max()))
            return out

    with torch.no_grad():
        Watch(session.graph.module).run(*session.flat("calibration", 2))
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Simple:
    """The simplest changes: first units stay, weights are rounded to the nearest."""

    session: Session
    int8: Mapping[str, SiteChange]

    def changes(self, assignment: Mapping[str, Level]) -> Changes:
        """Of an assignment."""
        widths = []
        for site in self.session.widths:
            count = assignment.get(site.name, site.units)
            if count != site.units:
                units = torch.arange(int(count))  # type: ignore[arg-type]
                widths.append(SiteChange(site=site, level=count, kept=units))
        formats = [self.int8[s] for s, level in assignment.items() if level == "int8"]
        return Changes(formats=tuple(formats), widths=tuple(widths))


def simple(session: Session, formats: Mapping[str, Sequence[Level]], limit: int) -> Simple:
    """Changes with grids from the ranges of one batch."""
    seen = ranges(session)
    quantizers: dict[str, Quantizer] = {}
    int8: dict[str, SiteChange] = {}
    for site in session.formats:
        if site.name not in formats:
            continue
        assert site.tensor is not None
        if site.tensor not in quantizers:
            quantizers[site.tensor] = _quantizer(*seen[site.tensor])
        weight = attribute(session.graph.module, site.weight).detach().double()
        rows = weight.reshape(1, weight.shape[0], -1)
        step = (rows.abs().amax(2) / limit).clamp(min=1e-12)
        int8[site.name] = SiteChange(
            site=site,
            level="int8",
            codes=round_nearest(rows, step, limit).reshape(weight.shape),
            scale=step.reshape(-1).float(),
            quantizer=quantizers[site.tensor],
        )
    own = own_operands(session.graph, session.additions, session.formats)
    nodes = {node.name: node for node in session.graph.module.graph.nodes}
    for site in session.additions:
        read = [a.name for a in nodes[site.ops[0]].all_input_nodes]
        int8[site.name] = SiteChange(
            site=site,
            level="int8",
            operands={t: quantizers[t] for t in read if t in quantizers}
            | {t: _quantizer(*seen[t]) for t in own[site.name]},
        )
    return Simple(session=session, int8=int8)


def _quantizer(low: float, high: float) -> Quantizer:
    step = max(high / 255, 1e-6) if low >= 0 else max(-low, high) / 127
    grid = (0, 255) if low >= 0 else (-128, 127)
    return Quantizer(step=step, low=grid[0], high=grid[1])


def make_tools(session: Session, made: Simple, choice: BuildChoice) -> PriceTools:
    """Pricing as ``compress`` does it, with the simple changes."""

    def build(choice: BuildChoice, assignment: Mapping[str, Level]) -> Executable:
        graph = sketched(session, made.changes(assignment))
        backend = session.backends[choice.backend]
        return backend.build(graph, shapes_of(graph.signature, choice.batch), choice)

    batch = choice.batch
    reference = session.caller(build(choice, {}), batch)
    timing = measure_calls(session, {"reference": reference}, CAREFUL)["reference"]
    return PriceTools(
        build=build,
        caller=lambda executable: session.caller(executable, batch),
        measure=lambda calls: measure_calls(session, calls, PRICING),
        reference=reference,
        reference_ms=timing.median_ms,
        quantize_nodes=lambda tensor: (quantize_node_name(tensor),),
        facts=lambda assignment: facts_of(session, made.changes(assignment), batch),
        note=print,
    )


def noise_floor(
    tools: PriceTools, choice: BuildChoice, variants: Sequence[Variant]
) -> tuple[float, float]:
    """Differences of the latency of one build that was compiled several times."""
    offs: list[float] = []
    for variant in variants:
        builds = [tools.build(choice, variant.assignment) for _ in range(COMPILES)]
        calls = {str(i): tools.caller(b) for i, b in enumerate(builds)}
        times = [t.median_ms for t in tools.measure(calls).values()]
        offs += [abs(a / b - 1) for i, a in enumerate(times) for b in times[i + 1 :]]
    return float(np.median(offs)), float(np.max(offs))


def isolated_sums(
    session: Session,
    choice: BuildChoice,
    observations: Sequence[Observation],
    facts: Any,
) -> list[float]:
    """Sum of the latencies of all weighted layers, each built and measured alone.

    A layer is a graph of its own on the same backend, in its format, at the sizes of the build.
    """
    known: dict[tuple[Any, ...], float] = {}
    sums: list[float] = []
    for o in observations:
        total = 0.0
        for site in session.formats:
            if site.op_kind == "embedding":
                continue
            level = o.assignment.get(site.name, choice.precision)
            for node in site.ops:
                key = _signature(session, site, node, o.assignment, facts, level)
                if key not in known:
                    known[key] = _alone(choice, key)
                total += known[key]
        sums.append(total)
    return sums


def _signature(
    session: Session, site: Site, node: str, assignment: Mapping[str, Level], facts: Any, level: Any
) -> tuple[Any, ...]:
    found = next(n for n in session.graph.module.graph.nodes if n.name == node)
    now = facts.at(node, assignment)
    before = found.all_input_nodes[0].meta["val"].shape
    channels = max(1, now.inputs // max(1, now.window))
    if site.op_kind == "linear":
        return ("linear", tuple(int(s) for s in before[1:-1]), channels, now.outputs, level)
    given = dict(zip(("stride", "padding"), found.args[3:5], strict=False))
    args = {"stride": (1, 1), "padding": (0, 0), **given}  # newer versions of torch write all
    kernel = tuple(site.shape[2:])
    depthwise = site.groups > 1
    return (
        "conv",
        tuple(int(s) for s in before[2:]),
        now.outputs if depthwise else channels,
        now.outputs,
        kernel,
        tuple(args["stride"]),
        tuple(args["padding"]),
        depthwise,
        level,
    )


def _alone(choice: BuildChoice, key: tuple[Any, ...]) -> float:
    """Latency of one layer."""
    layer: nn.Module
    if key[0] == "linear":
        _, positions, inputs, outputs, level = key
        layer, x = nn.Linear(inputs, outputs), torch.randn(2, *positions, inputs)
    else:
        _, size, inputs, outputs, kernel, stride, padding, depthwise, level = key
        layer = nn.Conv2d(
            inputs, outputs, kernel, stride, padding, groups=inputs if depthwise else 1
        )
        x = torch.randn(2, inputs, *size)
    data = tersor.Data(calibration=[x], search=[x], test=[x], output="values")
    settings = Settings(backend=choice.backend, progress=False, cache_dir=STORE, methods="quantize")
    session = open_session(layer.eval(), data, settings)
    formats = {s.name: ("f32", "int8") for s in session.formats} if level == "int8" else {}
    made = simple(session, formats, 63)
    graph = sketched(session, made.changes(dict.fromkeys(formats, "int8")))
    backend = session.backends[choice.backend]
    build = backend.build(graph, shapes_of(graph.signature, 1), choice)
    call = session.caller(build, 1)
    return measure({"alone": call}, ISOLATED)["alone"].median_ms


def errors(predicted: Sequence[float], measured: Sequence[float]) -> tuple[float, float, float]:
    """Median, 90th percentile, rank correlation."""
    off = np.abs(np.array(predicted) / np.array(measured) - 1)
    ranks = float(spearmanr(predicted, measured).statistic)
    return float(np.median(off)), float(np.percentile(off, 90)), ranks


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """One model on one backend, with the tests that were drawn before anything was measured."""

    name: str
    session: Session
    choice: BuildChoice
    formats: Mapping[str, tuple[Level, ...]]
    grid: Mapping[str, tuple[Level, ...]]
    others: Mapping[str, tuple[int, ...]]  # counts of the tests
    between: Mapping[str, tuple[int, ...]]  # counts of the fit beside the grid
    tests: Sequence[Variant]
    tools: PriceTools

    def facts(self) -> WidthFacts | None:
        """Of all counts that any build has."""
        levels: dict[str, tuple[Level, ...]] = dict(self.formats)
        for width, counts in self.grid.items():
            every = {*counts, *self.others[width], *self.between.get(width, ())}
            levels[width] = tuple(sorted(map(int, every), reverse=True))
        return width_facts(self.session.sites, levels, self.tools, self.choice.precision)

    def fits(self) -> tuple[Variant, ...]:
        """As many builds as ``compress`` makes, drawn in the same way."""
        levels = {**self.formats, **self.grid}
        k = PriceConfig().fitted(self.session.sites, levels)
        return draw_variants(
            self.session.sites,
            levels,
            self.choice.precision,
            k=k,
            held_out=0,
            seed=SEED,
            between=self.between,
        )


def prepare(name: str, backend: str, options: argparse.Namespace) -> Bench:
    """Draw everything: the tests by the seed of the run, the builds of the fit as ``compress`` does."""
    precision: Precision | None = options.precision
    seed: int = options.seed
    session = opened(name, backend, options.device, options.batch)
    info = session.infos[0]
    how = dict(info.choices[0] if info.choices else {})
    how |= dict(word.split("=") for word in options.build)
    choice = BuildChoice(
        backend=backend,
        device=options.device,
        precision=precision or info.precisions[-1],
        threads=options.threads,
        batch=options.batch,
        options={n: v == "True" if v in ("True", "False") else v for n, v in how.items()},
    )
    formats, grid = format_levels(session, choice), grid_levels(session)
    others = other_levels(grid, np.random.default_rng([seed, 5]))
    made = simple(session, formats, info.format("int8").weight_limit)  # type: ignore[union-attr]
    return Bench(
        name=name,
        session=session,
        choice=choice,
        formats=formats,
        grid=grid,
        others=others,
        between=between_offers(session.sites, {**formats, **grid}, SEED),
        tests=draw_tests(session, formats, grid, others, choice, seed),
        tools=make_tools(session, made, choice),
    )


def run(bench: Bench, options: argparse.Namespace) -> Row:
    """Fit, predict, measure."""
    session, choice, tools = bench.session, bench.choice, bench.tools
    start = time.perf_counter()
    fits = bench.fits()
    seen = observe_builds(choice, fits, tools, PriceConfig().batch)
    facts = bench.facts()
    table = fit_table(choice, session.sites, seen, tools.quantize_nodes, facts)
    seconds = time.perf_counter() - start
    careful = replace(tools, measure=lambda calls: measure_calls(session, calls, CAREFUL))
    truth = observe_builds(choice, bench.tests, careful, PriceConfig().batch)
    if options.keep:
        keep = Path(options.keep) / f"{bench.name}-{choice.backend}.pkl"
        keep.parent.mkdir(parents=True, exist_ok=True)
        with keep.open("wb") as file:
            pickle.dump((choice, session.sites, seen, truth, facts), file)
    floor = noise_floor(careful, choice, [*fits[:2], *bench.tests[1:2]])
    row = replace(summary(bench, table, truth), noise=floor, seconds=seconds)
    if options.isolated:
        every = [*seen[:EXTREMES], *truth]
        row = with_isolated(row, isolated_sums(session, choice, every, facts), every)
    return row


def summary(bench: Bench, table: PriceTable, truth: Sequence[Observation]) -> Row:
    """The row of a table on its tests."""
    session = bench.session
    predicted = [table.predict_ms(o.assignment, session.tensors) for o in truth]
    measured = [o.measured_ms for o in truth]
    median, p90, ranks = errors(predicted, measured)
    shown = {(w, b.assignment.get(w)) for b in table.builds for w in bench.grid}
    cut = [(w, o.assignment[w]) for o in truth for w in bench.grid]
    cut = [(w, count) for w, count in cut if count != bench.grid[w][0]]
    return Row(
        model=bench.name,
        backend=table.choice.backend,
        choice=table.choice.describe(),
        fitted=len(table.builds),
        tests=len(truth),
        median=median,
        p90=p90,
        spearman=ranks,
        span=max(measured) / min(measured),
        unseen=sum(pair not in shown for pair in cut) / max(1, len(cut)),
        predicted_ms=tuple(predicted),
        measured_ms=tuple(measured),
    )


def with_isolated(row: Row, sums: Sequence[float], every: Sequence[Observation]) -> Row:
    """The row with what a sum of single layers predicts, scaled on the builds of the fit."""
    pairs = list(zip(sums, every, strict=True))
    scale = float(np.median([o.measured_ms / s for s, o in pairs if not o.held_out]))
    tests = [(s * scale, o.measured_ms) for s, o in pairs if o.held_out]
    median, p90, ranks = errors(*zip(*tests, strict=True))
    return replace(row, isolated_median=median, isolated_p90=p90, isolated_spearman=ranks)


def main() -> None:
    """Read the options and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", nargs="*", choices=sorted(CASES), default=DEFAULT)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--build", nargs="*", default=[], help="options of the build: name=value")
    parser.add_argument("--out", help="a folder for results, in place of benchmarks/results")
    parser.add_argument("--backend", nargs="*", default=["openvino", "onnxruntime"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--precision", help="of what is not int8; default: bf16 where it computes")
    parser.add_argument("--seed", type=int, default=SEED, help="of the tests that are drawn")
    parser.add_argument("--isolated", action="store_true", help="also a sum of single layers")
    parser.add_argument("--keep", help="a folder for what was measured, to fit again")
    parser.add_argument("--dry", action="store_true", help="write no results")
    options = parser.parse_args()
    for name in options.case:
        for backend in options.backend:
            bench = prepare(name, backend, options)
            row = run(bench, options)
            print(
                f"{name} {backend}: median {row.median:.1%}, p90 {row.p90:.1%}, Spearman "
                f"{row.spearman:.3f}; noise {row.noise[0]:.1%}/{row.noise[1]:.1%}; span "
                f"{row.span:.2f}; unseen {row.unseen:.0%}; {row.seconds:.0f} s; isolated "
                f"{row.isolated_median} {row.isolated_p90} {row.isolated_spearman}",
                flush=True,
            )
            if not options.dry:
                where = {"folder": Path(options.out)} if options.out else {}
                record.append(NAME, [row], seed=options.seed, settings=vars(options), **where)
            gc.collect()


if __name__ == "__main__":
    main()
