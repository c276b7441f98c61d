"""Inductor: convolutions on codes, what a call of one takes in, and what stays in floats."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tersor.backends.inductor import InductorBackend
from tersor.backends.inductor.executable import InductorExecutable, load
from tersor.backends.inductor.lowering import lower
from tersor.backends.inductor.lowering_conv import filled, floats_from, pooled_codes
from tersor.backends.inductor.trust import BuildCache
from tersor.backends.inductor.work import Form
from tersor.build.build import parity
from tersor.core.records import BuildChoice, Candidate, Site
from tersor.graph.apply import apply
from tersor.graph.contracts import Graph, Quantizer, SiteChange
from tersor.graph.edit import attribute, run_all
from tersor.graph.operators import weighted_ops
from tersor.graph.shapes import input_shapes
from tersor.kernels.conv8 import conv8
from tersor.kernels.linear8 import linear8, quantize_codes
from tests.conformance.test_backends import graph_of, named, random, seeded

# Scales and offsets are put together in another order than the graph's: a value on the border between two
# codes may fall to the other side, here at most one in a hundred, each worth a step of 1 / 255.
CODES = 1e-4
aten = torch.ops.aten


class Residual(nn.Module):
    """What ResNets are made of: stem and pool, a block that halves the image, one that keeps it, a head."""

    def __init__(self, wide: int = 16) -> None:
        super().__init__()

        def conv(inp: int, out: int, kernel: int, stride: int = 1) -> nn.Sequential:
            return nn.Sequential(
                nn.Conv2d(inp, out, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(out)
            )

        self.stem = conv(3, wide, 7, 2)
        self.first, self.second = conv(wide, wide, 3, 2), conv(wide, wide, 1)
        self.short = conv(wide, wide, 1, 2)
        self.third, self.fourth = conv(wide, wide, 3), conv(wide, wide, 3)
        self.head = nn.Linear(wide, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.max_pool2d(torch.relu(self.stem(x)), 3, 2, 1)
        x = torch.relu(self.second(torch.relu(self.first(x))) + self.short(x))
        x = torch.relu(self.fourth(torch.relu(self.third(x))) + x)
        y: Tensor = self.head(nn.functional.adaptive_avg_pool2d(x, 1).flatten(1))
        return y


def grid_of(values: Tensor) -> Quantizer:
    largest = float(values.abs().max())
    if float(values.min()) >= 0:
        return Quantizer(step=largest / 255, low=0, high=255)
    return Quantizer(step=largest / 127, low=-128, high=127)


def in_codes(graph: Graph, *, additions: bool = True) -> Graph:
    """Everything on grids of what the example has; zero points that are not 0 behind ReLUs."""
    seen = run_all(graph.module, graph.example)
    grids: dict[str, Quantizer] = {}

    def grid(name: str) -> Quantizer:
        return grids.setdefault(name, grid_of(seen[name]))

    changes = []
    for op in weighted_ops(graph.module):
        weight = attribute(graph.module, str(op.weight.target)).detach()
        scale = weight.abs().flatten(1).amax(1) / 127
        codes = (weight / scale.reshape(-1, *[1] * (weight.dim() - 1))).round().to(torch.int8)
        site = Site(
            name=op.node.name, kind="format", ops=(op.node.name,), op_kind=op.kind,  # type: ignore[arg-type]
            weight=str(op.weight.target), shape=tuple(weight.shape),
        )  # fmt: skip
        quantizer = grid(op.data.name)
        changes.append(
            SiteChange(site=site, level="int8", codes=codes, scale=scale, quantizer=quantizer)
        )
    for node in graph.module.graph.nodes:
        if additions and node.target is aten.add.Tensor:
            site = Site(name=f"add:{node.name}", kind="format", ops=(node.name,), op_kind="add")
            operands = {a.name: grid(a.name) for a in node.args}
            changes.append(SiteChange(site=site, level="int8", operands=operands))
    return apply(graph, changes)


def targets(graph: Graph, **form: Any) -> tuple[list[Any], list[Any]]:
    """What a graph's calls are, and its convolutions of codes."""
    nodes = list(lower(graph, Form(**form)).module.graph.nodes)
    return [n.target for n in nodes], [n for n in nodes if n.target is conv8]


def quantisers(graph: Graph) -> list[Any]:
    return [n for n in graph.module.graph.nodes if "quantize_per_tensor" in str(n.target)][::2]


@pytest.fixture(scope="module")
def residual() -> tuple[Graph, tuple[Tensor, ...]]:
    inputs = (random(4, 3, 32, 32),)
    return graph_of(seeded(Residual()), *inputs), inputs


