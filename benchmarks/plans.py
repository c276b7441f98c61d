"""Error at a fixed latency by how a plan is found: ``python -m benchmarks.plans [--case ...]``.

All methods choose from the same candidates, levels and price table, at the same budgets of
*predicted* latency, so that the figures are about the choice alone. A look is one plan whose model
was made and run, on however few samples: a method's number of looks is what it may cost.

    uniform      the same share of every width, all layers in one format
    relative     the program on each candidate's relative change of its own layer's output
    trace        the program on the change of the layer's output times tr G
    additive     the program on measured errors, one candidate at a time: ours without a search
    ours25/100   the same, and a search of 25 or 100 looks
    evopress     evolution with level switches, (1 + 16) with two rounds of selection, 500 looks;
                 from the best uniform plan
    evopress+    the same, from the plan of ``additive``

Errors: change of the model's outputs (KL of logits, normalised squared error of embeddings), on the
search part, which the methods see, and on the test part, which they don't.

Source of ``evopress``: Sieberling et al. 2024, arXiv:2410.14649, algorithm 1; its tokens are our
samples. A switch softens one site, then hardens others drawn by chance until the latency holds.
"""

import argparse
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from benchmarks import record
from tersor.api.proposing import Offers, calibrate, propose
from tersor.api.session import Session, Settings, open_session
from tersor.api.shrink import width_sites_statistics
from tersor.api.stages import price, stitched
from tersor.cli.demo import models
from tersor.core.data import Split
from tersor.core.jsonable import digest
from tersor.core.records import Candidate, Level, PriceTable
from tersor.graph.apply import apply
from tersor.graph.contracts import Graph
from tersor.graph.geometry import output_error, sample_agreement
from tersor.plan.explore import Aim, Explorer
from tersor.plan.problem import Problem
from tersor.plan.solve import optimise
from tersor.propose.widths import replaced
from tests.data.zoo import load_lenet5

NAME = "plans"
# Of the native plan's predicted latency, where formats alone are not fast enough.
BUDGETS: Mapping[str, tuple[float, ...]] = {
    "lenet5": (0.65, 0.58),
    "resnet20": (0.5, 0.36),
    "minilm": (0.6, 0.45),
}
SEEDS = 3
SAMPLES: Mapping[str, Mapping[Split, int]] = {
    "lenet5": {"search": 600, "test": 8000},
    "resnet20": {"search": 1000, "test": 4000},
    "minilm": {"search": 24, "test": 100},
}
CHUNK = 100  # samples of one run
FIT_SAMPLES = 64  # on which a look fits what was cut: a quarter of what compress reads, and faster
LAYER_SAMPLES = 64  # on which a layer's own error is measured
DRAWS = 4  # of labels or projections a sample, for tr G
STORE = Path(tempfile.gettempdir()) / "tersor-plans"

# EvoPress
EVOLUTION_LOOKS = 500
OFFSPRING = 16
SURVIVORS = 4
FIRST_SHARE = 0.25  # of the samples, on which all offspring are compared
MOST_SWITCHES = 3
TRIES = 200
USED = 0.5  # how often a step that latency has room for is taken

Assignment = dict[str, Level]


class NoPlanError(Exception):
    """A method has no plan at a budget."""


