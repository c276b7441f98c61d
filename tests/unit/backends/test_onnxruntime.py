"""What is ONNX Runtime's own; what all backends share is in tests/conformance."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tersor.api.session import pick_backends
from tersor.core.errors import ArtifactError, BackendError, ConfigError, MissingDependencyError
from tersor.core.records import BuildChoice
from tersor.graph.apply import apply
from tersor.graph.contracts import Graph, Quantizer, SiteChange
from tersor.graph.edit import attribute
from tersor.graph.operators import weighted_ops
from tests.unit.capturing import graph_of, random, site_of, trained

pytest.importorskip("onnxruntime")
from tersor.backends.onnxruntime import ONNXRuntimeBackend
from tersor.backends.onnxruntime import executable as loading

CHOICE = BuildChoice(backend="onnxruntime")
BACKEND = ONNXRuntimeBackend()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 16, 3, padding=1)
        self.b = nn.Conv2d(16, 8, 3)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.max_pool2d(self.a(x).relu(), 2)
        return self.head(self.b(x).relu().mean((2, 3)))


@pytest.fixture(scope="module")
def graph() -> Graph:
    return graph_of(trained(Net()), random(2, 3, 12, 12))


def executable(graph: Graph, **options: str) -> loading.ONNXRuntimeExecutable:
    choice = BuildChoice(backend="onnxruntime", options=options)
    return BACKEND.build(graph, {"x": (1, 3, 12, 12)}, choice)


def kinds(build: loading.ONNXRuntimeExecutable) -> list[str]:
    """What the session runs, after all fusions."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        session = loading._session(build._stored, CHOICE, str(Path(folder) / "p"))
        session.run(None, {"x": np.ones((1, 3, 12, 12), np.float32)})
        events = json.loads(Path(session.end_profiling()).read_text())
    return [kind for _, kind in loading._by_node(events)]


def quantized(graph: Graph, names: tuple[str, ...], low: int = -128, high: int = 127) -> Graph:
    changes = []
    for op in weighted_ops(graph.module):
        target = str(op.weight.target)
        if target.removesuffix(".weight") not in names:
            continue
        weight = attribute(graph.module, target).detach()
        scale = weight.abs().flatten(1).amax(1) / 63
        codes = (weight / scale.reshape(-1, *[1] * (weight.dim() - 1))).round().to(torch.int8)
        changes.append(
            SiteChange(
                site=site_of(graph, target.removesuffix(".weight")),
                level="int8",
                codes=codes,
                scale=scale,
                quantizer=Quantizer(step=0.05, low=low, high=high),
            )
        )
    assert len(changes) == len(names)
    return apply(graph, changes)


def test_a_convolution_before_one_grid_is_fused_and_others_are_not(graph: Graph) -> None:
    both = quantized(graph, ("a", "b"))
    assert "QLinearConv" in kinds(executable(both))
    assert kinds(executable(both)).count("ConvInteger") == 0  # b goes on in floats
    assert kinds(executable(both, int8_conv="integers")).count("ConvInteger") == 1
    alone = quantized(graph, ("a",))
    assert "QLinearConv" not in kinds(executable(alone))


class Mobile(nn.Module):
    """What mobile networks have between convolutions: values up to 6, and padding of one side."""

    def __init__(self, top: float = 6.0, border: float = 0.0) -> None:
        super().__init__()
        self.top, self.border = top, border
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.b = nn.Conv2d(8, 8, 3, stride=2, groups=8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x).clamp(0.0, self.top)
        y = self.b(nn.functional.pad(y, (0, 1, 0, 1), value=self.border))
        return self.head(y.mean((2, 3)))


