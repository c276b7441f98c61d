"""The inductor backend on a CUDA device: kernels, every build choice, packages, profiles, memory."""

import time
from pathlib import Path

import numpy as np
import pytest
import torch

from tersor.backends.inductor import InductorBackend
from tersor.backends.inductor.executable import InductorExecutable, load
from tersor.backends.inductor.trust import BuildCache
from tersor.build.build import parity
from tersor.core.errors import BackendError
from tersor.core.records import OUTSIDE, BuildChoice
from tersor.graph.operators import weighted_ops
from tersor.kernels.linear8 import ACTIVATIONS, linear8, linear8_reference, quantize_codes
from tests.conformance.test_backends import (
    Block,
    Chain,
    compressed,
    graph_of,
    named,
    random,
    seeded,
)

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]
HALF_PRECISION = (
    2e-4  # normalised squared error of a short chain in bf16: (2**-8)**2 an op, about ten
)
EXACT = 1e-10
SHAPES = [(1, 64, 32), (33, 200, 72), (130, 3072, 768)]
CASES = [(*SHAPES[0], a) for a in ACTIVATIONS] + [(*shape, "gelu") for shape in SHAPES[1:]]


@pytest.fixture(scope="module", autouse=True)
def _card() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")


def codes(*shape: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-128, 128, shape, generator=generator).to(torch.int8).cuda()


@pytest.mark.parametrize(("rows", "inp", "out", "activation"), CASES)
def test_kernel_computes_its_definition(rows: int, inp: int, out: int, activation: str) -> None:
    x, w = codes(rows, inp, seed=1), codes(out, inp, seed=2)
    scale = torch.rand(out, generator=torch.Generator().manual_seed(3)).cuda() / inp / 1000 + 1e-6
    offset = random(out, seed=4).cuda()
    wanted = linear8_reference(x, w, scale, offset, torch.float32, activation)
    found = linear8(x, w, scale, offset, torch.float32, activation)
    assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-5)
    inverse = torch.full((out,), 50.0, device="cuda")
    args = (x, w, scale, offset, torch.int8, activation, inverse, 3.0, -100, 110)
    wanted, found = linear8_reference(*args).int(), linear8(*args).int()
    off = (found - wanted).abs()
    assert int(off.max()) <= 1  # a value at the border of two codes
    assert float((off > 0).float().mean()) < 0.01


@pytest.mark.parametrize(("rows", "inp", "out"), SHAPES)
def test_kernel_on_eight_bit_floats(rows: int, inp: int, out: int) -> None:
    x, w = (random(n, inp, seed=n).cuda().to(torch.float8_e4m3fn) for n in (rows, out))
    scale, offset = torch.full((out,), 0.01, device="cuda"), random(out).cuda()
    wanted = linear8_reference(x, w, scale, offset, torch.float32, "gelu")
    found = linear8(x, w, scale, offset, torch.float32, "gelu")
    # Tensor cores cut what they add of 8-bit floats to 13 bits below the largest term.
    sums = x.float().abs() @ w.float().abs().t() * scale
    assert bool(((found - wanted).abs() <= 2.0**-10 * sums + 1e-5).all())


def test_codes_are_torchs_own() -> None:
    x = random(64, 64).cuda()
    wanted = torch.ops.quantized_decomposed.quantize_per_tensor(x, 0.03, 5, -100, 100, torch.int8)
    assert torch.equal(quantize_codes(x, 0.03, 5, -100, 100), wanted)


@pytest.fixture(scope="module")
def backend() -> InductorBackend:
    return InductorBackend("cuda")


def build(
    backend: InductorBackend, graph: object, inputs: tuple[torch.Tensor, ...], **fields: object
) -> InductorExecutable:
    choice = BuildChoice(backend="inductor", device="cuda", batch=4, **fields)  # type: ignore[arg-type]
    shapes = {s.name: tuple(t.shape) for s, t in zip(graph.signature.inputs, inputs, strict=True)}  # type: ignore[attr-defined]
    return backend.build(graph, shapes, choice)  # type: ignore[arg-type]


