"""A report in brief: what it says of the plan is what the whole one says."""

import dataclasses
import json
from pathlib import Path

import pytest

from tersor.core.jsonable import from_json, to_json
from tersor.core.records import Candidate, Term
from tersor.report.brief import LEFT_OUT, brief
from tersor.report.explain import explain
from tersor.report.facts import all_notes, change_ms, site_lines
from tersor.report.record import Report

SAMPLE = Path(__file__).with_name("sample.json")


@pytest.fixture
def report() -> Report:
    """The sample, with one more offer of each site that it changes, which no plan took."""
    found = from_json(Report, json.loads(SAMPLE.read_text(encoding="utf-8")))
    more = [
        Candidate(site=s.name, level="int3_weight", method="quantize", size_bytes=7, error=0.5)
        for s in found.sites
        if s.kind == "format" and s.pinned is None
    ]
    return dataclasses.replace(found, candidates=(*found.candidates, *more))


def test_lines_of_the_plan_are_the_same(report: Report) -> None:
    whole, short = site_lines(report), site_lines(brief(report))
    assert [dataclasses.replace(a, reason="") for a in short] == [
        dataclasses.replace(b, reason="") for b in whole
    ]
    changed = [(a, b) for a, b in zip(short, whole, strict=True) if a.before != a.after]
    assert changed
    assert all(a.reason == b.reason for a, b in changed)


def test_a_site_left_alone_does_not_say_that_nothing_was_offered(report: Report) -> None:
    alone = next(
        s for s in report.sites if s.pinned is None and report.level(s) == report.native(s)
    )
    assert "is not in this report" in explain(brief(report), alone.name)["reason"]


def test_undoing_a_choice_costs_the_same(report: Report) -> None:
    changed = [s for s in report.sites if report.level(s) != report.native(s)]
    assert changed
    for site in changed:
        assert explain(brief(report), site.name)["undo"] == explain(report, site.name)["undo"]


def test_other_offers_are_gone_and_it_says_so(report: Report) -> None:
    short = brief(report)
    kept = {(c.site, c.level) for c in short.candidates}
    levels = {s.name: (report.level(s), report.native(s)) for s in report.sites}
    assert all(level in levels[site] for site, level in kept)
    assert len(short.candidates) < len(report.candidates)
    assert short.pareto == ()
    assert LEFT_OUT in all_notes(short)
    assert LEFT_OUT not in all_notes(report)
    assert from_json(Report, to_json(short)) == short


def test_terms_keep_the_costs_of_what_is_left(report: Report) -> None:
    """Two widths and a format: of 2 x 3 x 3 costs the 1 x 2 x 2 of the plan and of leaving alone."""
    table = report.table()
    assert table is not None
    site = next(s for s in report.sites if report.level(s) == "int8")
    levels = ((8, 4), (6, 3, 1), ("f32", "bf16", "int8"))
    sites = ("width:a", "width:b", site.name)
    term = Term(name="t", sites=sites, levels=levels, values=tuple(float(i) for i in range(18)))
    widths = [
        dataclasses.replace(site, name=name, kind="width", units=units, shape=())
        for name, units in (("width:a", 8), ("width:b", 6))
    ]
    assignment = {**report.plan.assignment, "width:a": 8, "width:b": 3}
    priced = dataclasses.replace(table, terms=(term,), native={"width:a": 8, "width:b": 6})
    whole = dataclasses.replace(
        report,
        sites=(*report.sites, *widths),
        plan=dataclasses.replace(report.plan, assignment=assignment),
        prices=dataclasses.replace(report.prices, tables=(priced,), size_terms=(term,)),
    )
    short = brief(whole)
    (cut,) = short.prices.size_terms
    assert cut.levels == ((8,), (6, 3), ("f32", "int8"))
    assert cut.values == (0.0, 2.0, 3.0, 5.0)
    assert change_ms(short, "width:b", 6) == change_ms(whole, "width:b", 6) is not None
