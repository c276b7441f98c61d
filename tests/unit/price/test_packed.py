"""Packed levels are one class of time and have bytes of their own; no build is made for any."""

from collections.abc import Sequence
from types import ModuleType

import pytest

from tersor.core.errors import ConfigError
from tersor.core.formats import PACKED
from tersor.core.packing import Packing
from tersor.core.records import Candidate, Level
from tersor.plan.problem import Problem
from tersor.plan.ranks import Grid
from tersor.plan.solve import solve
from tersor.price.facts import learn_facts
from tersor.price.price import PriceConfig, price_all
from tersor.price.terms import size_terms

LEVELS: tuple[Level, ...] = ("bf16", "int8", "int8_weight", *sorted(PACKED))  # type: ignore[arg-type]


def bits_of(_site: str, level: Level, rows: int, elements: int) -> int:
    """Grids of 4, 3 and 2 bits with a step for 64 inputs; else half a byte a weight."""
    if str(level).startswith("int"):
        shape = (rows, elements // rows)
        return Packing(kind="grid", shape=shape, bits=int(str(level)[3]), group=64).size_bytes()
    return elements // 2


def few(counts: Sequence[Level]) -> tuple[Level, ...]:
    """Three of them: terms are products of all levels, and checked at every call here."""
    return tuple(dict.fromkeys((counts[0], counts[len(counts) // 2], counts[-1])))


def test_no_more_builds_and_no_larger_terms(lab: ModuleType) -> None:
    built = []
    for formats in (LEVELS[:3], LEVELS):
        net = lab.Network()
        net.levels = {
            s.name: few(net.levels[s.name]) if s.kind == "width" else formats for s in net.sites
        }
        bench = lab.Bench({"linear": net})
        tools = bench.tools(facts=net.facts)
        object.__setattr__(tools, "packed_bytes", bits_of)
        config = PriceConfig(k=4, k_mixed=8, held_out=2)
        found = price_all([lab.CHOICE], net.sites, net.levels, tools, config)
        built.append((bench.built, found.tables[0].terms, found.tables[0].ops))
    assert built[0] == built[1]


def test_bytes_by_width(lab: ModuleType) -> None:
    net = lab.Network()
    facts = learn_facts(net.facts, net.sites, net.levels, "bf16")
    levels = {s.name: ("bf16", "int4_weight", "lut4_weight") for s in net.sites}
    term = next(t for t in size_terms(facts, net.sites, levels, {}, bits_of) if t.name == "b0a")
    at = {"width:stem": 64, "width:b0": 32, "b0a": "int4_weight"}
    # 32 rows of 64 x 9 codes in 288 bytes and nine steps; a bias of 32 floats.
    assert term.at(at) == 32 * (288 + 9 * 2) + 4 * 32
    assert term.at({**at, "b0a": "lut4_weight"}) == 32 * 64 * 9 // 2 + 4 * 32
    with pytest.raises(ConfigError, match=r"wanted to be told what it takes; give packed_bytes"):
        size_terms(facts, net.sites, levels)


def test_plans_and_predictions_give_them_the_native_time(lab: ModuleType) -> None:
    net = lab.Network()
    net.levels = {s.name: net.levels[s.name] if s.kind == "width" else LEVELS for s in net.sites}
    bench = lab.Bench({"linear": net})
    tools = bench.tools(facts=net.facts)
    object.__setattr__(tools, "packed_bytes", bits_of)
    priced = price_all(
        [lab.CHOICE], net.sites, net.levels, tools, PriceConfig(k=4, k_mixed=8, held_out=2)
    )
    table = priced.tables[0]
    native = table.predict_ms({}, {})
    formats = [s.name for s in net.sites if s.kind == "format"]
    for level in sorted(PACKED):
        assert table.predict_ms(dict.fromkeys(formats, level), {}) == native
    rows = {
        s.name: tuple(
            Candidate(
                site=s.name,
                level=level,
                method="m",
                size_bytes=0,
                error=0.0 if level in (128, "bf16") else 1.0 + i,
            )
            for i, level in enumerate(net.levels[s.name])
        )
        for s in net.sites
    }
    problem = Problem(
        candidates=rows,
        table=table,
        tensors={},
        size_terms=priced.size_terms,
        objective="size",
        max_error=1e6,
    )
    assert set(problem.levels()[formats[0]]) == set(LEVELS)
    chosen = solve(problem).assignment
    assert {chosen[s] for s in formats} <= PACKED
    grid = Grid(problem)
    row = grid.encode([chosen])
    totals = problem.totals(chosen)
    assert float(grid.ms(row)[0]) == pytest.approx(totals.ms)
    assert float(grid.size_bytes(row)[0]) == pytest.approx(totals.size_bytes, abs=1)
