"""Builds and tables of earlier sessions: found again, scaled, or refused."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tersor.core.records import Level, PriceTable, Site, Term
from tersor.core.store import Store
from tersor.price.memory import PriceMemory, narrowed
from tersor.price.price import PriceConfig, price_choice
from tersor.price.table import fit_error

CONFIG = PriceConfig(k=10, held_out=4, batch=3, seed=0)
BUILDS = 14


class Session:
    """Pricing on one fake machine; every call is a new session with the same store."""

    def __init__(self, lab: ModuleType, folder: Path) -> None:
        self.lab, self.folder = lab, folder
        self.machine = lab.Machine(lab.make_sites(9))
        self.notes: list[str] = []

    def __call__(
        self,
        *,
        pinned: tuple[int, ...] = (),
        drift: float = 1.0,
        k: int = CONFIG.k,
        stop_after: int | None = None,
        place: Mapping[str, Any] | None = None,
    ) -> PriceTable:
        self.bench = self.lab.Bench({"linear": self.machine}, drift=lambda _run: drift)
        where = {"scope": "model, machine", "versions": {"fake": "1"}, **(place or {})}
        memory = PriceMemory(store=Store(self.folder), **where)
        tools = replace(self.bench.tools(memory=memory), note=self.notes.append)
        if stop_after is not None:
            tools = replace(tools, measure=_interrupted(tools.measure, stop_after))
        sites = self.lab.make_sites(9, pinned)
        levels = dict(self.lab.all_levels(sites))
        for i in pinned:
            levels[f"s{i}"] = ("bf16",)
        config = replace(CONFIG, k=k)
        table: PriceTable = price_choice(self.lab.CHOICE, sites, levels, tools, config)
        return table

    @property
    def built(self) -> int:
        return len(self.bench.built)

    def slow(self, factor: float, int8: float = 1.0) -> None:
        """The machine gets slower, all int8 by another factor on top."""
        self.machine.native = {s: ms * factor for s, ms in self.machine.native.items()}
        self.machine.int8 = {s: ms * factor * int8 for s, ms in self.machine.int8.items()}
        self.machine.quantizer = {t: ms * factor for t, ms in self.machine.quantizer.items()}
        self.machine.glue *= factor


def _interrupted(measure: Any, runs: int) -> Any:
    left = [runs]

    def stopping(calls: Mapping[str, Any]) -> Any:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return measure(calls)

    return stopping


@pytest.fixture
def session(lab: ModuleType, tmp_path: Path) -> Session:
    return Session(lab, tmp_path)


def test_a_second_session_builds_the_reference_and_one_more(session: Session) -> None:
    first = session()
    assert session.built == BUILDS
    again = session()
    assert session.built == 2
    assert any("14 of 14 builds were measured before" in note for note in session.notes)
    assert again.predict_ms({}, {}) == pytest.approx(first.predict_ms({}, {}))
    assert [b.held_out for b in again.builds] == [b.held_out for b in first.builds]
    for one, other in zip(again.builds, first.builds, strict=True):
        assert one.measured_ms == pytest.approx(other.measured_ms)


def test_only_what_is_new_is_built(session: Session) -> None:
    session()
    table = session(k=12)
    assert session.built == 2 + 2
    assert len(table.builds) == BUILDS + 2


def test_a_slower_machine_scales_what_is_kept(session: Session) -> None:
    before = session()
    session.slow(1.2)
    table = session()
    assert session.built == 2
    assert table.predict_ms({}, {}) == pytest.approx(1.2 * before.predict_ms({}, {}))
    for build in table.builds:
        assert build.measured_ms == pytest.approx(session.machine.total(build.assignment))


def test_drift_within_a_session_is_not_taken_for_a_slower_machine(session: Session) -> None:
    before = session()
    assert session(drift=1.2).predict_ms({}, {}) == pytest.approx(before.predict_ms({}, {}))


def test_a_machine_that_has_changed_much_is_measured_anew(session: Session) -> None:
    session()
    session.slow(1.3)
    table = session()
    assert session.built == 2 + BUILDS
    assert any("changed by more than 25%" in note for note in session.notes)
    assert fit_error(table).p90 < 1e-9
    session()
    assert session.built == 2  # what was measured anew is what is kept


def test_a_machine_that_has_changed_in_kind_is_measured_anew(session: Session) -> None:
    session()
    session.slow(1.0, int8=1.25)
    table = session()
    assert session.built == 2 + BUILDS
    assert any("one of them takes +" in note for note in session.notes)
    assert fit_error(table).p90 < 1e-9


@pytest.mark.parametrize(
    "other",
    [
        {"scope": "model, another machine"},
        {"versions": {"fake": "2"}},
        {"detail": lambda _assignment: "another grid"},
    ],
)
def test_builds_of_anything_else_are_not_used(session: Session, other: dict[str, Any]) -> None:
    session()
    session(place=other)
    assert session.built == BUILDS


@pytest.mark.parametrize(
    "damage",
    [
        "{",
        {"measured_ms": -1.0},
        {"measured_ms": "nan"},
        {"reference_ms": 0.0},
        {"node_ms": {}},
        {"extra": 1},
        {"reference": "of another build"},
    ],
)
def test_a_damaged_entry_is_measured_again(session: Session, tmp_path: Path, damage: Any) -> None:
    before = session()
    path = sorted((tmp_path / "builds").glob("*/record.json"))[3]
    record = json.loads(path.read_text())
    path.write_text(damage if isinstance(damage, str) else json.dumps({**record, **damage}))
    table = session()
    assert session.built == 2 + 1
    assert table.predict_ms({}, {}) == pytest.approx(before.predict_ms({}, {}))


def test_what_was_measured_before_an_interruption_is_kept(session: Session) -> None:
    with pytest.raises(KeyboardInterrupt):
        session(stop_after=3)
    done = 9  # three batches
    session()
    assert session.built == 2 + BUILDS - done


def test_layers_that_are_to_be_kept_need_no_new_builds(session: Session, lab: ModuleType) -> None:
    wide = session()
    session.slow(1.1)
    table = session(pinned=(2, 7))
    assert session.built == 1
    assert any("an earlier run with more choices" in note for note in session.notes)
    sites: Sequence[Site] = lab.make_sites(9)
    tensors = {s.name: str(s.tensor) for s in sites}
    assignment: dict[str, Level] = {"s0": "int8", "s5": "int8"}
    wanted = 1.1 * wide.predict_ms(assignment, tensors)
    assert table.predict_ms(assignment, tensors) == pytest.approx(wanted)
    assert "int8" not in table.ops["s2"] | table.ops["s7"]
    assert "int8" in table.ops["s0"]
    session()  # and the wide one is still there
    assert session.built == 2


def test_more_choices_than_a_table_has_are_measured(session: Session) -> None:
    session(pinned=(2, 7))
    table = session()
    assert session.built > 2
    assert "int8" in table.ops["s2"]


def test_a_narrowed_table_costs_what_the_wide_one_does(lab: ModuleType, tmp_path: Path) -> None:
    """With widths: a pinned width stays full, a pinned format native, counts leave the terms."""
    net = lab.Network()
    bench = lab.Bench({"linear": net})
    memory = PriceMemory(store=Store(tmp_path), scope="net", versions={"fake": "1"})
    config = PriceConfig(k=10, k_mixed=14, held_out=2, batch=8)
    tools = bench.tools(facts=net.facts, memory=memory)
    wide = price_choice(lab.CHOICE, net.sites, net.levels, tools, config)
    pins = {"width:b1", "b1a", "head"}
    sites = tuple(replace(s, pinned="keep" if s.name in pins else None) for s in net.sites)
    levels = {s: own for s, own in net.levels.items() if s not in pins}
    levels["width:b0"] = (128, 64, 32)
    bench.built.clear()
    table = price_choice(lab.CHOICE, sites, levels, tools, config)
    assert len(bench.built) == 1
    tensors = {s.name: s.tensor for s in sites if s.tensor}
    drawn = {"width:b0": 64, "width:stem": 96, "b0a": "int8", "b2c": "int8", "width:b3": 16}
    ratio = table.predict_ms({}, tensors) / wide.predict_ms({}, tensors)
    assert table.predict_ms(drawn, tensors) == pytest.approx(
        ratio * wide.predict_ms(drawn, tensors)
    )
    assert not pins & {site for term in table.terms for site in term.sites}
    assert not pins & set(table.native)
    counts = {dict(zip(t.sites, t.levels, strict=True)).get("width:b0") for t in table.terms}
    assert counts <= {None, (128, 64, 32)}


def test_what_reads_an_op_is_no_matter_once_its_own_format_is_fixed(lab: ModuleType) -> None:
    both = (("bf16", "int8"), ("bf16", "int8"))
    fused = Term(name="a", sites=("a", "c"), levels=both, values=(1.0, 1.0, 1.0, 0.5))
    changed = Term(name="a, format", sites=("a", "c"), levels=both, values=(0.0, 0.1, 0.1, 0.0))
    table = PriceTable(
        choice=lab.CHOICE, ops={}, quantizers={}, glue_ms=0.2, terms=(fused, changed)
    )
    sites = tuple(
        Site(name=name, kind="format", ops=(name,), op_kind="conv", pinned=pinned)
        for name, pinned in (("a", "keep"), ("c", None))
    )
    found = narrowed(table, sites, {"c": ("bf16", "int8")})
    reads = Term(name="a, format", sites=("c",), levels=both[:1], values=(0.0, 0.1))
    assert found.terms == (reads,)
    for level in both[1]:
        assert found.predict_ms({"c": level}, {}) == pytest.approx(
            table.predict_ms({"c": level}, {})
        )
