"""Baselines and prices, each found again in the store when it was finished before."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from tersor.api.latency import measure_calls
from tersor.api.memory import price_memory
from tersor.api.proposing import Offers
from tersor.api.session import Session
from tersor.api.shaping import open_baseline, reshaped, with_shapes
from tersor.api.shrink import evaluated, facts_of, sketched
from tersor.build.build import Built, build, shapes_of
from tersor.core.errors import BackendError, ParityError
from tersor.core.formats import PACKED, STORED
from tersor.core.jsonable import digest
from tersor.core.levels import settled
from tersor.core.machine import describe_machine, usable_cores
from tersor.core.records import (
    BackendInfo,
    BaselineRow,
    BuildChoice,
    Candidate,
    Level,
    Prices,
    PriceTable,
    Site,
    Term,
)
from tersor.graph.apply import quantize_node_name
from tersor.graph.contracts import Backend, Graph, Joining
from tersor.graph.facts import stored_elsewhere
from tersor.price.baseline import BaselineTools, baseline_choices, measure_baselines
from tersor.price.price import PriceConfig, price_all
from tersor.price.refuse import refused
from tersor.price.table import fit_error
from tersor.price.terms import PackedBytes
from tersor.price.tools import PriceTools
from tersor.price.variants import native_assignment
from tersor.propose.propose import NATIVE
from tersor.timing.protocol import Protocol

_CHECKED_SIZES = 4  # beside the largest, at which a build is compared with its graph
_QUICK = Protocol(rounds=3, runs=7, max_seconds=12.0)
_CAREFUL = Protocol(rounds=7, runs=11, max_seconds=25.0)
# A build's own noise of 1 % is little beside what prices are off by; quiet runs need three rounds.
# Builds follow each other without a pause, so that the clock stays settled between two of them.
PRICING = Protocol(
    rounds=7,
    runs=6,
    settled_ms=40.0,
    max_seconds=15.0,
    turn_ms=60.0,
    enough=0.01,
    one_speed=True,
)
_DRAW_SEED = 0  # of the builds that prices are fitted on: the same ones, whatever the seed of a run


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tables:
    tables: tuple[PriceTable, ...]
    size_terms: tuple[Term, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class _BaselineRecord:
    rows: tuple[BaselineRow, ...]
    best: int
    notes: tuple[str, ...] = field(default=())


def stitched(session: Session, offered: Offers, assignment: Mapping[str, Level]) -> Graph:
    """The graph of an assignment, from cached changes and lightly fitted widths."""
    return evaluated(session, offered.chosen(assignment))


def build_for(session: Session, graph: Graph, choice: BuildChoice) -> Built:
    """A checked build."""
    part = session.parts["calibration"]
    others = part.others[:: max(1, len(part.others) // _CHECKED_SIZES)]
    return build(
        graph,
        session.backends[choice.backend],
        choice,
        session.flat("calibration", 4),
        [tuple(t[:1] for t in flat) for flat in others],
    )


def baselines(session: Session) -> tuple[tuple[BaselineRow, ...], int]:
    """Every uncompressed build, measured interleaved, and which is the best.

    Where sizes vary, the best one's shape choices are among them.
    """
    key = digest(session.key, "baseline")
    kept = session.store.get(_BaselineRecord, "baseline", key)
    if kept is None:
        cores, batch = usable_cores(), session.settings.batch
        choices = [c for i in session.infos for c in baseline_choices(i, cores=cores, batch=batch)]
        session.progress.stage("baseline", len(choices))
        found = measure_baselines(choices, _baseline_tools(session))
        notes = tuple(f"{d.choice.describe()}: {d.reason}" for d in found.dropped)
        kept = _BaselineRecord(rows=found.rows, best=found.best, notes=notes)
        session.store.put("baseline", key, kept)
    shaped = with_shapes(
        session, kept.rows, kept.best, lambda choice: build_for(session, session.graph, choice)
    )
    for note in (*kept.notes, *shaped.notes):
        session.progress.note(note)
    best = shaped.rows[shaped.best]
    session.progress.note(f"best uncompressed build: {best.name}, {best.timing.median_ms:.2f} ms")
    return shaped.rows, shaped.best


def _baseline_tools(session: Session) -> BaselineTools:
    def make(choice: BuildChoice) -> Callable[[], object]:
        session.progress.advance()
        backend = session.backends[choice.backend]
        reason = backend.idle(session.graph, choice) if isinstance(backend, Joining) else ""
        if reason:
            raise BackendError(reason)
        try:
            built = build_for(session, session.graph, choice)
        except ParityError as error:  # a precision that the device computes wrongly is no baseline
            raise BackendError(str(error)) from error
        return session.caller(built.executable, choice.batch)

    size = session.graph.parameter_bytes()
    return BaselineTools(
        build=make,
        quick=lambda calls: measure_calls(session, calls, _QUICK),
        careful=lambda calls: measure_calls(session, calls, _CAREFUL),
        size_bytes=lambda choice: session.original_bytes if choice is None else size,
        eager=eager_call(session),
    )


def eager_call(session: Session) -> Callable[[], object]:
    """A call of the model as given on each of the session's examples."""
    original = session.captured.original
    calls = [
        arguments(session, [torch.from_numpy(a) for a in example.values()])
        for example in session.examples(session.settings.batch)
    ]
    return lambda: [original(*args, **kwargs) for args, kwargs in calls]


