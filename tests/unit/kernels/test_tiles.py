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


def test_a_known_or_near_shape_is_not_measured() -> None:
    from tersor.kernels.tiles import choose

    def fails() -> object:
        raise AssertionError("measured")

    chosen: dict[tuple[int, ...], str] = {(512, 60): "fast"}
    assert not choose(chosen, (512, 60), ("slow", "fast"), fails)
    assert not choose(chosen, (512, 52), ("slow", "fast"), fails)
    assert chosen[512, 52] == "fast"
