from dataclasses import replace
from types import ModuleType

import numpy as np
import pytest

from tersor.core.records import OUTSIDE
from tersor.price.facts import learn_facts
from tersor.price.glue import steadied
from tersor.price.observation import Observation
from tersor.price.table import fit_error, fit_table
from tersor.price.variants import draw_variants


def build(total: float, outside: float) -> Observation:
    inside = total - outside
    return Observation(
        assignment={}, node_ms={"a": 0.75 * inside, "b": 0.25 * inside, OUTSIDE: outside},
        measured_ms=total,
    )  # fmt: skip


def test_time_outside_is_what_all_builds_say() -> None:
    """A constant of 0.2 ms and 3 % of the call; profiles are off by up to 5 % of it."""
    rng = np.random.default_rng(0)
    totals = [1.0, 2.0, 4.0, 8.0, 10.0, 3.0, 6.0, 5.0]
    noisy = [build(t, 0.2 + (0.03 + rng.uniform(-0.02, 0.05)) * t) for t in totals]
    for o, total in zip(steadied(noisy), totals, strict=True):
        assert sum(o.node_ms.values()) == pytest.approx(total)
        assert o.node_ms[OUTSIDE] == pytest.approx(0.2, abs=0.1)
        assert o.node_ms["a"] == pytest.approx(3 * o.node_ms["b"])  # shares among nodes stay
        assert o.measured_ms == total
    exact = [build(t, 0.2 + 0.03 * t) for t in totals]
    assert [o.node_ms[OUTSIDE] for o in steadied(exact)] == pytest.approx([0.2] * len(totals))


def test_builds_that_say_nothing_of_it_stay() -> None:
    seen = [Observation(assignment={}, node_ms={"a": 1.0}, measured_ms=1.1)]
    assert steadied(seen) == seen
    whole = [build(1.0, 1.0), build(2.0, 0.1)]  # a profile without any node
    assert steadied(whole) == whole
    one = steadied([build(2.0, 0.5)])
    assert sum(one[0].node_ms.values()) == pytest.approx(2.0)
    assert 0 <= one[0].node_ms[OUTSIDE] <= 2.0


def test_profiles_that_differ_outside_of_nodes_make_one_table(lab: ModuleType) -> None:
    net = lab.Network(overhead=1.0)
    drawn = draw_variants(net.sites, net.levels, "bf16", k=20, held_out=20, seed=0)
    facts = learn_facts(net.facts, net.sites, net.levels, "bf16")
    rng = np.random.default_rng(1)
    seen = []
    for v in drawn:
        o = net.observe(v.assignment, held_out=v.held_out)
        share = rng.uniform(0.0, 0.15)  # of the call, as this profile has it
        nodes = {name: ms * (1 - share) for name, ms in o.node_ms.items()}
        seen.append(replace(o, node_ms={**nodes, OUTSIDE: share * o.measured_ms}))
    error = fit_error(fit_table(lab.CHOICE, net.sites, seen, lab.quantize_nodes, facts))
    assert error is not None
    assert error.p90 < 0.02