def arguments(session: Session, flat: list[torch.Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Flat inputs in the model's own calling convention."""
    from tersor.core.records import Structure
    from tersor.core.structure import unflatten

    call = session.captured.call
    both = Structure(kind="tuple", children=(call.args, call.kwargs))
    args, kwargs = unflatten(both, flat)
    return tuple(args), dict(kwargs)


def price(session: Session, offered: Offers) -> Prices:
    """Baselines, and a price table for each way to build that stays in the race."""
    rows, best = baselines(session)
    levels = offered.levels()
    key = digest(session.key, "price", sorted((s, list(map(str, v))) for s, v in levels.items()))
    kept = session.store.get(_Tables, "price", key)
    if kept is None:
        kept = _price(session, offered, rows, open_baseline(rows, best))
        session.store.put("price", key, kept)
    for note in kept.notes:
        session.progress.note(note)
    machine = describe_machine().fingerprint()
    tables = reshaped(kept.tables, rows, best)
    out = refused(offered.by_site(), tables, session.tensors)
    if out:
        session.progress.note(
            f"{len(out)} levels are refused; {out[0].site} at {out[0].level}: {out[0].reason}"
        )
    return Prices(
        machine=machine,
        baselines=rows,
        best=best,
        tables=tables,
        size_terms=kept.size_terms,
        refused=out,
    )


def _price(session: Session, offered: Offers, rows: Sequence[BaselineRow], best: int) -> _Tables:
    baseline = rows[best]
    base = baseline.choice
    assert base is not None
    choices = _ways(session.infos, base, offered.levels())
    config = PriceConfig(seed=_DRAW_SEED)
    native = native_assignment(session.sites, base.precision)
    ways = len(choices)  # at most: those whose probe is slow are not priced
    builds = config.fitted(session.sites, offered.levels()) + config.held_out + 1
    session.progress.stage("price", ways * builds)
    reference = build_for(session, session.graph, base)
    tools = PriceTools(
        build=lambda choice, assignment: _priced_build(session, offered, choice, assignment),
        caller=lambda executable: session.caller(executable, base.batch),
        measure=lambda calls: measure_calls(session, calls, PRICING),
        reference=session.caller(reference.executable, base.batch),
        reference_ms=baseline.timing.median_ms,
        quantize_nodes=lambda tensor: (quantize_node_name(tensor),),
        runs=Runs(session.backends, session.graph, session.sites),
        facts=lambda assignment: facts_of(session, offered.chosen(assignment), base.batch),
        settle=lambda assignment: settled(assignment, session.inside, native),
        note=session.progress.note,
        stored=stored_elsewhere(session.graph),
        packed_bytes=_packed_bytes(offered),
        native_ms=_native_ms(rows, base),
        memory=price_memory(session, offered.chosen),
    )
    priced = price_all(choices, session.sites, offered.levels(), tools, config)
    notes = [
        f"{probe.choice.describe()}: all int8 takes {probe.measured_ms:.2f} ms"
        + (f"; not priced, {probe.reason}" if not probe.priced else "")
        for probe in priced.probes
        if probe.measured_ms is not None
    ]
    for table in priced.tables:
        off = fit_error(table)
        if off is not None:
            notes.append(
                f"{table.choice.describe()}: on {off.n} builds that no fit saw the prices are off "
                f"by {off.median:.1%} (median), {off.p90:.1%} (90th percentile)"
            )
    return _Tables(tables=priced.tables, size_terms=priced.size_terms, notes=tuple(notes))


def _packed_bytes(offered: Offers) -> PackedBytes:
    def found(site: str, level: Level, rows: int, elements: int) -> int:
        """Bytes of the layout that a site has on offer at a level, for so many rows."""
        packed = offered.changes[site, level].packed
        assert packed is not None
        inputs = elements // max(1, rows)
        return packed.packing.resized((rows, inputs)).size_bytes() if rows and inputs else 0

    return found


class Runs:
    """Whether a way to build takes a level at all; one that it ignores has no price of its own.

    Nor has one that would take apart what is one kernel in floats.
    """

    def __init__(
        self, backends: Mapping[str, Backend], graph: Graph, sites: Sequence[Site]
    ) -> None:
        self._backends, self._graph, self._all = backends, graph, sites
        self._joined: dict[str, frozenset[str]] = {}

    def __call__(self, choice: BuildChoice, site: str, level: Level) -> bool:
        """Whether it has a price there."""
        if isinstance(level, int) or level in NATIVE:
            return True
        wanted = Candidate(site=site, level=level, method="", size_bytes=0)
        is_there = self._backends[choice.backend].supports(wanted).ok
        return is_there and (level in STORED or site not in self._sites(choice))

    def _sites(self, choice: BuildChoice) -> frozenset[str]:
        """The sites whose ops are parts of such a kernel."""
        key = choice.describe()
        if key not in self._joined:
            backend = self._backends[choice.backend]
            ops = (
                backend.joined(self._graph, choice) if isinstance(backend, Joining) else frozenset()
            )
            sites = [s.name for s in self._all if ops & {*s.ops}]
            self._joined[key] = frozenset(sites)
        return self._joined[key]


def _ways(
    known: Sequence[BackendInfo], base: BuildChoice, levels: Mapping[str, Sequence[Level]]
) -> list[BuildChoice]:
    """Every way to build in the baseline's precision and with its threads; its backend first.

    Where a weight may be packed, also those that read packed weights in their own way.
    """
    is_packed = any(level in PACKED for offered in levels.values() for level in offered)
    infos = [info for info in known if base.precision in info.precisions]
    ordered = sorted(infos, key=lambda info: info.name != base.backend)
    return [
        replace(base, backend=info.name, options=_floats_of(info, base) | dict(options))
        for info in ordered
        for options in (*(info.choices or ({},)), *(info.stored_choices if is_packed else ()))
    ]


def _floats_of(info: BackendInfo, base: BuildChoice) -> dict[str, str | int | bool]:
    """How a backend builds floats: as the baseline does where it is the baseline's, or quicker."""
    if not info.floats:
        return {}
    if info.name == base.backend:
        same = [
            w for w in info.floats if (w.precision, w.options) == (base.precision, base.options)
        ]
        return dict(base.options) | (dict(same[0].quick) if same else {})
    ways = [way.options for way in info.floats if way.precision == base.precision]
    return dict(ways[0]) if ways else {}


def _native_ms(rows: Sequence[BaselineRow], base: BuildChoice) -> dict[str, float]:
    """Backend -> latency of its uncompressed build in the baseline's precision and threads."""
    found: dict[str, float] = {}
    for row in rows:
        choice = row.choice
        if choice and (choice.precision, choice.threads, choice.shapes) == (
            base.precision,
            base.threads,
            base.shapes,
        ):
            known = found.get(choice.backend, row.timing.median_ms)
            found[choice.backend] = min(known, row.timing.median_ms)
    return found


def _priced_build(
    session: Session, offered: Offers, choice: BuildChoice, assignment: Mapping[str, Level]
) -> Any:
    session.progress.advance()
    graph = sketched(session, offered.chosen(assignment))
    backend = session.backends[choice.backend]
    built = backend.build(graph, shapes_of(graph.signature, choice.batch), choice)
    if session.parts["calibration"].others:  # its profile is of the sizes that it ran at
        session.caller(built, choice.batch)()
    return built
