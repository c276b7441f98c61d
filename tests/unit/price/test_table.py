import math
from dataclasses import replace
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tersor.core.errors import ConfigError
from tersor.core.records import PricedBuild, PriceTable, Site
from tersor.price.observation import Observation
from tersor.price.table import correct_table, fit_error, fit_table
from tersor.price.variants import draw_variants


def fitted(lab: ModuleType, machine, k: int = 12) -> PriceTable:  # noqa: ANN001
    variants = draw_variants(
        machine.sites, lab.all_levels(machine.sites), "bf16", k=k, held_out=6, seed=1
    )
    seen = [machine.observe(v.assignment, held_out=v.held_out) for v in variants]
    return fit_table(lab.CHOICE, machine.sites, seen, lab.quantize_nodes)


def test_exact_node_times_give_the_prices_back(lab: ModuleType) -> None:
    machine = lab.Machine(lab.make_sites(9))
    table = fitted(lab, machine)
    scale = machine.overhead
    for site in machine.native:
        row = {level: ms * table.scale for level, ms in table.ops[site].items()}
        assert row["bf16"] == row["int8_weight"]
        assert row["bf16"] == pytest.approx(machine.native[site] * scale)
        assert row["int8"] == pytest.approx(machine.int8[site] * scale)
    for tensor, ms in machine.quantizer.items():
        assert table.quantizers[tensor] * table.scale == pytest.approx(ms * scale)
    assert table.glue_ms * table.scale == pytest.approx(machine.glue * scale)
    error = fit_error(table)
    assert error.n == 6
    assert error.p90 < 1e-9
    assert error.spearman == pytest.approx(1.0)


def test_without_widths_the_prices_stay_what_they_are(lab: ModuleType) -> None:
    # Written down from a fit of formats alone; anew when parts were held closer to one scale.
    machine = lab.Machine(lab.make_sites(5), seed=3, noise=0.02, glue_per_tensor=0.05)
    levels = lab.all_levels(machine.sites)
    variants = draw_variants(machine.sites, levels, "bf16", k=8, held_out=2, seed=4)
    drawn = ["".join("8" if x == "int8" else "." for x in v.assignment.values()) for v in variants]
    assert " ".join(drawn) == "..... 88888 ..888 ..8.. ..88. 8.8.8 8.... 888.. 8888. 888.8"
    seen = [machine.observe(v.assignment, held_out=v.held_out) for v in variants]
    table = fit_table(lab.CHOICE, machine.sites, seen, lab.quantize_nodes)
    close = {"rel": 1e-9, "abs": 0.0}  # another libm or BLAS
    golden = {
        "s0": (0.17943887213542262, 0.09909279020788321),
        "s1": (0.31762823402762685, 0.18457508207551396),
        "s2": (0.825701047070036, 0.32129874661636165),
        "s3": (0.6266155734789419, 0.4627161853783697),
        "s4": (0.18440325892298767, 0.06849101889001899),
    }
    assert {s: (r["bf16"], r["int8"]) for s, r in table.ops.items()} == {
        s: pytest.approx(pair, **close) for s, pair in golden.items()
    }
    quantizers = {"t0": 0.0704082979134087, "t1": 0.07575913242848104}
    assert table.quantizers == pytest.approx(quantizers, **close)
    assert table.glue_ms == pytest.approx(0.40810895343288744, **close)
    assert table.scale == pytest.approx(1.0743635911274698, **close)
    assert table.builds[-1].predicted_ms == pytest.approx(1.9922456901367005, **close)
    assert (table.terms, table.native) == ((), {})


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10_000))
def test_noisy_builds_are_predicted_within_their_noise(lab: ModuleType, seed: int) -> None:
    noise = 0.02
    machine = lab.Machine(lab.make_sites(9), seed=seed, noise=noise)
    error = fit_error(fitted(lab, machine))
    # A held-out latency carries the noise of its total and of its nodes, and the fit adds that of
    # its own twelve: three standard deviations for the middle of six, five for the worst.
    assert error.median < 3 * noise
    assert error.p90 < 5 * noise


def test_glue_that_formats_cause_is_charged_to_them(lab: ModuleType) -> None:
    machine = lab.Machine(lab.make_sites(9), glue_per_tensor=0.05, glue_per_site=0.03, overhead=1.0)
    table = fitted(lab, machine)
    assert table.glue_ms * table.scale == pytest.approx(machine.glue)
    for tensor, ms in machine.quantizer.items():
        assert table.quantizers[tensor] * table.scale == pytest.approx(ms + 0.05)
    for site, ms in machine.int8.items():
        assert table.ops[site]["int8"] * table.scale == pytest.approx(ms + 0.03)
        assert table.ops[site]["bf16"] * table.scale == pytest.approx(machine.native[site])


