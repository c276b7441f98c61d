"""8-bit linears on a CUDA device: one fused kernel, or the library's product and what follows it.

Both are measured at every shape when a call is first made outside of a compiler, by recorded calls, once
a process; the faster one is what later calls take. Where a compiler traces a library's product whose result stays
floats, what follows is in torch's own ops, so that it is fused to what comes next.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor
from torch.library import triton_op

from tersor.kernels.activations_triton import ACTIVATION_CODES
from tersor.kernels.epilogue import ACTIVATIONS, finished
from tersor.kernels.linear8_library import WAYS, Way, library_product, library_ways
from tersor.kernels.linear8_triton import (
    Key,
    choose_tile,
    finish,
    key_of,
    launch,
)
from tersor.kernels.tiles import is_exact, is_real, nearest, result

_FUSED = "fused"  # the way of the Triton kernel
_TRIES_MS = 4  # of device time a way, in each round
_ROUNDS = 3  # in turn: clocks change under load
_SURE = 0.97  # of the fused kernel's time, above which it stays


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """How one shape is computed, and why.

    Attributes:
        way: ``fused``, or a way of the library.
        ms: Way -> median time of one call, the least of three rounds; empty where there is one way, or a near
            shape's was taken.
        refused: Way -> what the library said.
    """

    way: str
    ms: dict[str, float] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)


CHOICES: dict[Key, Choice] = {}


@triton_op("tersor::linear8", mutates_args={})
def linear8_op(
    codes: Tensor,
    weight: Tensor,
    scale: Tensor,
    offset: Tensor,
    inverse: Tensor,
    dtype: torch.dtype,
    activation: int,
    to_codes: bool,
    zero: float,
    low: float,
    high: float,
) -> Tensor:
    """[rows, inp] x [out, inp] -> [rows, out], in the way that was chosen for the shape."""
    way = _way_of(codes, weight, dtype, activation)
    if way is None:
        return launch(
            codes, weight, scale, offset, inverse, dtype, activation, to_codes, zero, low, high
        )
    total = library_product(codes, weight, scale, offset, dtype, way)
    if way == "rowwise":  # scale and offset are in it
        return total
    if to_codes or activation or type(codes) is Tensor:
        return finish(total, scale, offset, inverse, dtype, activation, to_codes, zero, low, high)
    return finished(total, scale, offset, dtype, ACTIVATIONS[activation], None, zero, low, high)


def _way_of(codes: Tensor, weight: Tensor, dtype: torch.dtype, activation: int) -> Way | None:
    """The library's way; None: the fused kernel, also where nothing was measured."""
    rows: Any = codes.shape[0]
    if not isinstance(rows, int):  # open: any number of rows
        return None
    choice = CHOICES.get(key_of(codes, weight, dtype, activation))
    return next((w for w in WAYS if choice is not None and w == choice.way), None)


def choose_way(key: Key, ways: tuple[Way, ...], call: Callable[[], object]) -> bool:
    """Measure a shape's ways by recorded calls on the device, once a process, and keep the fastest.

    Args:
        key: What tells calls of different speeds apart.
        ways: Of the library, that take the shape.
        call: The call itself; it reads ``CHOICES``.

    Returns:
        Whether anything was measured.

    Raises:
        OutOfResources: The device has no room for any tile of the fused kernel.
    """
    if key in CHOICES and (CHOICES[key].ms or not is_exact()):
        return False
    CHOICES.pop(key, None)
    is_measured = choose_tile(key, call)  # no choice is known yet: it is the fused kernel's
    taken = _FUSED if not ways else None if is_measured or is_exact() else _near_way(key, ways)
    if taken is not None:
        CHOICES[key] = Choice(way=taken)
        return is_measured
    ms, refused = _measured(key, ways, call)
    best = min(ms, key=lambda w: ms[w])
    is_sure = ms[best] < _SURE * ms[_FUSED]
    CHOICES[key] = Choice(way=best if is_sure else _FUSED, ms=ms, refused=refused)
    return True


def _near_way(key: Key, ways: tuple[Way, ...]) -> str | None:
    """The way of the nearest measured shape that this one has as well."""
    near = nearest([k for k, choice in CHOICES.items() if choice.ms], key)
    return next((CHOICES[k].way for k in near if CHOICES[k].way in (_FUSED, *ways)), None)


def _measured(
    key: Key, ways: tuple[Way, ...], call: Callable[[], object]
) -> tuple[dict[str, float], dict[str, str]]:
    """The time of each way, and what the library said of those that it refused."""
    ms: dict[str, float] = {}
    refused: dict[str, str] = {}
    for way in (_FUSED, *ways) * _ROUNDS:
        if way in refused:
            continue
        CHOICES[key] = Choice(way=way)
        try:
            if way != _FUSED:
                call()  # what the library refuses is better known outside of a recording
            found = triton.testing.do_bench_cudagraph(call, rep=_TRIES_MS, return_mode="median")
            ms[way] = min(found, ms.get(way, found))
        except (RuntimeError, ValueError) as error:
            if way == _FUSED or isinstance(error, torch.OutOfMemoryError):
                raise
            refused[way] = str(error)
        finally:
            del CHOICES[key]
    return ms, refused


def linear8_cuda(
    codes: Tensor,
    weight: Tensor,
    scale: Tensor,
    offset: Tensor,
    dtype: torch.dtype,
    activation: str,
    inverse: Tensor | None,
    zero: float,
    low: int,
    high: int,
) -> Tensor:
    """As ``linear8.linear8``, by the kernel or the library."""
    rows = codes.reshape(-1, codes.shape[-1]).contiguous()
    limit = float(high) if dtype == torch.int8 or inverse is None else torch.finfo(dtype).max
    least = float(low) if dtype == torch.int8 or inverse is None else -limit
    kind = ACTIVATION_CODES[activation]

    call = partial(
        linear8_op, rows, weight, scale, offset, scale if inverse is None else inverse,
        dtype, kind, inverse is not None, zero, least, limit,
    )  # fmt: skip
    is_measured = True
    if is_real(rows):
        key = key_of(rows, weight, dtype, kind)
        is_last = inverse is None and activation == "none"
        ways = library_ways(rows, weight, dtype, is_last=is_last)
        is_measured = choose_way(key, ways, call)
    found = result(call, is_measured=is_measured)
    return found.reshape(*codes.shape[:-1], weight.shape[0])
