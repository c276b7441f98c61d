"""What is OpenVINO's own: layouts, shared skeletons, the probe, names, files."""

import json
import operator
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tersor.analyse.additions import addition_sites
from tersor.analyse.sites import find_sites
from tersor.backends.openvino import (
    OpenVINOBackend,
    executable_from_model,
    export_ir,
    to_openvino_model,
)
from tersor.capture.module import capture
from tersor.capture.samples import Samples, flatten_item
from tersor.core.errors import (
    ArtifactError,
    BackendError,
    ConfigError,
    DataError,
    MissingDependencyError,
    ShapeError,
    StoreError,
)
from tersor.core.records import BuildChoice, Signature, Structure, TensorSpec
from tersor.graph.apply import apply
from tersor.graph.contracts import Graph, Quantizer, SiteChange
from tersor.graph.edit import attribute, copy_graph, rebuild
from tersor.graph.floats import fingerprint
from tersor.graph.normalise import normalise
from tersor.graph.operators import weighted_ops
from tersor.graph.shapes import OPEN
from tersor.graph.split import split

ov = pytest.importorskip("openvino")

from tersor.backends.openvino import channels_first, executable  # noqa: E402 - need OpenVINO
from tersor.backends.openvino.failures import conversion_failed  # noqa: E402
from tersor.backends.openvino.nodes import source_name  # noqa: E402
from tersor.backends.openvino.probe import FULL_LIMIT, SAFE_LIMIT, weight_limit  # noqa: E402
from tersor.backends.openvino.skeleton import skeleton_of  # noqa: E402

STEP = 0.03
LINEAR = BuildChoice(backend="openvino", options={"int8_linear": "linear"})
CONVOLUTION = BuildChoice(backend="openvino", options={"int8_linear": "convolution"})
# Integer sums are exact; scale, bias and what follows are a few float32 roundings.
INTEGER = 1e-5


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def graph_of(module: nn.Module, *inputs: Tensor) -> Graph:
    """As capture makes it, without its checks."""
    with torch.no_grad():
        for i, p in enumerate(module.parameters()):
            p.copy_(random(*p.shape, seed=i + 1) * 0.1)
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(
        module.eval(), inputs, dynamic_shapes=tuple({0: batch} for _ in inputs), strict=False
    )
    graph = normalise(program.module(check_guards=False))
    holders = [n.name for n in graph.graph.nodes if n.op == "placeholder"]
    with torch.no_grad():
        outputs = graph(*inputs)
    signature = Signature(
        inputs=tuple(spec(n, t) for n, t in zip(holders, inputs, strict=True)),
        outputs=tuple(spec(f"y{i}", t) for i, t in enumerate(outputs)),
        args=Structure(kind="tuple"),
        kwargs=Structure(kind="dict"),
        result=Structure(kind="tuple"),
    )
    return Graph(graph, signature, inputs)


def spec(name: str, tensor: Tensor) -> TensorSpec:
    dtype = str(tensor.dtype).removeprefix("torch.")
    return TensorSpec(name=name, dtype=dtype, shape=(None, *tensor.shape[1:]))