# 255 steps of 0.05 end at 12.75, in front of the first bound and behind the second.
@pytest.mark.parametrize("top", [6.0, 20.0])
@pytest.mark.parametrize("border", [0.0, 0.35])
@pytest.mark.parametrize("ends", [(0, 255), (-128, 127)])
def test_clipping_and_padding_work_on_codes(
    top: float, border: float, ends: tuple[int, int]
) -> None:
    changed = quantized(
        graph_of(trained(Mobile(top, border)), random(2, 3, 12, 12)), ("a", "b"), *ends
    )
    build = executable(changed)
    found = kinds(build)
    assert "QLinearConv" in found
    assert found.count("QuantizeLinear") == 1  # of the input
    x = random(1, 3, 12, 12, seed=5)
    (value,) = build.run({"x": x.numpy()}).values()
    (wanted,) = changed.run((x,))
    # A tie may round the other way: of 144 values by one step of 0.05, a small part of each mean.
    assert torch.allclose(torch.from_numpy(value), wanted, atol=2e-2 * float(wanted.abs().max()))


def test_bounds_that_are_computed_and_borders_that_mirror_have_no_codes() -> None:
    from onnx import helper, numpy_helper

    from tersor.backends.onnxruntime.following import Following

    six = numpy_helper.from_array(np.float32(6.0), "six")
    shape = numpy_helper.from_array(np.zeros(8, np.int64), "shape")
    found = Following(helper.make_graph([], "graph", [], [], [six, shape]))
    assert found.ends(helper.make_node("Clip", ["x", "", "six"], ["y"])) == (-np.inf, 6.0)
    assert found.ends(helper.make_node("Clip", ["x", "computed", "six"], ["y"])) is None
    assert found.ends(helper.make_node("Relu", ["x"], ["y"])) == (0.0, np.inf)
    assert found.allows(helper.make_node("Pad", ["x", "shape"], ["y"]))
    assert not found.allows(helper.make_node("Pad", ["x", "shape"], ["y"], mode="reflect"))
    assert not found.allows(helper.make_node("Pad", ["x", "shape", "computed"], ["y"]))
    assert not found.allows(helper.make_node("Sigmoid", ["x"], ["y"]))


def test_a_convolution_that_is_fused_with_what_reads_it_keeps_its_time(graph: Graph) -> None:
    build = executable(graph)
    build.run({"x": np.ones((1, 3, 12, 12), np.float32)})
    again = loading.load(build.serialize(), CHOICE)
    again.run({"x": np.ones((1, 3, 12, 12), np.float32)})
    convolutions = [op.node.name for op in weighted_ops(graph.module) if op.kind == "conv"]
    for one in (build, again):
        times = one.profile()
        assert all(times.get(name, 0.0) > 0 for name in convolutions), times
        assert not [name for name in times if name.startswith("relu")]


def test_a_result_that_is_an_output_stays_float() -> None:
    class Both(Net):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            y = self.a(x).relu()
            return y, self.b(y)

    graph = graph_of(trained(Both()), random(2, 3, 12, 12))
    changed = quantized(graph, ("a", "b"))
    x = random(1, 3, 12, 12, seed=5)
    found = executable(changed).run({"x": x.numpy()})
    for value, wanted in zip(found.values(), changed.run((x,)), strict=True):
        assert torch.allclose(
            torch.from_numpy(value), wanted, atol=1e-3 * float(wanted.abs().max())
        )


def test_linears_are_integer_products(graph: Graph) -> None:
    assert "MatMulIntegerToFloat" in kinds(executable(quantized(graph, ("head",))))


@pytest.mark.parametrize("ends", [(-128, 127), (0, 255), (-127, 127), (-8, 7)])
def test_float_weights_keep_their_values_beside_quantised_data(
    graph: Graph, ends: tuple[int, int]
) -> None:
    """ONNX Runtime would round them to 8 bits, one scale a tensor."""
    changed = quantized(graph, ("a", "b"), *ends)
    x = random(1, 3, 12, 12, seed=5)
    wanted = changed.run((x,))[0].double()
    for way in ("floats", "integers"):
        (found,) = executable(changed, int8_conv=way).run({"x": x.numpy()}).values()
        error = (torch.from_numpy(found).double() - wanted).square().sum()
        assert float(error / wanted.square().sum()) <= 1e-4


