"""The Triton kernel under Triton's interpreter, against its definition; on a card see tests/gpu."""

import sys
from importlib.util import find_spec
from typing import Any

import pytest
import torch

from tests.unit.kernels.interpreter import interpreted

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
NEIGHBOUR = 2.0**-3  # the next 8-bit float, relative
# Codes on the border between two may differ by one; the interpreter has no fast tanh.
SCRIPT = """
import json
import torch
import triton
from tersor.kernels.linear8 import ACTIVATIONS, linear8_reference
from tersor.kernels.epilogue import finished
from tersor.kernels.activations_triton import ACTIVATION_CODES
from tersor.kernels.linear8_triton import linear8_finish_kernel, linear8_kernel

def off(rows, inp, out, activation, to_codes, tile, kind):
    generator = torch.Generator().manual_seed(rows + inp)
    if kind == "int8":
        x, w = (torch.randint(-128, 128, s, generator=generator).to(torch.int8) for s in ((rows, inp), (out, inp)))
    else:
        x, w = (torch.randn(s, generator=generator).to(torch.float8_e4m3fn) for s in ((rows, inp), (out, inp)))
    scale = torch.rand(out, generator=generator) / inp / (1000 if kind == "int8" else 1) + 1e-6
    offset, inverse = torch.randn(out, generator=generator), torch.full((out,), 20.0)
    dtype = x.dtype if to_codes else torch.float32
    limits = (-100.0, 90.0) if kind == "int8" else (-448.0, 448.0)
    zero = 3.0 if kind == "int8" else 0.0
    # One more row, poisoned: nothing beyond the end is written, and everything before it is.
    # The interpreter's own conversion to 8-bit floats loses carries: what it is given is looked at.
    buffer = torch.full((rows + 1, out), 77.0).to(torch.float32 if kind == "fp8" else dtype)
    grid = (triton.cdiv(rows, tile[0]) * triton.cdiv(out, tile[1]),)
    linear8_kernel[grid](
        x, w, buffer, scale, offset, inverse, rows, out, inp, zero, *limits,
        IS_INT=kind == "int8", ACTIVATION=ACTIVATION_CODES[activation], TO_CODES=to_codes,
        ROUNDS=kind == "int8", SHORT=False,
        BM=tile[0], BN=tile[1], BK=tile[2], GROUP=8, STEPS=triton.cdiv(inp, tile[2]),
    )
    wanted = linear8_reference(
        x, w, scale, offset, dtype, activation, inverse if to_codes else None, zero, *map(int, limits)
    )
    difference = (buffer[:rows].to(dtype).float() - wanted.float()).abs()
    if kind == "fp8" and to_codes:
        difference = difference / wanted.float().abs().clamp_min(2.0**-6)
    return float(difference.max()), float((difference > 0).float().mean()), bool((buffer[rows].float() == 77.0).all())

def off_behind(rows, out, activation, dtype, kind):
    generator = torch.Generator().manual_seed(rows)
    total = (torch.randn(rows, out, generator=generator) * 100).to(kind)
    scale, offset = torch.rand(out, generator=generator) / 50, torch.randn(out, generator=generator)
    to_codes = dtype != torch.float32
    inverse = torch.full((out,), 20.0) if to_codes else None
    limits = (-100.0, 90.0) if dtype == torch.int8 else (-448.0, 448.0)
    buffer = torch.full((rows + 1, out), 77.0).to(torch.float32 if kind == torch.bfloat16 else dtype)
    linear8_finish_kernel[triton.cdiv(rows, 16), triton.cdiv(out, 32)](
        total, buffer, scale, offset, scale if inverse is None else inverse, rows, out, 0.0, *limits,
        ACTIVATION=ACTIVATION_CODES[activation], TO_CODES=to_codes, ROUNDS=dtype == torch.int8,
        SHORT=False, BM=16, BN=32,
    )
    wanted = finished(total, scale, offset, dtype, activation, inverse, 0.0, *limits).float()
    difference = (buffer[:rows].to(dtype).float() - wanted).abs()
    relative = difference / wanted.abs().clamp_min(2.0**-6)
    is_kept = bool((buffer[rows].float() == 77.0).all())
    largest = relative if dtype == torch.float8_e4m3fn else difference
    return float(largest.max()), float((difference > 0).float().mean()), is_kept

found = {}
for activation in ACTIVATIONS:
    found[f"floats behind {activation}"] = off_behind(5, 40, activation, torch.float32, torch.int32)
    found[f"codes behind {activation}"] = off_behind(17, 33, activation, torch.int8, torch.int32)
    found[f"fp8 behind {activation}"] = off_behind(17, 33, activation, torch.float8_e4m3fn, torch.bfloat16)
for activation in ACTIVATIONS:
    found[f"floats {activation}"] = off(5, 40, 20, activation, False, (16, 32, 32), "int8")
    found[f"codes {activation}"] = off(5, 40, 20, activation, True, (16, 32, 32), "int8")
found["floats many"] = off(33, 70, 50, "none", False, (16, 16, 32), "int8")
for activation in ACTIVATIONS:
    found[f"fp8 codes {activation}"] = off(9, 64, 20, activation, True, (16, 32, 32), "fp8")
found["floats fp8"] = off(9, 64, 20, "none", False, (16, 32, 32), "fp8")
print(json.dumps(found))
"""


