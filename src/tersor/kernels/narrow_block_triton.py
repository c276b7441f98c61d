"""``narrow_block`` on a CUDA device: which launches a shape gets, and the calls.

"images": one launch, whole images a program, the tensor between the convolutions read again by the program
that wrote it. "tiles": a launch a convolution, whose programs need not wait for whole images. Which one,
and in which tile, is measured when a call is first made outside of a compiler (``tiles``).
"""

from functools import cache
from typing import Any, Literal, NamedTuple

import torch
import triton
from torch import Tensor
from torch.library import triton_op, wrap_triton

from tersor.kernels.narrow_block_kernels_triton import (
    narrow_block_kernel,
    narrow_first_kernel,
    narrow_second_kernel,
)
from tersor.kernels.tiles import choose, is_real

Form = Literal["images", "tiles"]


class Launch(NamedTuple):
    """How a block is computed.

    Attributes:
        form: One launch of whole images, or two of tiles.
        pixels: Of a tile.
        taps: Neighbouring taps that are one product: 1 or 3.
        images: Of a program ("images").
        warps: Of 32 threads.
    """

    form: Form
    pixels: int
    taps: int = 1
    images: int = 1
    warps: int = 4


# The one to expect most of first.
_LAUNCHES: dict[int, tuple[Launch, ...]] = {
    16: (
        Launch("images", 128, 3), Launch("images", 128, 1), Launch("images", 64, 1, 1, 2),
        Launch("images", 128, 1, 1, 8), Launch("tiles", 128, 3), Launch("tiles", 128, 1),
        Launch("tiles", 64, 1, 1, 2), Launch("tiles", 256, 1, 1, 8),
    ),
    32: (
        Launch("images", 64, 1), Launch("images", 128, 1), Launch("images", 64, 3),
        Launch("images", 64, 1, 1, 2), Launch("tiles", 128, 1), Launch("tiles", 64, 1),
        Launch("tiles", 128, 3), Launch("tiles", 64, 1, 1, 2),
    ),
    64: (
        Launch("images", 64, 1), Launch("images", 128, 1, 2), Launch("images", 128, 1, 2, 8),
        Launch("tiles", 64, 1), Launch("tiles", 128, 1), Launch("tiles", 128, 1, 1, 8),
    ),
}  # fmt: skip
_Key = tuple[Any, ...]
_CHOSEN: dict[_Key, Launch] = {}


def run(
    x: Tensor,
    first: Tensor,
    first_bias: Tensor,
    second: Tensor,
    second_bias: Tensor,
    short: Tensor | None,
    stride: int,
    launch: Launch,
) -> Tensor:
    """The block as a launch has it; as ``narrow_block.narrow_block`` otherwise, of x with channels last."""
    images, inp, height, width = x.shape
    out = second.shape[1]
    sizes = (-(-height // stride), -(-width // stride))
    y, z = (
        x.new_empty(images, *sizes, out).permute(0, 3, 1, 2) for _ in range(2)
    )  # channels last
    if isinstance(images, int) and not images:
        return z
    shape = {"H": height, "W": width, "OH": sizes[0], "OW": sizes[1], "CI": inp, "CO": out}
    settings = {**shape, "S": stride, "TAPS": launch.taps}
    depths = [triton.next_power_of_2(launch.taps * n) for n in (inp, out)]
    branch = {"SHORT": short is not None}
    added = second if short is None else short  # a pointer that is not read
    if launch.form == "images":
        wrap_triton(_tiled(narrow_block_kernel, launch))[triton.cdiv(images, launch.images),](
            x, first, first_bias, y, second, second_bias, added, z, images,
            **settings, **branch, KP1=depths[0], KP2=depths[1],
        )  # fmt: skip
        return z
    tiles = (triton.cdiv(images * sizes[0] * sizes[1], launch.pixels),)
    wrap_triton(_tiled(narrow_first_kernel, launch))[tiles](
        x, first, first_bias, y, images, **settings, KP=depths[0]
    )
    wrap_triton(_tiled(narrow_second_kernel, launch))[tiles](
        y, second, second_bias, x, added, z, images, **settings, **branch, KP=depths[1]
    )
    return z


@cache
def _tiled(kernel: Any, launch: Launch) -> Any:
    """The kernel with one tile: a list of one, so that no compiler has anything to tune."""
    sizes = {"BM": launch.pixels}
    if launch.form == "images":
        sizes["G"] = launch.images
    # One stage: a loop's loads are not moved; they would go around the first-level cache.
    config = triton.Config(sizes, num_warps=launch.warps, num_stages=1)
    return triton.autotune([config], key=[])(kernel)


def launches(out: int) -> tuple[Launch, ...]:
    """What is worth measuring for a number of channels, the one to expect most of first."""
    return _LAUNCHES[out]


def _key(x: Tensor, out: int, stride: int) -> _Key:
    """Both 16-bit types are equally fast."""
    return (*x.shape, out, stride, str(x.device))


def launch_of(x: Tensor, out: int, stride: int) -> Launch:
    """How a call is computed: as was chosen for its shape, or else as is to be expected."""
    if not all(isinstance(n, int) for n in x.shape):  # open: any number of images
        return launches(out)[0]
    return _CHOSEN.get(_key(x, out, stride), launches(out)[0])


@triton_op("tersor::narrow_block", mutates_args={})
def narrow_block_op(
    x: Tensor,
    first: Tensor,
    first_bias: Tensor,
    second: Tensor,
    second_bias: Tensor,
    short: Tensor | None,
    stride: int,
) -> Tensor:
    """[b, inp, h, w] with channels last; on other devices than CUDA the reference."""
    if not x.is_cuda:
        from tersor.kernels.narrow_block import narrow_block_reference

        return narrow_block_reference(x, first, first_bias, second, second_bias, short, stride)
    launch = launch_of(x, second.shape[1], stride)
    return run(x, first, first_bias, second, second_bias, short, stride, launch)


def narrow_block_cuda(
    x: Tensor,
    first: Tensor,
    first_bias: Tensor,
    second: Tensor,
    second_bias: Tensor,
    short: Tensor | None,
    stride: int,
) -> Tensor:
    """As ``narrow_block.narrow_block``, by the kernels."""

    def call() -> Tensor:
        found: Tensor = narrow_block_op(
            x, first, first_bias, second, second_bias, short, stride
        )
        return found

    out = second.shape[1]
    if is_real(x) and x.shape[0]:
        choose(_CHOSEN, _key(x, out, stride), launches(out), call)
    return call()


