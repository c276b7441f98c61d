"""Which of several launches of a kernel is the fastest at a shape: measured on the device, once a process.

Torch's own compiler would tune a kernel at its first shape and keep that for every other one (torch 2.11),
so that kernels choose here, when a call is first made outside of a compiler.

Every tile of a shape is a kernel to compile, and prices build dozens of variants of a model whose layers are narrower:
those take what was measured at a near shape, and nothing is compiled here, as torch's compiler does that again in any
case, many at once in processes of its own. A build for a file measures shapes of its own.
"""

import math
import operator
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Generic, Literal, TypeVar

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources

from tersor.kernels.assembler import use_sound_assembler

use_sound_assembler()  # every kernel that chooses its launch imports this, before it is compiled
Key = TypeVar("Key", bound=Hashable)
Tile = TypeVar("Tile")
_TRIES_MS = 4  # of device time a tile
_SMALL = 16  # plain sizes up to which shapes are not near but equal: kernels, strides, flags
_NEAR, _WIDE = (
    1.0,
    3.0,
)  # doublings of each size between near shapes: in any call, and in a build for prices
_MODE: ContextVar[Literal["call", "near", "exact"]] = ContextVar("choosing", default="call")


class Size(int):
    """A size of a tensor, which may differ between near shapes also where it is small."""


class Chosen(dict[Key, Tile], Generic[Key, Tile]):
    """Tiles by shape, and for which of them they were measured at another one (``taken``)."""

    def __init__(self, *known: Mapping[Key, Tile]) -> None:
        super().__init__(*known)
        self.taken: set[Key] = set()


@contextmanager
def choosing(*, exactly: bool = False) -> Iterator[None]:
    """Run a module for its kernels' choices alone: calls of shapes that need no measurement give zeros.

    Args:
        exactly: Shapes are measured that have taken a near one's tile; otherwise near is up to a factor of
            eight in every size.
    """
    token = _MODE.set("exact" if exactly else "near")
    try:
        yield
    finally:
        _MODE.reset(token)


def is_exact() -> bool:
    """Whether every shape is to be measured."""
    return _MODE.get() == "exact"


def result(call: Callable[[], Tensor], *, is_measured: bool) -> Tensor:
    """What a call gives; zeros of its shape, with nothing compiled, where choices alone are wanted.

    Args:
        call: Of one op, with its arguments.
        is_measured: Its shape was just measured, so that its kernel is compiled already.
    """
    return results(lambda: (call(),), is_measured=is_measured)[0]


def results(call: Callable[[], tuple[Tensor, ...]], *, is_measured: bool) -> tuple[Tensor, ...]:
    """As ``result``, of an op that gives several tensors."""
    if is_measured or _MODE.get() == "call":
        return call()
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        known = [(tuple(t.shape), t.stride(), t.dtype, t.device) for t in call()]
    return tuple(_zeros(*k) for k in known)


def _zeros(
    shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    made = torch.empty_strided(shape, stride, dtype=dtype, device=device)
    bits = made.view(torch.uint8) if dtype.itemsize == 1 else made  # no device fills 8-bit floats
    bits.zero_()
    return made


def is_real(tensor: Tensor) -> bool:
    """Whether a call computes: not a compiler's, and not one that is being recorded."""
    is_traced = torch.compiler.is_compiling() or type(tensor) is not Tensor
    return not is_traced and not torch.cuda.is_current_stream_capturing()


def distance(key: Hashable, other: Hashable) -> float:
    """Doublings between the sizes of two keys: those above 16, and every ``Size``; infinite where they are not near.

    All else in them must be equal, tuples inside of them part by part.
    """
    if isinstance(key, tuple) and isinstance(other, tuple) and len(key) == len(other):
        return sum(distance(a, b) for a, b in zip(key, other, strict=True))
    if key == other:
        return 0.0
    if not (isinstance(key, int) and isinstance(other, int)) or min(key, other) < 1:
        return math.inf
    if min(key, other) <= _SMALL and not (isinstance(key, Size) and isinstance(other, Size)):
        return math.inf
    doublings = abs(math.log2(key / other))
    return doublings if doublings <= (_WIDE if _MODE.get() == "near" else _NEAR) else math.inf


def nearest(known: Iterable[Key], key: Key) -> Iterator[Key]:
    """Those of the known keys that are near, the nearest first."""
    found = [(distance(other, key), i, other) for i, other in enumerate(known)]
    return (other for far, _, other in sorted(found, key=lambda f: f[:2]) if far < math.inf)


def take_near(
    chosen: Chosen[Key, Tile],
    key: Key,
    tiles: Sequence[Tile],
    alike: Callable[[Tile, Tile], bool] = operator.eq,
) -> bool:
    """Give a shape the tile of the nearest measured one, or that of its own like it; whether there was one."""
    if is_exact():
        return False
    measured = [other for other in chosen if other not in chosen.taken]
    for other in nearest(measured, key):
        for tile in tiles:
            if alike(chosen[other], tile):
                chosen[key] = tile
                chosen.taken.add(key)
                return True
    return False


def choose(
    chosen: Chosen[Key, Tile],
    key: Key,
    tiles: Sequence[Tile],
    call: Callable[[], object],
    alike: Callable[[Tile, Tile], bool] = operator.eq,
) -> bool:
    """Measure a shape's tiles by recorded calls on the device, and keep the fastest.

    Where a near shape was measured (``distance``, ``choosing``), its tile is taken instead.

    Args:
        chosen: Shape -> tile; gets the fastest one. Nothing happens where the key is in it.
        key: What tells calls of different speeds apart.
        tiles: To choose from, at least one.
        call: The call itself; it reads ``chosen``.
        alike: Whether a tile of a near shape and one of this are the same but for what the shapes give.

    Returns:
        Whether anything was measured.

    Raises:
        OutOfResources: The device has no room for any tile.
    """
    if key in chosen and not (is_exact() and key in chosen.taken):
        return False
    if take_near(chosen, key, tiles, alike):
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
    chosen.taken.discard(key)
    return True
