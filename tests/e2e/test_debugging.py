"""Profile and compare on the file of a real network."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

import tersor
from tersor.api import profiling
from tersor.api.comparing import Comparison, _values
from tersor.api.files import open_graph
from tersor.api.verifying import flat_inputs
from tersor.artifact import read_artifact
from tersor.backends.inductor import InductorBackend
from tersor.capture.module import capture
from tersor.capture.samples import Samples, flatten_item
from tersor.cli.main import app
from tersor.core import registry
from tersor.core.errors import BackendError, ConfigError, DataError
from tersor.core.records import BuildChoice
from tersor.graph import meta
from tersor.graph.contracts import Graph
from tersor.graph.edit import copy_graph, rebuild
from tersor.price.price import PriceConfig
from tests.data.zoo import load_resnet20
from tests.e2e.helpers import parts, quick_runs

aten = torch.ops.aten
KEEP = tuple(f"layers.{i}" for i in range(1, 6))  # fewer layers are quicker to propose and to price


@pytest.fixture(scope="module")
def data(images: dict[str, Tensor]) -> tersor.Data:
    return parts(images)


@pytest.fixture(scope="module")
def path(data: tersor.Data, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ResNet-20 in formats: how fast does not matter here."""
    found = tmp_path_factory.mktemp("debugging") / "resnet.tersor"
    with quick_runs(PriceConfig(k=2, held_out=1)):
        tersor.compress(
            load_resnet20(),
            data,
            target=tersor.Target(size_ratio=3.9, min_agreement=0.5),
            methods=("quantize",),
            keep=KEEP,
            cache_dir=found.parent / "cache",
            progress=False,
        ).save(found)
    return found


