"""``narrow_block`` on a CUDA device: which launches a shape gets, and the calls.

"images": one launch, whole images a program, the tensor between the convolutions read again by the program
that wrote it. "rows": one launch that goes down a few rows of several images, and reads every row once for
the three rows that it counts for. "tiles": a launch a convolution, whose programs need not wait for whole
images. Which one, and in which tile, is measured when a call is first made outside of a compiler
(``tiles``).
"""

from functools import cache
from typing import Any, Literal, NamedTuple

import triton
from torch import Tensor
from torch.library import triton_op, wrap_triton

from tersor.kernels.narrow_block_kernels_triton import (
    narrow_block_kernel,
    narrow_first_kernel,
    narrow_rows_kernel,
    narrow_second_kernel,
)
from tersor.kernels.tiles import choose, is_real

Form = Literal["images", "rows", "tiles"]


class Launch(NamedTuple):
    """How a block is computed.

    Attributes:
        form: One launch of whole images or of rows, or two of tiles.
        pixels: Of a tile; with "rows" one row of as many images as fit.
        taps: Neighbouring taps that are one product: 1 or 3; "rows": 3.
        images: Of a program ("images").
        warps: Of 32 threads.
        rows: Of the result, of a program ("rows").
        keeps: Weights stay in shared memory for all tiles of a program ("images").
    """

    form: Form
    pixels: int
    taps: int = 1
    images: int = 1
    warps: int = 4
    rows: int = 0
    keeps: bool = False


