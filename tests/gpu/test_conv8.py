"""8-bit convolutions on a CUDA device: the kernels, every tile of a few shapes, builds of a small network."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tersor.backends.inductor import InductorBackend
from tersor.build.build import parity
from tersor.core.records import BuildChoice
from tersor.kernels import conv8_triton
from tersor.kernels.conv8 import border_offsets, conv8, conv8_reference
from tersor.kernels.conv8_triton import Tile
from tests.conformance.test_backends import graph_of, random, seeded
from tests.unit.backends.test_inductor_conv import Residual, in_codes

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]
# Sums of codes are exact; six float32 roundings behind them, of terms up to eight times the largest result.
ROUNDED = 8 * 6 * 2.0**-24
# Tensor cores cut what they add of 8-bit floats to 13 bits below the largest term.
EIGHT = 2.0**-10
BORDER = 0.02  # codes that lie on the border between two
SHAPES: tuple[dict[str, Any], ...] = (
    {"inp": 64, "out": 256, "kernel": (1, 1)},
    {"inp": 100, "out": 72, "kernel": (1, 1), "stride": (2, 2)},
    {"inp": 256, "out": 128, "kernel": (3, 3), "padding": (1, 1)},
    {"inp": 64, "out": 64, "kernel": (3, 3), "padding": (1, 1), "stride": (2, 2)},
    {"inp": 48, "out": 33, "kernel": (3, 3), "padding": (1, 1)},
    {"inp": 4, "out": 64, "kernel": (7, 7), "padding": (3, 3), "stride": (2, 2)},
    {"inp": 5, "out": 20, "kernel": (1, 5), "padding": (0, 2)},
)


@pytest.fixture(scope="module", autouse=True)
def _card() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")


def drawn(  # noqa: PLR0913, PLR0917
    n: int, inp: int, out: int, kernel: tuple[int, int], size: tuple[int, int] = (14, 15),
    stride: tuple[int, int] = (1, 1), padding: tuple[int, int] = (0, 0), zero: int = 0,
    kind: torch.dtype = torch.int8, unit: float = 1.0,
) -> tuple[Any, ...]:  # fmt: skip
    """Arguments up to the padding, and a residual's codes."""
    generator = torch.Generator().manual_seed(n + inp + out)

    def codes(*shape: int) -> Tensor:
        if kind == torch.int8:
            return torch.randint(-128, 128, shape, generator=generator).to(kind)
        return torch.randn(shape, generator=generator).to(kind)

    x, w = codes(n, *size, inp).permute(0, 3, 1, 2), codes(out, *kernel, inp)
    fan = inp * kernel[0] * kernel[1]
    scale = (torch.rand(out, generator=generator) + 0.1) / fan**0.5 * unit
    scale = scale / 5000 if kind == torch.int8 else scale
    offset = border_offsets(w, scale, zero, torch.randn(out, generator=generator) * unit, padding)
    sides = [
        (s + 2 * p - k) // t + 1 for s, p, k, t in zip(size, padding, kernel, stride, strict=True)
    ]
    residual = torch.randint(-128, 128, (n, *sides, out), generator=generator).to(torch.int8)
    tensors = [t.cuda() for t in (x, w, scale, offset)]
    return (*tensors, list(stride), list(padding), residual.permute(0, 3, 1, 2).cuda())


def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an output that is not written holds."""
    real = torch.empty

    def poisoned(*args: Any, **settings: Any) -> Tensor:
        made = real(*args, **settings)
        return made.fill_(77 if made.dtype == torch.int8 else 300)

    monkeypatch.setattr(torch, "empty", poisoned)


def compare(*args: Any, kind: torch.dtype = torch.int8) -> None:
    found, wanted = conv8(*args), conv8_reference(*args)
    assert found.shape == wanted.shape
    assert found.is_contiguous(memory_format=torch.channels_last)
    off = (found.float() - wanted.float()).abs()
    if args[6] == torch.int8:
        assert int(off.max()) <= 1
        assert float((off > 0).float().mean()) <= BORDER
        return
    bound = {torch.float32: ROUNDED, torch.float16: 2.0**-10}.get(args[6], 2.0**-7)
    bound = bound if kind == torch.int8 else bound + 8 * EIGHT
    assert float(off.max()) <= bound * float(wanted.float().abs().max())


CASES = [(shape, 40) for shape in SHAPES] + [(SHAPES[2], 1), (SHAPES[5], 1)]


@pytest.fixture
def _first_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is measured: compiling every tile takes minutes."""
    monkeypatch.setattr(conv8_triton, "choose_tile", lambda *_: True)