def test_a_file_without_onnx_still_loads(graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    build = executable(graph)
    sections = build.serialize()
    from tersor.backends import onnxruntime as package

    known = package.find_spec
    monkeypatch.setattr(
        package, "find_spec", lambda n: None if n in ("onnx", "onnxscript") else known(n)
    )
    info = BACKEND.describe()
    assert info.available
    assert info.precisions == ()
    with pytest.raises(BackendError, match=r"onnx is not installed.*pip install 'tersor\[onnx\]'"):
        pick_backends("onnxruntime", "cpu")
    x = {"x": np.ones((1, 3, 12, 12), np.float32)}
    (found,) = BACKEND.load(sections, CHOICE).run(x).values()
    (wanted,) = build.run(x).values()
    assert np.array_equal(found, wanted)
    with pytest.raises(MissingDependencyError, match=r"onnx is not installed.*'tersor\[onnx\]'"):
        executable(graph)
    monkeypatch.setattr(package, "find_spec", lambda _: None)
    assert BACKEND.describe().reason == "onnxruntime is not installed"
    with pytest.raises(MissingDependencyError, match=r"pip install 'tersor\[onnx\]'"):
        BACKEND.load(sections, CHOICE)


@pytest.mark.parametrize("name", ["model.onnx", "model.bin", "tensors.json"])
def test_a_missing_section_is_named(graph: Graph, name: str) -> None:
    sections = executable(graph).serialize()
    del sections[name]
    with pytest.raises(ArtifactError, match=rf"sections \['{name}'\] are missing"):
        BACKEND.load(sections, CHOICE)


@pytest.mark.parametrize(
    ("field", "value"),
    [(3, 1 << 40), (3, -8), (4, 8), (2, [-1, 4]), (1, "float64"), (1, "object"), (2, "no")],
)
def test_a_damaged_list_of_constants_is_refused(graph: Graph, field: int, value: object) -> None:
    sections = executable(graph).serialize()
    index = json.loads(sections["tensors.json"])
    index["tensors"][0][field] = value
    sections["tensors.json"] = json.dumps(index).encode()
    with pytest.raises(ArtifactError, match="write the artifact again"):
        BACKEND.load(sections, CHOICE)


def test_no_file_outside_is_read(
    graph: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A structure may name files; only the constants that are listed are taken."""
    sections = executable(graph).serialize()
    index = json.loads(sections["tensors.json"])
    largest = max(index["tensors"], key=lambda row: row[4])
    index["tensors"].remove(largest)
    sections["tensors.json"] = json.dumps(index).encode()
    (tmp_path / "model.bin").write_bytes(sections["model.bin"])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ArtifactError, match="is no model"):
        BACKEND.load(sections, CHOICE)


def test_an_operation_in_another_form_is_refused_not_lost(
    graph: Graph, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its bias and its quantiser were taken out of the graph: they must come back."""
    from tersor.backends.onnxruntime import assembly

    monkeypatch.setattr(assembly._Assembly, "_operation", lambda *_: None)
    with pytest.raises(BackendError, match=r"conv2d became Conv, wanted .*use another backend"):
        executable(graph)


def test_a_damaged_model_is_refused(graph: Graph) -> None:
    sections = {**executable(graph).serialize(), "model.onnx": b"\\x08\\x0a garbage"}
    with pytest.raises(ArtifactError, match=r"model.onnx \(\d+ bytes\).*is no model"):
        BACKEND.load(sections, CHOICE)


def test_choices_that_are_not_here_are_refused(graph: Graph) -> None:
    for fields, text in (
        ({"precision": "bf16"}, "precision bf16"),
        ({"device": "cuda"}, "device 'cuda'"),
        ({"options": {"int8_conv": "magic"}}, "wanted int8_conv as one of"),
    ):
        with pytest.raises(ConfigError, match=text):
            BACKEND.build(graph, {}, BuildChoice(backend="onnxruntime", **fields))


def test_a_file_that_is_no_onnx_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.onnx"
    path.write_bytes(b"nothing")
    with pytest.raises(BackendError, match="is no ONNX file"):
        BACKEND.read_file(path, {}, CHOICE)