def test_interpreted_kernel_computes_its_definition() -> None:
    found = interpreted("-c", SCRIPT)
    for name, (largest, share, is_kept) in found.items():
        assert is_kept, name
        if name.startswith("codes"):
            assert largest <= 1, name
            assert share <= 0.02, name
        elif name.startswith("fp8"):
            assert largest <= NEIGHBOUR, name
            assert share <= 0.02, name
        else:
            assert largest <= 2e-5, name


def test_no_checker_of_types_wraps_a_kernel() -> None:
    from triton.runtime.jit import KernelInterface

    from tersor.kernels import linear8_triton as module

    kernels: list[Any] = [v for v in vars(module).values() if isinstance(v, KernelInterface)]
    assert len(kernels) >= 4
    for kernel in kernels:  # activations have a module of their own
        home = vars(sys.modules[kernel.fn.__module__])
        assert kernel.fn.__globals__ is home, kernel.fn.__name__


def test_a_build_for_a_file_measures_what_prices_took(monkeypatch: pytest.MonkeyPatch) -> None:
    from tersor.kernels import linear8_triton as module
    from tersor.kernels.tiles import Chosen, choosing

    large, middle, small = module._TALL
    rest = (torch.int8, torch.bfloat16, 0, "cuda:0")
    key = (4000, 900, 64, *rest)
    monkeypatch.setattr(module, "CHOSEN", Chosen({(4096, 192, 32, *rest): large}))
    times = {large: 3.0, middle: 1.0, small: 2.0}
    monkeypatch.setattr(
        module.triton.testing, "do_bench_cudagraph", lambda _call, **_: times[module.CHOSEN[key]]
    )
    with choosing():
        assert not module.choose_tile(key, print)
    assert module.CHOSEN[key] == large
    with choosing(exactly=True):
        assert module.choose_tile(key, print)
        assert not module.choose_tile(key, print)
    assert module.CHOSEN[key] == middle


def test_the_fastest_tile_of_a_shape_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.errors import OutOfResources

    from tersor.kernels import linear8_triton as module
    from tersor.kernels.tiles import Chosen

    key = (4096, 64, 32, torch.int8, torch.bfloat16, 0, "cuda:0")
    calls: list[Any] = []

    def bench(times: dict[Any, float]) -> Any:
        def measured(call: Any, **_: Any) -> float:
            calls.append(call)
            tile = module.CHOSEN[key]
            if tile not in times:
                raise OutOfResources(300_000, 100_000, "shared memory")
            return times[tile]

        return measured

    monkeypatch.setattr(module, "CHOSEN", Chosen())
    large, middle, small = module._TALL
    codes, weight = torch.zeros(4096, 64, dtype=torch.int8), torch.zeros(32, 64, dtype=torch.int8)
    monkeypatch.setattr(module.triton.testing, "do_bench_cudagraph", bench({}))
    with pytest.raises(OutOfResources):
        module.choose_tile(key, print)
    assert not module.CHOSEN
    assert len(calls) == 3
    monkeypatch.setattr(
        module.triton.testing, "do_bench_cudagraph", bench({middle: 2.0, small: 1.0})
    )
    for _ in range(2):  # measured once
        module.choose_tile(key, print)
        assert len(calls) == 6
    assert {key: small} == module.CHOSEN
    near, far = (4000, 50, 20, *key[3:]), (4000, 140, 20, *key[3:])
    module.choose_tile(near, print)  # no more than twice as large or small
    assert len(calls) == 6
    assert module.CHOSEN[near] == small
    module.choose_tile(far, print)
    assert len(calls) == 9
    assert far in module.CHOSEN
    monkeypatch.setattr(module, "CHOSEN", Chosen({(*key[:-1], "cpu"): small}))
    assert module._tile_of(codes, weight, torch.bfloat16, 0) == small
    assert module._tile_of(codes[:100], weight, torch.bfloat16, 0) == large
    assert module._tile_of(codes[:5], weight, torch.bfloat16, 0) == module._FLAT[0]
