"""Run by ``test_codebook_linear_triton`` under TRITON_INTERPRET=1: every kernel against float64.

Outputs are poisoned: torch fills what is empty with NaN. Errors go to standard output as JSON, each as a
share of the bound that follows from the formats.
"""

import json
import sys
from collections.abc import Iterator
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._library.triton import set_wrap_triton_enabled

from tersor.kernels import codebook_kernels_triton as kernels
from tersor.kernels.codebook_launches import Launch, lookups
from tersor.kernels.codebook_linear_triton import Weight, run
from tersor.kernels.codebook_weight import coded_weight, expanded

# A unit in the last place, halved: what one rounding moves a number by, relative to it.
HALF_UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
SMALL = {
    torch.float32: 0.0,
    torch.float16: 2.0**-25,
    torch.bfloat16: 0.0,
}  # below its normal numbers
CASES = (
    ("tensor", None), ("row", None), ("group", None), ("none", "row"), ("none", "group"),
    ("tensor", "group"), ("group", "group"), ("row", "row"),
)  # fmt: skip


def weight_of(
    seed: int, shape: tuple[int, int], bits: int, kind: tuple[str, str | None], group: int
) -> Weight:
    out, inp = shape
    owner, scaled = kind
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (out, inp), generator=generator, dtype=torch.uint8)
    groups = -(-inp // group)
    counts = {"tensor": (1, 1), "row": (out, 1), "group": (out, groups)}
    tables = None
    if owner != "none":
        tables = torch.randn(*counts[owner], 2**bits, generator=generator).half()
    scales = None
    if scaled is not None:
        scales = torch.randn(out, 1 if scaled == "row" else groups, generator=generator)
    found = coded_weight(codes, bits=bits, tables=tables, scales=scales, group=group)
    return Weight(found.words, found.tables, found.planes, found.scales, bits, inp, found.group)


def off(
    x: Tensor, weight: Weight, bias: Tensor | None, launch: Launch, added: float = 2.0**-23
) -> float:
    """The largest error over its bound; infinite where an output was not written.

    ``added``: what a product and its sum are off by, of all that is added.
    """
    w = expanded(weight.words, weight.tables, weight.scales, *weight[4:]).double()
    wanted = x.double() @ w.t()
    sums = x.double().abs() @ w.abs().t()
    if bias is not None:
        wanted, sums = wanted + bias.double(), sums + bias.double().abs()
    unit = HALF_UNIT[x.dtype]
    is_rounded = x.dtype != torch.float32 and (
        launch.form == "dense"
        or (
            launch.form in ("dot", "mma")
            and weight.tables is not None
            and x.dtype == torch.bfloat16
        )
    )
    # Inputs, parts, the scale, the bias; then values that were rounded to x's type.
    bound = sums * (added * (x.shape[1] + launch.splits + 4) + (unit if is_rounded else 0.0))
    bound = bound + unit * (wanted.abs() + bound)
    bound = bound + SMALL[x.dtype] * (1 + x.double().abs().sum(1, keepdim=True))
    with set_wrap_triton_enabled(False):
        found = run(x, weight, bias, launch).double()
    error = torch.where(found.isfinite(), (found - wanted).abs(), torch.inf)
    return float((error / bound.clamp(min=1e-30)).max()) if found.numel() else 0.0


def forms(rows: int, weight: Weight, splits: int) -> Iterator[Launch]:
    if rows == 1:
        for lookup in lookups(weight.facts):
            yield Launch("vector", lookup, 8, 64, splits)
    for i, lookup in enumerate(lookups(weight.facts)):
        yield Launch("dot", lookup, 16, 16, splits, joined=(1, 2, 4)[(rows + splits + i) % 3])
    yield Launch("dense", lookups(weight.facts)[-1])


def every_kind() -> dict[str, float]:
    """All ways from codes to values, in shapes that divide by nothing."""
    found = {}
    for bits in (4, 8):
        for kind in CASES:
            weight = weight_of(7, (11, 300 if bits == 4 else 150), bits, kind, 64)
            for rows in (1, 3) if kind[1] == "group" else (1,):
                generator = torch.Generator().manual_seed(rows)
                x = torch.randn(rows, weight.inputs, generator=generator)
                for launch in forms(rows, weight, 2):
                    name = f"{bits} bits, {kind}, {rows} rows, {launch.form} {launch.lookup}"
                    found[name] = off(x, weight, torch.randn(11, generator=generator), launch)
    return found


def every_type() -> dict[str, float]:
    """Types of x, groups that share a place or not, one split and more than there are steps."""
    found = {}
    for dtype in HALF_UNIT:
        for group in (32, 96, 512):
            weight = weight_of(3, (17, 520), 4, ("none", "group"), group)
            for rows, splits in ((1, 9), (18, 2)):
                generator = torch.Generator().manual_seed(rows)
                x = torch.randn(rows, 520, generator=generator).to(dtype)
                for launch in forms(rows, weight, splits):
                    if launch.form == "dot" and dtype == torch.bfloat16:
                        continue  # the interpreter multiplies the bits of bfloat16 as integers
                    name = (
                        f"{dtype}, groups of {group}, {rows} rows, {splits} splits, {launch.form}"
                    )
                    found[name] = off(x, weight, None, launch)
    return found


def few_rows() -> dict[str, float]:
    """The kernel that multiplies by instructions: types, tiles, warps that share inputs, parts, whole chunks."""
    found = {}
    half, brain = torch.float16, torch.bfloat16
    cases = (
        # Type, bits, kind, inputs, rows; outputs, rows and splits of a program, its warps, tiles of a warp.
        (half, 4, ("none", "group"), 512, 8, (16, 8, 1, 2, 1)),
        (brain, 4, ("none", "row"), 292, 13, (32, 16, 2, 2, 2)),
        (half, 4, ("row", None), 600, 3, (32, 8, 1, 4, 1)),
        (brain, 8, ("none", "group"), 300, 1, (16, 8, 2, 2, 1)),
        (half, 8, ("group", "group"), 148, 10, (16, 8, 1, 1, 1)),
    )
    for i, (dtype, bits, kind, inp, rows, tile) in enumerate(cases):
        weight = weight_of(i, (19, inp), bits, kind, 64)
        generator = torch.Generator().manual_seed(i)
        x = torch.randn(rows, inp, generator=generator).to(dtype)
        bias = torch.randn(19, generator=generator).to(dtype)
        outputs, width, splits, warps, tall = tile
        launch = Launch(
            "mma", lookups(weight.facts)[0], outputs, width, splits, warps, i % 2, tall=tall
        )  # fmt: skip
        name = f"{dtype}, {bits} bits, {kind}, {rows} rows, {launch}"
        found[name] = off(x, weight, bias, launch)
    return found


def drawn() -> dict[str, float]:
    """Shapes that hypothesis finds."""
    worst: dict[str, float] = {}

    @settings(max_examples=12, deadline=None, derandomize=True, database=None)
    @given(
        st.integers(0, 2**32 - 1), st.integers(0, 4),
        st.tuples(st.integers(1, 20), st.integers(1, 300)), st.sampled_from([4, 8]),
        st.sampled_from(CASES), st.integers(1, 4),
    )  # fmt: skip
    def check(
        seed: int, rows: int, shape: tuple[int, int], bits: int, kind: Any, splits: int
    ) -> None:
        weight = weight_of(seed, shape, bits, kind, 32)
        x = torch.randn(rows, shape[1], generator=torch.Generator().manual_seed(seed))
        for launch in forms(rows, weight, splits):
            found = off(x, weight, None, launch)
            worst[launch.form] = max(worst.get(launch.form, 0.0), found)
            assert found <= 1, (launch, found)

    check()
    return worst


def extremes() -> dict[str, float]:
    """Codes at their ends: the highest bit of a word, the first and the last value of a table."""
    found = {}
    for bits in (4, 8):
        for kind in (("none", "row"), ("row", None)):
            weight = weight_of(1, (9, 256), bits, kind, 32)
            for value in (0, 2**bits - 1, 2 ** (bits - 1)):
                codes = torch.full((9, 256), value)
                made = coded_weight(codes, bits=bits, tables=weight.tables, scales=weight.scales)
                weight = weight._replace(words=made.words)
                x = torch.randn(1, 256, generator=torch.Generator().manual_seed(value))
                for launch in forms(1, weight, 1):
                    found[f"{bits} {kind} {value} {launch.form} {launch.lookup}"] = off(
                        x, weight, None, launch
                    )
    return found


def equal_bits() -> dict[str, float]:
    """Sums in parts are added in order: two calls give the same bits; several steps a part."""
    weight = weight_of(5, (16, 1100), 4, ("row", None), 32)
    x = torch.randn(1, 1100, generator=torch.Generator().manual_seed(5))
    launch = Launch("vector", kernels.PERMUTE, 8, 64, 2)
    with set_wrap_triton_enabled(False):
        first, second = (run(x, weight, None, launch) for _ in range(2))
    return {"equal": float(not torch.equal(first, second)), "steps": off(x, weight, None, launch)}


def every_form() -> dict[str, float]:
    """All ways, in one process."""
    return {**every_kind(), **extremes(), **equal_bits()}


def every_shape() -> dict[str, float]:
    """Types and shapes at length: for a release."""
    return {**every_type(), **drawn()}


PARTS = {f.__name__: f for f in (every_form, every_shape, few_rows)}

if __name__ == "__main__":
    torch.use_deterministic_algorithms(True)
    HALF_UNIT[torch.bfloat16] *= 2  # the interpreter cuts what it should round
    print(json.dumps(PARTS[sys.argv[1]]()))  # noqa: T201
