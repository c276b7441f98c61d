"""Every rule on graphs of a few ops: what it finds, what it pins, and the law mask == cut."""

import pytest
import torch

from tersor.graph.axes import Axes, analyse_axes
from tersor.graph.axes.gate import EFFECT, TOLERANCE, check, random_share
from tersor.graph.axes.rulebook import REWRITES, RULES, Call, op_name
from tersor.graph.axes.slicing import cut
from tersor.graph.contracts import Graph
from tests.unit.graph.axes.cases import CASES
from tests.unit.graph.axes.micro import Case

PINNED = [case for case in CASES if case.pinned and case.breaks]
SHARE = 0.3


def named(case: Case) -> str:
    return case.id


def widths_of(axes: Axes, exactness: str) -> dict[str, tuple[int, str]]:
    return {w.name: (w.units, w.kind) for w in axes.widths if w.exactness == exactness}


@pytest.mark.parametrize("case", CASES, ids=named)
def test_a_rule_finds_what_is_there_and_obeys_the_law(case: Case):
    graph = case.graph()
    axes = analyse_axes(graph)
    assert case.op in {op_name(n) for n in graph.module.graph.nodes if n.op == "call_function"}
    assert not axes.unknown
    assert widths_of(axes, "exact") == case.widths
    assert widths_of(axes, "approximate") == case.approximate
    reasons = {(p.tensor, p.dim): (p.op, p.reason) for p in axes.pinned}
    for place, (op, text) in case.pinned.items():
        assert reasons[place][0] == op
        assert text in reasons[place][1]
    if case.widths:
        gone = random_share(axes, SHARE, case.seed)
        report = check(graph, axes, gone, each=len(gone) > 1)
        assert report.passed, report
        assert not report.silent


@pytest.mark.parametrize("case", [c for c in CASES if c.approximate], ids=named)
def test_with_the_norms_of_the_whole_width_approximate_widths_obey_the_law(case: Case):
    graph = case.graph()
    axes = analyse_axes(graph)
    gone = random_share(axes, SHARE, case.seed, exact_only=False)
    assert not check(graph, axes, gone).difference <= EFFECT * TOLERANCE
    report = check(graph, axes, gone, each=True, exact_norms=True)
    assert report.passed, report
    assert not report.silent


@pytest.mark.parametrize("case", PINNED, ids=named)
def test_what_is_pinned_could_not_be_cut(case: Case, monkeypatch: pytest.MonkeyPatch):
    """Without the freeze a width is found there, and cutting it changes the output."""
    monkeypatch.setattr(Call, "freeze", lambda *_: None)
    graph = case.graph()
    axes = analyse_axes(graph)
    for tensor, dim in case.pinned:
        name = next(
            w.name for w in axes.widths if (tensor, dim) in {(c.tensor, c.dim) for c in w.couplings}
        )
        assert any(differs(graph, axes, name, [unit]) for unit in range(axes[name].units))


def differs(graph: Graph, axes: Axes, name: str, units: list[int]) -> bool:
    """Whether a cut does not run, or computes something else than the mask."""
    try:
        report = check(graph, axes, {name: units})
    except (RuntimeError, IndexError):
        return True
    return report.difference > EFFECT * TOLERANCE


def test_every_rule_has_a_case():
    assert sorted(set(RULES) - {case.op for case in CASES}) == []


def test_every_rule_is_of_an_op_that_exists():
    """A name that no op has would never be met."""
    listed = (name.split("::") for name in torch._C._dispatch_get_all_op_names())
    ops = {name.partition(".")[0] for space, name in listed if space == "aten"}
    assert [name for name in RULES if name not in ops] == []


def written(graph: Graph, op: str) -> list[tuple[str, ...]]:
    """Targets and arguments of the nodes that were of an op when they were named."""
    return [
        (str(node.target), str(node.args), str(node.kwargs))
        for node in graph.module.graph.nodes
        if node.name.startswith(f"{op}_")
    ]


@pytest.mark.parametrize("case", [c for c in CASES if c.literal], ids=named)
def test_a_rewrite_changes_what_is_written_at_the_op(case: Case):
    graph = case.graph()
    axes = analyse_axes(graph)
    gone = random_share(axes, 0.5, 0, exact_only=False)
    assert written(cut(graph, axes, axes.removed(gone)), case.op) != written(graph, case.op)


def test_every_rewrite_has_a_case_that_needs_it():
    assert sorted(set(REWRITES) - {case.op for case in CASES if case.literal}) == []
