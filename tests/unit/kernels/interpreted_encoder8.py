"""Run by ``test_narrow_linear8_triton`` under TRITON_INTERPRET=1: layers on 8-bit codes against their definition.

Outputs are poisoned. For every case the largest error of the floats, as a share of what the formats allow, the largest
distance of a code, and the share of codes that differ at all go to standard output as JSON. ``tests/gpu`` runs the same cases on a card.
"""

import json
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._library.triton import set_wrap_triton_enabled

from tersor.kernels.narrow_linear8 import Layer, linear8_weights, narrow_linear8_reference
from tersor.kernels.narrow_linear8_triton import run
from tersor.kernels.narrow_linear_triton import Parts, Tile, Written, launch
from tests.unit.kernels.interpreted_encoder import (
    FIRST_EPS,
    LAST_EPS,
    LinearCase,
    device,
    drawn,
    linear_parts,
    share,
)

INT8, FLOAT8 = torch.int8, torch.float8_e4m3fn


class Case(NamedTuple):
    """Rows, inputs and outputs of a layer, what it reads and writes, and what is around it."""

    rows: int
    inp: int
    out: int
    read: torch.dtype = INT8
    codes: torch.dtype | None = INT8
    first: bool = False
    added: bool = True
    last: bool = True
    activation: str = "none"
    is_written: bool = True
    half: torch.dtype = torch.float16


def arguments_of(case: Case) -> tuple[Any, ...]:
    """As ``narrow_linear8`` takes them, without the tile."""
    added = drawn(7, case.rows, case.out).to(case.half) if case.added else None
    x: Tensor
    factor: Tensor | None
    if case.read not in (INT8, FLOAT8):
        plain = LinearCase(
            case.rows,
            case.inp,
            case.out,
            case.first,
            case.added,
            case.last,
            case.activation,
            case.half,
        )
        *_, made = linear_parts(plain)
        x, factor = drawn(6, case.rows, case.inp).to(case.half), None
        weight, bias, sums, scale, shift = made
    else:
        size = 40.0 if case.read == INT8 else 1.0
        x, own = (
            (drawn(i, *sizes) * size).to(case.read)
            for i, sizes in ((6, (case.rows, case.inp)), (1, (case.out, case.inp)))
        )
        factors = (0.5 + torch.rand(case.out, generator=torch.Generator().manual_seed(8))) / (
            size * size * case.inp**0.5
        )
        norm = (1 + drawn(4, case.out, scale=0.2), drawn(5, case.out, scale=0.2))
        weight, factor, bias, scale, shift = linear8_weights(
            own, factors, drawn(2, case.out, scale=0.3), norm if case.last else None
        )
        sums = None
    eps = (FIRST_EPS, LAST_EPS)
    grid = (case.codes, 0.03, -7, -120, 111) if case.codes == INT8 else (case.codes, 0.01, 0, 0, 0)
    return (
        x, weight, factor, bias, sums, added, scale, shift, case.out, case.activation, *eps, case.half,
        case.is_written, *grid,
    )  # fmt: skip


def distance(found: Tensor, wanted: Tensor) -> tuple[float, float]:
    """The largest distance of two codes in steps between neighbours, and the share of those that differ."""
    a, b = found.float(), wanted.float()
    steps = torch.ones_like(b)
    if found.dtype == FLOAT8:  # half a step of the larger of two is one of the smaller
        steps = 2.0 ** (torch.maximum(a.abs(), b.abs()).clamp(min=2.0**-6).log2().floor() - 3)
    return float(((a - b).abs() / steps).max()), float((a != b).float().mean())


def run_unrounded(arguments: Any, case: Case, tile: Tile) -> tuple[Tensor, Tensor]:
    """What the kernel gives, its 8-bit floats rounded by torch: the interpreter rounds them another way."""
    x, weight, factor, bias, sums, added, scale, shift, *_ = arguments
    y = x.new_empty(case.rows, case.out, dtype=case.half)
    codes = x.new_empty(case.rows, case.out, dtype=torch.float32)
    launch(
        x, weight, bias, Parts(factor, sums, added, scale, shift), y if case.is_written else None, case.out,
        case.activation, (FIRST_EPS, LAST_EPS), tile, Written(codes, 1 / 0.01, 0.0, -448.0, 448.0),
    )  # fmt: skip
    return y, codes.to(FLOAT8)


def result_of(case: Case, tile: Tile) -> tuple[float, float, float]:
    arguments = arguments_of(case)
    wanted, codes = narrow_linear8_reference(*arguments)
    there: Any = [a.to(device()) if isinstance(a, Tensor) else a for a in arguments]
    if case.codes == FLOAT8 and device() == "cpu":
        y, coded = run_unrounded(there, case, tile)
    else:
        y, coded = (t.cpu() for t in run(there[0], Layer(*there[1:]), tile))
    error = share(y, wanted.double()) if case.is_written else float(y.numel())
    if case.codes is None:
        return error, float(coded.numel()), 0.0
    return error, *distance(coded, codes)


# Whole tiles; odd sizes; fewer rows than a tile.
SIZES = ((64, 128, 128), (70, 200, 200), (5, 33, 17))
CASES = (
    *(Case(*sizes, read, codes) for sizes, read, codes in product(SIZES, (INT8, FLOAT8), (INT8, FLOAT8, None))),
    *(Case(*sizes, torch.float16, codes, first) for sizes, codes, first in product(SIZES, (INT8, FLOAT8), (False, True))),
    *(Case(20, 64, 100, activation=name, last=False) for name in ("relu", "gelu", "gelu_tanh", "silu")),
    *(Case(20, 64, 100, read, is_written=False) for read in (INT8, torch.float16)),
    Case(20, 64, 100, added=False, last=False),
)  # fmt: skip


def tiles_of(case: Case) -> tuple[Tile, ...]:
    deep = 64 if case.read == torch.float16 else 128
    if not case.last:
        return (Tile(64, deep, 128, 1, 4, 1), Tile(16, 64, 64, 2, 4, 1))
    wide = ((64, deep, 64), (16, 64, 128))
    return tuple(Tile(rows, step, c, -(-case.out // c), 4, 1) for rows, step, c in wide)


def every_case() -> dict[str, tuple[float, float, float]]:
    return {
        f"{tuple(case)} {tuple(tile)}": result_of(case, tile)
        for case in CASES
        for tile in tiles_of(case)
    }


def poisoned(plain: Any) -> Any:
    """``new_empty`` that gives NaN, and 127 of integers."""

    def filled(self: Tensor, *size: Any, **fields: Any) -> Tensor:
        found: Tensor = plain(self, *size, **fields)
        bits = found.view(torch.uint8) if found.dtype in (INT8, FLOAT8) else found
        bits.fill_(127 if bits is not found else torch.nan)
        return found

    return filled


if __name__ == "__main__":
    torch.Tensor.new_empty = poisoned(torch.Tensor.new_empty)  # type: ignore[method-assign]
    with set_wrap_triton_enabled(False):
        print(json.dumps(every_case()))  # noqa: T201