def test_a_profile_adds_up_and_names_the_layers(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = replace(profiling._PROBES["cpu"], copied=1)  # from a cache: a lower floor
    monkeypatch.setitem(profiling._PROBES, "cpu", small)  # type: ignore[arg-type]
    found = tersor.profile(path)
    total = sum(row.ms for row in found.rows) + found.outside_ms
    assert total == pytest.approx(found.call.median_ms)
    layers = {row.layer for row in found.rows}
    assert {"stem", "layers.0.conv1", "layers.8.conv2"} <= layers
    convs = [row for row in found.rows if row.kind == "conv"]
    assert len(convs) == 21
    assert {row.format for row in convs} & {"int8"}
    # Ceilings and calls are measured one after the other: a neighbour may have slowed either.
    disturbed = 5
    shares = [row.of_ceiling for row in convs if row.of_ceiling and row.ms > 0.005]
    assert all(0 < share <= disturbed for share in shares)
    assert found.ceilings is not None
    assert all(rate > 1e9 for rate in found.ceilings.macs_per_s.values())
    assert found.ceilings.bytes_per_s is not None
    assert found.floor_ms is not None
    assert 0 < found.floor_ms < disturbed * found.call.median_ms


def test_a_build_of_sixteen_bits_has_both_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its options are for such builds alone: what is copied in f32 takes the backend's own for that."""
    monkeypatch.setitem(profiling._PROBES, "cpu", profiling._Probe(rows=64, side=64, copied=1))  # type: ignore[arg-type]
    options = {"mode": "eager", "half": "float16", "blocks": "fused"}
    choice = BuildChoice(backend="inductor", precision="bf16", options=options)
    found = profiling.measured_ceilings(InductorBackend(), choice, {"bf16"})
    assert found.macs_per_s["bf16"] > 0
    assert found.bytes_per_s is not None
    assert found.bytes_per_s > 0


def test_the_command_writes_a_trace(path: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    words = ["profile", str(path), "--no-ceilings", "--json", "--trace", str(trace)]
    ran = CliRunner().invoke(app, words)
    assert ran.exit_code == 0, ran.output
    rows = json.loads(ran.stdout)["rows"]
    bars = [e for e in json.loads(trace.read_text())["traceEvents"] if e["ph"] == "X"]
    assert len(bars) == len(rows) + 1
    assert sum(bar["dur"] for bar in bars) == pytest.approx(
        1e3 * json.loads(ran.stdout)["call"]["median_ms"], rel=0.01
    )


def test_a_model_is_profiled_in_its_best_uncompressed_build(data: tersor.Data) -> None:
    found = tersor.profile(load_resnet20(), data, backend="openvino", ceilings=False)
    assert found.build.startswith("openvino")
    assert {row.format for row in found.rows if row.kind == "conv"} <= {"f32", "bf16"}


def test_the_original_and_the_result_are_compared_value_by_value(
    path: Path, images: dict[str, Tensor]
) -> None:
    found = tersor.compare(load_resnet20(), path, inputs=images["test"][:8], limit=0.05)
    nodes = [point.node for point in found.points]
    assert nodes[0].startswith("conv2d")
    assert len(nodes) > 40
    assert found.is_equal
    assert found.first is None
    assert any(point.own > 0 for point in found.points)
    assert all(build.first is None for build in found.builds)
    tight = tersor.compare(load_resnet20(), path, inputs=images["test"][:8], limit=1e-7)
    assert not tight.is_equal
    assert tight.first in nodes
    assert tight.introduced in nodes


def test_a_weight_out_of_its_codes_is_no_value_of_the_network(path: Path) -> None:
    graph = open_graph(read_artifact(path))
    meta.ensure(graph)
    from_codes = {n.name for n in graph.module.graph.nodes if n.name.endswith("weight_dequantize")}
    values = _values(graph)
    assert len(from_codes) > 5
    assert from_codes.isdisjoint(values)
    assert {"mean", "add", "add_4"} <= set(values)


class _Wrong:
    """A backend that runs graphs in torch, and takes one op's input for its output."""

    def __init__(self, whole: Graph, wrong: str) -> None:
        self.whole, self.wrong = whole, wrong

    def describe(self) -> Any:
        return type("Info", (), {"available": True})()

    def build(self, graph: Graph, _shapes: Any, _choice: BuildChoice) -> Any:
        fresh, tensors = copy_graph(graph.module)
        for node in fresh.nodes:
            if node.name == self.wrong:
                with fresh.inserting_after(node):
                    twice = fresh.call_function(aten.mul.Tensor, (node, 2.0))
                node.replace_all_uses_with(twice)
                twice.args = (node, 2.0)
        return _Run(Graph(rebuild(fresh, tensors), graph.signature, graph.example))

    def load(self, _sections: Any, choice: BuildChoice) -> Any:
        return self.build(self.whole, {}, choice)


class _Run:
    def __init__(self, graph: Graph) -> None:
        self.graph = graph

    def run(self, arrays: Mapping[str, Any]) -> dict[str, Any]:
        specs = self.graph.signature
        found = self.graph.run([torch.from_numpy(arrays[s.name]) for s in specs.inputs])
        return {s.name: t.numpy() for s, t in zip(specs.outputs, found, strict=True)}

    def profile(self) -> dict[str, float]:
        return {}

    def serialize(self) -> dict[str, bytes]:
        return {}


@pytest.mark.parametrize("wrong", ["add", "add_4", "mean"])
def test_a_wrong_build_is_found_at_the_op_where_it_is_wrong(
    path: Path, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    graph = open_graph(read_artifact(path))
    monkeypatch.setattr(registry, "backend", lambda *_: _Wrong(graph, wrong))
    found: Comparison = tersor.compare(path)
    (build,) = found.builds
    assert not found.is_equal
    assert build.first == wrong
    assert 1 < len(build.looked) < 14


def test_the_command_says_unequal_by_its_exit_code(path: Path, tmp_path: Path) -> None:
    ran = CliRunner().invoke(app, ["compare", str(path), "--json"])
    assert ran.exit_code == 0, ran.output
    assert json.loads(ran.stdout)["builds"][0]["first"] is None
    wide = tmp_path / "wide.npz"
    np.savez(wide, np.zeros((2, 1, 28, 28), np.float32))
    assert CliRunner().invoke(app, ["compare", str(path), str(path), str(wide)]).exit_code == 0


def test_a_machine_without_the_backend_does_not_call_a_file_equal(
    path: Path, monkeypatch: pytest.MonkeyPatch, images: dict[str, Tensor]
) -> None:
    class Missing:
        def describe(self) -> Any:
            info = {"available": False, "reason": "it is not installed", "remedy": "install it"}
            return type("Info", (), info)()

    monkeypatch.setattr(registry, "backend", lambda *_: Missing())
    with pytest.raises(BackendError, match="it is not installed; install it"):
        tersor.compare(path)
    found = tersor.compare(load_resnet20(), path, inputs=images["test"][:4], limit=0.05)
    assert found.builds == ()
    assert "not installed" in found.notes[0]


def test_inputs_are_bound_by_name_and_checked() -> None:
    class Two(torch.nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return a - 2 * b

    call, tensors = flatten_item({"a": torch.zeros(2, 3), "b": torch.ones(2, 3)}, "item")
    graph = capture(Two().eval(), Samples(call, tensors)).graph
    given = {"b": torch.ones(2, 3), "a": torch.zeros(2, 3)}
    assert [float(t.sum()) for t in flat_inputs(graph, given)] == [0.0, 6.0]
    with pytest.raises(DataError):
        flat_inputs(graph, torch.zeros(2, 3))
    with pytest.raises(DataError, match="'b'"):
        flat_inputs(graph, given | {"b": torch.ones(2, 4)})


def test_bad_use_is_refused(path: Path) -> None:
    with pytest.raises(ConfigError, match="limit"):
        tersor.compare(path, limit=2.0)
    with pytest.raises(ConfigError, match="inputs"):
        tersor.compare(load_resnet20())
    with pytest.raises(ConfigError, match="data"):
        tersor.profile(load_resnet20())
    with pytest.raises(ConfigError, match="same inputs"):
        tersor.compare(path, torch.nn.Linear(4, 2), inputs=torch.zeros(2, 4))
