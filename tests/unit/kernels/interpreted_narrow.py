"""Run by ``test_narrow_block_triton`` under TRITON_INTERPRET=1: every launch against float64.

Outputs are poisoned: torch fills what is empty with NaN. Errors go to standard output as JSON, each as a
share of the bound that follows from the formats.
"""

import json
from typing import NamedTuple

import torch
from torch import Tensor
from torch._library.triton import set_wrap_triton_enabled
from torch.nn.functional import conv2d

from tersor.kernels.narrow_block import BlockWeights, block_weights
from tersor.kernels.narrow_block_triton import Launch, run

# A unit in the last place, halved: what one rounding moves a number by, relative to it.
HALF_UNIT = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
SMALL = {torch.float16: 2.0**-25, torch.bfloat16: 0.0}  # below its normal numbers
# A product and its sum in float32; tensor cores cut instead of rounding.
ADDED = 2.0**-22


class Block(NamedTuple):
    """The weights as convolutions have them, in float64, rounded as the kernels' are."""

    first: Tensor
    first_bias: Tensor
    second: Tensor
    second_bias: Tensor
    short: Tensor | None
    stride: int


def drawn(
    seed: int, inp: int, out: int, stride: int, dtype: torch.dtype, between: int = 0
) -> tuple[Block, BlockWeights]:
    """Weights as trained ones are, about as large as keeps a signal's size."""
    generator = torch.Generator().manual_seed(seed)

    def some(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(dtype)

    between = between or out
    sides = (between, inp), (out, between)
    first, second = (some(*side, 3, 3, scale=(9 * side[1]) ** -0.5) for side in sides)
    biases = [torch.randn(n, generator=generator) for n in (between, out)]
    has_short = stride != 1 or inp != out
    short = some(out, inp, 1, 1, scale=inp**-0.5) if has_short else None
    made = block_weights(first, biases[0], second, biases[1], dtype=dtype, short=short)
    exact = Block(
        first.double(), biases[0].double(), second.double(), biases[1].double(),
        None if short is None else short.double(), stride,
    )  # fmt: skip
    return exact, made


def off(x: Tensor, block: Block, found: Tensor) -> float:
    """The largest error over its bound; infinite where an output was not written."""
    unit, small = HALF_UNIT[x.dtype], SMALL[x.dtype]
    wide = x.double()
    y = conv2d(wide, block.first, block.first_bias, block.stride, 1).relu()
    sums = conv2d(wide.abs(), block.first.abs(), block.first_bias.abs(), block.stride, 1)
    y_error = ADDED * (9 * x.shape[1] + 2) * sums
    y_error = y_error + unit * (y + y_error) + small
    added = wide if block.short is None else conv2d(wide, block.short, None, block.stride)
    added_sums = (
        wide.abs()
        if block.short is None
        else conv2d(wide.abs(), block.short.abs(), None, block.stride)
    )
    wanted = (conv2d(y, block.second, block.second_bias, 1, 1) + added).relu()
    carried = conv2d(y_error, block.second.abs(), None, 1, 1)
    sums = conv2d(y, block.second.abs(), block.second_bias.abs(), 1, 1) + added_sums + carried
    error = carried + ADDED * (9 * y.shape[1] + x.shape[1] + 3) * sums
    bound = error + unit * (wanted + error) + small
    given = found.double()
    difference = torch.where(given.isfinite(), (given - wanted).abs(), torch.inf)
    return float((difference / bound).max()) if found.numel() else 0.0


def image(seed: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator).to(dtype)
    return x.contiguous(memory_format=torch.channels_last)


# Images, inputs, height, width, outputs, stride: sizes that divide by nothing, one pixel, no images.
SHAPES = (
    (3, 16, 5, 7, 16, 1), (2, 16, 7, 6, 32, 2), (1, 32, 1, 1, 32, 1), (2, 32, 4, 3, 16, 1),
    (0, 16, 4, 4, 16, 1), (2, 64, 3, 3, 64, 1), (1, 64, 5, 2, 64, 2),
)  # fmt: skip
# And channels between the convolutions: fewer, more, such as are filled up, here and at both ends.
NARROWER = (
    (2, 32, 5, 4, 32, 1, 16), (1, 16, 5, 7, 64, 2, 24), (2, 64, 3, 3, 64, 1, 40), (2, 16, 4, 4, 16, 1, 5),
    (1, 16, 3, 5, 16, 1, 32), (2, 24, 5, 4, 24, 1, 24), (1, 8, 4, 7, 40, 2, 16), (2, 48, 3, 3, 24, 1, 64),
    (1, 3, 3, 4, 5, 2, 7), (1, 1, 2, 3, 1, 1, 1),
)  # fmt: skip
LAUNCHES = (
    Launch("images", 16), Launch("images", 32, 2), Launch("images", 16, 2, keeps=True),
    Launch("tiles", 16), Launch("tiles", 64),
)  # fmt: skip


def every_form() -> dict[str, float]:
    """All launches at all shapes, in float16: the interpreter multiplies the bits of bfloat16 as integers."""
    found = {}
    for seed, shape in enumerate((*SHAPES, *NARROWER)):
        images, inp, height, width, out, stride, *between = shape
        block, made = drawn(seed, inp, out, stride, torch.float16, *between)
        x = image(seed, (images, inp, height, width), torch.float16)
        for launch in LAUNCHES:
            with set_wrap_triton_enabled(False):
                result = run(x, *made, stride, launch)  # type: ignore[arg-type]
            assert result.is_contiguous(memory_format=torch.channels_last)
            found[f"{shape} {launch}"] = off(x, block, result)
    return found


if __name__ == "__main__":
    torch.use_deterministic_algorithms(True)
    print(json.dumps(every_form()))  # noqa: T201
