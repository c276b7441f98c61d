"""Inductor: what a driver may say, packages from elsewhere, lowering, compiled builds on the CPU."""

import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tersor.api.session import pick_backends
from tersor.backends.inductor import InductorBackend, compiling, executable, host
from tersor.backends.inductor.executable import InductorExecutable, RefusedNativeWarning, load
from tersor.backends.inductor.host import Host, check_device, mismatch, problem, read_host
from tersor.backends.inductor.lowering import lower
from tersor.backends.inductor.options import float_choices, read_options
from tersor.backends.inductor.profiling import Launch, attributed, launches, traced_names, with_rest
from tersor.backends.inductor.sections import Native, read
from tersor.backends.inductor.trust import BuildCache
from tersor.backends.inductor.work import Form
from tersor.build.build import parity
from tersor.core.errors import ArtifactError, BackendError, ConfigError
from tersor.core.records import BuildChoice, Precision
from tersor.core.registry import backend
from tersor.graph.contracts import Graph
from tersor.graph.shapes import input_shapes
from tersor.kernels.linear8 import linear8, quantize_codes
from tests.conformance.test_backends import (
    Block,
    Chain,
    compressed,
    graph_of,
    named,
    random,
    seeded,
)

# Of a bfloat16: 2**-9 an op, squared, about ten ops in a row.
HALF = 1e-4


class Fake(host.Driver):
    """A driver that says what a test wants."""

    def __init__(self, build: str = "13.0", devices: int = 1, version: int = 13000) -> None:
        self.build, self.count, self.known = build, devices, version

    def cuda_build(self) -> str:
        return self.build

    def devices(self) -> int:
        return self.count

    def version(self) -> int:
        return self.known

    def capability(self, index: int) -> tuple[int, int]:
        del index
        return (9, 0)

    def name(self, index: int) -> str:
        return f"card {index}"


@pytest.fixture(scope="module")
def block() -> tuple[Graph, tuple[torch.Tensor, ...]]:
    inputs = (random(4, 7, 16),)
    return graph_of(seeded(Block()), *inputs), inputs


def built(
    graph: Graph, cache: Path, precision: Precision = "f32", **options: str | bool
) -> InductorExecutable:
    choice = BuildChoice(backend="inductor", precision=precision, batch=4, options=options)
    shapes = input_shapes(graph.signature, 4)
    return InductorExecutable(graph, shapes, choice, cache=BuildCache(cache))


@pytest.mark.parametrize(
    ("driver", "device", "said"),
    [
        (Fake(build=""), "cuda", "CPU build"),
        (Fake(devices=0, version=0), "cuda", "no CUDA driver"),
        (Fake(devices=0, version=12040), "cuda", "knows CUDA 12.4, torch is built for CUDA 13.0"),
        (Fake(devices=0), "cuda", "no usable device"),
        (Fake(devices=2), "cuda:2", r"found 2 CUDA device\(s\), wanted number 2"),
    ],
)
def test_says_why_a_device_is_not_there(driver: Fake, device: str, said: str) -> None:
    with pytest.raises(BackendError, match=said):
        check_device(device, driver)


def test_devices_that_are_there() -> None:
    assert problem("cpu", Fake(build="")) == ("", "")
    assert problem("cuda:1", Fake(devices=2)) == ("", "")
    assert read_host("cuda", Fake()).capability == "9.0"
    assert host.facts("cuda", Fake())["driver"] == "13.0"
    with pytest.raises(ConfigError, match="abacus"):
        check_device("abacus")


CARD = Host(device="cuda", torch="2.11.0", machine="x86_64", capability="9.0", driver="13.0")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, ""),
        ({"driver": "13.1"}, ""),
        ({"driver": "12.8"}, "found driver for CUDA 12.8, wanted at least 13.0"),
        ({"capability": "8.0"}, "found capability 8.0, wanted 9.0"),
        ({"torch": "2.13.0"}, "found torch 2.13.0, wanted 2.11.0"),
        ({"device": "cpu", "capability": ""}, "found capability none, wanted 9.0"),
    ],
)
def test_hosts_that_a_package_runs_on(change: dict[str, str], said: str) -> None:
    found = mismatch(replace(CARD, **change), CARD)
    assert said in found
    assert bool(said) == bool(found)


