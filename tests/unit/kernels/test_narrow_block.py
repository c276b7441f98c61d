"""Narrow blocks: the definition against float64, the op, and what is refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tersor.core.errors import ShapeError
from tersor.kernels.narrow_block import (
    BlockWeights,
    block_weights,
    narrow_block,
    narrow_block_op,
    narrow_block_reference,
)

pytest.importorskip("triton")  # before what imports it
from tests.unit.kernels.interpreted_narrow import NARROWER, SHAPES, drawn, image, off

DTYPES = [torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, *NARROWER])
def test_definition_against_float64(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    images, inp, height, width, out, stride, *between = shape
    block, made = drawn(1, inp, out, stride, dtype, *between)
    x = image(1, (images, inp, height, width), dtype)
    found = narrow_block(x, *made, stride)
    assert found.shape == (images, out, -(-height // stride), -(-width // stride))
    assert found.dtype == dtype
    assert off(x, block, found) <= 1


def test_any_strides_are_read() -> None:
    _, made = drawn(2, 16, 16, 1, torch.float16)
    x = image(2, (2, 16, 6, 5), torch.float16)
    wanted = narrow_block(x, *made, 1)
    assert wanted.is_contiguous(memory_format=torch.channels_last)
    for other in (x.contiguous(), torch.stack([x, x], -1)[..., 0]):
        assert not other.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(narrow_block(other, *made, 1), wanted)


def test_the_bias_of_a_shortcut_is_added() -> None:
    block, made = drawn(3, 16, 32, 2, torch.float16)
    extra = torch.linspace(-1, 1, 32)
    parts = (
        block.first.half(),
        block.first_bias.float(),
        block.second.half(),
        block.second_bias.float(),
    )
    found = block_weights(
        *parts,
        dtype=torch.float16,
        short=block.short.half(),
        short_bias=extra,  # type: ignore[union-attr]
    )
    assert torch.equal(found.second_bias, made.second_bias + extra)
    assert torch.equal(found.first, made.first)
    bare = block_weights(
        parts[0],
        None,
        parts[2],
        None,
        dtype=torch.float16,
        short=block.short.half(),  # type: ignore[union-attr]
    )
    assert not bare.first_bias.any()
    assert not bare.second_bias.any()


@pytest.mark.parametrize("stride", [1, 2])
def test_compilers_see_one_op(stride: int) -> None:
    _, made = drawn(4, 16, 32, stride, torch.float16)
    x = image(4, (2, 16, 5, 4), torch.float16)
    arguments = (x, *made, stride)
    torch.library.opcheck(
        narrow_block_op(), arguments, test_utils=("test_schema", "test_faketensor")
    )
    wanted = narrow_block_reference(*arguments)
    assert torch.equal(narrow_block_op()(*arguments), wanted)
    program = torch.export.export(Layer(made, stride), (x,))
    assert torch.ops.tersor.narrow_block.default in [n.target for n in program.graph.nodes]
    assert torch.equal(program.module()(x), wanted)


class Layer(torch.nn.Module):
    def __init__(self, made: BlockWeights, stride: int) -> None:
        super().__init__()
        self.made, self.stride = made, stride

    def forward(self, x: Tensor) -> Tensor:
        return narrow_block(x, *self.made, self.stride)


def weights(out: int = 16, inp: int = 16, **changed: Any) -> dict[str, Any]:
    return {
        "first": torch.zeros(out, inp, 3, 3), "first_bias": None, "second": torch.zeros(out, out, 3, 3),
        "second_bias": None, "dtype": torch.float16, **changed,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (weights(128, 128), "found 128 channels to 128 to 128, wanted at most 64 of each"),
        (weights(65, 16), "found 16 channels to 65 to 65, wanted at most 64"),
        (weights(first=torch.zeros(16, 16, 5, 5)), r"found weights \(16, 16, 5, 5\)"),
        (weights(second=torch.zeros(16, 32, 3, 3)), r"\(16, 32, 3, 3\) and a shortcut"),
        (weights(32, 16, short=torch.zeros(32, 16, 3, 3)), r"shortcut \(32, 16, 3, 3\), wanted"),
        (
            weights(first=torch.zeros(72, 16, 3, 3), second=torch.zeros(16, 72, 3, 3)),
            "found 16 channels to 72 to 16, wanted at most 64",
        ),
        (weights(32, 16), "found 16 channels to 32 without a shortcut's weight"),
        (weights(dtype=torch.float32), "found type torch.float32, wanted float16 or bfloat16"),
    ],
)
def test_weights_that_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        block_weights(**fields)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            lambda x, w, s: (x.float(), w, s),
            "found x in torch.float32 and weights in torch.float16",
        ),
        (lambda x, w, s: (x.bfloat16(), w, s), "found x in torch.bfloat16 and weights in"),
        (
            lambda x, w, s: (torch.cat([x, x], 1), w, s),
            r"found x \(2, 32, 5, 4\) for 16 channels to 32",
        ),
        (lambda x, w, s: (x[0], w, s), r"found x \(16, 5, 4\) for 16 channels"),
        (
            lambda x, w, s: (x, w._replace(second=w.second[:-9]), s),
            r"found weights \(144, 32\) and \(279, 32\) with a last bias of 32, wanted",
        ),
        (lambda x, w, _: (x, w, 3), "found stride 3 from 16 to 32 channels, wanted 1 or 2"),
        (
            lambda x, w, s: (x, w._replace(short=None), s),
            "found stride 2 .* shortcut's weight wherever",
        ),
        (
            lambda x, w, s: (x.new_empty(1).expand(2**15, 16, 64, 64), w, s),
            "wanted at most 2147483647 elements",
        ),
    ],
)
def test_calls_that_are_refused(
    changed: Callable[[Tensor, BlockWeights, int], tuple[Tensor, BlockWeights, int]], message: str
) -> None:
    _, made = drawn(5, 16, 32, 2, torch.float16)
    x, made, stride = changed(image(5, (2, 16, 5, 4), torch.float16), made, 2)
    with pytest.raises(ShapeError, match=message):
        narrow_block(x, *made, stride)
