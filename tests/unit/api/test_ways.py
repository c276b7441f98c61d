"""Ways to build that are priced: option sets for packed weights only where such weights are on offer."""

from typing import Any

import pytest

from tersor.api.stages import Runs, _ways
from tersor.backends.inductor import InductorBackend
from tersor.core.records import BackendInfo, BuildChoice, Level, Site, Support
from tersor.graph.contracts import Graph

BASE = BuildChoice(backend="own", precision="f32", options={"mode": "eager"})
OWN = BackendInfo(
    name="own", available=True, precisions=("f32",), stored_choices=({"weights": "codes"},)
)
OTHER = BackendInfo(name="other", available=True, precisions=("f32",), choices=({"a": 1}, {"a": 2}))


def options(levels: dict[str, tuple[Any, ...]], *infos: BackendInfo) -> list[tuple[str, Any]]:
    return [(way.backend, dict(way.options)) for way in _ways(infos, BASE, levels)]


def test_packed_levels_bring_their_own_ways() -> None:
    plain = {"fc": ("f32", "int8", "int8_weight"), "width:fc": (8, 4)}
    others = [("other", {"a": 1}), ("other", {"a": 2})]
    default = ("own", {})
    assert options(plain, OTHER, OWN) == [default, *others]
    packed = {**plain, "out": ("f32", "lut4_weight")}
    assert options(packed, OTHER, OWN) == [default, ("own", {"weights": "codes"}), *others]


class Joins(InductorBackend):
    """A backend that computes two convolutions as one kernel, where it is told to."""

    asked = 0

    def supports(self, candidate: Any) -> Support:
        return Support(ok=candidate.level != "fp8")

    def joined(self, graph: Graph, choice: BuildChoice) -> frozenset[str]:
        del graph
        self.asked += 1
        return frozenset({"conv_a", "conv_b"} if choice.options.get("fused") else ())


@pytest.mark.parametrize(
    ("site", "level", "apart", "fused"),
    [
        ("a", "int8", True, False),
        ("a", "int8_weight", True, True),  # floats when it runs
        ("a", "bf16", True, True),
        ("c", "int8", True, True),
        ("c", "fp8", False, False),
        ("width:a", 8, True, True),
    ],
)
def test_eight_bits_take_no_kernel_of_several_ops_apart(
    site: str, level: Level, apart: bool, fused: bool
) -> None:
    sites = [
        Site(name=name, kind="format", ops=ops)
        for name, ops in (("a", ("conv_a",)), ("b", ("conv_b",)), ("c", ("linear", "linear_1")))
    ]
    backend = Joins()
    runs = Runs({"own": backend}, Graph.__new__(Graph), sites)
    joining = BuildChoice(backend="own", precision="bf16", options={"fused": True})
    for _ in range(2):
        assert runs(BASE, site, level) is apart
        assert runs(joining, site, level) is fused
    assert backend.asked <= 2  # once a way
