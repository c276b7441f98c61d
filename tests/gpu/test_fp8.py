"""8-bit floats on a CUDA device: every way of the product, chains, builds in every mode, one row."""

import pytest
import torch

from tersor.backends.inductor import InductorBackend
from tersor.build.build import parity
from tersor.core.records import BuildChoice, Candidate
from tersor.graph.contracts import Graph
from tersor.kernels import linear8_cuda
from tersor.kernels.epilogue import ACTIVATIONS, finished
from tersor.kernels.linear8 import linear8, linear8_reference, quantize_floats
from tersor.kernels.linear8_library import library_product, library_ways
from tests.conformance.test_backends import Block, graph_of, random, seeded
from tests.unit.graph.test_float8 import in_float8

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]
FLOAT8 = torch.float8_e4m3fn
# Tensor cores cut what they add of 8-bit floats to 13 bits below the largest term.
CUT = 2.0**-10
HALF = 2.0**-8  # a bfloat16 of the sum, and one of the result
NEIGHBOUR = 2.0**-3  # the next 8-bit float, relative
# Squared error: an input on the border of two 8-bit floats goes either way in another precision.
BORDERS = 1e-3
SHAPES = [(1, 64, 32), (33, 208, 80), (130, 3072, 768)]


@pytest.fixture(scope="module", autouse=True)
def _card() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no products of 8-bit floats on this card")


def operands(rows: int, inp: int, out: int) -> tuple[torch.Tensor, ...]:
    x, w = (random(n, inp, seed=n).cuda().to(FLOAT8) for n in (rows, out))
    return x, w, torch.full((out,), 0.01, device="cuda"), random(out).cuda()


@pytest.mark.parametrize(("rows", "inp", "out"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_way_computes_the_product(rows: int, inp: int, out: int, dtype: torch.dtype) -> None:
    x, w, scale, offset = operands(rows, inp, out)
    wanted = x.double() @ w.double().t() * scale + offset
    terms = x.double().abs() @ w.double().abs().t() * scale + offset.abs()
    bound = CUT * terms + 1e-5 + (0 if dtype == torch.float32 else HALF * terms)
    found = linear8(x, w, scale, offset, dtype)
    assert bool(((found.double() - wanted).abs() <= bound).all())
    for way in library_ways(x, w, dtype, is_last=True):
        y = library_product(x, w, scale, offset, dtype, way)
        if way != "rowwise":
            y = finished(y, scale, offset, dtype, "none", None, 0.0, -448, 448)
        assert bool(((y.double() - wanted).abs() <= bound).all()), way


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("rows", [1, 130])
def test_codes_of_the_next_layer(activation: str, rows: int) -> None:
    x, w, scale, offset = operands(rows, 256, 128)
    inverse = torch.full((128,), 20.0, device="cuda")
    arguments = (x, w, scale, offset, FLOAT8, activation, inverse)
    wanted, found = linear8_reference(*arguments).float(), linear8(*arguments).float()
    # GELU of codes is by the card's own tanh, 2**-11 off, times half of y (5 at most) and 20 codes a unit.
    apart = (found - wanted).abs()
    assert bool((apart <= NEIGHBOUR * wanted.abs() + 0.03).all())
    assert float((apart > 0).float().mean()) < 0.1


def test_the_choice_of_a_shape_is_recorded() -> None:
    x, w, scale, offset = operands(256, 512, 256)
    linear8(x, w, scale, offset, torch.bfloat16)
    choice = linear8_cuda.CHOICES[linear8_cuda.key_of(x, w, torch.bfloat16, 0)]
    assert set(choice.ms) | set(choice.refused) == {"fused", "tensorwise", "rowwise"}
    assert not choice.refused
    assert all(ms > 0 for ms in choice.ms.values())


def test_quantised_on_the_card_as_on_the_cpu() -> None:
    x = random(64, 64) * 5
    assert torch.equal(
        quantize_floats(x.cuda(), 0.01).cpu().float(), quantize_floats(x, 0.01).float()
    )


def test_the_backend_offers_it() -> None:
    backend = InductorBackend("cuda")
    assert backend.describe().format("fp8") is not None
    assert backend.supports(Candidate(site="s", level="fp8", method="m", size_bytes=1)).ok


@pytest.fixture(scope="module")
def chain() -> tuple[Graph, tuple[torch.Tensor, ...]]:
    inputs = (random(4, 7, 64),)
    return in_float8(graph_of(seeded(Block(64, 256)), *inputs), inputs), inputs


@pytest.mark.parametrize("precision", ["f32", "bf16"])
@pytest.mark.parametrize("mode", ["eager", "compile", "package"])
def test_graphs_run_on_eight_bit_floats(
    chain: tuple[Graph, tuple[torch.Tensor, ...]], mode: str, precision: str
) -> None:
    graph, inputs = chain
    choice = BuildChoice(
        backend="inductor", device="cuda", batch=4, precision=precision,  # type: ignore[arg-type]
        options={"mode": mode, "graph": True},
    )  # fmt: skip
    shapes = {graph.signature.inputs[0].name: tuple(inputs[0].shape)}
    built = InductorBackend("cuda").build(graph, shapes, choice)
    targets = [getattr(n.target, "__name__", "") for n in built._lowered.module.graph.nodes]
    assert targets.count("linear8") == 2
    assert targets.count("quantize_floats") == 1  # the second one is in the first product
    assert parity(graph, built, 4, inputs) <= BORDERS
    again = InductorBackend("cuda").load(built.serialize(), choice)
    assert parity(graph, again, 4, inputs) <= BORDERS
