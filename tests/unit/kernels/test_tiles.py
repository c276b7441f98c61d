"""What a kernel's call gives while launches are chosen: zeros of its shape where nothing has to be measured."""

from collections.abc import Callable
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


def block_call(images: int) -> Callable[[], Tensor]:
    from tersor.kernels.narrow_block_triton import narrow_block_op
    from tests.unit.kernels.interpreted_narrow import drawn, image

    _, made = drawn(0, 16, 32, 2, torch.float16)
    x = image(0, (images, 16, 9, 9), torch.float16)
    return lambda: narrow_block_op(x, *made, 2)


def test_zeros_of_the_shape_and_layout_without_a_computation() -> None:
    from tersor.kernels.tiles import choosing, result

    call = block_call(3)
    real = call()
    assert torch.equal(result(call, is_measured=False), real)
    with choosing():
        empty = result(call, is_measured=False)
        assert torch.equal(result(call, is_measured=True), real)
    assert not empty.any()
    assert empty.shape == real.shape
    assert empty.stride() == real.stride()
    assert empty.dtype == real.dtype
    assert type(empty) is Tensor
    assert torch.equal(result(call, is_measured=False), real)


def test_an_error_ends_the_choosing() -> None:
    from tersor.kernels.tiles import choosing, result

    call = block_call(1)
    with pytest.raises(ValueError, match="stop"), choosing():
        raise ValueError("stop")
    assert result(call, is_measured=False).any()


def test_a_known_or_near_shape_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    import triton

    from tersor.kernels.tiles import Chosen, choose, choosing

    def fails() -> object:
        raise AssertionError("measured")

    monkeypatch.setattr(triton.testing, "do_bench_cudagraph", lambda call, **_: call())
    tiles = ("slow", "fast")
    chosen: Chosen[tuple[int, ...], str] = Chosen({(512, 60): "fast", (512, 100): "slow"})
    assert not choose(chosen, (512, 60), tiles, fails)
    assert not choose(chosen, (512, 52), tiles, fails)
    assert not choose(chosen, (512, 90), tiles, fails)
    assert (chosen[512, 52], chosen[512, 90]) == ("fast", "slow")
    assert chosen.taken == {(512, 52), (512, 90)}
    with choosing():
        assert not choose(chosen, (512, 480), tiles, fails)
        assert chosen[512, 480] == "slow"
    with pytest.raises(AssertionError, match="measured"):
        choose(Chosen({(512, 60): "fast"}), (512, 480), tiles, fails)
    with choosing(exactly=True), pytest.raises(AssertionError, match="measured"):
        choose(chosen, (512, 52), tiles, fails)
    with choosing(exactly=True):
        assert not choose(chosen, (512, 60), tiles, fails)


def test_what_is_near() -> None:
    from tersor.kernels.tiles import Size, choosing, distance

    assert distance((4096, (3, True), "int8"), (2048, (3, True), "int8")) == 1
    for key, other in (
        ((4096, 3), (4096, 5)),
        ((64, "a"), (64, "b")),
        ((64, 1), (64,)),
        ((64,), (0,)),
    ):
        assert distance(key, other) == float("inf")
    assert distance((Size(8), Size(64)), (Size(12), Size(64))) == pytest.approx(0.585, abs=1e-3)
    assert distance(512, 64) == float("inf")
    with choosing():
        assert distance(512, 64) == 3
        assert distance(512, 63) == float("inf")


def test_a_convolution_takes_the_like_of_a_near_tile() -> None:
    from tersor.kernels import conv8_triton as module
    from tersor.kernels.tiles import Chosen, choose, choosing

    def fails() -> object:
        raise AssertionError("measured")

    def key(out: int, inp: int) -> tuple[object, ...]:
        codes = torch.empty(512, 14, 14, inp, dtype=torch.int8, device="meta")
        weight = torch.empty(out, 3, 3, inp, dtype=torch.int8, device="meta")
        offset = torch.empty(1, out, device="meta")
        return module._key(codes, weight, offset, None, (1, 1), (1, 1), torch.int8, [])

    wide, narrow = (module.tiles(100_352, n, (3, 3), n) for n in (32, 13))
    chosen: Chosen[tuple[object, ...], module.Tile] = Chosen({key(32, 32): wide[1]})
    assert wide[1].pixels == 256
    with choosing():
        assert not choose(chosen, key(13, 13), narrow, fails, module._alike)
    assert chosen[key(13, 13)] == narrow[1]
    assert narrow[1] != wide[1]
