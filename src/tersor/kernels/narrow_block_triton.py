"""``narrow_block`` on a CUDA device: which launches a shape gets, and the calls.

"images": one launch, whole images a program, the tensor between the convolutions read again by the program
that wrote it. "tiles": a launch a convolution, whose programs need not wait for whole images. Which one,
and in which tile, is measured when a call is first made outside of a compiler (``tiles``).
"""

from functools import cache, partial
from typing import Any, Literal, NamedTuple

import triton
from torch import Tensor
from torch.library import triton_op, wrap_triton

from tersor.kernels.narrow_block_kernels_triton import (
    narrow_block_kernel,
    narrow_first_kernel,
    narrow_second_kernel,
)
from tersor.kernels.tiles import Chosen, choose, is_real, result

Form = Literal["images", "tiles"]


class Launch(NamedTuple):
    """How a block is computed.

    Attributes:
        form: One launch of whole images, or two of tiles.
        pixels: Of a tile.
        images: Of a program ("images").
        warps: Of 32 threads.
        keeps: Weights stay in shared memory for all tiles of a program ("images").
    """

    form: Form
    pixels: int
    images: int = 1
    warps: int = 4
    keeps: bool = False


# By the channels of the result: what is the fastest at a shape of ResNet-20 (H200), or within 7 % of it at
# all of them; docs/kernels/narrow-block.md says what is not here.
_LAUNCHES: dict[int, tuple[Launch, ...]] = {
    16: (Launch("tiles", 128), Launch("images", 128, keeps=True)),
    32: (Launch("tiles", 128), Launch("images", 128, keeps=True), Launch("images", 64, keeps=True)),
    64: (Launch("tiles", 64), Launch("images", 128, 2), Launch("images", 128, 2, 8)),
}
_TAPS = 9
_Key = tuple[Any, ...]
_CHOSEN: Chosen[_Key, Launch] = Chosen()


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
    images, real, height, width = x.shape
    inp, between, out = first.shape[0] // _TAPS, first.shape[1], second.shape[1]
    written = second_bias.shape[0]
    sizes = (-(-height // stride), -(-width // stride))
    # Allocated as they lie, and turned at the end: compilers would copy a view that a kernel writes.
    y, z = (x.new_empty(images, *sizes, n) for n in (between, written))
    if isinstance(images, int) and not images:
        return z.permute(0, 3, 1, 2)
    shape = {"H": height, "W": width, "OH": sizes[0], "OW": sizes[1], "NI": real, "CI": inp}
    settings = {**shape, "CM": between, "S": stride}
    branch = {"NO": written, "CO": out, "SHORT": short is not None}
    added = second if short is None else short  # a pointer that is not read
    if launch.form == "images":
        wrap_triton(_tiled(narrow_block_kernel, launch))[triton.cdiv(images, launch.images),](
            x, first, first_bias, y, second, second_bias, added, z, images,
            **settings, **branch, KEEP=launch.keeps,
        )  # fmt: skip
        return z.permute(0, 3, 1, 2)
    tiles = (triton.cdiv(images * sizes[0] * sizes[1], launch.pixels),)
    wrap_triton(_tiled(narrow_first_kernel, launch))[tiles](
        x, first, first_bias, y, images, **settings
    )
    wrap_triton(_tiled(narrow_second_kernel, launch))[tiles](
        y, second, second_bias, x, added, z, images, **settings, **branch
    )
    return z.permute(0, 3, 1, 2)


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
    """What is worth measuring for a number of channels of the result, the one to expect most of first."""
    return _LAUNCHES[out]


def _key(x: Tensor, channels: tuple[int, int], stride: int, *, is_plain: bool) -> _Key:
    """Both 16-bit types are equally fast; ``channels``: between the convolutions, and of the result."""
    return (*x.shape, *channels, stride, is_plain, str(x.device))


def launch_of(x: Tensor, channels: tuple[int, int], stride: int, *, is_plain: bool) -> Launch:
    """How a call is computed: as was chosen for its shape, or else as is to be expected."""
    first = launches(channels[1])[0]
    images: Any = x.shape[0]
    if not isinstance(images, int):  # open: any number of images
        return first
    return _CHOSEN.get(_key(x, channels, stride, is_plain=is_plain), first)


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
    channels = first.shape[1], second.shape[1]
    launch = launch_of(x, channels, stride, is_plain=short is None)
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
    arguments = x, first, first_bias, second, second_bias, short, stride
    call: partial[Tensor] = partial(narrow_block_op, *arguments)
    if not is_real(x) or not x.shape[0]:
        return call()
    channels = first.shape[1], second.shape[1]
    key = _key(x, channels, stride, is_plain=short is None)
    return result(call, is_measured=choose(_CHOSEN, key, launches(channels[1]), call))
