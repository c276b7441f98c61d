from collections.abc import Mapping
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest

from tersor.core.errors import BackendError, ConfigError
from tersor.core.records import BuildChoice, Level, Timing
from tersor.price.observing import measure_interleaved, observe_builds
from tersor.price.price import PriceConfig, price_all, price_choice
from tersor.price.table import fit_error
from tersor.price.variants import draw_variants
from tersor.timing.device import SelfTimed

CONFIG = PriceConfig(k=10, held_out=4, batch=3, seed=0)


def two_ways(lab: ModuleType, slower: float) -> tuple:
    """A bench with two option sets; int8 by convolution takes ``slower`` times as long."""
    sites = lab.make_sites(9)
    linear, convolution = lab.Machine(sites), lab.Machine(sites)
    convolution.int8 = {s: ms * slower for s, ms in convolution.int8.items()}
    bench = lab.Bench({"linear": linear, "convolution": convolution})
    choices = [
        replace(lab.CHOICE, options={"int8_linear": way}) for way in ("linear", "convolution")
    ]
    return bench, choices, sites


def test_a_table_of_whole_builds(lab: ModuleType) -> None:
    sites = lab.make_sites(9)
    machine = lab.Machine(sites)
    bench = lab.Bench({"linear": machine})
    table = price_choice(lab.CHOICE, sites, lab.all_levels(sites), bench.tools(), CONFIG)
    assert len(bench.built) == 14
    assert [b.held_out for b in table.builds] == [False] * 10 + [True] * 4
    assert fit_error(table).p90 < 1e-9
    for build in table.builds:
        assert build.measured_ms == pytest.approx(machine.total(build.assignment))


def test_a_build_that_times_itself_is_measured_by_its_own_clock(lab: ModuleType) -> None:
    """On a card the clock of this process would count uploads, which prices must not."""
    sites = lab.make_sites(5)
    machine = lab.Machine(sites)
    bench = lab.Bench({"linear": machine})

    class Timed:
        def __init__(self, build: Any) -> None:
            self.build = build

        def __call__(self) -> object:
            return machine.total(self.build.assignment) + 100.0

        def timed_ms(self) -> float:
            return float(machine.total(self.build.assignment))

    def measure(calls: Mapping[str, Any]) -> dict[str, Timing]:
        own = {n: c.timed_ms() if isinstance(c, SelfTimed) else c() for n, c in calls.items()}
        return {name: lab.timing(float(ms)) for name, ms in own.items()}

    tools = replace(bench.tools(), caller=Timed, measure=measure)
    table = price_choice(lab.CHOICE, sites, lab.all_levels(sites), tools, CONFIG)
    for build in table.builds:
        assert build.measured_ms == pytest.approx(machine.total(build.assignment))


def test_node_times_are_parts_of_the_latency_whenever_they_were_profiled(lab: ModuleType) -> None:
    """A profile of a slow moment says shares, the measurement says how much."""
    sites = lab.make_sites(9)
    tools = lab.Bench({"linear": lab.Machine(sites)}).tools()
    variants = draw_variants(sites, lab.all_levels(sites), "bf16", k=7, held_out=0, seed=0)

    def slowed(choice: BuildChoice, assignment: Mapping[str, Level]) -> object:
        build = tools.build(choice, assignment)
        profile = build.profile()
        factor = 1.0 + sum(level == "int8" for level in assignment.values())
        build.profile = lambda: {name: ms * factor for name, ms in profile.items()}
        return build

    plain = observe_builds(lab.CHOICE, variants, tools, 3)
    found = observe_builds(lab.CHOICE, variants, replace(tools, build=slowed), 3)
    assert [o.assignment for o in found] == [v.assignment for v in variants]  # in their order
    for one, other in zip(found, plain, strict=True):
        assert sum(one.node_ms.values()) == pytest.approx(one.measured_ms)
        assert one.node_ms == pytest.approx(other.node_ms)


def test_drift_of_the_session_is_taken_out(lab: ModuleType) -> None:
    sites = lab.make_sites(9)
    bench = lab.Bench({"linear": lab.Machine(sites)}, drift=lambda run: 1 + 0.02 * run)
    table = price_choice(lab.CHOICE, sites, lab.all_levels(sites), bench.tools(), CONFIG)
    assert bench.runs == 5
    assert fit_error(table).p90 < 1e-9
    still = lab.Bench({"linear": lab.Machine(sites)})
    same = price_choice(lab.CHOICE, sites, lab.all_levels(sites), still.tools(), CONFIG)
    assert table.scale == pytest.approx(same.scale)


def test_few_builds_are_alive_at_once(lab: ModuleType) -> None:
    sites = lab.make_sites(9)
    bench = lab.Bench({"linear": lab.Machine(sites)})
    price_choice(lab.CHOICE, sites, lab.all_levels(sites), bench.tools(), CONFIG)
    assert bench.most_alive == CONFIG.batch