@pytest.mark.usefixtures("_first_tile")
@pytest.mark.parametrize(("shape", "n"), CASES, ids=lambda v: str(v).replace(" ", ""))
def test_kernel_computes_its_definition(
    shape: dict[str, Any], n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch)
    *args, residual = drawn(n, **shape)
    compare(*args, torch.float32, -torch.inf, torch.inf)
    *args, residual = drawn(n, **shape, zero=-128, unit=20.0)
    compare(*args, torch.int8, 0.0, 100.0, residual, 0.2531, 1.5)
    if n > 1:
        other = (residual.float() / 50).bfloat16()
        compare(*args, torch.float16, 0.0, torch.inf, other, 0.5)
        inner = [-30.0, 40.0, 0.47]
        compare(*args, torch.int8, -100.0, 100.0, residual, 0.2531, 1.5, inner)


@pytest.mark.usefixtures("_first_tile")
@pytest.mark.parametrize("shape", SHAPES[1:3], ids=["1x1", "3x3"])
def test_eight_bit_floats(shape: dict[str, Any]) -> None:
    kind = torch.float8_e4m3fn
    *args, residual = drawn(3, **shape, kind=kind)
    compare(*args, torch.float32, -torch.inf, torch.inf, kind=kind)
    compare(*args, torch.bfloat16, 0.0, torch.inf, residual, 0.01, kind=kind)
    found, wanted = (f(*args, kind, 0.0, 448.0).float() for f in (conv8, conv8_reference))
    assert bool(((found - wanted).abs() <= 2.0**-3 * wanted + 0.05).all())  # one code


@pytest.mark.usefixtures("_first_tile")
@pytest.mark.parametrize(("shape", "n"), [(SHAPES[2], 1), (SHAPES[0], 40)], ids=["few", "many"])
def test_every_tile(shape: dict[str, Any], n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    *args, residual = drawn(n, **shape, unit=20.0)
    tiles = conv8_triton.tiles(n * 14 * 15, shape["out"], shape["kernel"], shape["inp"])
    assert any(t.splits > 1 for t in tiles) == (n == 1)
    for tile in tiles:
        monkeypatch.setattr(conv8_triton, "_tile_of", lambda *_, t=tile: t)
        compare(*args, torch.int8, -128.0, 127.0, residual, 0.2531, 1.5)


def test_equal_calls_give_equal_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    tiles = (Tile(64, 64, 128, 4, 5, 8), Tile(16, 64, 128, 4, 5, 4))
    monkeypatch.setattr(conv8_triton, "tiles", lambda *_: tiles)
    *args, residual = drawn(2, 512, 64, (3, 3), size=(7, 7), padding=(1, 1))
    found = [conv8(*args, torch.float32, 0.0, torch.inf, residual) for _ in range(3)]
    assert all(torch.equal(f, found[0]) for f in found)
    assert next(reversed(conv8_triton._CHOSEN.values())) in tiles  # measured


def test_empty_batch() -> None:
    *args, _ = drawn(2, **SHAPES[2])
    assert conv8(args[0][:0], *args[1:], torch.int8, 0.0, 1.0).shape == (0, 128, 14, 15)


@pytest.mark.usefixtures("_first_tile")
@pytest.mark.parametrize(
    ("mode", "precision"),
    [
        ("eager", "f32"),
        ("compile", "bf16"),
        pytest.param("package", "bf16", marks=pytest.mark.slow),
    ],
)
def test_builds_stay_in_codes(mode: str, precision: Any) -> None:
    inputs = (random(4, 3, 64, 64),)
    graph = in_codes(graph_of(seeded(Residual(32)), *inputs))
    options = {"mode": mode, "graph": True, "layout": "channels_last"}
    choice = BuildChoice(
        backend="inductor", device="cuda", precision=precision, batch=4, options=options
    )
    (spec,) = graph.signature.inputs
    made = InductorBackend("cuda").build(graph, {spec.name: tuple(inputs[0].shape)}, choice)
    calls = [n.target for n in made._lowered.module.graph.nodes]
    assert calls.count(conv8) == 6
    assert torch.ops.aten.conv2d.default not in calls
    assert parity(graph, made, 4, inputs) <= 2e-3
    if mode == "eager":
        assert made.profile()["conv2d"] > 0
