"""Ops at int8 that are computed in floats, seen on machines that do so, and on such as don't."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import ModuleType

import numpy as np
import pytest

from tersor.core.records import Level, PriceTable, Site
from tersor.graph.facts import NodeFacts
from tersor.price.costs import WidthCosts
from tersor.price.facts import learn_facts
from tersor.price.laws import NodeTime, fit_laws
from tersor.price.table import fit_error, fit_table
from tersor.price.variants import draw_variants
from tersor.price.ways import Ways, choose_ways, first_readers


def chained(lab: ModuleType, *, fuses: bool, **fields: object):
    """The network whose sites read what nodes give."""

    @dataclass
    class Chained(lab.Network):  # type: ignore[misc, name-defined]
        """First convolutions are integers only in front of an int8 one; second ones never are."""

        def _sites(self) -> tuple[Site, ...]:
            read = {f"b{i}a": f"add{i - 1}" for i in range(1, self.blocks)}
            read |= {f"b{i}c": f"b{i}a" for i in range(self.blocks)} | {"head": "pool"}
            return tuple(replace(s, tensor=read.get(s.name, s.tensor)) for s in super()._sites())

        def exact(self, assignment: Mapping[str, Level]) -> dict[str, float]:
            found: dict[str, float] = super().exact(assignment)
            for node, own in self.facts(assignment).items() if fuses else ():
                reader = f"{node[:-1]}c"
                if node[0] == "b" and (node == reader or assignment.get(reader) != "int8"):
                    found[node] = self.law(node, own, int8=False)
            return found

    return Chained(**fields)


def fitted(lab: ModuleType, net, k: int = 26) -> PriceTable:  # noqa: ANN001
    drawn = draw_variants(net.sites, net.levels, "bf16", k=k, held_out=20, seed=net.seed)
    facts = learn_facts(net.facts, net.sites, net.levels, "bf16")
    seen = [net.observe(v.assignment, held_out=v.held_out) for v in drawn]
    return fit_table(lab.CHOICE, net.sites, seen, lab.quantize_nodes, facts)


@pytest.mark.parametrize("noise", [0.0, 0.03])
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_int8_that_needs_an_int8_reader_goes_by_both_formats(
    lab: ModuleType, seed: int, noise: float
) -> None:
    net = chained(lab, fuses=True, seed=seed, noise=noise)
    table = fitted(lab, net)
    error = fit_error(table)
    assert error is not None
    assert error.median < 0.01 + 2 * noise
    terms = {term.name: term for term in table.terms}
    for i in range(net.blocks):
        assert terms[f"b{i}a"].sites[-2:] == (f"b{i}a", f"b{i}c")  # its own comes first
        assert terms[f"b{i}c"].sites[-1] == f"b{i}c"  # never in integers, whatever reads it
        assert not any(f"b{i}a" in term.sites for term in (terms[f"b{i}c"], terms["head"]))
    at = {"width:stem": 96, "width:b1": 80}
    native, alone, both, beside = (
        terms["b1a"].at({**at, "b1a": mine, "b1c": reader})
        for mine, reader in (
            ("bf16", "bf16"), ("int8", "bf16"), ("int8", "int8"), ("bf16", "int8"),
        )
    )  # fmt: skip
    facts = net.facts(at)["b1a"]
    true = net.law("b1a", facts, int8=False) / net.law("b1a", facts, int8=True)
    assert native == beside
    assert native / both == pytest.approx(true, rel=0.02 + 2 * noise)
    assert alone / native == pytest.approx(1, rel=0.02 + 2 * noise)
    second = {"width:stem": 96, "width:b1": 80}
    ratio = terms["b1c"].at({**second, "b1c": "int8"}) / terms["b1c"].at({**second, "b1c": "bf16"})
    assert ratio == pytest.approx(1, rel=0.02 + 2 * noise)


@pytest.mark.parametrize("noise", [0.0, 0.03])
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_int8_that_needs_none_goes_by_its_own_format(
    lab: ModuleType, seed: int, noise: float
) -> None:
    net = chained(lab, fuses=False, seed=seed, noise=noise)
    table = fitted(lab, net)
    formats = {s.name for s in net.sites if s.kind == "format"}
    native = table.predict_ms({}, {})
    for term in table.terms:  # those of two formats are nothing beside a build
        assert len(formats & set(term.sites)) <= 1 or max(map(abs, term.values)) < 2e-3 * native
    error = fit_error(table)
    assert error is not None
    assert error.p90 < 0.01 + 3 * noise


def test_a_table_of_both_formats_is_worse_by_one(lab: ModuleType) -> None:
    """What the second site is worth: the same builds, with readers that nobody names."""
    net = chained(lab, fuses=True)
    table = fitted(lab, net)
    net.sites = tuple(
        replace(s, tensor=f"{s.tensor}?") if s.kind == "format" else s for s in net.sites
    )
    blind = fit_error(fitted(lab, net))
    error = fit_error(table)
    assert error is not None
    assert blind is not None
    assert blind.median > 5 * error.median


def test_a_reader_reads_the_next_tensor_that_is_written_behind(lab: ModuleType) -> None:
    net = chained(lab, fuses=False)
    facts = learn_facts(net.facts, net.sites, net.levels, "bf16")
    found = first_readers([s for s in net.sites if s.kind == "format"], facts)
    # b0a reads a tensor that no node gives, so that nothing tells what stands in front of it.
    assert found == {
        "b0c": "b1a", "b1a": "b1c", "b1c": "b2a", "b2a": "b2c", "b2c": "b3a", "b3a": "b3c",
        "b3c": "head", "b0a": "b0c",
    }  # fmt: skip
    kept = tuple(replace(s, pinned="keep") if s.name == "b1c" else s for s in net.sites)
    rest = first_readers([s for s in kept if s.kind == "format"], facts)
    assert rest == {site: reader for site, reader in found.items() if reader != "b1c"}


@pytest.mark.usefixtures("how_sure")
def test_what_a_result_costs_that_is_read_in_another_format(lab: ModuleType) -> None:
    net = chained(lab, fuses=False)
    exact = net.exact
    readers = {f"b{i}a": f"b{i}c" for i in range(4)} | {f"b{i}c": f"b{i + 1}a" for i in range(3)}
    readers["b3c"] = "head"
    per_element = 2e-6

    def changes(assignment: Mapping[str, Level]) -> dict[str, float]:
        facts = net.facts(assignment)
        elements = sum(
            facts[site].out_elements
            for site, reader in readers.items()
            if (assignment.get(site) == "int8") != (assignment.get(reader) == "int8")
        )
        return {**exact(assignment), "Convert": per_element * elements}

    without = fitted(lab, net)
    native = without.predict_ms({}, {})
    small = [term for term in without.terms if term.name.endswith(", format")]
    assert all(max(map(abs, term.values)) < 2e-3 * native for term in small)
    net.exact = changes
    table = fitted(lab, net)
    error = fit_error(table)
    assert error is not None
    assert error.p90 < 0.02
    terms = {term.name: term for term in table.terms}
    assert {name for name in terms if name.endswith(", format")} == {
        f"{site}, format" for site in readers
    }
    assert terms["b1a, format"].sites == ("width:b1", "b1a", "b1c")  # what it reads is no matter
    at = {"width:b1": 64}
    cost = terms["b1a, format"].at({**at, "b1a": "int8", "b1c": "bf16"}) * table.scale
    wanted = per_element * net.facts(at)["b1a"].out_elements * net.overhead
    assert cost == pytest.approx(wanted, rel=0.1)
    back = terms["b1a, format"].at({**at, "b1a": "bf16", "b1c": "int8"}) * table.scale
    assert back == pytest.approx(wanted, rel=0.1)  # each way has its own slope
    assert terms["b1a, format"].at({**at, "b1a": "int8", "b1c": "int8"}) == 0.0
    assert table.uncertainty is not None
    assert set(terms) <= set(table.uncertainty.entries)  # else `explain` has no standard error
    assert 0 < np.median(list(table.uncertainty.entries.values())) < 1


def one_kernel(*, with_others: bool) -> Mapping[str, str]:
    """Ways of two depthwise layers that gain little in integers, beside convolutions that gain much."""
    rng = np.random.default_rng(0)
    gains = {"c0": 0.2, "c1": 0.25, "c2": 0.3, "d0": 0.93, "d1": 0.95}
    names = [n for n in gains if with_others or n[0] == "d"]
    owners = {n: Site(name=n, kind="format", ops=(n,), op_kind="conv") for n in names}
    readers = {n: f"after {n}" for n in names}
    assignments, rows = [], []
    for build in range(24):
        chosen = {s: str(rng.choice(["f32", "int8"])) for n in names for s in (n, readers[n])}
        assignments.append(chosen)
        for node in names:
            kind, count = ("depthwise", 9) if node[0] == "d" else ("conv", 64)
            out = 16 * int(rng.integers(2, 9))
            facts = NodeFacts(
                kind=kind,
                macs=100 * count * out,
                weight_elements=count * out,
                in_elements=100 * (out if kind == "depthwise" else count),
                out_elements=100 * out,
                inputs=count,
                outputs=out,
                window=9 if kind == "depthwise" else 1,
            )
            is_fused = chosen[node] == chosen[readers[node]] == "int8"
            ms = (
                1e-3 * out * (gains[node] if is_fused else 1.0) * float(np.exp(0.05 * rng.normal()))
            )
            rows.append(
                NodeTime(node=node, format=chosen[node], build=build, facts=facts, ms=ms)  # type: ignore[arg-type]
            )
    ways = Ways(precision="f32", readers=readers)
    return choose_ways(rows, fit_laws(rows), owners, assignments, ways).found


def test_depthwise_layers_go_with_all_other_convolutions() -> None:
    alone, beside = one_kernel(with_others=False), one_kernel(with_others=True)
    assert alone == {}
    assert {beside[n] for n in ("c0", "c1", "c2")} == {"reader"}
    assert {beside.get(n) for n in ("d0", "d1")} <= {"reader", "native"}


def test_what_is_laid_out_anew_around_depthwise_layers_of_odd_counts(
    lab: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a runtime's floats are in blocks of four channels, and other counts are not."""

    class Depthwise(lab.Network):  # type: ignore[misc, name-defined]
        """First layers work on one channel at a time."""

        def facts(self, assignment: Mapping[str, Level]) -> dict[str, NodeFacts]:
            found: dict[str, NodeFacts] = super().facts(assignment)
            for node, own in found.items():
                if node[0] == "b" and node[-1] == "a":
                    found[node] = replace(
                        own,
                        kind="depthwise",
                        macs=9 * own.out_elements,
                        weight_elements=9 * own.outputs,
                        in_elements=own.out_elements,
                        inputs=9,
                    )
            return found

        def exact(self, assignment: Mapping[str, Level]) -> dict[str, float]:
            found: dict[str, float] = super().exact(assignment)
            odd = [
                own.in_elements + own.out_elements
                for node, own in self.facts(assignment).items()
                if own.kind == "depthwise" and own.outputs % 4 and assignment.get(node) != "int8"
            ]
            return {**found, "ReorderInput": 3e-6 * sum(odd)}

    net = Depthwise(own=0.1)
    odd: tuple[Level, ...] = (128, 113, 96, 81, 64, 49, 32, 17)
    net.levels |= {s.name: odd for s in net.sites if s.kind == "width"}
    error = fit_error(fitted(lab, net))
    monkeypatch.setattr(WidthCosts, "_odd", lambda *_: 0.0)
    without = fit_error(fitted(lab, net))
    assert error is not None
    assert without is not None
    assert error.median < 0.015
    assert without.median > 2 * error.median