def test_native_code_from_elsewhere_is_not_loaded(
    block: tuple[Graph, tuple[torch.Tensor, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph, inputs = block
    plain = built(graph, tmp_path)
    monkeypatch.setattr(executable, "open_package", lambda *_: pytest.fail("ran foreign code"))
    here = read_host("cpu")
    for wanted, said in ((here, "build cache"), (replace(here, torch="1.0"), "wanted 1.0")):
        native = Native(package=b"code", host=wanted)
        sections = executable.written(graph, input_shapes(graph.signature, 4), native)
        with pytest.warns(RefusedNativeWarning, match=said):
            loaded = load(sections, plain._choice, BuildCache(tmp_path))
        assert said in loaded.native.reason
        assert not loaded.native.used
        found, made = (e.run(named(graph, inputs)) for e in (loaded, plain))
        assert all(np.array_equal(found[name], made[name]) for name in made)


@pytest.mark.parametrize("name", ["graph.json", "tensors.json", "model.bin"])
def test_damaged_sections(
    block: tuple[Graph, tuple[torch.Tensor, ...]], tmp_path: Path, name: str
) -> None:
    made = built(block[0], tmp_path)
    sections = made.serialize()
    for broken in ({k: v for k, v in sections.items() if k != name}, {**sections, name: b"[]"}):
        with pytest.raises(ArtifactError):
            load(broken, made._choice, BuildCache(tmp_path))


def test_chains_of_codes(block: tuple[Graph, tuple[torch.Tensor, ...]]) -> None:
    graph = compressed(block[0], "int8", 127)
    lowered = lower(graph, Form())
    targets = [n.target for n in lowered.module.graph.nodes]
    assert targets.count(linear8) == 2
    assert targets.count(quantize_codes) == 1
    first, second = (n for n in lowered.module.graph.nodes if n.target is linear8)
    assert first.args[4:6] == (torch.int8, "gelu")
    assert second.args[0] is first
    assert lowered.sources[first.name] == "linear"
    assert lowered.sources[second.name] == "linear_1"
    plain = lower(graph, Form(integers=False))
    assert linear8 not in [n.target for n in plain.module.graph.nodes]


class Reads(nn.Module):
    """Three linears that read one tensor, and one whose weight another op reads as well."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(16, 8), nn.Linear(16, 8, bias=False), nn.Linear(16, 12)
        self.tied = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        parts = [t.view(t.shape[0], t.shape[1], 4, -1) for t in (q, k, v)]
        return (
            torch.cat([*parts, self.tied(x).unsqueeze(2).expand(-1, -1, 4, -1)], -1)
            + (self.tied.weight * x.mean((1, 2), keepdim=True)).sum((1, 2))[:, None, None, None]
        )


@pytest.mark.parametrize(
    ("level", "target"), [("f32", torch.ops.aten.linear.default), ("int8", linear8)]
)
def test_linears_that_read_one_tensor_are_one_product(level: str, target: Any) -> None:
    inputs = (random(4, 7, 16),)
    graph = graph_of(seeded(Reads()), *inputs)
    graph = compressed(graph, "int8", 127) if level == "int8" else graph
    apart, joined = (lower(graph, Form(joins=joins)).module for joins in (False, True))
    count = [[n.target for n in m.graph.nodes].count(target) for m in (apart, joined)]
    assert count == ([4, 2] if level == "f32" else [4, 1])
    wanted, found = (m(*inputs)[0] for m in (apart, joined))
    assert torch.allclose(found, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("half", ["bfloat16", "float16"])
@pytest.mark.parametrize("level", ["f32", "int8"])
def test_sixteen_bit_floats(half: str, level: str, tmp_path: Path) -> None:
    inputs = (random(4, 3, 12, 12),)
    graph = graph_of(seeded(Chain()), *inputs)
    if level == "int8":
        graph = compressed(graph, level, 127)
    for layout in ("contiguous", "channels_last"):
        made = built(graph, tmp_path, "bf16", half=half, layout=layout)
        assert parity(graph, made, 4, inputs) <= HALF * (10 if level == "int8" else 1)


def test_huge_constants_stay_finite_in_sixteen_bits(tmp_path: Path) -> None:
    class Masked(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.softmax(x.masked_fill(x < 0, torch.finfo(torch.float32).min), -1)

    inputs = (random(4, 9),)
    graph = graph_of(Masked(), *inputs)
    made = built(graph, tmp_path, "bf16", half="float16")
    assert parity(graph, made, 4, inputs) <= HALF


def test_layout_without_images_is_no_build(
    block: tuple[Graph, tuple[torch.Tensor, ...]], tmp_path: Path
) -> None:
    with pytest.raises(BackendError, match="no 2d convolutions"):
        built(block[0], tmp_path, layout="channels_last")


def test_options_of_a_gpu_are_refused_on_a_cpu() -> None:
    with pytest.raises(ConfigError, match="CUDA"):
        read_options(BuildChoice(backend="inductor", options={"graph": True}))
    ways = float_choices("cuda", can_compile=True)
    assert len({str(w) for w in ways}) == len(ways)
    for way in ways:
        read_options(
            BuildChoice(
                backend="inductor", device="cuda", precision=way.precision, options=way.options
            )
        )
    assert {w.options["mode"] for w in float_choices("cpu", can_compile=False)} == {"eager"}


def test_only_its_name_brings_it_to_a_cpu() -> None:
    backends, _ = pick_backends("auto", "cpu")
    assert "inductor" not in backends
    assert list(pick_backends("inductor", "cpu")[0]) == ["inductor"]
    assert backend("inductor", "cuda:1").describe().device == "cuda:1"


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_describes_why_there_is_no_gpu() -> None:
    info = InductorBackend("cuda").describe()
    assert not info.available
    assert info.reason
    assert info.remedy
    with pytest.raises(BackendError, match="no backend runs on device 'cuda'"):
        pick_backends("auto", "cuda")


PROGRAM = """
def helper():
    # Topologically Sorted Source Nodes: [no], Original ATen: [aten.mm]
    extern_kernels.mm(a)
class Runner:
    def call(self, args):
        # Topologically Sorted Source Nodes: [linear], Original ATen: [aten.addmm]
        extern_kernels.addmm(arg2_1, buf1)
        # Topologically Sorted Source Nodes: [gelu, layer_norm], Original ATen: [aten.gelu]
        triton_per_fused_gelu_0.run(buf0, stream=s)
        # Topologically Sorted Source Nodes: [linear_1], Original ATen: [aten.addmm]
        extern_kernels.addmm(arg2_1, buf3)
        # Topologically Sorted Source Nodes: [att], Original ATen: [aten.attention]
        buf9 = torch.ops.aten._attention.default(buf5)
"""


def test_launches_of_a_program_and_who_they_are_of() -> None:
    order = launches(PROGRAM)
    assert order == [
        Launch("aten::addmm", "linear"),
        Launch("triton_per_fused_gelu_0", "layer_norm"),
        Launch("aten::addmm", "linear_1"),
        Launch("aten::_attention", "att"),
    ]
    call = [
        ("aten::addmm", 5.0), ("other", 9.0), ("triton_per_fused_gelu_0", 1.0), ("aten::addmm", 7.0),
    ]  # fmt: skip
    found = attributed(order, call * 2)
    assert found == {"linear": 10.0, "linear_1": 14.0, "layer_norm": 2.0}
    assert with_rest(found, 30.0)["other kernels"] == 4.0


def test_names_of_the_compilers_graph(block: tuple[Graph, tuple[torch.Tensor, ...]]) -> None:
    lowered = lower(compressed(block[0], "int8", 127), Form())
    traced = [
        ("mul", "<built-in function mul>"), ("round_1", "<built-in method round of type object>"),
        ("p", "tersor.linear8.default"), ("q", "tersor.linear8.default"), ("s", "aten.add.Tensor"),
    ]  # fmt: skip
    names = traced_names(lowered.module, traced)
    assert [lowered.sources.get(names[n], names[n]) for n in ("p", "q")] == ["linear", "linear_1"]
    assert names["s"] == "add"


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_compiled_builds(
    block: tuple[Graph, tuple[torch.Tensor, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One program just in time, one package and what a file brings back of it."""
    graph, inputs = block
    made = built(graph, tmp_path, mode="compile")
    assert parity(graph, made, 4, inputs) <= 1e-10
    assert made.profile()["linear"] > 0
    package = built(compressed(graph, "int8", 127), tmp_path, mode="package")
    wanted = package.run(named(graph, inputs))
    sections = package.serialize()
    monkeypatch.setattr("torch._inductor.cpu_vec_isa.pick_vec_isa", probed)
    loaded = load(sections, package._choice, BuildCache(tmp_path))
    assert loaded.native.used
    found = loaded.run(named(graph, inputs))
    assert all(np.array_equal(found[k], wanted[k]) for k in wanted)
    given = tmp_path / "given.pkl"
    given.write_bytes(pickle.dumps((sections, package._choice, named(graph, inputs))))
    ran = subprocess.run(
        [sys.executable, "-c", FRESH, str(given), str(tmp_path)],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-2000:]
    answered = dict(np.load(given.with_suffix(".npz")))
    assert all(np.array_equal(answered[k], wanted[k]) for k in wanted)


# A process of its own that loads a file and answers: no compiler is imported, which takes seconds.
FRESH = """
import pickle, sys
from pathlib import Path
import numpy, torch
from tersor.backends.inductor.executable import load
from tersor.backends.inductor.trust import BuildCache
sections, choice, inputs = pickle.loads(Path(sys.argv[1]).read_bytes())
loaded = load(sections, choice, BuildCache(Path(sys.argv[2])))
assert loaded.native.used, loaded.native
found = loaded.run(inputs)
assert not {"torch._dynamo", "torch._inductor", "triton", "sympy"} & set(sys.modules)
numpy.savez(Path(sys.argv[1]).with_suffix(".npz"), **found)
"""


def probed() -> None:
    """What takes seconds: a program for each kind of vectors is compiled and run."""
    raise AssertionError("the processor was probed")


class _Kernel:
    """As torch sees one with its tiles; whose module it says."""

    def __init__(self, home: str) -> None:
        self.fn = type("Function", (), {"__module__": home, "__name__": "kernel"})()


def test_what_a_kernel_writes_is_found_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._higher_order_ops import triton_kernel_wrap as home

    name = next(n for n in compiling._ANALYSES if hasattr(home, n))
    asked: list[dict[str, Any]] = []

    def analyse(_kernel: Any, kwargs: dict[str, Any], _more: Any) -> list[str]:
        asked.append(kwargs)
        return ["y"]

    monkeypatch.setattr(home, name, analyse)
    monkeypatch.setattr(compiling, "_ANALYSED", {})
    plain = {"y": torch.zeros(2), "N": 640, "IS_SHARE": False, "SCALE": 1, "BIAS": None}
    with compiling._analysed_once():
        ask = getattr(home, name)
        first = ask(_Kernel("tersor.kernels.a"), plain, {})
        first.append("changed by who asked")
        assert ask(_Kernel("tersor.kernels.a"), {**plain, "N": 512}, {}) == ["y"]
        assert len(asked) == 1  # sizes make no difference
        for change in ({"IS_SHARE": True}, {"SCALE": 2}, {"BIAS": torch.zeros(2)}):
            ask(_Kernel("tersor.kernels.a"), {**plain, **change}, {})
        ask(_Kernel("tersor.kernels.b"), plain, {})
        assert len(asked) == 5
        for _ in range(2):  # others' kernels are theirs
            ask(_Kernel("elsewhere"), plain, {})
        assert len(asked) == 7
    assert getattr(home, name) is analyse


def test_sizes_of_a_package_are_read_again(
    block: tuple[Graph, tuple[torch.Tensor, ...]],
) -> None:
    graph = block[0]
    native = Native(package=b"code", host=read_host("cpu"), sizes={"linear": ("s0", "8")})
    shapes = input_shapes(graph.signature, 4)
    sections = executable.written(graph, shapes, native)
    assert read(sections)[2] == native
    older = {k: v for k, v in sections.items() if k != "native.sizes.json"}
    assert read(older)[2] == replace(native, sizes={})
    with pytest.raises(ArtifactError, match=r"native\.json"):
        read({**sections, "native.sizes.json": b"[1]"})


def test_a_search_of_a_package_is_for_packages() -> None:
    tuned = {"mode": "package", "tuned": True}
    assert read_options(BuildChoice(backend="inductor", options=tuned)).tuned
    with pytest.raises(ConfigError, match="wanted mode='package'"):
        read_options(BuildChoice(backend="inductor", options={**tuned, "mode": "compile"}))
