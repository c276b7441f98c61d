"""Tables of builds that vary widths and formats, on a machine whose laws are known."""

from collections.abc import Mapping
from dataclasses import replace
from types import ModuleType

import pytest

from tersor.core.errors import ConfigError
from tersor.core.records import Level, PriceTable, Site
from tersor.price.facts import learn_facts
from tersor.price.price import PriceConfig, price_all, price_choice
from tersor.price.table import fit_error, fit_table
from tersor.price.variants import draw_variants


def fitted(lab: ModuleType, net, k: int = 20, held_out: int = 20) -> PriceTable:  # noqa: ANN001
    variants = draw_variants(net.sites, net.levels, "bf16", k=k, held_out=held_out, seed=net.seed)
    facts = learn_facts(net.facts, net.sites, net.levels, "bf16")
    seen = [net.observe(v.assignment, held_out=v.held_out) for v in variants]
    return fit_table(lab.CHOICE, net.sites, seen, lab.quantize_nodes, facts)


def tensors(net) -> dict[str, str]:  # noqa: ANN001
    return {s.name: s.tensor for s in net.sites if s.tensor}


def by_name(table: PriceTable) -> dict:
    return {term.name: term for term in table.terms}


@pytest.mark.parametrize(
    ("seed", "tile"), [(0, 16), pytest.param(1, 16, marks=pytest.mark.slow), (2, 32)]
)
def test_held_out_widths_and_formats_are_predicted(lab: ModuleType, seed: int, tile: int) -> None:
    error = fit_error(fitted(lab, lab.Network(seed=seed, tile=tile)))
    assert error.n == 20
    assert error.p90 < 0.01  # the law is among those that the fit knows
    assert error.spearman > 0.99


@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2))])
def test_noise_of_builds_is_not_amplified(lab: ModuleType, seed: int) -> None:
    noise = 0.02
    error = fit_error(fitted(lab, lab.Network(seed=seed, noise=noise)))
    # As without widths: the noise of a held-out latency, and that of the fit's own builds.
    assert error.median < 2 * noise
    assert error.p90 < 3 * noise


def test_twelve_builds_do_for_one_precision(lab: ModuleType) -> None:
    net = lab.Network(noise=0.02)
    net.levels = {s: v if s.startswith("width") else v[:1] for s, v in net.levels.items()}
    table = fitted(lab, net, k=12)
    assert fit_error(table).p90 < 3 * 0.02
    assert all("int8" not in levels for t in table.terms for levels in t.levels)


def test_every_op_keeps_its_own_level(lab: ModuleType) -> None:
    net = lab.Network(own=0.0)
    net.factor["b1a"] = 3.0  # as a layout that only this op meets
    table = fitted(lab, net)
    terms = by_name(table)
    for node in ("b0a", "b1a", "b2c"):
        for level in ("bf16", "int8"):
            levels = {**dict.fromkeys(terms[node].sites, 64), node: level}
            facts = net.facts(levels)[node]
            wanted = net.law(node, facts, int8=level == "int8") * net.overhead
            # Reorders of an op's elements are charged to it.
            wanted += 2e-7 * facts.out_elements * net.overhead
            assert terms[node].at(levels) * table.scale == pytest.approx(wanted, rel=0.02)


def test_glue_with_widths_is_a_term_and_other_glue_stays(lab: ModuleType) -> None:
    net = lab.Network()
    table = fitted(lab, net)
    terms = by_name(table)
    assert table.glue_ms * table.scale == pytest.approx(0.05 * net.overhead, rel=0.02)
    assert terms["pool"].sites == ("width:stem",)
    assert terms["b0a"].sites == ("width:stem", "width:b0", "b0a")
    assert set(table.ops) == set()  # every op is moved
    assert table.native == {s.name: 128 for s in net.sites if s.kind == "width"}
    assert "Reorder" not in terms


def test_glue_that_stands_alone_beside_int8_is_gated_by_that_site(lab: ModuleType) -> None:
    net = lab.Network()
    table = fitted(lab, net)
    term = by_name(table)["add1"]
    assert term.sites == ("width:stem", "b1c")
    assert term.at({"width:stem": 64, "b1c": "bf16"}) == 0.0
    wanted = net.law("add1", net.facts({"width:stem": 64})["add1"], int8=False)
    alone = term.at({"width:stem": 64, "b1c": "int8"}) * table.scale
    assert alone == pytest.approx(wanted * net.overhead, rel=0.02)


def test_glue_on_another_layout_in_front_of_int8_goes_by_the_next_layer(lab: ModuleType) -> None:
    class Layouts(lab.Network):  # type: ignore[misc, name-defined]
        """Pools take ten times as long in front of an int8 classifier, and more where ragged."""

        def exact(self, assignment: Mapping[str, Level]) -> dict[str, float]:
            found: dict[str, float] = super().exact(assignment)
            return found | {"pool": found["pool"] * (10 if assignment.get("head") == "int8" else 1)}

    net = Layouts()
    term = by_name(fitted(lab, net))["pool"]
    assert term.sites == ("width:stem", "head")
    table = fitted(lab, net)
    for level in ("bf16", "int8"):
        for stem in (128, 64):
            found = term.at({"width:stem": stem, "head": level}) * table.scale
            wanted = net.exact({"width:stem": stem, "head": level})["pool"] * net.overhead
            assert found == pytest.approx(wanted, rel=0.1)


def test_terms_are_the_whole_prediction(lab: ModuleType) -> None:
    net = lab.Network(noise=0.02)
    table = fitted(lab, net)
    for build in table.builds:
        levels: Mapping[str, Level] = build.assignment
        int8 = {tensors(net)[s] for s, level in levels.items() if level == "int8"}
        total = table.glue_ms + sum(table.quantizers[t] for t in int8)
        total += sum(term.at(levels) for term in table.terms)
        assert table.predict_ms(levels, tensors(net)) == pytest.approx(total * table.scale)
        assert build.predicted_ms == pytest.approx(total * table.scale)