def quantized(
    graph: Graph, *, factor: float | None = None, shift: float = 0.0, limit: int = SAFE_LIMIT
) -> Graph:
    """Every linear and convolution in int8, written by hand as graph.apply writes it."""
    decomposed = torch.ops.quantized_decomposed
    fresh, tensors = copy_graph(graph.module)
    pairs: dict[str, Any] = {}
    for node in [n for n in fresh.nodes if re.match(r"aten\.(linear|conv)", str(n.target))]:
        source, stored = node.args[:2]
        weight = tensors[stored.target]
        scale = weight.abs().flatten(1).amax(1) / limit
        codes = (weight / scale.reshape(-1, *[1] * (weight.dim() - 1))).round()
        tensors[f"{stored.target}_codes"] = codes.to(torch.int8)
        tensors[f"{stored.target}_scale"] = scale
        tensors["factor"] = torch.full((1,), factor or 1.0)
        with fresh.inserting_before(node):
            call = fresh.call_function
            if source.name not in pairs:
                data = source
                if factor is not None:
                    data = call(torch.ops.aten.mul.Tensor, (data, fresh.get_attr("factor")))
                if shift:
                    data = call(torch.ops.aten.add.Tensor, (data, shift))
                grid = (STEP, 0, -128, 127, torch.int8)
                data = call(decomposed.quantize_per_tensor.default, (data, *grid))
                pairs[source.name] = call(decomposed.dequantize_per_tensor.default, (data, *grid))
            integers = fresh.get_attr(f"{stored.target}_codes")
            steps = fresh.get_attr(f"{stored.target}_scale")
            floats = call(
                decomposed.dequantize_per_channel.default,
                (integers, steps, None, 0, -127, 127, torch.int8),
            )
        node.args = (pairs[source.name], floats, *node.args[2:])
    return Graph(rebuild(fresh, tensors), graph.signature, graph.example)


def shapes_of(graph: Graph) -> dict[str, tuple[int, ...]]:
    pairs = zip(graph.signature.inputs, graph.example, strict=True)
    return {s.name: tuple(t.shape) for s, t in pairs}


def arrays_of(graph: Graph) -> dict[str, Any]:
    pairs = zip(graph.signature.inputs, graph.example, strict=True)
    return {s.name: t.numpy() for s, t in pairs}


def largest_error(graph: Graph, choice: BuildChoice) -> float:
    """Of the output's scale, over all outputs."""
    executable = OpenVINOBackend().build(graph, shapes_of(graph), choice)
    found, wanted = executable.run(arrays_of(graph)), graph.run(graph.example)
    return max(
        float(np.abs(found[s.name] - t.numpy()).max() / np.abs(t.numpy()).max())
        for s, t in zip(graph.signature.outputs, wanted, strict=True)
    )


def count(model: Any, kind: str) -> int:
    return sum(node.get_type_name() == kind for node in model.get_ops())


class Chain(nn.Module):
    def __init__(self, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 32), nn.Linear(32, 16)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(self.activation(self.first(x)))
        return out