def test_every_float_choice_computes_the_graph(backend: InductorBackend) -> None:
    inputs = (random(4, 3, 12, 12),)
    graph = graph_of(seeded(Chain()), *inputs)
    for way in backend.describe().floats:
        if way.options["mode"] == "autotune":  # minutes
            continue
        built = build(backend, graph, inputs, precision=way.precision, options=way.options)
        limit = EXACT if way.precision == "f32" and not way.options.get("tf32") else HALF_PRECISION
        assert parity(graph, built, 4, inputs) <= limit, way


@pytest.mark.parametrize("precision", ["f32", "bf16"])
@pytest.mark.parametrize("mode", ["eager", "compile", "package"])
def test_int8_graphs_run_on_codes(backend: InductorBackend, mode: str, precision: str) -> None:
    inputs = (random(4, 7, 64),)
    graph = compressed(graph_of(seeded(Block(64, 256)), *inputs), "int8", 127)
    built = build(
        backend, graph, inputs, precision=precision, options={"mode": mode, "graph": True}
    )
    targets = [getattr(n.target, "__name__", "") for n in built._lowered.module.graph.nodes]
    assert targets.count("linear8") == 2
    assert targets.count("quantize_codes") == 1  # the second one is in the first product
    assert parity(graph, built, 4, inputs) <= 1e-3


def test_profile_names_the_ops_and_sums_to_the_latency(backend: InductorBackend) -> None:
    inputs = (random(4, 64, 256),)
    plain = graph_of(seeded(Block(256, 1024)), *inputs)
    for graph in (plain, compressed(plain, "int8", 127)):
        for mode in ("eager", "compile"):
            built = build(
                backend, graph, inputs, precision="bf16", options={"mode": mode, "graph": True}
            )
            times = built.profile()
            ops = {op.node.name for op in weighted_ops(graph.module)}
            assert ops <= set(times)
            assert all(times[name] > 0 for name in ops)
            call_ms = float(
                np.median([built.resident(named(graph, inputs)).timed_ms() for _ in range(20)])
            )
            assert 0.3 <= sum(times.values()) / call_ms <= 3
            assert times[OUTSIDE] >= 0


def test_package_of_a_file_answers_within_a_second(
    backend: InductorBackend, tmp_path: Path
) -> None:
    inputs = (random(4, 7, 64),)
    graph = compressed(graph_of(seeded(Block(64, 256)), *inputs), "int8", 127)
    options = {"mode": "package", "graph": True}
    built = build(backend, graph, inputs, precision="bf16", options=options)
    sections, wanted = built.serialize(), built.run(named(graph, inputs))
    start = time.perf_counter()
    loaded = backend.load(sections, built._choice)
    found = loaded.run(named(graph, inputs))
    assert time.perf_counter() - start <= 1.0
    assert loaded.native.used
    assert all(np.array_equal(found[k], wanted[k]) for k in wanted)
    with pytest.warns(UserWarning, match="no record that this user built it"):
        other = load(sections, built._choice, BuildCache(tmp_path))
    assert not other.native.used


def test_no_memory_is_a_dropped_build_and_a_clean_card(backend: InductorBackend) -> None:
    inputs = (random(4, 7, 64),)
    graph = graph_of(seeded(Block(64, 256)), *inputs)
    total = torch.cuda.get_device_properties(0).total_memory
    rows = 2 * total // (256 * 4 * 7)  # the inner tensor alone is twice the card
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    choice = BuildChoice(backend="inductor", device="cuda", batch=4)
    shrunk = torch.cuda.memory_reserved()
    with pytest.raises(BackendError, match="memory"):
        backend.build(graph, {graph.signature.inputs[0].name: (rows, 7, 64)}, choice)
    assert torch.cuda.memory_allocated() <= before + 2**20
    assert torch.cuda.memory_reserved() <= shrunk + 2**26


def test_a_device_that_is_not_there(backend: InductorBackend) -> None:
    graph = graph_of(seeded(Block()), random(4, 7, 16))
    choice = BuildChoice(backend="inductor", device="cuda:99")
    with pytest.raises(BackendError, match="wanted number 99"):
        backend.build(graph, {}, choice)