def built(graph: Graph, cache: Path, precision: Any = "f32", **options: Any) -> InductorExecutable:
    choice = BuildChoice(backend="inductor", precision=precision, batch=4, options=options)
    return InductorExecutable(
        graph, input_shapes(graph.signature, 4), choice, cache=BuildCache(cache)
    )


def test_a_lowering_of_known_sizes_is_the_same(
    residual: tuple[Graph, tuple[Tensor, ...]],
) -> None:
    graph = in_codes(residual[0])
    once = lower(graph, Form())
    assert once.sizes
    for node in graph.module.graph.nodes:
        node.meta.pop("val", None)
    again = lower(graph, Form(), once.sizes)
    assert not any("val" in n.meta for n in graph.module.graph.nodes)  # nothing was asked for
    assert str(again.module.graph) == str(once.module.graph)
    assert again.sizes == once.sizes
    without = lower(graph, Form(), {"other": ("1",)})
    assert str(without.module.graph) != str(once.module.graph)  # they make a difference


def test_a_network_stays_in_codes(residual: tuple[Graph, tuple[Tensor, ...]]) -> None:
    graph = in_codes(residual[0])
    calls, convs = targets(graph)
    assert len(convs) == 6
    assert calls.count(linear8) == 1
    assert calls.count(pooled_codes) == 1
    assert calls.count(filled) == 1  # three channels to four
    assert calls.count(quantize_codes) == 2  # of the image, and in front of the head
    for gone in (floats_from, aten.conv2d.default, aten.relu.default, aten.add.Tensor):
        assert gone not in calls
    assert [c.args[6] for c in convs] == [torch.int8] * 5 + [torch.float32]
    added = [c for c in convs if len(c.args) > 9 and c.args[9] is not None]
    assert [c.args[9].target for c in added] == [conv8, conv8]
    assert all(c.args[12] is not None for c in added)  # the own grid of what is added to
    assert convs[-1].args[7:9] == (0.0, math.inf)
    wanted, found = graph.run(residual[1])[0], lower(graph, Form()).module(*residual[1])[0]
    assert float((found - wanted).abs().max()) <= 0.01 * float(wanted.abs().max())


def test_additions_in_floats(residual: tuple[Graph, tuple[Tensor, ...]]) -> None:
    graph = in_codes(residual[0], additions=False)
    calls, convs = targets(graph)
    assert len(convs) == 6
    assert (
        calls.count(quantize_codes) == 3
    )  # behind the first addition, whose floats the second reads
    assert aten.add.Tensor not in calls
    assert [c.args[6] for c in convs].count(torch.int8) == 3
    wanted, found = graph.run(residual[1])[0], lower(graph, Form()).module(*residual[1])[0]
    assert float((found - wanted).abs().max()) <= 0.01 * float(wanted.abs().max())
    assert conv8 not in targets(graph, integers=False)[0]