class FanOut(nn.Module):
    """Tensors inside a chain that others read as well: gate, residual, transposed output."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(16, 32), nn.Linear(32, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        h = self.a(x)
        gate = h * torch.sigmoid(h) * 1.7
        y = self.b(gate)
        return (y + gate).mean(1), self.c(gate), gate.transpose(1, 2)


def test_import_loads_neither_openvino_nor_torch() -> None:
    script = (
        "import sys, tersor.backends.openvino as b; b.OpenVINOBackend();"
        "assert not {'openvino', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tersor.backends.openvino.find_spec", lambda _: None)
    info = OpenVINOBackend().describe()
    assert not info.available
    assert info.reason == "openvino is not installed"
    assert info.remedy == "pip install 'tersor[openvino]'"
    with pytest.raises(MissingDependencyError, match=re.escape(info.remedy)):
        OpenVINOBackend().load({}, LINEAR)


@given(st.data(), st.sampled_from(channels_first.RANKS))
def test_turned_constants_broadcast_like_the_original(data: st.DataObject, rank: int) -> None:
    full = tuple(data.draw(st.lists(st.integers(2, 4), min_size=rank, max_size=rank)))
    kept = data.draw(st.integers(0, rank))
    shape = tuple(data.draw(st.sampled_from([1, size])) for size in full[rank - kept :])
    constant = np.arange(np.prod(shape, dtype=int), dtype=np.float32).reshape(shape)
    tensor = np.arange(np.prod(full), dtype=np.float32).reshape(full)
    turned = channels_first.turn_constant(tensor, rank)
    found = turned * channels_first.turn_constant(constant, rank)
    assert np.array_equal(found, channels_first.turn_constant(tensor * constant, rank))


@pytest.mark.parametrize("shape", [(4, 3), (2, 4, 3), (2, 4, 5, 3)])
def test_leave_inverts_enter(shape: tuple[int, ...]) -> None:
    from openvino import opset13 as op

    data = op.parameter(list(shape), np.float32)
    inside = channels_first.enter(data.output(0), len(shape), "in")
    assert inside.get_partial_shape().rank.get_length() == 4
    assert inside.get_shape()[1] == shape[-1]
    model = ov.Model([op.result(channels_first.leave(inside, len(shape), "out"))], [data], "m")
    values = random(*shape).numpy()
    assert np.array_equal(ov.Core().compile_model(model, "CPU")(values)[0], values)


@pytest.mark.parametrize("activation", [nn.functional.gelu, torch.relu, nn.functional.silu])
@pytest.mark.parametrize("shape", [(2, 16), (2, 5, 16), (2, 3, 5, 16)])
def test_a_chain_changes_layout_once_each_way(
    activation: Callable[[Tensor], Tensor], shape: tuple[int, ...]
) -> None:
    graph = quantized(graph_of(Chain(activation), random(*shape)))
    model = to_openvino_model(graph, shapes_of(graph), CONVOLUTION)
    assert count(model, "Convolution") == 2
    assert count(model, "MatMul") == 0
    assert count(model, "Transpose") == 2
    assert count(to_openvino_model(graph, shapes_of(graph), LINEAR), "MatMul") == 2


def test_readers_inside_a_chain_see_the_right_layout() -> None:
    """Also guards against OpenVINO merging transpositions wrongly (channels_first)."""
    graph = quantized(graph_of(FanOut(), random(2, 6, 16)))
    # A code may fall to the other side of a border between two ops: one step, times one weight.
    assert largest_error(graph, CONVOLUTION) < STEP
    transposed = to_openvino_model(graph, shapes_of(graph), CONVOLUTION)
    assert count(transposed, "Convolution") == 3


@pytest.mark.parametrize("choice", [LINEAR, CONVOLUTION])
def test_smoothing_and_shift(choice: BuildChoice) -> None:
    codes = torch.randint(-60, 60, (2, 5, 16), generator=torch.Generator().manual_seed(0))
    graph = graph_of(nn.Linear(16, 8), (codes + 0.25) * STEP)
    assert largest_error(quantized(graph, factor=0.5, shift=4 * STEP), choice) <= INTEGER


def test_padding_is_added_after_the_shift() -> None:
    """OpenVINO pads an even kernel in a node of its own; its zeros must stay zeros."""
    codes = torch.randint(-60, 60, (2, 3, 6, 6), generator=torch.Generator().manual_seed(0))
    layer = nn.Conv2d(3, 4, (4, 2), padding="same")
    graph = graph_of(layer, (codes + 0.25) * STEP)
    assert largest_error(quantized(graph, shift=8 * STEP), LINEAR) <= INTEGER


def test_graphs_that_differ_in_formats_only_share_a_skeleton() -> None:
    graph = graph_of(Chain(nn.functional.gelu), random(2, 5, 16))
    integer = quantized(graph, factor=0.5, shift=STEP)
    first = skeleton_of(graph, split(graph.module))
    assert skeleton_of(integer, split(integer.module)) is first
    other = graph_of(Chain(torch.relu), random(2, 5, 16))
    assert skeleton_of(other, split(other.module)) is not first


def test_constants_of_the_graph_are_part_of_the_skeletons_key() -> None:
    class Offset(nn.Module):
        def __init__(self, value: float) -> None:
            super().__init__()
            self.register_buffer("offset", torch.full((3,), value))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.offset

    for value in (1.0, 2.0):
        graph = graph_of(Offset(value), random(2, 3))
        executable = OpenVINOBackend().build(graph, shapes_of(graph), LINEAR)
        found = executable.run(arrays_of(graph))["y0"]
        assert np.array_equal(found, (graph.example[0] + value).numpy())


def test_the_graph_is_not_edited() -> None:
    graph = quantized(graph_of(Chain(nn.functional.gelu), random(2, 5, 16)))
    code = graph.module.code
    weights = {k: v.clone() for k, v in graph.module.state_dict().items()}
    OpenVINOBackend().build(graph, shapes_of(graph), CONVOLUTION)
    assert graph.module.code == code
    assert all(torch.equal(v, weights[k]) for k, v in graph.module.state_dict().items())


def test_a_later_change_of_the_weights_does_not_reach_the_build() -> None:
    graph = graph_of(nn.Linear(64, 64), random(2, 64))
    executable = OpenVINOBackend().build(graph, shapes_of(graph), LINEAR)
    before = executable.run(arrays_of(graph))["y0"]
    with torch.no_grad():
        for node in graph.module.graph.nodes:
            if node.op == "get_attr":
                attribute(graph.module, str(node.target)).zero_()
    assert np.array_equal(executable.run(arrays_of(graph))["y0"], before)


def test_tied_weights_are_stored_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(500, 64)
            self.head = nn.Linear(64, 500, bias=False)
            self.head.weight = self.table.weight

        def forward(self, ids: Tensor) -> Tensor:
            out: Tensor = self.head(self.table(ids))
            return out

    graph = graph_of(Tied(), torch.arange(6).reshape(2, 3))
    sections = OpenVINOBackend().build(graph, shapes_of(graph), LINEAR).serialize()
    table = 500 * 64 * 4
    assert table <= len(sections["model.bin"]) < 1.1 * table


def test_the_probed_limit_is_exact_and_is_one_of_two() -> None:
    assert weight_limit() in (SAFE_LIMIT, FULL_LIMIT)
    info = OpenVINOBackend().describe().format("int8")
    if info is None:
        pytest.skip("no int8 on this device")
    assert info.weight_limit == weight_limit()
    assert bool(info.note) == (weight_limit() == SAFE_LIMIT)


def test_rounding_to_bfloat16_is_not_taken_for_saturation(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor with both gave results that were off in the third digit: codes had 7 bits for nothing."""
    from tersor.backends.openvino import probe
    from tersor.core.machine import describe_machine

    asked: list[dict[str, object]] = []
    real = probe.core()

    class Core:
        def compile_model(self, model: object, device: str, settings: dict[str, object]) -> object:
            asked.append(settings)
            return real.compile_model(model, device, settings)

    monkeypatch.setattr(probe, "core", Core)
    limit = weight_limit.__wrapped__()
    assert asked
    assert all(settings["INFERENCE_PRECISION_HINT"] == "f32" for settings in asked)
    if {"avx512_vnni", "avx_vnni", "amx_int8"} & set(describe_machine().features):
        assert limit == FULL_LIMIT