Key = tuple[tuple[str, Level], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One plan of one method.

    Attributes:
        budget: Share of the native plan's predicted latency.
        looks: Plans that were made and run before this one was chosen.
        search_error, test_error: Mean change of the outputs.
        test_agreement: Share of equal top-1, or mean cosine.
        seconds: Of the looks, where none was known before.
    """

    model: str
    budget: float
    method: str
    seed: int
    looks: int
    predicted_ms: float
    search_error: float
    test_error: float
    test_agreement: float
    seconds: float
    samples: int
    table: str
    levels: Mapping[str, Level]


def case_of(name: str) -> models.Case:
    """A model with real weights."""
    if name == "minilm":
        return models.minilm({"calibration": 64, **SAMPLES[name]})
    case = models.resnet20()
    return case if name == "resnet20" else replace(case, name=name, model=load_lenet5())


@dataclass
class Bench:
    """One model with its candidates, its table, and every look that was ever taken."""

    name: str
    session: Session
    offered: Offers
    table: PriceTable
    candidates: Mapping[str, tuple[Candidate, ...]]
    looked: dict[Key, np.ndarray[Any, Any]] = field(default_factory=dict)
    graphs: dict[Key, Graph] = field(default_factory=dict)
    wanted: dict[tuple[str, int, int], list[Tensor]] = field(default_factory=dict)
    seconds: float = 0.0

    @cached_property
    def looking(self) -> Session:
        """The session as looks see it."""
        few = self.session.parts["calibration"].limited(FIT_SAMPLES)
        return replace(self.session, parts={**self.session.parts, "calibration": few})

    @property
    def n_samples(self) -> int:
        """Of the search part."""
        return SAMPLES[self.name]["search"]

    @cached_property
    def native_ms(self) -> float:
        """Predicted."""
        return self.ms({})

    def ms(self, assignment: Mapping[str, Level]) -> float:
        """Predicted latency."""
        return self.table.predict_ms(assignment, self.session.tensors)

    def problem(self, max_ms: float, candidates: Any = None) -> Problem:
        """The least error within a latency."""
        return Problem(
            candidates=candidates or self.candidates,
            table=self.table,
            tensors=self.session.tensors,
            inside=self.session.inside,
            objective="error",
            max_ms=max_ms,
        )

    @cached_property
    def levels(self) -> dict[str, list[Level]]:
        """Site -> its levels, the native one first, then ever harder ones."""
        return {s: list(row) for s, row in self.problem(math.inf).levels().items()}

    def losses(self, assignment: Mapping[str, Level], n: int) -> np.ndarray[Any, Any]:
        """Errors of the first n samples of the search part."""
        key = tuple(sorted(assignment.items()))
        path = STORE / "looks" / f"{digest(self.session.key, FIT_SAMPLES, self.n_samples, key)}.npy"
        if key not in self.looked and path.exists():
            self.looked[key] = np.load(path)
        known = self.looked.get(key, np.zeros(0))
        if len(known) < n:
            start = time.perf_counter()
            fresh = self._errors(self._graph(key), "search", len(known), n)
            known = self.looked[key] = np.concatenate([known, fresh])
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, known)
            path.with_suffix(".json").write_text(json.dumps(key), "utf-8")
            self.seconds += time.perf_counter() - start
        return known[:n]

    def error(self, assignment: Mapping[str, Level]) -> float:
        """On the whole search part."""
        return float(self.losses(assignment, self.n_samples).mean())

    def _graph(self, key: Key) -> Graph:
        if key not in self.graphs:
            while len(self.graphs) > 2 * OFFSPRING:
                del self.graphs[next(iter(self.graphs))]
            self.graphs[key] = stitched(self.looking, self.offered, dict(key))
        return self.graphs[key]

    def _errors(self, graph: Graph, part: Split, start: int, stop: int) -> np.ndarray[Any, Any]:
        pairs = list(self._outputs(graph, part, start, stop))
        # The spread of a squared error is of all samples, whichever of them are looked at.
        found, wanted = ([torch.cat(rows) for rows in zip(*side, strict=True)]
                         for side in zip(*pairs, strict=True))  # fmt: skip
        if self.session.kind == "logits":
            return output_error(found, wanted, "logits").numpy()
        spread = self._spread
        off = sum((f.double() - w.double()).reshape(len(f), -1).square().mean(1)
                  for f, w in zip(found, wanted, strict=True))  # fmt: skip
        assert isinstance(off, Tensor)
        return (off / spread).numpy()

    @cached_property
    def _spread(self) -> float:
        wanted = [w for _, w in self._outputs(self.session.graph, "search", 0, self.n_samples)]
        whole = torch.cat([w[0] for w in wanted]).double()
        return float((whole - whole.mean(0)).square().mean())

    def _outputs(
        self, graph: Graph, part: Split, start: int, stop: int
    ) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
        flat = self.session.parts[part].tensors
        for i in range(start, stop, CHUNK):
            inputs = tuple(t[i : min(stop, i + CHUNK)] for t in flat)
            place = (part, i, len(inputs[0]))
            if place not in self.wanted:
                self.wanted[place] = list(self.session.graph.run(inputs))
            yield list(graph.run(inputs)), self.wanted[place]

    def test(self, assignment: Mapping[str, Level]) -> tuple[float, float]:
        """Error and agreement on the test part."""
        graph = self._graph(tuple(sorted(assignment.items())))
        stop = min(SAMPLES[self.name]["test"], len(self.session.parts["test"]))
        pairs = list(self._outputs(graph, "test", 0, stop))
        agree = torch.cat([sample_agreement(f, w, self.session.kind) for f, w in pairs])
        return float(self._errors(graph, "test", 0, stop).mean()), float(agree.double().mean())


def prepare(name: str) -> Bench:
    """Candidates and prices as ``compress`` makes them, without levels that are worse in both."""
    torch.manual_seed(0)
    case = case_of(name)
    settings = Settings(backend="openvino", progress=False, cache_dir=STORE)
    session = open_session(case.model, case.data(), settings)
    offered = propose(session)
    tables = price(session, offered).tables
    int8 = {s: "int8" for s, row in offered.levels().items() if "int8" in row}
    table = min(tables, key=lambda t: t.predict_ms(int8, session.tensors))
    bench = Bench(name, session, offered, table, offered.by_site())
    bench.candidates = {
        site: tuple(c for c in rows if c.level != "int8_weight")  # as slow as the native format
        for site, rows in bench.candidates.items()
    }
    return bench


# Baselines without looks


def uniform(bench: Bench, max_ms: float) -> tuple[Assignment, int]:
    """The largest share of every width that is fast enough, in the better of two formats."""
    found = []
    for formats in (0, 1):
        base = {s: row[min(formats, len(row) - 1)] for s, row in bench.levels.items()
                if not isinstance(row[0], int)}  # fmt: skip
        for share in np.linspace(1, 0, 101):
            whole = {**base, **{s: min(row, key=lambda v, row=row: abs(v - share * row[0]))  # type: ignore[misc]
                                for s, row in bench.levels.items() if isinstance(row[0], int)}}  # fmt: skip
            if bench.ms(whole) <= max_ms:
                found.append(whole)
                break
    if not found:
        raise NoPlanError(f"no share of all widths takes {max_ms:.3f} ms")
    return min(found, key=bench.error), len(found)


def layer_errors(bench: Bench, with_trace: bool) -> dict[str, tuple[Candidate, ...]]:
    """Candidates whose error is the change of their own layers' outputs, relative or times tr G.

    Changed are the layers that a format rounds, or those that read a width, with their refit.
    """
    session = bench.session
    inputs = tuple(t[:LAYER_SAMPLES] for t in session.parts["search"].tensors)
    outputs = _node_values(session.graph, inputs)
    traces = _traces(session, inputs) if with_trace else {}
    observed = calibrate(session)
    statistics = width_sites_statistics(session, observed)
    moments = {name: seen.moments for name, seen in observed.items()}
    found: dict[str, tuple[Candidate, ...]] = {}
    for site, rows in bench.candidates.items():
        changed = []
        for c in rows:
            change = bench.offered.changes.get((site, c.level))
            if c.level == bench.levels[site][0] or change is None:
                changed.append(replace(c, error=0.0))
                continue
            if isinstance(c.level, int):
                assert session.axes is not None
                graph = replaced(session.axes, change, statistics[site], moments)
            else:
                graph = apply(session.graph, [change])
            after = _node_values(graph, inputs)
            total = 0.0
            for op in change.site.ops:
                old, new = outputs[op].double(), after[op].double()
                if with_trace:
                    total += float((new - old).square().mean()) * traces[op]
                else:
                    spread = (old - old.mean(0)).square().mean()
                    total += float((new - old).square().mean() / spread)
            changed.append(replace(c, error=total))
        found[site] = tuple(changed)
    return found


def _node_values(graph: Graph, inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}

    class Watch(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            out = super().run_node(n)
            if isinstance(out, Tensor):
                found[n.name] = out
            return out

    with torch.no_grad():
        Watch(graph.module).run(*inputs)
    return found


def _traces(session: Session, inputs: tuple[Tensor, ...]) -> dict[str, float]:
    """Op -> mean over samples of |dL/dy|^2 of its output, with L drawn as the geometry says.

    Logits: log-likelihood of a class drawn from the model's own softmax. Else: a random direction.
    With the mean squared change this is half the error where changes and gradients are
    independent.
    """
    ops = {op for site in session.sites for op in site.ops}
    generator = torch.Generator().manual_seed(0)
    found: dict[str, float] = dict.fromkeys(ops, 0.0)
    for _ in range(DRAWS):
        values: dict[str, Tensor] = {}

        class Watch(fx.Interpreter):
            def run_node(self, n: fx.Node, values: dict[str, Tensor] = values) -> Any:
                out = super().run_node(n)
                if n.name in ops:
                    out = out if out.requires_grad else out.requires_grad_()
                    out.retain_grad()
                    values[n.name] = out
                return out

        with torch.enable_grad():
            result = Watch(session.graph.module).run(*inputs)
            output = result[0] if isinstance(result, tuple | list) else result
            if session.kind == "logits":
                logs = torch.log_softmax(output.double(), -1)
                drawn = torch.multinomial(logs.exp().detach(), 1, generator=generator)
                loss = logs.gather(-1, drawn).sum()
            else:
                direction = torch.randn(output.shape, generator=generator)
                loss = (output * direction).sum()
            loss.backward()
        for name, value in values.items():
            if value.grad is not None:
                found[name] += float(value.grad.double().square().sum()) / len(inputs[0]) / DRAWS
    return found


def by_program(bench: Bench, max_ms: float, candidates: Any = None) -> Assignment:
    """The program's plan on some errors."""
    solution = optimise(bench.problem(max_ms, candidates))
    if not solution.is_feasible:
        raise NoPlanError(f"no plan takes {max_ms:.3f} ms")
    return dict(solution.assignment)


@dataclass
class Looker:
    """Looks at plans for our search, and counts them."""

    bench: Bench
    limit: int
    seen: set[Key] = field(default_factory=set)

    def look(self, plan: Mapping[str, Level], share: float) -> np.ndarray[Any, Any]:
        """Errors of the first share of the samples."""
        self.seen.add(_key(plan))
        return self.bench.losses(plan, max(1, round(share * self.bench.n_samples)))

    def accepts(self, plan: Mapping[str, Level]) -> bool:
        """The error decides alone."""
        del plan
        return True

    @property
    def looks_left(self) -> int:
        """Of the method's own."""
        return self.limit - len(self.seen)

    @property
    def max_loss(self) -> float:
        """None: the latency is the budget."""
        return math.inf


def ours(bench: Bench, max_ms: float, seed: int, looks: int) -> tuple[Assignment, int]:
    """The program's plan, and a search around it."""
    start = by_program(bench, max_ms)
    judge = Looker(bench, looks)
    explorer = Explorer(Aim(problem=bench.problem(max_ms), seed=seed), judge, start)
    explorer.run()
    print(f"  {explorer.reason}; {explorer.rounds} rounds", flush=True)
    return dict(explorer.best), len(judge.seen)


# EvoPress


def evolve(
    bench: Bench, max_ms: float, start: Assignment, seed: int, looks: int = EVOLUTION_LOOKS
) -> tuple[Assignment, int]:
    """Evolution from a plan that holds the budget."""
    rng = np.random.default_rng([seed, 41])
    few = max(1, round(FIRST_SHARE * bench.n_samples))
    parent, seen = start, {_key(start)}
    while len(seen) < looks:
        fresh: dict[Key, Assignment] = {}
        for _ in range(TRIES):
            child = _mutated(bench, parent, max_ms, rng)
            if child is not None and _key(child) not in seen:
                fresh[_key(child)] = child
            if len(fresh) >= min(OFFSPRING, looks - len(seen)):
                break
        if not fresh:
            break
        seen |= set(fresh)
        ranked = sorted(fresh.values(), key=lambda a: bench.losses(a, few).mean())
        parent = min([parent, *ranked[:SURVIVORS]], key=bench.error)
    return parent, len(seen)


def _key(assignment: Mapping[str, Level]) -> Key:
    return tuple(sorted(assignment.items()))


def _mutated(
    bench: Bench, parent: Assignment, max_ms: float, rng: np.random.Generator
) -> Assignment | None:
    """The parent after one to three switches, small numbers more often; None where one failed."""
    child: Assignment | None = dict(parent)
    for _ in range(int(min(rng.integers(1, MOST_SWITCHES + 1, 2)))):
        if child is None:
            break
        child = _switched(bench, child, max_ms, rng)
    return child


def _switched(
    bench: Bench, child: Assignment, max_ms: float, rng: np.random.Generator
) -> Assignment | None:
    """One site softer, others harder until the latency holds, and what is left of it used."""
    soft = _not_at(bench, child, 0)
    if not soft:
        return None
    up = str(rng.choice(soft))
    child = child | {up: _step(bench, child, up, -1)}
    for _ in range(TRIES):
        if bench.ms(child) <= max_ms:
            break
        hard = [s for s in _not_at(bench, child, -1) if s != up]
        if not hard:
            return None
        down = str(rng.choice(hard))
        harder = child | {down: _step(bench, child, down, +1)}
        child = harder if bench.ms(harder) < bench.ms(child) else child
    else:
        return None
    for site in rng.permutation(_not_at(bench, child, 0)):
        softer = child | {str(site): _step(bench, child, str(site), -1)}
        if bench.ms(softer) <= max_ms and rng.random() < USED:
            child = softer
    return child


def _not_at(bench: Bench, plan: Assignment, end: int) -> list[str]:
    """Sites that are not at their first or last level."""
    return [s for s, row in bench.levels.items() if plan[s] != row[end]]


def _step(bench: Bench, assignment: Assignment, site: str, by: int) -> Level:
    row = bench.levels[site]
    return row[row.index(assignment[site]) + by]


# Rows


def method_rows(
    bench: Bench, share: float, methods: Mapping[str, Callable[[], tuple[Assignment, int]]],
    seed: int, done: set[tuple[Any, ...]], options: argparse.Namespace,
) -> None:  # fmt: skip
    """Run what is not there yet and write its rows."""
    for name, find in methods.items():
        if (bench.name, share, name, seed) in done:
            continue
        bench.seconds = 0.0
        try:
            assignment, looks = find()
        except NoPlanError as error:
            print(f"{bench.name} {share:.0%} {name}: {error}", flush=True)
            continue
        seconds = bench.seconds
        test_error, agreement = bench.test(assignment)
        row = Row(
            model=bench.name,
            budget=share,
            method=name,
            seed=seed,
            looks=looks,
            predicted_ms=bench.ms(assignment),
            search_error=bench.error(assignment),
            test_error=test_error,
            test_agreement=agreement,
            seconds=round(seconds, 1),
            samples=bench.n_samples,
            table=bench.table.choice.describe(),
            levels=dict(sorted(assignment.items())),
        )
        print(
            f"{bench.name} {share:.0%} {name} seed {seed}: search {row.search_error:.5f}, test "
            f"{row.test_error:.5f} ({row.test_agreement:.2%}), {looks} looks, {seconds:.0f} s",
            flush=True,
        )
        if not options.dry:
            record.append(NAME, [row], seed=seed, settings=vars(options))


def finished() -> set[tuple[Any, ...]]:
    """(model, budget, method, seed) of the rows that are there."""
    path = record.RESULTS / f"{NAME}.jsonl"
    if not path.exists():
        return set()
    rows = [json.loads(line)["row"] for line in path.read_text("utf-8").splitlines()]
    return {(r["model"], r["budget"], r["method"], r["seed"]) for r in rows}


def main() -> None:
    """Read the options and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", nargs="*", choices=sorted(SAMPLES), default=list(SAMPLES))
    parser.add_argument("--budget", nargs="*", type=float, help="shares of the native latency")
    parser.add_argument("--only", nargs="*", help="methods")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--quick", action="store_true", help="a tenth of the looks, one seed")
    parser.add_argument("--dry", action="store_true", help="write no results, run all again")
    options = parser.parse_args()
    for name in options.case:
        bench = prepare(name)
        for share in options.budget or BUDGETS[name]:
            max_ms = share * bench.native_ms
            for seed in range(1 if options.quick else options.seeds):
                methods = methods_for(bench, max_ms, seed, options.quick)
                if options.only:
                    methods = {m: f for m, f in methods.items() if m in options.only}
                done = set() if options.dry else finished()
                method_rows(bench, share, methods, seed, done, options)


def methods_for(
    bench: Bench, max_ms: float, seed: int, quick: bool
) -> dict[str, Callable[[], tuple[Assignment, int]]]:
    """By name; what draws nothing by chance runs for the first seed only."""
    scale = 10 if quick else 1
    looks = EVOLUTION_LOOKS // scale
    fixed: dict[str, Callable[[], tuple[Assignment, int]]] = {
        "uniform": lambda: uniform(bench, max_ms),
        "relative": lambda: (by_program(bench, max_ms, layer_errors(bench, False)), 0),
        "trace": lambda: (by_program(bench, max_ms, layer_errors(bench, True)), 0),
        "additive": lambda: (by_program(bench, max_ms), 0),
    }
    drawn: dict[str, Callable[[], tuple[Assignment, int]]] = {
        "ours25": lambda: ours(bench, max_ms, seed, 25 // min(scale, 2)),
        "ours100": lambda: ours(bench, max_ms, seed, 100 // scale),
        "evopress": lambda: evolve(bench, max_ms, uniform(bench, max_ms)[0], seed, looks),
        "evopress+": lambda: evolve(bench, max_ms, by_program(bench, max_ms), seed, looks),
    }
    return {**(fixed if seed == 0 else {}), **drawn}


if __name__ == "__main__":
    main()
