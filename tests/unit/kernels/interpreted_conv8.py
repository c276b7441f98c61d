"""The kernels of 8-bit convolutions under Triton's interpreter; prints how far off each case is.

Run as a program with TRITON_INTERPRET=1: the interpreter is chosen when the kernels are defined.
"""

import json
from typing import Any

import torch

from tersor.kernels import conv8_kernels_triton as kernels
from tersor.kernels.conv8 import border_offsets, conv8_reference
from tersor.kernels.conv8_triton import Tile, launched

INT8, FP8 = torch.int8, torch.float8_e4m3fn


class Sized:
    """A kernel with its tile, as torch.compile is given it."""

    def __init__(self, kernel: Any, **sizes: int) -> None:
        self.kernel, self.sizes = kernel, sizes

    def __getitem__(self, grid: Any) -> Any:
        def call(*args: Any, **settings: Any) -> None:
            self.kernel[grid(self.sizes)](*args, **settings, **self.sizes)

        return call


def drawn(shape: tuple[int, ...], kind: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    if kind == INT8:
        return torch.randint(-128, 128, shape, generator=generator).to(INT8)
    return torch.randn(shape, generator=generator).to(kind)


def case(  # noqa: PLR0913, PLR0917
    n: int = 2, inp: int = 16, size: tuple[int, int] = (5, 6), out: int = 20,
    kernel: tuple[int, int] = (3, 3), stride: tuple[int, int] = (1, 1), padding: tuple[int, int] = (1, 1),
    kind: torch.dtype = INT8, to: torch.dtype = torch.float32, zero: int = 0,
    residual: torch.dtype | None = None, inner: bool = False, relu: bool = False,
    tile: tuple[int, ...] = (16, 32, 32, 4, 2, 1),
) -> dict[str, Any]:  # fmt: skip
    generator = torch.Generator().manual_seed(n + inp + out)
    codes = drawn((n, *size, inp), kind, generator)
    weight = drawn((out, *kernel, inp), kind, generator)
    unit = 20.0 if to in (INT8, FP8) else 1.0  # a result's codes for 1
    fan = inp * kernel[0] * kernel[1]
    scale = (torch.rand(out, generator=generator) + 0.1) * unit / fan**0.5
    scale = scale / 5000 if kind == INT8 else scale
    bias = torch.randn(out, generator=generator) * unit
    offset = border_offsets(weight, scale, zero, bias, padding)
    sides = [
        (s + 2 * p - k) // t + 1 for s, p, k, t in zip(size, padding, kernel, stride, strict=True)
    ]
    other = None
    if residual is not None:
        other = drawn((n, *sides, out), INT8, generator)
        other = other if residual == INT8 else (other.float() / 50).to(residual)
    low, high = {INT8: (-100.0, 90.0), FP8: (-448.0, 448.0)}.get(to, (-1e30, 1e30))
    low = 0.0 if relu else low
    # No factors that put many values exactly between two codes: those may fall to either side.
    bounds = (-30.0, 40.0, 0.47) if inner else ()
    found = launched(
        Sized(kernels.conv8_kernel, BM=tile[0], BN=tile[1], BK=tile[2], GROUP=8),
        Sized(kernels.conv8_finish_kernel, BM=16, BN=16), Tile(*tile), codes, weight, scale, offset,
        other, stride, padding, to, (low, high), (0.2531, 1.5), bounds,
    )  # fmt: skip
    wanted = conv8_reference(
        codes.permute(0, 3, 1, 2), weight, scale, offset, stride, padding, to, low, high,
        None if other is None else other.permute(0, 3, 1, 2), 0.2531, 1.5, bounds or None,
    ).permute(0, 2, 3, 1)  # fmt: skip
    off = (found.float() - wanted.float()).abs()
    return {
        "shape": found.shape == wanted.shape,
        "codes": to == INT8,
        "inner": inner,
        "largest": float(off.max()),
        "share": float((off > 0).float().mean()),
        "size": float(wanted.float().abs().max()),
    }


def main() -> None:
    """All cases: ways to walk over the inner dimension, types, endings, shares of the sums."""
    # What an output that is not written holds: the next call would find the last one's results.
    real = torch.empty

    def poisoned(*args: Any, **settings: Any) -> torch.Tensor:
        made = real(*args, **settings)
        return made.fill_(77 if made.dtype == INT8 else 3e4 if made.dtype != FP8 else 300)

    torch.empty = poisoned  # type: ignore[assignment]
    split = (16, 32, 32, 4, 2, 3)
    point: dict[str, Any] = {"kernel": (1, 1), "padding": (0, 0)}
    cases: dict[str, dict[str, Any]] = {
        "point": {**point, "inp": 40},
        "point even": {**point, "inp": 64, "out": 33},
        "point strided": {**point, "inp": 64, "stride": (2, 2), "size": (7, 5)},
        "point zero": {**point, "zero": -128, "to": INT8},
        "taps": {"inp": 32},
        "taps strided": {"inp": 64, "stride": (2, 2), "size": (7, 8)},
        "lines": {"inp": 16},
        "lines odd": {"inp": 5, "size": (4, 9), "stride": (2, 1)},
        "stem": {"inp": 4, "kernel": (7, 7), "stride": (2, 2), "padding": (3, 3), "size": (11, 12)},
        "wide": {"inp": 32, "kernel": (1, 5), "padding": (0, 2)},
        "no padding": {"inp": 32, "padding": (0, 0)},
        "borders": {"inp": 32, "zero": -128},
        "borders strided": {"inp": 16, "zero": 3, "stride": (2, 2), "size": (8, 7)},
        "codes": {"to": INT8, "relu": True},
        "half": {"to": torch.float16, "relu": True},
        "residual": {"inp": 32, "residual": INT8},
        "residual float": {"inp": 32, "residual": torch.bfloat16, "to": INT8},
        "inner": {"inp": 32, "residual": INT8, "inner": True, "to": INT8},
        "inner alone": {"inp": 32, "inner": True},
        "shares": {"inp": 64, "tile": split},
        "shares, all": {"inp": 64, "tile": split, "zero": -128, "residual": INT8, "to": INT8},
        "shares fp8": {"inp": 64, "tile": split, "kind": FP8},
        "fp8": {
            "inp": 32,
            "kind": FP8,
            "relu": True,
        },  # to codes: the interpreter rounds them otherwise
        "one pixel": {"n": 1, "size": (1, 1), "inp": 32, "out": 7},
    }
    print(json.dumps({name: case(**settings) for name, settings in cases.items()}))  # noqa: T201


if __name__ == "__main__":
    main()