def test_a_slow_option_set_is_only_probed(lab: ModuleType) -> None:
    bench, choices, sites = two_ways(lab, 1.5)
    priced = price_all(choices, sites, lab.all_levels(sites), bench.tools(), CONFIG)
    assert [t.choice for t in priced.tables] == choices[:1]
    assert [p.priced for p in priced.probes] == [True, False]
    assert "its all-int8 build takes" in priced.probes[1].reason
    ways = [way for way, _ in bench.built]
    assert ways.count("convolution") == 1
    assert ways.count("linear") == 1 + 14


def test_option_sets_that_are_close_are_both_priced(lab: ModuleType) -> None:
    bench, choices, sites = two_ways(lab, 1.03)
    priced = price_all(choices, sites, lab.all_levels(sites), bench.tools(), CONFIG)
    assert [t.choice for t in priced.tables] == choices
    assert all(p.reason == "" for p in priced.probes)


def test_probes_share_one_run_with_the_reference(lab: ModuleType) -> None:
    bench, choices, sites = two_ways(lab, 1.5)
    bench.drift = lambda _run: 2.0
    priced = price_all(choices, sites, lab.all_levels(sites), bench.tools(), CONFIG)
    full = dict.fromkeys((s.name for s in sites), "int8")
    assert priced.probes[0].measured_ms == pytest.approx(bench.machines["linear"].total(full))


def test_an_option_set_that_can_not_be_built_is_reported(lab: ModuleType) -> None:
    bench, choices, sites = two_ways(lab, 0.5)
    bench.refuse = ("convolution",)
    priced = price_all(choices, sites, lab.all_levels(sites), bench.tools(), CONFIG)
    assert [t.choice for t in priced.tables] == choices[:1]
    assert priced.probes[1].measured_ms is None
    assert priced.probes[1].reason == "convolution: can't be lowered"
    bench.refuse = ("convolution", "linear")
    with pytest.raises(BackendError, match=r"found no int8 build among 2 choices"):
        price_all(choices, sites, lab.all_levels(sites), bench.tools(), CONFIG)


def test_without_int8_there_is_one_native_table(lab: ModuleType) -> None:
    bench, choices, sites = two_ways(lab, 1.0)
    levels = {s.name: ("bf16", "int8_weight") for s in sites}
    priced = price_all(choices, sites, levels, bench.tools(), CONFIG)
    assert priced.probes == ()
    (table,) = priced.tables
    assert table.choice == choices[0]
    assert len(bench.built) == 1
    assert all(set(row) == {"bf16", "int8_weight"} for row in table.ops.values())
    assert table.predict_ms({}, {}) == pytest.approx(bench.machines["linear"].total({}))


def test_interleaved_times_speak_of_the_session_of_the_baseline(lab: ModuleType) -> None:
    bench = lab.Bench({}, drift=lambda _run: 1.25)
    times = measure_interleaved({"a": lambda: 2.0, "b": lambda: 3.0}, bench.tools())
    assert times == {"a": pytest.approx(2.0), "b": pytest.approx(3.0)}


@pytest.mark.parametrize(
    ("drifts", "taken"), [([1.6, 1.02], 1), ([1.6, 1.62], 1), ([1.6, 1.2, 1.4], 1), ([1.05], 0)]
)
def test_a_reference_that_a_neighbour_slowed_is_measured_again(
    lab: ModuleType, drifts: list[float], taken: int
) -> None:
    bench, runs = lab.Bench({}), []
    tools = bench.tools()

    def measure(calls: Mapping[str, Any]) -> dict[str, Any]:
        runs.append(drifts[len(runs)])
        plain = tools.measure(calls)
        # Only the reference is slower, by so much; the others show in which run they were measured.
        return {
            n: replace(
                t,
                median_ms=t.median_ms * (runs[-1] if n.startswith("reference") else len(runs)),
            )
            for n, t in plain.items()
        }

    times = measure_interleaved({"a": lambda: 2.0}, replace(tools, measure=measure))
    assert len(runs) == len(drifts)
    assert times["a"] == pytest.approx(2.0 * (taken + 1) / drifts[taken])


@pytest.mark.parametrize("bad", [{"k": 1}, {"held_out": -1}, {"batch": 0}])
def test_bad_configurations_are_refused(bad: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=r"wanted k >= 2"):
        PriceConfig(**bad)


def test_what_settles_to_the_same_is_built_once(lab: ModuleType) -> None:
    """Else a held-out build would be one that the fit has seen."""
    sites = lab.make_sites(9)
    bench = lab.Bench({"linear": lab.Machine(sites)})
    free = {s.name for s in sites[:2]}  # of the others nothing is chosen

    def settle(assignment: Mapping[str, Level]) -> dict[str, Level]:
        return {s: level if s in free else "f32" for s, level in assignment.items()}

    tools = replace(bench.tools(), settle=settle)
    table = price_choice(lab.CHOICE, sites, lab.all_levels(sites), tools, CONFIG)
    built = [tuple(sorted(b.assignment.items())) for b in table.builds]
    assert 2 <= len(built) == len(set(built)) <= 4
    assert all(
        level == "f32" for b in table.builds for s, level in b.assignment.items() if s not in free
    )