class Others(nn.Module):
    """What the kernel does not do, and bounds that are not a ReLU's."""

    def __init__(self) -> None:
        super().__init__()
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.dilated = nn.Conv2d(8, 8, 3, padding=2, dilation=2)
        self.long = nn.Conv1d(64, 8, 3)
        self.wide = nn.Conv2d(8, 8, 1, padding=1)
        self.same = nn.Conv2d(8, 20, (1, 5), padding="same")
        self.last = nn.Conv2d(20, 4, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.wide(self.dilated(self.grouped(x)))
        z = nn.functional.relu6(self.same(x) * 50)
        return (
            y,
            self.long(x.flatten(2).transpose(1, 2)),
            self.last(nn.functional.hardtanh(z, 0.5, 4.0)),
        )


def test_what_stays_in_floats() -> None:
    inputs = (random(4, 8, 8, 8),)
    graph = in_codes(graph_of(seeded(Others()), *inputs))
    calls, convs = targets(graph)
    assert len(convs) == 2
    assert calls.count(aten.conv2d.default) == 3
    assert calls.count(aten.conv1d.default) == 1
    lowered = lower(graph, Form()).module
    for wanted, found in zip(graph.run(inputs), lowered(*inputs), strict=True):
        assert float((found - wanted).abs().max()) <= 0.01 * float(wanted.abs().max())


class Bounded(nn.Module):
    """Bounds of bounds between two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(8, 20, 3), nn.Conv2d(20, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(nn.functional.hardtanh(nn.functional.relu6(self.first(x)), 0.25, 4))
        return y


def test_bounds_are_codes() -> None:
    inputs = (random(4, 8, 8, 8) * 8,)
    graph = in_codes(graph_of(seeded(Bounded()), *inputs))
    _, (first, second) = targets(graph)
    assert second.args[0] is first
    low, high = first.args[7:9]
    step = quantisers(graph)[-1].args[1]
    assert low == round(0.25 / step) - 128
    assert high == min(127, round(4 / step) - 128)
    wanted, found = graph.run(inputs)[0], lower(graph, Form()).module(*inputs)[0]
    assert float((found - wanted).abs().max()) <= 0.01 * float(wanted.abs().max())


class Pair(nn.Module):
    """Two convolutions with a bound between them."""

    def __init__(self, bound: str) -> None:
        super().__init__()
        self.first, self.second, self.bound = nn.Conv2d(8, 20, 3), nn.Conv2d(20, 4, 3), bound

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(getattr(nn.functional, self.bound)(self.first(x)))
        return y


@pytest.mark.parametrize(("bound", "is_fused"), [("relu", True), ("hardtanh", False)])
def test_factors_of_channels(bound: str, is_fused: bool) -> None:
    """A quantiser that scales every channel by a number of its own: no bound but 0 goes with it."""
    inputs = (random(4, 8, 8, 8),)
    plain = graph_of(seeded(Pair(bound)), *inputs)
    factor = torch.rand(20, generator=torch.Generator().manual_seed(0)) + 0.5
    changes = []
    for op, quantizer in zip(
        weighted_ops(plain.module),
        (
            Quantizer(step=0.03, low=-128, high=127),
            Quantizer(step=0.05, low=-128, high=127, inverse_scale=factor, channel_dim=1),
        ),
        strict=True,
    ):
        weight = attribute(plain.module, str(op.weight.target)).detach()
        if quantizer.inverse_scale is not None:
            weight = weight / factor.reshape(1, -1, 1, 1)
        scale = weight.abs().flatten(1).amax(1) / 127
        site = Site(
            name=op.node.name, kind="format", ops=(op.node.name,), op_kind="conv",
            weight=str(op.weight.target), shape=tuple(weight.shape),
        )  # fmt: skip
        codes = (weight / scale.reshape(-1, 1, 1, 1)).round().to(torch.int8)
        changes.append(
            SiteChange(site=site, level="int8", codes=codes, scale=scale, quantizer=quantizer)
        )
    graph = apply(plain, changes)
    calls, convs = targets(graph)
    assert len(convs) == 2
    assert (aten.mul.Tensor in calls) != is_fused
    wanted, found = graph.run(inputs)[0], lower(graph, Form()).module(*inputs)[0]
    assert float((found - wanted).abs().max()) <= 0.01 * float(wanted.abs().max())


def test_pools_of_codes() -> None:
    codes = torch.randint(-128, 128, (2, 5, 9, 8), generator=torch.Generator().manual_seed(0))
    for kernel, stride, padding in (([3, 3], [2, 2], [1, 1]), ([2, 3], [2, 1], [0, 1])):
        wanted = nn.functional.max_pool2d(codes.float(), kernel, stride, padding)
        found = pooled_codes(codes.to(torch.int8), kernel, stride, padding)
        assert torch.equal(found.float(), wanted)


@pytest.mark.parametrize(("half", "limit"), [("", CODES), ("float16", 5 * CODES)])
def test_builds(
    residual: tuple[Graph, tuple[Tensor, ...]], tmp_path: Path, half: str, limit: float
) -> None:
    options = {"half": half, "layout": "channels_last"} if half else {}
    made = built(in_codes(residual[0]), tmp_path, "bf16" if half else "f32", **options)
    assert parity(in_codes(residual[0]), made, 4, residual[1]) <= limit


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_compiled_builds(residual: tuple[Graph, tuple[Tensor, ...]], tmp_path: Path) -> None:
    graph = in_codes(residual[0])
    made = built(graph, tmp_path, mode="compile")
    assert parity(graph, made, 4, residual[1]) <= CODES
    assert made.profile()["conv2d"] > 0
    package = built(graph, tmp_path, mode="package")
    wanted = package.run(named(graph, residual[1]))
    loaded = load(package.serialize(), package._choice, BuildCache(tmp_path))
    assert loaded.native.used
    found = loaded.run(named(graph, residual[1]))
    assert all(np.array_equal(found[k], wanted[k]) for k in wanted)


def test_additions_of_codes_are_for_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(InductorBackend, "_problem", lambda *_: ("", ""))
    monkeypatch.setattr(InductorBackend, "_float8", lambda *_: ())
    candidate = Candidate(site="add:add", level="int8", method="quantize", size_bytes=0)
    assert not InductorBackend("cpu").supports(candidate).ok
    assert InductorBackend("cuda").supports(candidate).ok