def test_profile_names_a_quantiser_that_stands_alone() -> None:
    graph = quantized(graph_of(nn.Linear(256, 64), random(8, 64, 256)))
    quantizer = next(
        n.name for n in graph.module.graph.nodes if "quantize_per_tensor.default" in str(n.target)
    )
    profile = OpenVINOBackend().build(graph, shapes_of(graph), LINEAR).profile()
    assert {"linear", quantizer} <= set(profile)
    assert all(value >= 0 for value in profile.values())


def test_an_int8_product_whose_bias_was_moved_keeps_its_name() -> None:
    """As in MiniLM in front of additions, where OpenVINO calls it after a multiplication of its own."""
    data = ov.opset13.parameter([2, 4], np.float32, name="x")
    codes = ov.opset13.constant(np.ones((3, 4), np.float32), name="linear_3/codes")
    product = ov.opset13.matmul(data, codes, transpose_a=False, transpose_b=True, name="Multiply_9")
    other = ov.opset13.relu(product, name="Relu_1")
    model = ov.Model([ov.opset13.result(other)], [data])

    class Compiled:
        def get_runtime_model(self) -> Any:
            return model

    names = executable._runtime_names(Compiled())
    assert names["Multiply_9"] == ("linear_3", True)
    assert names["Relu_1"] == ("Relu", False)


