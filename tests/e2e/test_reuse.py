"""What was measured once on a machine is not measured again for the same model."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

import tersor
from tersor.api import stages, tiles
from tersor.api.session import pick_backends
from tersor.backends.openvino.executable import OpenVINOExecutable
from tersor.core.errors import BackendError
from tersor.core.records import BuildChoice
from tersor.core.store import Store
from tersor.price.price import PriceConfig
from tests.e2e.conftest import Tiny
from tests.e2e.helpers import Recorded, quick_runs

CONFIG = PriceConfig(k=6, held_out=2)
WAYS = 2  # of OpenVINO to lower int8 linears
MOST = WAYS * (1 + CONFIG.k + CONFIG.held_out)  # each probed, then priced


class Counted:
    """``compress`` on one store, counting the builds that pricing makes."""

    def __init__(self, cache: Path, patch: pytest.MonkeyPatch) -> None:
        self.cache, self.built = cache, 0
        build = stages._priced_build

        def counted(*args: Any) -> Any:
            self.built += 1
            return build(*args)

        patch.setattr(stages, "_priced_build", counted)

    def __call__(self, model: nn.Module, rows: Tensor, **options: Any) -> Any:
        self.built, self.progress = 0, Recorded()
        return tersor.compress(
            model,
            tersor.Data([rows], output="values"),
            **{"target": tersor.Target(size_ratio=1.5), "methods": ("quantize",), **options},
            cache_dir=self.cache,
            progress=self.progress,
        )


@pytest.fixture
def compress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Counted]:
    """One thread, both ways are priced, any drift is fine: times decide nothing here."""
    monkeypatch.setattr("tersor.api.stages.usable_cores", lambda: 1)
    monkeypatch.setattr("tersor.price.price.PROBE_MARGIN", 1e9)
    monkeypatch.setattr("tersor.price.memory.MOST_DRIFT", 1e9)
    monkeypatch.setattr("tersor.price.memory.MOST_DISAGREEMENT", 1e9)
    with quick_runs(CONFIG):
        yield Counted(tmp_path / "cache", monkeypatch)


def rows_of(images: dict[str, Tensor], first: int) -> Tensor:
    return images["train"][first : first + 90, 0, 14]


def other_weights() -> nn.Module:
    model = Tiny().eval()
    for p in model.parameters():
        p.data = p.data.flip(0) * 1.1
    return model


class OtherMachine:
    """Of which nothing is kept."""

    def fingerprint(self) -> str:
        return "another"


def test_other_data_weights_seeds_and_targets_find_the_builds_again(
    compress: Counted,
    images: dict[str, Tensor],
    tiny: nn.Module,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = compress(tiny, rows_of(images, 0))
    once = compress.built
    assert WAYS * 5 <= once <= MOST
    again = WAYS * (1 + 2)  # the probe; the native and one other build
    compress(tiny, rows_of(images, 200), seed=3)
    assert compress.built == again
    assert sum("builds were measured before" in note for note in compress.progress.notes) == WAYS
    # The plan is made of prices that are there, and all that it promises is measured anew.
    found = compress(other_weights(), rows_of(images, 0), target=tersor.Target(size_ratio=2.0))
    assert compress.built == again
    assert {"baseline", "price", "plan", "verify"} <= set(compress.progress.stages)
    assert found.verdict.latency.runs > 0
    ways = [[t.choice for t in run.record.prices.tables] for run in (first, found)]
    assert ways[0] == ways[1]
    monkeypatch.setattr("tersor.api.memory.describe_machine", OtherMachine)
    compress(tiny, rows_of(images, 400))
    assert compress.built == once


def test_layers_to_keep_need_no_builds_and_other_shapes_do(
    compress: Counted, images: dict[str, Tensor], tiny: nn.Module
) -> None:
    compress(tiny, rows_of(images, 0))
    once = compress.built
    kept = compress(tiny, rows_of(images, 0), keep=("middle",))
    assert compress.built == WAYS * (1 + 1)
    assert kept.plan.assignment.get("middle", "f32") == "f32"
    wider = Tiny().eval()
    wider.middle, wider.last = nn.Linear(64, 48), nn.Linear(48, 5)
    compress(wider, rows_of(images, 0))
    assert compress.built == once


def test_tiles_are_measured_once_a_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "SIZES", tuple(range(36, 68, 4)))
    monkeypatch.setattr(tiles, "SWEEPS", 3)
    profiles: Counter[str] = Counter()
    profile = OpenVINOExecutable.profile

    def counted(self: OpenVINOExecutable) -> dict[str, float]:
        profiles["openvino"] += 1
        return profile(self)

    monkeypatch.setattr(OpenVINOExecutable, "profile", counted)
    backends, infos = pick_backends("openvino", "cpu")
    store, progress = Store(tmp_path), Recorded()
    found = tiles.device_tiles(backends, infos, store, progress)
    assert profiles["openvino"] == 2 * 3  # native and int8
    assert len(progress.notes) == 4  # linears and convolutions of both
    assert set(found.native) == set(found.int8) == {"linear", "conv"}
    every = {t for rows in (*found.native.values(), *found.int8.values()) for t in rows}
    assert every <= {8, 16, 32, 64}
    assert tiles.device_tiles(backends, infos, store, Recorded()) == found
    assert profiles["openvino"] == 2 * 3
    newer = [replace(info, version="next") for info in infos]
    tiles.device_tiles(backends, newer, store, Recorded())
    assert profiles["openvino"] == 2 * 2 * 3
    damaged = min((tmp_path / "tiles").glob("*/record.json"))
    damaged.write_text("{}")
    tiles.device_tiles(backends, newer, store, Recorded())
    tiles.device_tiles(backends, infos, store, Recorded())
    assert profiles["openvino"] == 2 * 2 * 3 + 3


def test_every_probe_has_its_nodes_in_the_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "SIZES", (40, 64))
    backends, infos = pick_backends("openvino", "cpu")
    for level in ("f32", "int8"):
        graph, nodes = tiles.probe_graph(level, infos[0])
        assert set(nodes) == {(kind, n) for kind in ("linear", "conv") for n in (40, 64)}
        assert all(len(own) == 2 for own in nodes.values())
        choice = BuildChoice(backend="openvino")
        shapes = {"x": (1, 256, 128), "plane": (1, 32, 14, 14)}
        profile = backends["openvino"].build(graph, shapes, choice).profile()
        assert all(profile[node] > 0 for own in nodes.values() for node in own)


def test_a_backend_that_can_not_run_the_probes_has_default_tiles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*_: Any) -> Any:
        raise BackendError("no such op")

    monkeypatch.setattr(tiles, "probe_graph", refuses)
    backends, infos = pick_backends("openvino", "cpu")
    progress = Recorded()
    found = tiles.device_tiles(backends, infos, Store(tmp_path), progress)
    assert found.native["linear"] == (tiles.DEFAULT_TILES[infos[0].precisions[-1]],)
    assert "tiles were not measured: no such op" in progress.notes[0]
    assert not (tmp_path / "tiles").exists()
