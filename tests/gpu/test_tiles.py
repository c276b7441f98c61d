"""Kernels of a shape that is chosen already, while others are chosen: zeros, and nothing that is compiled."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")  # before what imports it
from tersor.kernels import codebook_linear_triton as codebook
from tersor.kernels import conv8_triton, linear8_cuda, narrow_block_triton
from tersor.kernels.codebook_linear import codebook_linear
from tersor.kernels.conv8 import conv8
from tersor.kernels.linear8 import linear8
from tersor.kernels.narrow_block import narrow_block
from tersor.kernels.tiles import Chosen, choosing
from tests.unit.kernels import interpreted_narrow
from tests.unit.kernels.interpreted_codebook import weight_of

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]
Call = Callable[[], Tensor]


@pytest.fixture(scope="module", autouse=True)
def _card() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")


def codes(*shape: int) -> Tensor:
    return torch.randint(-127, 128, shape, dtype=torch.int8, device="cuda")


def linear() -> Call:
    x, weight, ones = codes(48, 96), codes(64, 96), torch.ones(64, device="cuda")
    return lambda: linear8(x, weight, ones, ones, torch.float16)


def convolution() -> Call:
    x = codes(2, 32, 9, 9).contiguous(memory_format=torch.channels_last)
    weight, ones = codes(64, 3, 3, 32), torch.ones(64, device="cuda")
    bounds = -float("inf"), float("inf")
    return lambda: conv8(x, weight, ones, ones[None], (2, 2), (1, 1), torch.bfloat16, *bounds)


def coded() -> Call:
    weight = weight_of(0, (64, 256), 4, ("none", "row"), 256)
    x = torch.randn(8, 256, device="cuda", dtype=torch.bfloat16)
    words, tables, planes, scales = (None if t is None else t.cuda() for t in weight[:4])
    assert words is not None
    return lambda: codebook_linear(x, words, tables, planes, scales, None, *weight[4:])


def block() -> Call:
    _, made = interpreted_narrow.drawn(0, 16, 32, 2, torch.float16)
    x = interpreted_narrow.image(0, (4, 16, 12, 12), torch.float16).cuda()
    parts = [None if t is None else t.cuda() for t in made]
    return lambda: narrow_block(x, *parts, 2)  # type: ignore[arg-type]


@pytest.mark.parametrize("made", [linear, convolution, coded, block])
def test_a_chosen_shape_is_not_computed_while_others_are_chosen(
    made: Callable[[], Call], monkeypatch: pytest.MonkeyPatch
) -> None:
    for home, name in (
        (linear8_cuda, "CHOICES"),
        (conv8_triton, "_CHOSEN"),
        (codebook, "_CHOSEN"),
        (narrow_block_triton, "_CHOSEN"),
    ):
        monkeypatch.setattr(home, name, {} if name == "CHOICES" else Chosen())
    call = made()
    with choosing():
        measured = call()
        empty = call()
    wanted = call()
    assert torch.equal(measured, wanted)
    assert wanted.any()
    assert not empty.any()
    assert empty.shape == wanted.shape
    assert empty.stride() == wanted.stride()
    assert empty.dtype == wanted.dtype
    assert empty.device == wanted.device
