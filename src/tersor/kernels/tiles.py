"""Which of several launches of a kernel is the fastest at a shape: measured on the device, once a process.

Torch's own compiler would tune a kernel at its first shape and keep that for every other one (torch 2.11),
so that kernels choose here, when a call is first made outside of a compiler.

A tile takes a second or two to compile, and most shapes need it compiled anew. Prices build dozens of variants
of a model whose layers are a little narrower: such a shape takes what was measured at a near one, and its kernel is not
compiled here at all, as the compiler does it again in any case, many at once in processes of their own.
"""

from collections.abc import Callable, Hashable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

import torch
import triton
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.runtime.errors import OutOfResources

Key = TypeVar("Key", bound=Hashable)
Tile = TypeVar("Tile")
_TRIES_MS = 4  # of device time a tile
_SMALL = 16  # sizes up to which shapes are not near but equal
_IS_CHOOSING: ContextVar[bool] = ContextVar("is_choosing", default=False)


@contextmanager
def choosing() -> Iterator[None]:
    """Run a module for its kernels' choices alone: calls of shapes that need no measurement give zeros."""
    token = _IS_CHOOSING.set(True)
    try:
        yield
    finally:
        _IS_CHOOSING.reset(token)


def result(call: Callable[[], Tensor], *, is_measured: bool) -> Tensor:
    """What a call gives; zeros of its shape, with nothing compiled, where choices alone are wanted.

    Args:
        call: Of one op, with its arguments.
        is_measured: Its shape was just measured, so that its kernel is compiled already.
    """
    if is_measured or not _IS_CHOOSING.get():
        return call()
    with FakeTensorMode(allow_non_fake_inputs=True):
        like = call()
        shape, stride, dtype, device = tuple(like.shape), like.stride(), like.dtype, like.device
    return torch.empty_strided(shape, stride, dtype=dtype, device=device).zero_()


def is_real(tensor: Tensor) -> bool:
    """Whether a call computes: not a compiler's, and not one that is being recorded."""
    is_traced = torch.compiler.is_compiling() or type(tensor) is not Tensor
    return not is_traced and not torch.cuda.is_current_stream_capturing()


def near_shape(key: Hashable) -> Hashable:
    """A key with every size above 16 rounded up to a power of two, also inside of tuples."""
    if isinstance(key, tuple):
        return tuple(near_shape(part) for part in key)
    if isinstance(key, int) and not isinstance(key, bool) and key > _SMALL:
        return 1 << (key - 1).bit_length()
    return key


def take_near(chosen: MutableMapping[Key, Tile], key: Key, tiles: Sequence[Tile]) -> bool:
    """Give a shape the tile of a measured one near it, if it is one of its own; whether there was one."""
    near = near_shape(key)
    for other, tile in chosen.items():
        if tile in tiles and near_shape(other) == near:
            chosen[key] = tile
            return True
    return False


def choose(
    chosen: MutableMapping[Key, Tile], key: Key, tiles: Sequence[Tile], call: Callable[[], object]
) -> bool:
    """Measure a shape's tiles by recorded calls on the device, and keep the fastest.

    A shape whose sizes lie between the same powers of two as a measured one's takes its tile, if it is one of
    its own: nothing is compiled but that.

    Args:
        chosen: Shape -> tile; gets the fastest one. Nothing happens where the key is in it.
        key: What tells calls of different speeds apart.
        tiles: To choose from, at least one.
        call: The call itself; it reads ``chosen``.

    Returns:
        Whether anything was measured.

    Raises:
        OutOfResources: The device has no room for any tile.
    """
    if key in chosen or take_near(chosen, key, tiles):
        return False
    times: dict[Tile, float] = {}
    problem = None
    for tile in tiles:
        chosen[key] = tile
        try:
            times[tile] = triton.testing.do_bench_cudagraph(
                call, rep=_TRIES_MS, return_mode="median"
            )
        except OutOfResources as error:  # shared memory that this card has less of
            problem = error
        finally:
            del chosen[key]
    if problem is not None and not times:
        raise problem
    chosen[key] = min(times, key=lambda t: times[t])
    return True