@pytest.mark.parametrize(
    ("totals", "wanted"),
    [
        ([9.0, 16.0, 23.0, 30.0], 1.0),
        ([90.0, 97.0, 104.0, 111.0], 1.0),  # slow cold runs
        ([9.0, 16.0, 58.0, 65.0], 1.0),  # interrupted in the second block
        ([9.0, 16.0, 23.01, 30.02], 21.02 / 21),  # within what the cut explains
        ([0.0, 0.0, 0.0, 0.0], 0.0),
        ([0.009, 0.0, 0.0, 0.0], 0.0),  # cut to nothing
    ],
)
def test_warm_time_of_a_node(totals: list[float], wanted: float) -> None:
    half = 0.0005 if wanted else 0.0  # of a microsecond: what a cut takes away on average
    assert executable._warm_ms(totals, [9, 16, 23, 30]) == pytest.approx(wanted + half, rel=1e-12)


@pytest.mark.parametrize(
    ("layers", "name"),
    [
        ("add/aten.add.Tensor/Add,linear_3/aten.linear.default/MatMul", "linear_3"),
        (
            "t/aten.permute.default/Transpose,sdpa/aten.scaled_dot_product_attention.default/S",
            "sdpa",
        ),
        ("v/aten.view.default/Reshape,add/aten.add.Tensor/Add", "add"),
        ("v/aten.view.default/Reshape", "v"),
        ("Multiply_12,conv2d/aten.convolution.default/Convolution", "conv2d"),
        ("q/quantized_decomposed.quantize_per_tensor.default/FakeQuantize", "q"),
        ("Constant_3,a/b/c", None),
        ("", None),
    ],
)
def test_names_of_fused_layers(layers: str, name: str | None) -> None:
    assert source_name(layers) == name


def test_conversion_errors_name_the_ops() -> None:
    text = (
        "-- No conversion rule found for operations: aten.foo.default, <built-in function getitem>\n"
        "-- Conversion is failed for: inlined.constant.default\n"
    )
    assert str(conversion_failed(RuntimeError(text))).startswith(
        "openvino: no conversion for aten.foo.default; wanted ops"
    )
    assert "something else" in str(conversion_failed(RuntimeError("something else")))


def test_shapes_that_the_graph_can_not_take() -> None:
    graph = graph_of(nn.Linear(16, 8), random(2, 16))
    (name,) = shapes_of(graph)
    with pytest.raises(ShapeError, match=r"can't take the shapes .*17.*wanted"):
        OpenVINOBackend().build(graph, {name: (1, 17)}, LINEAR)


def test_unknown_lowering() -> None:
    graph = graph_of(nn.Linear(16, 8), random(2, 16))
    choice = BuildChoice(backend="openvino", options={"int8_linear": "magic"})
    with pytest.raises(ConfigError, match=r"magic.*\['linear', 'convolution'\]"):
        OpenVINOBackend().build(graph, shapes_of(graph), choice)


def test_bf16_only_where_the_device_has_it() -> None:
    info = OpenVINOBackend().describe()
    graph = graph_of(nn.Linear(16, 8), random(2, 16))
    choice = BuildChoice(backend="openvino", precision="bf16")
    if "bf16" in info.precisions:
        assert largest_error(graph, choice) < 16 * 2.0**-8
    else:
        with pytest.raises(BackendError, match=r"bf16.*use f32"):
            OpenVINOBackend().build(graph, shapes_of(graph), choice)


def test_export_is_read_by_stock_openvino(tmp_path: Path) -> None:
    graph = quantized(graph_of(nn.Linear(16, 8), random(2, 16)))
    for choice in (LINEAR, CONVOLUTION):
        export_ir(graph, shapes_of(graph), choice, tmp_path / "model.xml")
        hint = {"INFERENCE_PRECISION_HINT": "f32"}  # else bf16, where the device has it
        model = ov.Core().compile_model(str(tmp_path / "model.xml"), "CPU", hint)
        found = model(arrays_of(graph))["y0"]
        own = OpenVINOBackend().build(graph, shapes_of(graph), choice).run(arrays_of(graph))["y0"]
        assert np.array_equal(found, own)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.bin", "model.xml"]


