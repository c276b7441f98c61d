"""The Triton kernels of 8-bit convolutions under Triton's interpreter; on a card see tests/gpu."""

from importlib.util import find_spec
from typing import Any

import pytest

from tests.unit.kernels.interpreter import interpreted

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
# Sums of int8 codes are exact; scale, offset, gains, residual: six float32 roundings at most, one of them
# of the sum, and their terms are up to eight times the largest result. Float8 sums are float32, in another order.
ROUNDED = 8 * 6 * 2.0**-24
HALF = 2.0**-10
BORDER = 0.02  # codes that lie on the border between two


def test_interpreted_kernels_compute_their_definition() -> None:
    found = interpreted("-m", "tests.unit.kernels.interpreted_conv8")
    assert len(found) >= 24
    for name, case in found.items():
        assert case["shape"], name
        if case["codes"]:
            assert case["largest"] <= 1, name
            assert case["share"] <= BORDER, name
        elif name == "inner alone":  # half a unit where a rounding falls to the other side
            assert case["largest"] <= 0.5, name
            assert case["share"] <= BORDER, name
        else:
            bound = HALF if name == "half" else ROUNDED
            assert case["largest"] <= bound * case["size"], (name, case)


def test_no_checker_of_types_wraps_a_kernel() -> None:
    from triton.runtime.jit import KernelInterface

    from tersor.kernels import conv8_kernels_triton as module

    kernels = [v for v in vars(module).values() if isinstance(v, KernelInterface)]
    assert len(kernels) == 8
    for kernel in kernels:
        assert kernel.fn.__globals__ is vars(module), kernel.fn.__name__  # type: ignore[attr-defined]


class Counting:
    """A kernel that only asks for its grid, with all its arguments by name as Triton's launcher does."""

    def __init__(self) -> None:
        self.grids: list[Any] = []

    def __getitem__(self, grid: Any) -> Any:
        def call(*args: Any, **settings: Any) -> None:
            named = {f"argument_{i}": value for i, value in enumerate(args)}
            self.grids.append(grid({**named, **settings, "BM": 16, "BN": 32}))

        return call


def test_grids_are_asked_with_all_arguments() -> None:
    import torch

    from tersor.kernels.conv8_triton import Tile, launched

    codes, weight = (torch.zeros(s, dtype=torch.int8) for s in ((2, 5, 6, 32), (40, 3, 3, 32)))
    kernel, finisher = Counting(), Counting()
    launched(
        kernel, finisher, Tile(16, 32, 32, 4, 2, 3), codes, weight, torch.ones(40), torch.zeros(1, 40),
        None, [1, 1], [1, 1], torch.int8, (0.0, 1.0), (1.0, 0.0), [],
    )  # fmt: skip
    assert kernel.grids == [(4 * 2, 3)]
    assert finisher.grids == [(4, 2)]
