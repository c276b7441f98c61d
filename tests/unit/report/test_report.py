"""The report: arithmetic by hand on one small record, and what a reader sees."""

import dataclasses
import io
import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console, RenderableType

from tersor.core.errors import SiteNotFoundError
from tersor.core.jsonable import from_json, to_json
from tersor.core.records import Candidate, Site, Term, Uncertainty
from tersor.report.explain import explain
from tersor.report.facts import (
    all_notes,
    change_ms,
    describe,
    price_quality,
    quantile,
    result_rows,
    site_lines,
)
from tersor.report.form import report_json
from tersor.report.record import Report
from tersor.report.terminal import (
    baselines_table,
    explained,
    inspected_table,
    render_report,
    render_summary,
    sites_view,
)

SAMPLE = Path(__file__).with_name("sample.json")
ROUNDING = 1e-12  # sums of a dozen doubles near 10, in milliseconds


@pytest.fixture
def report() -> Report:
    return from_json(Report, json.loads(SAMPLE.read_text(encoding="utf-8")))


def shown(item: RenderableType) -> str:
    stream = io.StringIO()
    Console(file=stream, width=200, highlight=False).print(item)
    return stream.getvalue()


def with_verdict(report: Report, **changes: object) -> Report:
    verdict = dataclasses.replace(report.verdict, **changes)  # type: ignore[arg-type]
    return dataclasses.replace(report, verdict=verdict)


def test_the_record_reads_back_from_its_json(report: Report) -> None:
    assert from_json(Report, json.loads(json.dumps(report_json(report)))["record"]) == report


def test_json_holds_the_derived_tables_beside_the_record(report: Report) -> None:
    value = report_json(report)
    assert value["status"] == "pass"
    assert [row["name"] for row in value["rows"]] == [
        "as given (eager)",
        "best uncompressed (openvino f32)",
        "result",
    ]
    assert value["sites"] == to_json(site_lines(report))


def test_rows_compare_with_the_best_uncompressed_build(report: Report) -> None:
    given_row, best, result = result_rows(report)
    assert given_row.speedup == pytest.approx(9 / 20, rel=ROUNDING)
    assert (best.speedup, best.speedup_low) == (1.0, None)
    assert (result.speedup, result.speedup_low, result.speedup_high) == (1.5, 1.45, 1.55)
    assert (result.drop_points, result.agreement, result.test_samples) == (0.3, 0.991, 64)


def test_a_model_that_was_not_timed_as_given_has_no_such_row(report: Report) -> None:
    rows = result_rows(with_verdict(report, original_latency=None))
    assert [row.name for row in rows] == ["best uncompressed (openvino f32)", "result"]


def test_site_lines_say_format_size_price_and_reason(report: Report) -> None:
    first, second, head = site_lines(report)
    assert (first.before, first.after) == ("f32", "int8")
    assert (first.size_before, first.size_after) == (4_000_000, 1_000_000)
    assert (first.predicted_ms_before, first.predicted_ms) == (4.0, 2.0)  # 2 and 1 ms, scale 2
    assert first.reason == "-1.8 ms, +0.003 error"
    assert (second.after, second.reason) == (
        "f32",
        "none of 1 other format(s) was chosen under the target",
    )
    assert (head.after, head.reason) == ("f32", "pinned: matched by keep")


def test_change_of_one_site_shares_the_quantiser(report: Report) -> None:
    # As it is: (1 + 1 + 0.4 + 0.5 glue + 0.1 quantiser) x 2 = 6.
    assert change_ms(report, "encoder.0", "f32") == pytest.approx(7.8 - 6, rel=ROUNDING)
    assert change_ms(report, "encoder.1", "int8") == pytest.approx(5.2 - 6, rel=ROUNDING)


def test_without_a_table_for_the_choice_prices_are_unknown(report: Report) -> None:
    prices = dataclasses.replace(report.prices, tables=())
    bare = dataclasses.replace(report, prices=prices)
    assert change_ms(bare, "encoder.0", "f32") is None
    assert site_lines(bare)[0].predicted_ms is None
    assert site_lines(bare)[0].reason == "chosen without a price, +0.003 error"
    assert explain(bare, "encoder.0")["predicted_ms"] is None
    assert "unknown" in shown(explained(explain(bare, "encoder.0")))