def test_export_errors(tmp_path: Path) -> None:
    graph = graph_of(nn.Linear(16, 8), random(2, 16))
    with pytest.raises(ConfigError, match=r"found suffix '\.onnx', wanted \.xml"):
        export_ir(graph, shapes_of(graph), LINEAR, tmp_path / "model.onnx")
    with pytest.raises(StoreError, match="cannot write"):
        export_ir(graph, shapes_of(graph), LINEAR, tmp_path / "absent" / "model.xml")
    assert not list(tmp_path.iterdir())


def test_open_shapes_are_refused_where_a_build_is_wanted() -> None:
    graph = graph_of(nn.Linear(16, 8), random(2, 16))
    with pytest.raises(ShapeError, match=r"open sizes.*model\.reshape"):
        executable_from_model(to_openvino_model(graph, {}, LINEAR), LINEAR)


class Tokens(nn.Module):
    """What transformers do with a length: products over tokens, heads, a mean over all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = x + self.b(nn.functional.gelu(self.a(x)))
        heads = h.reshape(h.shape[0], h.shape[1], 4, 4).transpose(1, 2)
        mixed = torch.softmax(heads @ heads.transpose(2, 3), -1) @ heads
        return self.c(mixed.transpose(1, 2).reshape(h.shape)), h.mean(1)


class Share(nn.Module):
    """[b, t, 16] -> [b, t, 8], scaled by a size over another number."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) * (x.shape[1] / 7)


