"""Ways to build that are priced: option sets for packed weights only where such weights are on offer."""

from typing import Any

from tersor.api.stages import _ways
from tersor.core.records import BackendInfo, BuildChoice

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
