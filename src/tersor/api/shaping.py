"""How sizes that vary are built: static, bucketed and open builds of the best baseline, measured.

The sizes are those of the calibration part. Each choice runs the same calls, drawn from it by
frequency, interleaved with the open build; it is taken where it is surely faster.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from tersor.api.latency import measure_calls
from tersor.api.session import Session
from tersor.build.build import Built
from tersor.build.padding import EXACT, padding_error
from tersor.core.errors import BackendError, ParityError
from tersor.core.jsonable import digest
from tersor.core.records import BaselineRow, Bucket, BuildChoice, PriceTable, ShapeMode, Timing
from tersor.graph.contracts import Executable, Reshapable
from tersor.graph.routed import unpaddable
from tersor.graph.shapes import Sizes, built_sizes, input_shapes, limits_of, sizes_of
from tersor.price.buckets import as_buckets, fit_curve, worthwhile
from tersor.timing.device import call_of
from tersor.timing.protocol import Protocol, measure, ratio

MOST_BUILDS = 6  # beside the open one: each is compiled whenever the model is built or loaded
MOST_BYTES = 2**30  # of weights in them: each packs its own
_LEAST_SHARE = 0.05  # of the samples: what an exact build of a rarer size saves is below the noise
_CURVE_SIZES = 5  # at which calls are measured for the costs of buckets
_PROVEN_SIZES = 12  # at which padding is tried
_PROVEN_SAMPLES = 4  # of each of them
_CALLS = 24  # drawn from the data: finer than what other builds run, as buckets cost in steps
_CURVE = Protocol(rounds=5, runs=7, max_seconds=10.0)
_RACE = Protocol(rounds=7, runs=7, max_seconds=30.0)

Build = Callable[[BuildChoice], Built]


@dataclass(frozen=True, slots=True, kw_only=True)
class ShapesRecord:
    """Baselines with the rows of the shape choices, and which is the best of all."""

    rows: tuple[BaselineRow, ...]
    best: int
    notes: tuple[str, ...] = field(default=())


@dataclass(frozen=True, slots=True)
class _Group:
    """The calibration samples of one combination of sizes."""

    sizes: Sizes
    flat: tuple[Tensor, ...]

    @property
    def count(self) -> int:
        return int(self.flat[0].shape[0])


def with_shapes(
    session: Session, rows: Sequence[BaselineRow], best: int, build: Build
) -> ShapesRecord:
    """Measure the shape choices of the best baseline; found again in the store.

    Models without open sizes, and backends that make no builds of single sizes, cost nothing.
    """
    same = ShapesRecord(rows=tuple(rows), best=best)
    base = rows[best].choice
    if base is None or not built_sizes(session.graph.signature):
        return same
    key = digest(session.key, "shapes", base)
    kept = session.store.get(ShapesRecord, "shapes", key)
    if kept is not None:
        return kept
    session.progress.stage("shapes")
    opened = build(base).executable
    if not isinstance(opened, Reshapable):
        return replace(same, notes=(f"{base.backend}: makes no builds of single sizes",))
    choices, notes = _offered(session, base, opened)
    builds: dict[ShapeMode, Executable] = {"open": opened}
    for choice in choices:
        try:
            builds[choice.shapes] = build(choice).executable
        except (BackendError, ParityError) as error:
            notes.append(f"{choice.describe()}: {error}")
    by_mode = {choice.shapes: choice for choice in choices if choice.shapes in builds}
    found = _measured(session, rows, best, by_mode, builds)
    found = replace(found, notes=tuple(notes))
    session.store.put("shapes", key, found)
    return found


def _measured(
    session: Session,
    rows: Sequence[BaselineRow],
    best: int,
    choices: Mapping[ShapeMode, BuildChoice],
    builds: Mapping[ShapeMode, Executable],
) -> ShapesRecord:
    """The rows with the open one measured again, beside the others; the fastest sure one is best."""
    if not choices:
        return ShapesRecord(rows=tuple(rows), best=best)
    batch = session.settings.batch
    calls: dict[str, Callable[[], object]] = {
        mode: session.caller(build, batch, _CALLS) for mode, build in builds.items()
    }
    timings = measure_calls(session, calls, _RACE, _CALLS)
    fresh = [
        replace(row, timing=timings["open"]) if i == best else row for i, row in enumerate(rows)
    ]
    fresh += [
        replace(rows[best], name=choice.describe(), choice=choice, timing=timings[mode])
        for mode, choice in choices.items()
    ]
    surely = [mode for mode in choices if is_faster(timings[mode], timings["open"])]
    chosen = min(surely, key=lambda mode: timings[mode].median_ms, default=None)
    name = rows[best].name if chosen is None else choices[chosen].describe()
    order = sorted(fresh, key=lambda row: (row.choice is not None, row.timing.median_ms))
    return ShapesRecord(
        rows=tuple(order), best=next(i for i, row in enumerate(order) if row.name == name)
    )


def is_faster(timing: Timing, opened: Timing) -> bool:
    """Whether a choice is surely faster than the open build, from rounds of one run."""
    return ratio(opened, timing).low > 1.0


def _offered(
    session: Session, base: BuildChoice, opened: Reshapable
) -> tuple[list[BuildChoice], list[str]]:
    """Exact and padded choices, and why one is not on offer."""
    groups = _groups(session)
    most = min(MOST_BUILDS, MOST_BYTES // max(1, session.graph.parameter_bytes()))
    if most < 1:
        return [], [f"shapes: the weights are above {MOST_BYTES} bytes, no build packs them again"]
    ways: dict[ShapeMode, tuple[Bucket, ...] | str] = {
        "exact": exact_buckets(groups, most),
        "padded": _padded_buckets(session, base, opened, groups, most),
    }
    choices, notes = [], []
    for mode, found in ways.items():
        if isinstance(found, str):
            notes.append(f"shapes={mode} is not offered: {found}")
        else:
            choices.append(replace(base, shapes=mode, buckets=found))
    return choices, notes


def _groups(session: Session) -> list[_Group]:
    signature = session.graph.signature
    return [
        _Group(
            sizes_of(
                signature,
                {s.name: tuple(t.shape) for s, t in zip(signature.inputs, flat, strict=True)},
            ),
            flat,
        )
        for flat in session.parts["calibration"].groups
    ]


def exact_buckets(groups: Sequence[_Group], most: int) -> tuple[Bucket, ...] | str:
    """The most frequent combinations of sizes, or why there are none."""
    total = sum(g.count for g in groups)
    frequent = [g for g in groups if g.count >= _LEAST_SHARE * total]
    if not frequent:
        return (
            f"none of the {len(groups)} sizes in the data is that of {_LEAST_SHARE:.0%} of the "
            "samples"
        )
    chosen = sorted(frequent, key=lambda g: -g.count)[:most]
    return tuple(Bucket(sizes=dict(g.sizes), least=dict(g.sizes)) for g in chosen)


def _padded_buckets(
    session: Session,
    base: BuildChoice,
    opened: Reshapable,
    groups: Sequence[_Group],
    most: int,
) -> tuple[Bucket, ...] | str:
    """The cheapest buckets under measured costs, or why padding is not offered."""
    signature = session.graph.signature
    reason = unpaddable(signature)
    if reason:
        return reason
    (symbol,) = built_sizes(signature)
    largest = max(g.sizes[symbol] for g in groups)
    whole = Bucket(sizes={symbol: largest}, least={symbol: min(g.sizes[symbol] for g in groups)})
    reason = _unproven(session, replace(base, shapes="padded", buckets=(whole,)), groups)
    if reason or not whole.pads:
        return reason or "all samples have one size"
    single, opened_cost = (fit_curve(p) for p in _curves(session, base, opened, groups))
    counts = {g.sizes[symbol]: g.count for g in groups}
    best = worthwhile(counts, single, opened_cost, most)
    if not best.sizes:
        return "no bucket would save 1 % of the open build's time"
    limits = limits_of(signature, symbol)
    found = as_buckets(symbol, best.sizes, (single, opened_cost), limits)
    return _unproven(session, replace(base, shapes="padded", buckets=found), groups) or found


def _unproven(session: Session, choice: BuildChoice, groups: Sequence[_Group]) -> str:
    """Why padding may not be used: the outputs that it changes; "" where it changes none."""
    step = -(-len(groups) // _PROVEN_SIZES)
    tried = [[t[:_PROVEN_SAMPLES] for t in g.flat] for g in groups[::step]]
    error = padding_error(session.graph, choice, tried)
    if error <= EXACT:
        return ""
    return (
        f"padding with zeros changes the outputs (normalised squared error {error:.1e}, wanted "
        f"at most {EXACT:g}); a model that gets a mask of the real places, and uses it, can be "
        "padded"
    )


def _curves(
    session: Session, base: BuildChoice, opened: Reshapable, groups: Sequence[_Group]
) -> tuple[dict[int, float], dict[int, float]]:
    """Size -> milliseconds of a call of a build for that size, and of the open build."""
    signature = session.graph.signature
    (symbol,) = built_sizes(signature)
    ordered = sorted(groups, key=lambda g: g.sizes[symbol])
    last = len(ordered) - 1
    places = {round(i * last / (_CURVE_SIZES - 1)) for i in range(_CURVE_SIZES)}
    calls: dict[str, Callable[[], object]] = {}
    for place in sorted(places):
        group = ordered[place]
        size = group.sizes[symbol]
        inputs = session.named([t[torch.arange(base.batch) % len(t)] for t in group.flat])
        build = opened.at(input_shapes(signature, base.batch, group.sizes))
        calls[f"single {size}"] = call_of(build, inputs)
        calls[f"open {size}"] = call_of(opened, inputs)
    times = measure(calls, _CURVE)
    sizes = [ordered[place].sizes[symbol] for place in sorted(places)]
    return (
        {n: times[f"single {n}"].median_ms for n in sizes},
        {n: times[f"open {n}"].median_ms for n in sizes},
    )


def open_baseline(rows: Sequence[BaselineRow], best: int) -> int:
    """The row of the best baseline's build with open sizes; itself where it has no other."""
    base = rows[best].choice
    assert base is not None
    wanted = opened_choice(base)
    return next(i for i, row in enumerate(rows) if row.choice == wanted)


def opened_choice(choice: BuildChoice) -> BuildChoice:
    """The same choice with one build for all sizes."""
    return replace(choice, shapes="open", buckets=())


def reshaped(
    tables: Sequence[PriceTable], rows: Sequence[BaselineRow], best: int
) -> tuple[PriceTable, ...]:
    """Tables that were priced on open builds, for the shape choice of the best baseline.

    It was measured on that baseline's backend, and its tables get it, times what it saves on the
    uncompressed build; finalists are built so and correct that. Other backends stay open.
    """
    base = rows[best].choice
    assert base is not None
    if base.shapes == "open":
        return tuple(tables)
    opened = rows[open_baseline(rows, best)].timing.median_ms
    factor = rows[best].timing.median_ms / opened
    return tuple(
        replace(
            table,
            choice=replace(table.choice, shapes=base.shapes, buckets=base.buckets),
            scale=table.scale * factor,
        )
        if table.choice.backend == base.backend
        else table
        for table in tables
    )