def test_price_quality_counts_only_held_out_builds(report: Report) -> None:
    (quality,) = price_quality(report)
    assert quality.builds == 3  # errors of 1, 2 and 10 %; the fourth build was fitted
    assert quality.median_percent == pytest.approx(2.0, rel=1e-9)
    assert quality.p90_percent == pytest.approx(2 + 0.8 * 8, rel=1e-9)


def test_price_quality_without_held_out_builds_is_unknown(report: Report) -> None:
    table = dataclasses.replace(report.prices.tables[0], builds=())
    prices = dataclasses.replace(report.prices, tables=(table,))
    (quality,) = price_quality(dataclasses.replace(report, prices=prices))
    assert (quality.builds, quality.median_percent, quality.p90_percent) == (0, None, None)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=20), st.floats(0, 1))
def test_quantile_is_numpys(values: list[float], fraction: float) -> None:
    import numpy as np

    # Two roundings of numbers up to 1e6.
    assert quantile(values, fraction) == pytest.approx(np.quantile(values, fraction), abs=1e-9)


def test_explain_gives_price_alternatives_and_the_way_back(report: Report) -> None:
    facts = explain(report, "encoder.0")
    assert (facts["level"], facts["method"], facts["error"]) == ("int8", "quantize", 0.003)
    assert facts["predicted_ms"] == 2.0
    assert facts["settings"] == {"alpha": 0.5}
    assert facts["undo"]["latency_ms_change"] == pytest.approx(1.8, rel=ROUNDING)
    assert facts["undo"]["error_change"] == -0.003
    assert facts["undo"]["size_bytes_change"] == 3_000_000
    (alternative,) = facts["alternatives"]
    assert alternative["level"] == "f32"
    assert json.loads(json.dumps(facts)) == facts


def test_explain_of_an_untouched_site_has_nothing_to_undo(report: Report) -> None:
    facts = explain(report, "encoder.1")
    assert facts["undo"] is None
    (alternative,) = facts["alternatives"]
    assert alternative["latency_ms_change"] == pytest.approx(-0.8, rel=ROUNDING)
    assert alternative["error_change"] == 0.02


def test_explain_of_an_unknown_site_names_the_nearest(report: Report) -> None:
    with pytest.raises(SiteNotFoundError, match=r"'encodr\.1'; nearest of 3: encoder\.1"):
        explain(report, "encodr.1")


def test_notes_say_that_nothing_was_held_out(report: Report) -> None:
    assert "quality is not held out: 64 test sample(s), used 1 time(s)" in all_notes(report)
    held = with_verdict(report, held_out=True)
    assert "quality is held out: 64 test sample(s), used once" in all_notes(held)


def test_a_returned_baseline_says_so_and_why(report: Report) -> None:
    back = with_verdict(
        report, returned_baseline=True, reason="slower", status="fail", binding="drop_points"
    )
    assert all_notes(back)[0] == "the best uncompressed build is returned: slower"
    assert "the constraint that binds: drop_points" in all_notes(back)
    assert result_rows(back)[-1].name == "result (the best uncompressed build)"


@pytest.mark.parametrize(
    ("status", "words"),
    [("pass", "pass (target met)"), ("fail", "fail (target not met)"), ("unknown", "unknown")],
)
def test_terminal_says_the_status_in_words(report: Report, status: str, words: str) -> None:
    assert f"verdict: {words}" in shown(render_summary(with_verdict(report, status=status)))


def test_terminal_shows_every_part(report: Report) -> None:
    text = shown(render_report(report))
    for part in (
        "6.000 [5.880, 6.120]",
        "1.50x [1.45, 1.55]",
        "drop 0.30 pt, agreement 0.9910, 5th percentile 0.9700, 64 test samples",
        "f32 -> int8",
        "4.00 MB -> 1.00 MB",
        "8.4 %",
        "predicted",
        "* one note",
        "95 % bound 1.45",
        "Example CPU, 2 core(s); openvino 2026.4.1; seed 7",
    ):
        assert part in text