def test_a_fused_quantizer_is_free_and_the_tensor_known(lab: ModuleType) -> None:
    machine = lab.Machine(lab.make_sites(9), fused=("t1",))
    table = fitted(lab, machine)
    assert table.quantizers["t1"] == pytest.approx(0.0, abs=1e-9)
    assert table.quantizers["t0"] > 0.005


def test_readers_of_one_tensor_pay_once_in_a_fitted_table(lab: ModuleType) -> None:
    machine = lab.Machine(lab.make_sites(6))
    table = fitted(lab, machine)
    tensors = {s.name: s.tensor for s in machine.sites}
    one = table.predict_ms({"s0": "int8"}, tensors)
    two = table.predict_ms({"s0": "int8", "s1": "int8"}, tensors)
    gain = (machine.int8["s1"] - machine.native["s1"]) * machine.overhead
    assert two - one == pytest.approx(gain)


def test_unsupported_formats_and_pinned_sites_have_no_int8_entry(lab: ModuleType) -> None:
    sites = lab.make_sites(6, pinned=(2,))
    levels = {**lab.all_levels(sites), "s4": ("bf16", "int8_weight")}
    machine = lab.Machine(sites)
    variants = draw_variants(sites, levels, "bf16", k=8, held_out=2, seed=0)
    seen = [machine.observe(v.assignment, held_out=v.held_out) for v in variants]
    table = fit_table(lab.CHOICE, sites, seen, lab.quantize_nodes)
    assert set(table.ops["s2"]) == set(table.ops["s4"]) == {"bf16", "int8_weight"}
    assert set(table.ops["s0"]) == {"bf16", "int8_weight", "int8"}


def test_held_out_builds_change_no_price(lab: ModuleType) -> None:
    machine = lab.Machine(lab.make_sites(6))
    variants = draw_variants(
        machine.sites, lab.all_levels(machine.sites), "bf16", k=8, held_out=3, seed=0
    )
    seen = [machine.observe(v.assignment, held_out=v.held_out) for v in variants]
    table = fit_table(lab.CHOICE, machine.sites, seen, lab.quantize_nodes)
    spoilt = [replace(o, measured_ms=o.measured_ms * 3) if o.held_out else o for o in seen]
    other = fit_table(lab.CHOICE, machine.sites, spoilt, lab.quantize_nodes)
    same = {"builds": (), "uncertainty": None}  # how sure one may be they do say
    assert replace(other, **same) == replace(table, **same)
    # The prediction is a third of what was "measured".
    assert fit_error(other).median == pytest.approx(2 / 3)


def test_parts_that_profile_too_high_are_balanced(lab: ModuleType) -> None:
    machine = lab.Machine(lab.make_sites(9), overhead=1.0)
    variants = draw_variants(
        machine.sites, lab.all_levels(machine.sites), "bf16", k=16, held_out=8, seed=0
    )
    seen = []
    for v in variants:
        o = machine.observe(v.assignment, held_out=v.held_out)
        slow = {f"op{s[1:]}" for s, level in v.assignment.items() if level == "int8"}
        # The profiler adds a third to every int8 op.
        nodes = {n: ms * (4 / 3 if n in slow else 1.0) for n, ms in o.node_ms.items()}
        seen.append(replace(o, node_ms=nodes))
    table = fit_table(lab.CHOICE, machine.sites, seen, lab.quantize_nodes)
    scaled_only = [
        sum(o.node_ms.values()) / o.measured_ms for o in seen if "int8" in o.assignment.values()
    ]
    spread = np.ptp(scaled_only) / np.median(scaled_only)
    assert spread > 0.1  # what one scale alone could not mend
    assert fit_error(table).p90 < spread / 4


def test_fit_error_of_few_builds(lab: ModuleType) -> None:
    def table(*pairs: tuple[float, float]) -> PriceTable:
        builds = tuple(
            PricedBuild(assignment={}, measured_ms=m, predicted_ms=p, held_out=True)
            for p, m in pairs
        )
        seen = PricedBuild(assignment={}, measured_ms=1.0, predicted_ms=9.0, held_out=False)
        return PriceTable(
            choice=lab.CHOICE, ops={}, quantizers={}, glue_ms=1.0, builds=(seen, *builds)
        )

    assert fit_error(table()) is None
    error = fit_error(table((1.1, 1.0), (0.8, 1.0), (1.0, 1.0)))
    assert error.median == pytest.approx(0.1)
    assert error.p90 == pytest.approx(0.18)
    assert error.spearman is None
    assert fit_error(table((1, 2), (2, 3), (3, 4), (4, 1))).spearman == pytest.approx(-0.2)
    assert fit_error(table((1, 2), (1, 3), (1, 4), (1, 1))).spearman is None


