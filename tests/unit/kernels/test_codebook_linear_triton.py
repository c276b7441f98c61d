"""The codebook kernels under Triton's interpreter, and how a launch is chosen; on a card see tests/gpu."""

from importlib.util import find_spec
from typing import Any

import pytest
import torch

from tests.unit.kernels.interpreter import interpreted

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "part", ["every_form", "few_rows", pytest.param("every_shape", marks=pytest.mark.slow)]
)
def test_interpreted_kernels_stay_within_the_bound_of_their_formats(part: str) -> None:
    found = interpreted("-m", "tests.unit.kernels.interpreted_codebook", part)
    assert found
    for name, share in found.items():
        assert share <= 1, name


def test_no_checker_of_types_wraps_a_kernel() -> None:
    from triton.runtime.jit import KernelInterface

    from tersor.kernels import codebook_kernels_triton as module

    kernels = [v for v in vars(module).values() if isinstance(v, KernelInterface)]
    assert len(kernels) >= 8
    for kernel in kernels:
        assert kernel.fn.__globals__ is vars(module), kernel.fn.__name__  # type: ignore[attr-defined]


def weight_of(out: int, inp: int, bits: int, **fields: Any) -> Any:
    from tersor.kernels.codebook_linear_triton import Weight
    from tersor.kernels.codebook_weight import coded_weight

    codes = torch.zeros(out, inp, dtype=torch.uint8)
    found = coded_weight(codes, bits=bits, **fields)
    return Weight(found.words, found.tables, found.planes, found.scales, bits, inp, found.group)


def test_what_is_worth_measuring() -> None:
    from tersor.kernels import codebook_launches as module
    from tersor.kernels.codebook_kernels_triton import ARITHMETIC, LOAD, PERMUTE

    uniform = weight_of(64, 512, 4, scales=torch.ones(64, 1)).facts
    table = weight_of(64, 512, 4, tables=torch.zeros(64, 1, 16)).facts
    large = weight_of(64, 512, 8, tables=torch.zeros(64, 1, 256)).facts
    grouped = weight_of(64, 512, 4, tables=torch.zeros(64, 4, 16), group=128).facts
    for facts, vector, dot in (
        (uniform, {ARITHMETIC}, {ARITHMETIC}),
        (table, {PERMUTE, LOAD}, {PERMUTE, LOAD}),
        (large, {LOAD}, {LOAD}),
        (grouped, {LOAD}, {LOAD}),
    ):
        one, few, many = (module.launches(rows, facts) for rows in (1, 16, 200))
        assert {t.lookup for t in one if t.form == "vector"} == vector
        for tiles in (one, few, many):
            assert {t.lookup for t in tiles if t.form == "dot"} == dot
            assert len(set(tiles)) == len(tiles)
        assert {t.form for t in one} == {"vector", "dot"}
        assert {t.form for t in few} == {"dot"}
        assert {t.form for t in many} == {"dot", "dense"}
        assert any(t.warps == 16 for t in one if t.form == "vector")  # 512 threads
        assert any(t.warps == 16 for t in few)
        assert all(t.width == 16 for t in few)


def test_a_chosen_launch_is_that_of_its_shape_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from tersor.kernels import codebook_linear_triton as module
    from tersor.kernels.codebook_launches import launches

    weight = weight_of(64, 512, 4, scales=torch.ones(64, 1))
    x = torch.zeros(1, 512)
    fastest = launches(1, weight.facts)[3]
    monkeypatch.setattr(module, "_CHOSEN", {module._key(x, weight): fastest})
    assert module.launch_of(x, weight) == fastest
    first = launches(1, weight.facts)[0]
    assert first != fastest
    assert module.launch_of(x.half(), weight) == first
    other = weight_of(64, 512, 4, scales=torch.ones(64, 4), group=128)
    assert module.launch_of(x, other) == first
    table = weight_of(64, 512, 4, tables=torch.zeros(64, 1, 16))
    assert module.launch_of(x, table) == launches(1, table.facts)[0]


def test_few_rows_by_instructions_are_for_half_precision_and_rows_that_can_be_read() -> None:
    from tersor.kernels import codebook_launches as module

    uniform = weight_of(64, 512, 4, scales=torch.ones(64, 1)).facts
    table = weight_of(64, 512, 4, tables=torch.zeros(64, 1, 16)).facts
    for rows in (1, 3, 8):
        found = module.mma_launches(rows, 512, torch.bfloat16, uniform)
        assert found
        assert len(set(found)) == len(found)
        for launch in found:
            assert (launch.form, launch.width) == ("mma", 8)
            # Warps that share inputs, times those of the outputs, are all warps.
            assert launch.deep >= 1
            assert launch.deep * launch.outputs == launch.warps * 16 * launch.tall
    assert 0 < len(module.mma_launches(1, 512, torch.float16, table)) < len(found)
    assert not module.mma_launches(9, 512, torch.bfloat16, uniform)
    assert not module.mma_launches(1, 512, torch.float32, uniform)
    assert not module.mma_launches(1, 510, torch.bfloat16, uniform)


def test_a_launch_that_does_not_agree_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from tersor.kernels import codebook_linear_triton as module
    from tersor.kernels.codebook_launches import launches, mma_launches

    weight = weight_of(64, 512, 4, scales=torch.ones(64, 1))
    x = torch.zeros(2, 512, dtype=torch.bfloat16)
    tried = mma_launches(2, 512, x.dtype, weight.facts)
    seen: list[torch.Tensor] = []

    def run(probe: torch.Tensor, *_: object) -> torch.Tensor:
        launch = _[-1]
        seen.append(probe)
        return probe.flip(0) if launch == tried[1] else probe * (1 + 2.0**-7)

    monkeypatch.setattr(module, "run", run)
    with pytest.warns(RuntimeWarning, match="left out") as caught:
        found = module._candidates(x, weight)
    assert len(caught) == 1
    assert found == (*launches(2, weight.facts), tried[0], *tried[2:])
    assert all(p.shape == x.shape and p.dtype == x.dtype and bool(p.any()) for p in seen)
    monkeypatch.setattr(
        module,
        "run",
        lambda probe, *rest: probe * (1.0 if rest[-1].form == "dense" else float("nan")),
    )
    with pytest.warns(RuntimeWarning, match="left out"):
        assert [launch.form for launch in module._candidates(x, weight)] == ["dense"]
    monkeypatch.setattr(module, "run", run)
    single = torch.zeros(2, 512)
    assert module._candidates(single, weight) == launches(2, weight.facts)


def test_measured_calls_go_through_copies_that_no_cache_holds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from itertools import cycle
    from types import SimpleNamespace

    from tersor.kernels import codebook_linear_triton as module

    weight = weight_of(64, 512, 4, scales=torch.ones(64, 1))
    size = weight.words.numel() * 4
    card = SimpleNamespace(L2_cache_size=2 * size)
    monkeypatch.setattr(module.torch.cuda, "get_device_properties", lambda _: card)
    copies = module._copies(weight.words)
    assert len({t.data_ptr() for t in copies}) == 8
    assert all(torch.equal(t, weight.words) for t in copies)
    seen: list[int] = []
    monkeypatch.setattr(module, "codebook_linear_op", lambda *args: seen.append(args[1].data_ptr()))
    call = module._in_turn(cycle(copies), torch.zeros(1, 512), weight, None)
    for _ in range(16):
        call()
    assert seen == [t.data_ptr() for t in copies] * 2