def test_sizes_may_be_divided() -> None:
    """As detectors do that bring boxes back to the size of an image."""
    example = Samples(flatten_item(random(2, 9, 16), "x")[0], (random(2, 9, 16),))
    graph = capture(Share().eval(), example, {(0, 1)}).graph
    assert operator.truediv in {n.target for n in graph.module.graph.nodes}
    (name,) = (i.name for i in graph.signature.inputs)
    built = OpenVINOBackend().build(graph, {name: (2, OPEN, 16)}, LINEAR)
    for length in (2, 9, 31):
        x = random(2, length, 16, seed=length)
        (right,) = graph.run([x])
        (found,) = built.run({name: x.numpy()}).values()
        assert torch.allclose(torch.from_numpy(found), right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("choice", [LINEAR, CONVOLUTION])
def test_one_build_for_every_length(choice: BuildChoice) -> None:
    model = Tokens().eval()
    example = Samples(flatten_item(random(2, 9, 16), "x")[0], (random(2, 9, 16),))
    captured = capture(model, example, {(0, 1)}).graph
    x_spec = captured.signature.inputs[0]
    assert x_spec.symbol(1)
    # Squared errors: float32 sums in another order, and codes that fall to the other side.
    for graph, limit in ((captured, 1e-9), (quantized(captured), 1e-2)):
        built = OpenVINOBackend().build(graph, {x_spec.name: (2, OPEN, 16)}, choice)
        assert built.is_dynamic
        with pytest.raises(DataError, match="run the model once"):
            built.profile()
        again = OpenVINOBackend().load(built.serialize(), choice)
        for length in (2, 9, 30):
            x = random(2, length, 16, seed=length)
            wanted = graph.run([x])
            found = built.run({x_spec.name: x.numpy()})
            for out, right in zip(graph.signature.outputs, wanted, strict=True):
                assert found[out.name].shape == tuple(right.shape)
                gap = torch.from_numpy(found[out.name]) - right
                assert float(gap.square().mean() / right.square().mean()) <= limit
                assert np.array_equal(
                    again.run({x_spec.name: x.numpy()})[out.name], found[out.name]
                )
        profile = built.profile()
        assert sum(profile.values()) > 0
        with pytest.raises(ShapeError, match=r"found shape \(3, 9, 16\), wanted \(2, -1, 16\)"):
            built.run({x_spec.name: random(3, 9, 16).numpy()})


def broken(sections: Mapping[str, bytes]) -> dict[str, dict[str, bytes]]:
    return {
        "missing": {"model.xml": sections["model.xml"]},
        "truncated xml": {**sections, "model.xml": sections["model.xml"][:200]},
        "truncated constants": {**sections, "model.bin": sections["model.bin"][:16]},
    }


@pytest.mark.parametrize("damage", ["missing", "truncated xml", "truncated constants"])
def test_damaged_sections(damage: str) -> None:
    graph = graph_of(nn.Linear(16, 8), random(2, 16))
    sections = OpenVINOBackend().build(graph, shapes_of(graph), LINEAR).serialize()
    with pytest.raises(ArtifactError, match=r"model\.(xml|bin).*write the artifact again"):
        OpenVINOBackend().load(broken(sections)[damage], LINEAR)


def test_segments_cover_the_constants() -> None:
    graph = quantized(graph_of(nn.Linear(16, 8), random(2, 16)))
    sections = OpenVINOBackend().build(graph, shapes_of(graph), LINEAR).serialize()
    segments = json.loads(sections["segments.json"])
    ends = [0, *(offset + size for offset, size in segments)]
    assert all(offset >= end for (offset, _), end in zip(segments, ends, strict=False))
    assert ends[-1] == len(sections["model.bin"])
    codes = next(v for k, v in graph.module.state_dict().items() if k.endswith("codes"))
    pieces = [sections["model.bin"][o : o + s] for o, s in segments]
    assert codes.numpy().tobytes() in pieces


class Steps(nn.Module):
    """Two products that no compiler fuses with anything, behind one that can be taken out."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(64, 64) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x).cumsum(1)).cumsum(1))


def test_names_survive_a_node_that_is_gone() -> None:
    """Exporting again counts the ops anew: the second one must not get the first one's name."""
    graph = graph_of(Steps(), random(4, 64))
    fresh, tensors = copy_graph(graph.module)
    products = [n for n in fresh.nodes if n.target is torch.ops.aten.linear.default]
    products[0].replace_all_uses_with(products[0].args[0])
    fresh.erase_node(products[0])
    small = Graph(rebuild(fresh, tensors), graph.signature, graph.example)
    names = {op.node.name for op in weighted_ops(small.module)}
    assert names == {n.name for n in products[1:]}
    build = OpenVINOBackend().build(small, shapes_of(small), BuildChoice(backend="openvino"))
    build.run(arrays_of(small))
    found = set(build.profile())  # what takes less than a microsecond is not in it
    assert found & names
    assert products[0].name not in found


class Pooled(nn.Module):
    """A stem with a pool whose result a convolution and a residual addition read."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.a, self.b = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.max_pool2d(self.stem(x).relu(), 2)
        return self.b(self.a(y).relu()) + y


def integers(graph: Graph, *, additions: bool) -> Graph:
    """All layers in int8, and perhaps the additions."""
    grid = Quantizer(step=0.02, low=0, high=255)
    changes = []
    for site in find_sites(graph):
        weight = attribute(graph.module, site.weight).detach()
        step = weight.abs().flatten(1).amax(1) / 63
        codes = (weight / step.reshape(-1, 1, 1, 1)).round().to(torch.int8)
        changes.append(SiteChange(site=site, level="int8", codes=codes, scale=step, quantizer=grid))
    for site in addition_sites(graph, find_sites(graph)) if additions else ():
        node = next(n for n in graph.module.graph.nodes if n.name == site.ops[0])
        operands = {a.name: grid for a in node.all_input_nodes}
        changes.append(SiteChange(site=site, level="int8", operands=operands))
    return apply(graph, changes)


def test_a_pool_whose_readers_are_integers_is_one_of_integers() -> None:
    plain = graph_of(Pooled(), random(4, 3, 8, 8))
    for additions in (True, False):
        graph = integers(plain, additions=additions)
        model = to_openvino_model(graph, shapes_of(graph), BuildChoice(backend="openvino"))
        (pool,) = [n for n in model.get_ops() if n.get_type_name() == "MaxPool"]
        before = pool.input_value(0).get_node().get_type_name()
        assert (before == "FakeQuantize") == additions  # else a float addition reads it, too
        rounded = [n for n in model.get_ops() if n.get_type_name() == "FakeQuantize"]
        names = [n.get_friendly_name().partition("/")[0] for n in rounded]
        assert len(names) == len(set(names))  # one a tensor, whoever reads it


class Padded(nn.Module):
    """Padding of its own in front of a convolution, more at the end than at the beginning."""

    def __init__(self, value: float = 0.0) -> None:
        super().__init__()
        self.value = value
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.each = nn.Conv2d(16, 16, 3, stride=2, groups=16)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x).clamp(0.0, 6.0)
        return self.each(nn.functional.pad(y, (0, 1, 0, 1), value=self.value))


def test_zero_padding_is_rounded_before_and_becomes_the_convolutions_own() -> None:
    x = random(4, 3, 8, 8)
    graph = integers(graph_of(Padded(), x), additions=False)
    choice = BuildChoice(backend="openvino")
    model = to_openvino_model(graph, shapes_of(graph), choice)
    (pad,) = [n for n in model.get_ops() if n.get_type_name() == "Pad"]
    assert pad.input_value(0).get_node().get_type_name() == "FakeQuantize"
    built = executable_from_model(model, choice)
    (wanted,) = graph.run([x])
    names = [spec.name for spec in graph.signature.inputs]
    found = built.run({names[0]: x.numpy()})[graph.signature.outputs[0].name]
    # A value at a rounding's tie may fall on the other side: one step of 0.02 times a weight.
    assert float((torch.from_numpy(found) - wanted).abs().max()) <= 0.02 * float(wanted.abs().max())
    assert not any(name.startswith("pad") for name, ms in built.profile().items() if ms > 0)


def test_padding_with_something_else_stays_in_front_of_its_rounding() -> None:
    graph = integers(graph_of(Padded(1.5), random(4, 3, 8, 8)), additions=False)
    model = to_openvino_model(graph, shapes_of(graph), BuildChoice(backend="openvino"))
    (pad,) = [n for n in model.get_ops() if n.get_type_name() == "Pad"]
    assert pad.input_value(0).get_node().get_type_name() != "FakeQuantize"


def test_additions_share_the_skeleton_of_the_float_graph() -> None:
    """Else pricing would convert the model again for every combination."""
    plain = graph_of(Pooled(), random(4, 3, 8, 8))
    keys = {
        fingerprint(graph, split(graph.module))
        for graph in (plain, integers(plain, additions=False), integers(plain, additions=True))
    }
    assert len(keys) == 1


def test_a_pool_whose_places_are_read_stays_where_it_is() -> None:
    """Rounded values tie where others do not: the places would be those of other values."""

    class Places(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y, places = nn.functional.max_pool2d(self.a(x).relu(), 2, return_indices=True)
            return self.b(y), places

    graph = integers(graph_of(Places(), random(4, 3, 8, 8)), additions=False)
    model = to_openvino_model(graph, shapes_of(graph), BuildChoice(backend="openvino"))
    (pool,) = [n for n in model.get_ops() if n.get_type_name() == "MaxPool"]
    assert pool.input_value(0).get_node().get_type_name() != "FakeQuantize"


def test_a_node_under_a_microsecond_keeps_its_place_in_the_profile() -> None:
    """OpenVINO says of it that it was not run."""
    from datetime import timedelta
    from types import SimpleNamespace

    from tersor.backends.openvino.executable import _node_totals

    status = SimpleNamespace(EXECUTED=1, NOT_RUN=0)
    rows = [
        SimpleNamespace(
            node_name="a", real_time=timedelta(microseconds=3), status=1, Status=status
        ),
        SimpleNamespace(node_name="b", real_time=timedelta(0), status=0, Status=status),
    ]
    request = SimpleNamespace(infer=lambda *_, **__: None, get_profiling_info=lambda: rows)
    _, totals = _node_totals(request, [{}], 2, 10)
    assert totals == {"a": pytest.approx(0.03), "b": 0.0}
