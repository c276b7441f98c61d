"""The library's products on the CPU, which ways take a shape, and which one is kept."""

from importlib.util import find_spec
from typing import Any

import pytest
import torch

from tersor.kernels.epilogue import finished
from tersor.kernels.linear8_library import library_product, library_ways

FLOAT8 = torch.float8_e4m3fn
HALF = 2.0**-8  # of a bfloat16, a rounding of the sum and one of what is done with it
# Sums of products in float32, in another order.
SINGLE = 1e-5


def drawn(rows: int, inp: int, out: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(rows)
    x, w = (
        (torch.randn(n, inp, generator=generator) * 20).clamp(-127, 127).to(dtype)
        for n in (rows, out)
    )
    scale = torch.rand(out, generator=generator) / inp + 1e-4
    return x, w, scale, torch.randn(out, generator=generator)


@pytest.mark.parametrize(
    ("shape", "codes", "dtype", "wanted"),
    [
        ((32, 64, 48), torch.int8, torch.bfloat16, ()),
        ((32, 64, 48), FLOAT8, torch.bfloat16, ("tensorwise", "rowwise")),
        ((32, 64, 48), FLOAT8, FLOAT8, ("tensorwise",)),
        ((32, 64, 48), FLOAT8, torch.float32, ("tensorwise",)),
        ((16, 64, 48), FLOAT8, torch.bfloat16, ()),
        ((32, 72, 48), FLOAT8, torch.bfloat16, ()),
        ((32, 64, 44), FLOAT8, torch.bfloat16, ()),
    ],
)
def test_ways_of_a_shape(
    shape: tuple[int, int, int], codes: torch.dtype, dtype: torch.dtype, wanted: tuple[str, ...]
) -> None:
    x, w, _, _ = drawn(*shape, codes)
    assert library_ways(x, w, dtype, is_last=True) == wanted
    assert "rowwise" not in library_ways(x, w, dtype, is_last=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_way_computes_the_linear(dtype: torch.dtype) -> None:
    x, w, scale, offset = drawn(32, 64, 48, FLOAT8)
    wanted = x.double() @ w.double().t() * scale.double() + offset.double()
    terms = x.double().abs() @ w.double().abs().t() * scale.double() + offset.double().abs()
    for way in library_ways(x, w, dtype, is_last=True):
        y = library_product(x, w, scale, offset, dtype, way)
        if way != "rowwise":
            y = finished(y, scale, offset, dtype, "none", None, 0.0, -128, 127)
        assert y.dtype == dtype
        bound = terms * SINGLE if dtype == torch.float32 else wanted.abs() * HALF + terms * HALF
        assert bool(((y.double() - wanted).abs() <= bound).all()), way


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("way", ["tensorwise", "rowwise"])
def test_a_compiler_sees_through_the_chosen_way(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.backends.common import aot_autograd

    from tersor.kernels import linear8_cuda as module

    x, w, scale, offset = drawn(32, 64, 48, FLOAT8)
    key = module.key_of(x, w, torch.bfloat16, 0)
    monkeypatch.setattr(module, "CHOICES", {key: module.Choice(way=way)})
    seen: list[str] = []

    def compiler(graph: torch.fx.GraphModule, _inputs: object) -> Any:
        seen.extend(str(n.target) for n in graph.graph.nodes)
        return graph.forward

    def call(x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = module.linear8_op(
            x, w, scale, offset, scale, torch.bfloat16, 0, False, 0.0, -448.0, 448.0
        )
        return found

    found = torch.compile(call, backend=aot_autograd(fw_compiler=compiler), fullgraph=True)(x)
    assert "aten._scaled_mm.default" in seen
    # What follows is left to the compiler, unless it is in the product.
    assert ("aten.mul.Tensor" in seen) == (way == "tensorwise")
    y = library_product(x, w, scale, offset, torch.bfloat16, way)  # type: ignore[arg-type]
    if way == "tensorwise":
        y = finished(y, scale, offset, torch.bfloat16, "none", None, 0.0, -448, 448)
    assert torch.equal(found, y)


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_the_fastest_way_is_kept_and_refused_ones_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from tersor.kernels import linear8_cuda as module

    x, w, _, _ = drawn(32, 64, 48, FLOAT8)
    key = module.key_of(x, w, FLOAT8, 2)
    times = {"fused": 3.0, "rowwise": 2.0}
    seen: list[str] = []

    def call() -> None:
        way = module.CHOICES[key].way if key in module.CHOICES else "tile"
        if way == "tensorwise":
            raise RuntimeError("no such product here")

    def bench(call: Any, **_: Any) -> float:
        call()
        seen.append(module.CHOICES[key].way)
        return times[seen[-1]]

    monkeypatch.setattr(module, "CHOICES", {})
    monkeypatch.setattr(module, "choose_tile", lambda _key, _call: False)
    monkeypatch.setattr(module.triton.testing, "do_bench_cudagraph", bench)
    for _ in range(2):  # measured once
        module.choose_way(key, ("tensorwise", "rowwise"), call)
    assert seen == ["fused", "rowwise"] * 3
    choice = module.CHOICES[key]
    assert choice.way == "rowwise"
    assert choice.ms == times
    assert choice.refused == {"tensorwise": "no such product here"}
    assert module._way_of(x, w, FLOAT8, 2) == "rowwise"
    assert module._way_of(x, w, FLOAT8, 0) is None
    times["rowwise"] = 2.95  # no more than noise
    monkeypatch.setattr(module, "CHOICES", {})
    module.choose_way(key, ("tensorwise", "rowwise"), call)
    assert module.CHOICES[key].way == "fused"
    longer = (2 * key[0], *key[1:])
    module.choose_way(longer, ("tensorwise", "rowwise"), call)  # as the measured one
    assert module.CHOICES[longer] == module.Choice(way="fused")
    few = x[:4]
    module.choose_way(module.key_of(few, w, FLOAT8, 2), (), call)
    assert module._way_of(few, w, FLOAT8, 2) is None