# The one to expect most of first.
_LAUNCHES: dict[int, tuple[Launch, ...]] = {
    16: (
        Launch("rows", 64, 3, rows=14), Launch("rows", 64, 3, rows=28), Launch("rows", 64, 3, rows=7),
        Launch("rows", 128, 3, rows=14, warps=8), Launch("rows", 32, 3, rows=14, warps=2),
        Launch("images", 128, 3, keeps=True), Launch("images", 128, 1, keeps=True),
        Launch("images", 64, 1, warps=2, keeps=True), Launch("images", 128, 3), Launch("tiles", 128, 3),
        Launch("tiles", 128, 1), Launch("tiles", 64, 1, warps=2),
    ),
    32: (
        Launch("images", 64, 1, keeps=True), Launch("images", 64, 3, keeps=True), Launch("images", 64, 1),
        Launch("images", 128, 1, keeps=True), Launch("images", 64, 1, warps=2, keeps=True),
        Launch("rows", 64, 3, rows=7), Launch("rows", 32, 3, rows=7, warps=2), Launch("tiles", 128, 1),
        Launch("tiles", 64, 1), Launch("tiles", 64, 3), Launch("tiles", 64, 1, warps=2),
    ),
    64: (
        Launch("images", 64, 1), Launch("images", 128, 1, 2), Launch("images", 128, 1, 2, 8),
        Launch("images", 64, 1, 1, 8), Launch("tiles", 64, 1), Launch("tiles", 128, 1),
        Launch("tiles", 128, 1, warps=8),
    ),
}  # fmt: skip
_RING = 4  # rows that a program of "rows" keeps between the convolutions
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
    if launch.form == "rows":
        return _rows(x, first, first_bias, second, second_bias, launch)
    sizes = (-(-height // stride), -(-width // stride))
    # Allocated as they lie, and turned at the end: compilers would copy a view that a kernel writes.
    y, z = (x.new_empty(images, *sizes, out) for _ in range(2))
    if isinstance(images, int) and not images:
        return z.permute(0, 3, 1, 2)
    shape = {"H": height, "W": width, "OH": sizes[0], "OW": sizes[1], "CI": inp, "CO": out}
    settings = {**shape, "S": stride, "TAPS": launch.taps}
    depths = [triton.next_power_of_2(launch.taps * n) for n in (inp, out)]
    branch = {"SHORT": short is not None}
    added = second if short is None else short  # a pointer that is not read
    if launch.form == "images":
        wrap_triton(_tiled(narrow_block_kernel, launch))[triton.cdiv(images, launch.images),](
            x, first, first_bias, y, second, second_bias, added, z, images,
            **settings, **branch, KP1=depths[0], KP2=depths[1], KEEP=launch.keeps,
        )  # fmt: skip
        return z.permute(0, 3, 1, 2)
    tiles = (triton.cdiv(images * sizes[0] * sizes[1], launch.pixels),)
    wrap_triton(_tiled(narrow_first_kernel, launch))[tiles](
        x, first, first_bias, y, images, **settings, KP=depths[0]
    )
    wrap_triton(_tiled(narrow_second_kernel, launch))[tiles](
        y, second, second_bias, x, added, z, images, **settings, **branch, KP=depths[1]
    )
    return z.permute(0, 3, 1, 2)


def _rows(
    x: Tensor,
    first: Tensor,
    first_bias: Tensor,
    second: Tensor,
    second_bias: Tensor,
    launch: Launch,
) -> Tensor:
    """The block without a stride or a weight in its shortcut."""
    images, channels, height, width = x.shape
    z = x.new_empty(images, height, width, channels)
    if isinstance(images, int) and not images:
        return z.permute(0, 3, 1, 2)
    padded = triton.next_power_of_2(width)
    together = launch.pixels // padded
    programs = triton.cdiv(images, together) * triton.cdiv(height, launch.rows)
    ring = x.new_empty(programs * _RING * launch.pixels * channels)
    wrap_triton(_tiled(narrow_rows_kernel, launch))[programs,](
        x, first, first_bias, ring, second, second_bias, z, images, H=height, W=width, WP=padded,
        C=channels, KP=triton.next_power_of_2(launch.taps * channels), G=together,
    )  # fmt: skip
    return z.permute(0, 3, 1, 2)


@cache
def _tiled(kernel: Any, launch: Launch) -> Any:
    """The kernel with one tile: a list of one, so that no compiler has anything to tune."""
    sizes = {"R": launch.rows} if launch.form == "rows" else {"BM": launch.pixels}
    if launch.form == "images":
        sizes["G"] = launch.images
    # One stage: a loop's loads are not moved; they would go around the first-level cache.
    config = triton.Config(sizes, num_warps=launch.warps, num_stages=1)
    return triton.autotune([config], key=[])(kernel)


def launches(x: Tensor, out: int, stride: int, *, is_plain: bool) -> tuple[Launch, ...]:
    """What is worth measuring for x, the one to expect most of first.

    Args:
        x: [b, inp, h, w].
        out: Channels of the result.
        stride: Of the block.
        is_plain: x itself is added.
    """
    height, width = x.shape[2:]
    has_rows = is_plain and stride == 1 and x.shape[1] == out

    def fits(launch: Launch) -> bool:
        is_row = launch.form == "rows"
        return not is_row or (has_rows and width <= launch.pixels and launch.rows <= height)

    return tuple(filter(fits, _LAUNCHES[out]))


def _key(x: Tensor, out: int, stride: int, *, is_plain: bool) -> _Key:
    """Both 16-bit types are equally fast."""
    return (*x.shape, out, stride, is_plain, str(x.device))


def launch_of(x: Tensor, out: int, stride: int, *, is_plain: bool) -> Launch:
    """How a call is computed: as was chosen for its shape, or else as is to be expected."""
    first = launches(x, out, stride, is_plain=is_plain)[0]
    if not isinstance(x.shape[0], int):  # open: any number of images
        return first
    return _CHOSEN.get(_key(x, out, stride, is_plain=is_plain), first)


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
    launch = launch_of(x, second.shape[1], stride, is_plain=short is None)
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
        found: Tensor = narrow_block_op(x, first, first_bias, second, second_bias, short, stride)
        return found

    out = second.shape[1]
    if is_real(x) and x.shape[0]:
        key = _key(x, out, stride, is_plain=short is None)
        choose(_CHOSEN, key, launches(x, out, stride, is_plain=short is None), call)
    return call()