def test_widths_that_are_not_listed_are_full(lab: ModuleType) -> None:
    net = lab.Network()
    table = fitted(lab, net)
    full = {s.name: 128 for s in net.sites if s.kind == "width"}
    assert table.predict_ms({}, tensors(net)) == table.predict_ms(full, tensors(net))
    assert table.predict_ms({}, tensors(net)) == pytest.approx(net.total({}), rel=0.01)


def test_an_op_that_no_width_meets_stays_in_ops(lab: ModuleType) -> None:
    net = lab.Network()
    net.sites = tuple(replace(s, pinned="keep") if s.name == "width:stem" else s for s in net.sites)
    table = fitted(lab, net)
    assert set(table.ops) == {"head"}
    assert set(table.ops["head"]) == {"bf16", "int8_weight", "int8"}
    assert by_name(table)["b0a"].sites == ("width:b0", "b0a")
    assert not any("width:stem" in t.sites for t in table.terms)
    assert fit_error(table).p90 < 0.01


def test_a_pinned_format_leaves_widths_alone_in_its_term(lab: ModuleType) -> None:
    net = lab.Network()
    net.sites = tuple(replace(s, pinned="keep") if s.name == "b0a" else s for s in net.sites)
    table = fitted(lab, net)
    assert by_name(table)["b0a"].sites == ("width:stem", "width:b0")
    assert fit_error(table).p90 < 0.01


def test_a_branch_that_is_removed_costs_nothing(lab: ModuleType) -> None:
    net = lab.Network()
    branch = Site(name="branch:b1", kind="branch", ops=(), units=1)
    net.sites, net.levels = (*net.sites, branch), {**net.levels, "branch:b1": (1, 0)}
    table = fitted(lab, net, k=24)
    assert table.native["branch:b1"] == 1
    conv = by_name(table)["b1a"]
    assert conv.sites == ("width:stem", "width:b1", "branch:b1", "b1a")
    pruned = {**dict.fromkeys(conv.sites, 64), "b1a": "int8"}
    assert conv.at({**pruned, "branch:b1": 0}) == 0.0
    assert conv.at({**pruned, "branch:b1": 1}) > 0.05
    without = table.predict_ms({"branch:b1": 0}, tensors(net))
    assert without == pytest.approx(net.total({"branch:b1": 0}), rel=0.01)


def test_glue_that_profiles_too_high_is_balanced(lab: ModuleType) -> None:
    net = lab.Network()
    net.factor |= {f"add{i}": 25.0 for i in range(net.blocks)}
    variants = draw_variants(net.sites, net.levels, "bf16", k=20, held_out=20, seed=0)
    facts = learn_facts(net.facts, net.sites, net.levels, "bf16")
    seen = []
    for v in variants:
        o = net.observe(v.assignment, held_out=v.held_out)
        # The profiler adds a half to every add.
        nodes = {n: ms * (1.5 if n.startswith("add") else 1.0) for n, ms in o.node_ms.items()}
        seen.append(replace(o, node_ms=nodes))
    table = fit_table(lab.CHOICE, net.sites, seen, lab.quantize_nodes, facts)
    ratios = [sum(o.node_ms.values()) / o.measured_ms for o in seen]
    spread = (max(ratios) - min(ratios)) / sorted(ratios)[len(ratios) // 2]
    assert spread > 0.2  # what one scale alone could not mend
    assert fit_error(table).p90 < spread / 8


def test_held_out_builds_change_no_term(lab: ModuleType) -> None:
    net = lab.Network()
    variants = draw_variants(net.sites, net.levels, "bf16", k=20, held_out=3, seed=0)
    facts = learn_facts(net.facts, net.sites, net.levels, "bf16")
    seen = [net.observe(v.assignment, held_out=v.held_out) for v in variants]
    spoilt = [replace(o, measured_ms=3 * o.measured_ms) if o.held_out else o for o in seen]
    one, other = (
        fit_table(lab.CHOICE, net.sites, rows, lab.quantize_nodes, facts) for rows in (seen, spoilt)
    )
    same = {"builds": (), "uncertainty": None}  # how sure one may be they do say
    assert replace(one, **same) == replace(other, **same)


def test_price_all_builds_more_for_mixtures_and_asks_for_facts_once(lab: ModuleType) -> None:
    net = lab.Network()
    bench = lab.Bench({"linear": net, "convolution": net})
    choices = [
        replace(lab.CHOICE, options={"int8_linear": way}) for way in ("linear", "convolution")
    ]
    config = PriceConfig(held_out=4, batch=8)
    assert config.fitted(net.sites, net.levels) == 26
    net.calls = 0
    tools = bench.tools(facts=net.facts)
    priced = price_all(choices, net.sites, net.levels, tools, config)
    # Each build asks three times here: its profile, and its call in two measurements.
    assert len(priced.tables) == 2
    assert len(bench.built) == 2 + 2 * 30
    # Native, two counts of each of five widths, all at their least.
    assert net.calls - 2 * 60 - 2 == 12
    assert all(fit_error(t).p90 < 0.01 for t in priced.tables)
    assert set(bench.built[0][1].values()) == {"int8", 128}


def test_widths_without_facts_are_refused(lab: ModuleType) -> None:
    net = lab.Network()
    bench = lab.Bench({"linear": net})
    with pytest.raises(
        ConfigError, match=r"found 5 widths and 0 layers with ranks .* no facts .* PriceTools"
    ):
        price_choice(lab.CHOICE, net.sites, net.levels, bench.tools(), PriceConfig())