@given(st.lists(st.floats(0.5, 2.0), min_size=1, max_size=6), st.randoms())
def test_corrections_are_the_geometric_mean_of_all_ratios(
    lab: ModuleType, ratios: list[float], random: object
) -> None:
    start = PriceTable(
        choice=lab.CHOICE,
        ops={"s0": {"bf16": 2.0, "int8": 1.0}},
        quantizers={"t0": 0.5},
        glue_ms=1.0,
        scale=1.3,
    )
    tensors = {"s0": "t0"}
    plans = [{"s0": "int8"} if random.random() < 0.5 else {} for _ in ratios]  # type: ignore[attr-defined]
    table = start
    for plan, ratio in zip(plans, ratios, strict=True):
        table = correct_table(table, plan, tensors, ratio * start.predict_ms(plan, tensors))
    mean = math.prod(ratios) ** (1 / len(ratios))
    assert table.scale == pytest.approx(1.3 * mean)
    assert table.corrections == len(ratios)
    assert (table.ops, table.quantizers, table.glue_ms) == (start.ops, start.quantizers, 1.0)


def test_bad_input_is_refused(lab: ModuleType) -> None:
    machine = lab.Machine(lab.make_sites(2))
    seen = machine.observe({})
    held_out = replace(seen, held_out=True)
    with pytest.raises(ConfigError, match="found no build to fit prices on, wanted at least one"):
        fit_table(lab.CHOICE, machine.sites, [held_out], lab.quantize_nodes)
    still = replace(seen, measured_ms=0.0)
    with pytest.raises(ConfigError, match=r"found a latency of 0.0 ms"):
        fit_table(lab.CHOICE, machine.sites, [still], lab.quantize_nodes)
    blank = replace(seen, node_ms={})
    with pytest.raises(ConfigError, match="the profile of a build holds no time at all"):
        fit_table(lab.CHOICE, machine.sites, [blank], lab.quantize_nodes)
    table = fit_table(lab.CHOICE, machine.sites, [seen], lab.quantize_nodes)
    with pytest.raises(ConfigError, match=r"found a latency of nan ms"):
        correct_table(table, {}, {}, math.nan)


def test_a_quantised_tensor_that_an_addition_reads_as_floats_costs_more(lab: ModuleType) -> None:
    """It is there twice; the addition's own int8 gives back what its quantiser was charged."""
    extra = 0.2
    layers = lab.make_sites(6)
    sums = tuple(
        Site(name=f"add:{i}", kind="format", ops=(f"sum{i}",), op_kind="add", tensor=f"t{i}")
        for i in range(2)
    )
    machine = lab.Machine(layers, overhead=1.0)
    tensors = {s.name: s.tensor for s in (*layers, *sums)}

    def observe(assignment: dict[str, str], *, held_out: bool) -> Observation:
        seen = machine.observe(assignment, held_out=held_out)
        quantized = {tensors[s] for s, level in assignment.items() if level == "int8"}
        boundaries = sum(s.tensor in quantized and assignment[s.name] != "int8" for s in sums)
        fresh = quantized - {s.tensor for s in layers if assignment[s.name] == "int8"}
        nodes = {**seen.node_ms, "reorder": extra * boundaries, "sum0": 0.1, "sum1": 0.1}
        nodes |= {f"{t}_quantize": machine.quantizer[t] for t in fresh}
        total = sum(nodes.values())
        return replace(seen, node_ms=nodes, measured_ms=total)

    sites = (*layers, *sums)
    variants = draw_variants(sites, lab.all_levels(sites), "bf16", k=16, held_out=8, seed=2)
    seen = [observe(dict(v.assignment), held_out=v.held_out) for v in variants]
    table = fit_table(lab.CHOICE, sites, seen, lab.quantize_nodes)
    assert fit_error(table).p90 < 1e-6
    one = {"s0": "int8"}
    beside = table.predict_ms({**one, "add:0": "int8"}, tensors)
    assert table.predict_ms(one, tensors) - beside == pytest.approx(extra, rel=1e-6)