def test_names_are_never_read_as_markup(report: Report) -> None:
    sites = (dataclasses.replace(report.sites[0], name="layers[bold]"),)
    assert "layers[bold]" in shown(inspected_table(sites))


def test_baselines_table_tells_eager_from_builds(report: Report) -> None:
    text = shown(baselines_table(report.prices.baselines))
    assert "eager (as given)" in text
    assert "openvino f32 (openvino f32, 2 thread(s))" in text
    choice = report.plan.choice
    named = dataclasses.replace(report.prices.baselines[1], name=choice.describe())
    assert shown(baselines_table([named])).count(choice.describe()) == 1


def with_widths(report: Report) -> Report:
    """The sample with an inner width that decides two weights, a branch, and a pinned width.

    Of ``encoder.0`` the time and the bytes are terms of the width and the format.
    """
    width = Site(
        name="width:ffn", kind="width", ops=("linear",), units=1536, unit_kind="neurons",
        members=("up.weight", "down.weight"),
    )  # fmt: skip
    branch = Site(name="branch:block.1", kind="branch", ops=("add",), units=2)
    stream = Site(name="width:stream", kind="width", ops=(), units=384, pinned="an output")
    by_both = (("width:ffn", "encoder.0"), ((1536, 1024), ("f32", "int8")))
    table = report.prices.tables[0]
    latency = (
        Term(name="up", sites=by_both[0], levels=by_both[1], values=(2.0, 1.0, 1.6, 0.79)),
        Term(
            name="block.1", sites=("branch:block.1",), levels=((2, 1, 0),), values=(0.5, 0.2, 0.0)
        ),
    )
    table = dataclasses.replace(
        table,
        ops={k: v for k, v in table.ops.items() if k != "encoder.0"},
        terms=latency,
        native={"width:ffn": 1536, "branch:block.1": 2},
    )
    size = Term(name="up", sites=by_both[0], levels=by_both[1], values=(4e6, 1e6, 3e6, 6e5))
    more = [("width:ffn", 1536, 0.0), ("width:ffn", 1024, 0.0003), ("width:ffn", 512, 0.01)]
    more += [("branch:block.1", level, error) for level, error in ((2, 0.0), (1, 0.1), (0, 0.2))]
    candidates = tuple(
        Candidate(site=s, level=v, method="prune", size_bytes=0, error=e) for s, v, e in more
    )
    assignment = {**report.plan.assignment, "width:ffn": 1024}
    return dataclasses.replace(
        report,
        sites=(*report.sites, width, branch, stream),
        candidates=(*report.candidates, *candidates),
        prices=dataclasses.replace(report.prices, tables=(table,), size_terms=(size,)),
        plan=dataclasses.replace(report.plan, assignment=assignment),
    )


def test_a_width_is_one_line_of_text(report: Report) -> None:
    lines = {line.site: line for line in site_lines(with_widths(report))}
    # 1 ms against 0.79 ms at int8, scale 2.
    assert describe(lines["width:ffn"]) == "width ffn: 1536 -> 1024, -0.42 ms, +0.0003 error"
    kept = "branch block.1: kept, none of 2 other level(s) was chosen under the target"
    assert describe(lines["branch:block.1"]) == kept
    assert describe(lines["width:stream"]) == "width stream: 384, pinned: an output"
    assert describe(lines["encoder.0"]).startswith("encoder.0: f32 -> int8, -1.42 ms")
    text = shown(render_report(with_widths(report)))
    assert "width ffn: 1536 -> 1024, -0.42 ms, +0.0003 error" in text
    assert kept in text
    assert "width:ffn" not in text


@pytest.mark.parametrize(
    ("level", "words"),
    [
        (1, "replaced by its best linear map, -0.6 ms, +0.1 error"),
        (0, "removed, -1 ms, +0.2 error"),
    ],
)
def test_a_branch_that_is_replaced_says_so(report: Report, level: int, words: str) -> None:
    joint = with_widths(report)
    assignment = {**joint.plan.assignment, "branch:block.1": level}
    plan = dataclasses.replace(joint.plan, assignment=assignment)
    line = site_lines(dataclasses.replace(joint, plan=plan))[4]
    assert describe(line) == f"branch block.1: {words}"


