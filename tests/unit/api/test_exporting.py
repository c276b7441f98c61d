"""Who reads an exported file back, what is said where that fails, and that nothing is left then."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from torch import nn

from tersor.api import exporting
from tersor.api.exporting import export_graph
from tersor.build.reference import GraphExecutable
from tersor.core.errors import BackendError, MissingDependencyError, ParityError, TersorError
from tersor.core.records import BuildChoice
from tersor.graph.contracts import Graph
from tests.unit.capturing import graph_of, random, trained

CHOICE = BuildChoice(backend="openvino", batch=2, options={"int8_linear": "linear"})
FLAT = [random(4, 2, 16)]
Reading = Callable[[Graph], Any]


def net(padding_mode: Literal["zeros", "circular"] = "zeros") -> Graph:
    conv = nn.Conv1d(2, 4, 5, padding=2, padding_mode=padding_mode)
    return graph_of(trained(nn.Sequential(conv, nn.ReLU())), FLAT[0])


class Fake:
    """A backend that writes something, and reads it as the test says."""

    def __init__(self, graph: Graph, name: str, reading: Reading, read: list[str]) -> None:
        self.graph, self.name, self.reading, self.read = graph, name, reading, read

    def export_ir(self, _graph: Graph, _shapes: Any, _choice: BuildChoice, path: Path) -> None:
        path.with_suffix(".bin").write_text("weights")
        path.write_text("new")

    def read_file(self, path: Path, _shapes: Any, choice: BuildChoice) -> Any:
        assert path.read_text() == "new"
        assert choice.backend == self.name
        assert choice.batch == CHOICE.batch
        self.read.append(self.name)
        return self.reading(self.graph)


class Build:
    """The graph itself, scaled, or nothing."""

    def __init__(self, graph: Graph, scale: float | None) -> None:
        self.graph, self.scale = GraphExecutable(graph), scale

    def run(self, inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
        if self.scale is None:
            raise BackendError("no such op")
        return {name: self.scale * value for name, value in self.graph.run(inputs).items()}

    def profile(self) -> dict[str, float]:
        return {}

    def serialize(self) -> dict[str, bytes]:
        return {}


def right(graph: Graph) -> Any:
    return Build(graph, 1.0)


def wrong(graph: Graph) -> Any:
    return Build(graph, 1.2)


def failing(graph: Graph) -> Any:
    return Build(graph, None)


def absent(_graph: Graph) -> Any:
    raise MissingDependencyError("it is not installed")


def refusing(_graph: Graph) -> Any:
    raise BackendError("no such op")


def readers(patch: pytest.MonkeyPatch, graph: Graph, **reading: Reading) -> list[str]:
    """Put backends in the place of the real ones; returns who reads, as it happens."""
    read: list[str] = []
    patch.setattr(exporting, "_backend", lambda name: Fake(graph, name, reading[name], read))
    patch.setattr(exporting, "write_onnx", lambda _, path: path.write_text("new"))
    return read


@pytest.mark.parametrize("backend", ["openvino", "onnxruntime", "inductor"])
def test_onnx_is_read_by_the_first_that_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    graph, path = net(), tmp_path / "m.onnx"
    choice = BuildChoice(backend=backend, batch=2)
    read = readers(monkeypatch, graph, onnxruntime=right, openvino=refusing)
    assert export_graph(graph, choice, path, FLAT) == 0.0
    assert read == ["onnxruntime"]
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]

    read = readers(monkeypatch, graph, onnxruntime=absent, openvino=right)
    assert export_graph(graph, choice, path, FLAT) == 0.0
    assert read == ["onnxruntime", "openvino"]

    path.write_text("old")
    readers(monkeypatch, graph, onnxruntime=absent, openvino=absent)
    with pytest.raises(MissingDependencyError, match=r"m\.onnx: found neither onnxruntime nor ope"):
        export_graph(graph, choice, path, FLAT)
    assert path.read_text() == "old"


def test_xml_is_read_by_openvino_and_has_its_weights_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = net()
    read = readers(monkeypatch, graph, onnxruntime=refusing, openvino=right)
    for backend in ("openvino", "onnxruntime"):
        choice = BuildChoice(backend=backend, batch=2)
        assert export_graph(graph, choice, tmp_path / "m.xml", FLAT) == 0.0
    assert read == ["openvino"] * 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.bin", "m.xml"]


CANT = "{}, which checks the file, can't run it (no such op)"


@dataclass(frozen=True)
class Place:
    suffix: str
    reader: str
    way_out: str


@pytest.mark.parametrize(
    ("reading", "error", "said"),
    [
        (wrong, ParityError, "the file, as {} runs it, differs from the graph, normalised squ"),
        (failing, BackendError, CANT),
        (refusing, BackendError, CANT),
    ],
)
@pytest.mark.parametrize(
    "place",
    [
        Place(".onnx", "onnxruntime", "export .xml or .pt2 instead"),
        Place(".onnx", "openvino", "install onnxruntime, which then checks it instead, or export"),
        Place(".xml", "openvino", "export .onnx or .pt2 instead"),
    ],
)
def test_where_the_check_fails_nothing_is_left_and_what_was_there_stays(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    reading: Reading,
    error: type[TersorError],
    said: str,
    place: Place,
) -> None:
    graph, path = net(), tmp_path / f"m{place.suffix}"
    backends = {"onnxruntime": absent, "openvino": absent} | {place.reader: reading}
    readers(monkeypatch, graph, **backends)
    for before in ({}, {path.name: "old"}, {path.name: "old", "m.bin": "old"}):
        for name, text in before.items():
            (tmp_path / name).write_text(text)
        with pytest.raises(error) as found:
            export_graph(graph, CHOICE, path, FLAT)
        assert str(found.value).startswith(f"{path}: {said.format(place.reader)}")
        assert "it was not kept; " + place.way_out in str(found.value)
        assert {p.name: p.read_text() for p in tmp_path.iterdir()} == before


def test_a_valid_file_that_openvino_can_t_read_is_written(tmp_path: Path) -> None:
    """Its reader knows no padding that wraps around, which ONNX has since opset 19."""
    graph, path = net("circular"), tmp_path / "m.onnx"
    # Sums in another order only.
    assert export_graph(graph, CHOICE, path, FLAT) <= 1e-10
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]
    import onnxruntime

    session = onnxruntime.InferenceSession(path)
    (found,) = session.run(None, {session.get_inputs()[0].name: FLAT[0][:3].numpy()})
    (wanted,) = graph.run([FLAT[0][:3]])
    assert np.allclose(found, wanted.numpy(), atol=1e-5)


def test_pt2_that_can_t_be_written_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(_graph: Graph, path: Path) -> None:
        path.write_text("half")
        raise BackendError(f"{path}: no")

    monkeypatch.setattr(exporting, "write_pt2", half)
    (tmp_path / "m.pt2").write_text("old")
    with pytest.raises(BackendError, match=r"/m\.pt2: no$"):
        export_graph(net(), CHOICE, tmp_path / "m.pt2", FLAT)
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"m.pt2": "old"}