def test_sizes_and_times_of_sites_that_share_terms(report: Report) -> None:
    lines = {line.site: line for line in site_lines(with_widths(report))}
    first, width = lines["encoder.0"], lines["width:ffn"]
    assert (first.size_before, first.size_after) == (4_000_000, 600_000)
    assert (width.size_before, width.size_after) == (1_000_000, 600_000)
    assert (width.predicted_ms_before, width.predicted_ms) == (2.0, 1.58)
    assert (first.predicted_ms_before, first.predicted_ms) == (3.2, 1.58)
    assert lines["width:stream"].predicted_ms is None


def test_explain_says_how_certain_a_price_is(report: Report) -> None:
    joint = with_widths(report)
    assert explain(joint, "encoder.0")["predicted_ms_se"] is None
    (table,) = joint.prices.tables
    second = dataclasses.replace(table.terms[0], name="down", values=(1.0, 0.5, 0.8, 0.3))
    sure = Uncertainty(deviation=0.02, covariance=(), entries={"up": 0.1, "down": 0.2})
    table = dataclasses.replace(table, terms=(*table.terms, second), uncertainty=sure)
    joint = dataclasses.replace(joint, prices=dataclasses.replace(joint.prices, tables=(table,)))
    facts = explain(joint, "width:ffn")
    # At 1024 and int8: 0.79 and 0.3 ms, each by itself, scale 2.
    assert facts["predicted_ms"] == pytest.approx(2 * 1.09)
    assert facts["predicted_ms_se"] == pytest.approx(2 * math.hypot(0.079, 0.06))
    assert "predicted 2.180 +- 0.198 ms" in shown(explained(facts))
    # One entry that is not known: none of it is.
    assert explain(joint, "branch:block.1")["predicted_ms_se"] is None


def test_explain_of_a_width(report: Report) -> None:
    facts = explain(with_widths(report), "width:ffn")
    assert (facts["kind"], facts["level"], facts["native"], facts["units"]) == (
        "width", 1024, 1536, 1536,
    )  # fmt: skip
    assert facts["members"] == ["up.weight", "down.weight"]
    whole, half = facts["alternatives"]
    assert (whole["level"], half["level"]) == (1536, 512)
    assert whole["latency_ms_change"] == pytest.approx(0.42, rel=1e-9)
    assert whole["size_bytes_change"] == facts["undo"]["size_bytes_change"] == 400_000
    assert half["latency_ms_change"] is None  # no price at 512
    assert facts["undo"]["level"] == 1536
    assert json.loads(json.dumps(facts)) == facts
    assert "undo this (back to 1536): +0.420 ms, -0.0003 error" in shown(explained(facts))


def test_a_report_with_widths_reads_back(report: Report) -> None:
    joint = with_widths(report)
    assert from_json(Report, json.loads(json.dumps(report_json(joint)))["record"]) == joint


def test_inspection_shows_units_of_a_width(report: Report) -> None:
    text = shown(inspected_table(with_widths(report).sites))
    assert "neurons" in text
    assert "1536 units" in text


def test_errors_come_with_their_confidence(report: Report) -> None:
    measured = tuple(
        dataclasses.replace(c, error_se=c.error / 10, samples=64, note="why") if c.error else c
        for c in report.candidates
    )
    known = dataclasses.replace(report, candidates=measured)
    (line, *_) = site_lines(known)
    assert (line.error, line.error_se) == (0.003, 0.003 / 10)
    facts = explain(known, "encoder.0")
    assert (facts["error_se"], facts["samples"]) == (0.003 / 10, 64)
    assert "error 0.003 +- 0.0003 (64 samples)" in shown(explained(facts))
    assert "0.003 +- 0.0003" in shown(sites_view(site_lines(known)))
    noted = explain(known, "encoder.1")["alternatives"][0]
    assert (noted["samples"], noted["note"]) == (64, "why")


def test_candidates_of_older_records_can_be_read() -> None:
    old = {"site": "a", "level": "int8", "method": "m", "size_bytes": 1, "error": 0.5,
           "error_se": 0.1, "detail": {}}  # fmt: skip
    found = from_json(Candidate, old)
    assert (found.samples, found.proxy, found.note) == (0, None, "")
    assert from_json(Candidate, to_json(found)) == found
