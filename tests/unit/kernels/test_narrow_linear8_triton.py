"""Layers on 8-bit codes under Triton's interpreter, and how they are launched; on a card see tests/gpu."""

from importlib.util import find_spec
from typing import Any

import pytest
import torch

from tersor.kernels.narrow_linear8 import Layer
from tests.unit.kernels.interpreter import interpreted

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
DIFFERENT = 0.01  # of codes that lie on the border of two


@pytest.mark.timeout(300)
def test_interpreted_kernel_computes_its_definition() -> None:
    found = interpreted("-m", "tests.unit.kernels.interpreted_encoder8")
    assert len(found) > 60
    for name, (error, code, share) in found.items():
        assert error <= 1, name
        assert code <= 1, name  # the next one
        assert share <= DIFFERENT, name


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.float16])
@pytest.mark.parametrize("rows", [1, 1024, 1025])
@pytest.mark.parametrize("width", [1, 64, 65, 256, 257, 384, 512])
def test_tiles_hold_whole_rows_where_those_are_normed(
    width: int, rows: int, dtype: torch.dtype
) -> None:
    from tersor.kernels.narrow_linear import COLUMNS, STEP
    from tersor.kernels.narrow_linear8 import DEEP
    from tersor.kernels.narrow_linear8_triton import tiles

    x = torch.empty(rows, 8, dtype=dtype, device="meta")
    filled = width + -width % COLUMNS
    for is_normed in (False, True):
        known = tiles(x, width, is_normed=is_normed)
        assert len(set(known)) == len(known) >= 2
        for tile in known:
            assert (DEEP if dtype.itemsize == 1 else STEP) % tile.step == 0
            across = tile.columns * tile.sums
            if is_normed:
                assert across >= width
            assert -(-width // across) * across <= filled


def test_what_makes_another_kernel_makes_another_choice() -> None:
    from tersor.kernels import narrow_linear8_triton as module

    x, some = torch.empty(64, 384, dtype=torch.int8, device="meta"), torch.empty(1)
    usual = Layer(
        some, some, some, None, some, some, some, 384, "none", 1e-5, 1e-5, torch.float16, True, torch.int8,
        1.0, 0, -9, 9,
    )  # fmt: skip
    changes: tuple[dict[str, Any], ...] = (
        {"sums": some}, {"added": None}, {"scale": None}, {"width": 192}, {"activation": "gelu"},
        {"half": torch.bfloat16}, {"is_written": False}, {"codes": None}, {"codes": torch.float8_e4m3fn},
    )  # fmt: skip
    keys = {module._key(x, usual._replace(**change)) for change in changes}
    keys |= {module._key(x, usual), module._key(x.to(torch.float8_e4m3fn), usual)}
    assert len(keys) == len(changes) + 2
    scaled = usual._replace(step=2.0, zero=3, low=-8, high=8, last_eps=0.1)  # the same kernel
    assert module._key(x, scaled) == module._key(x, usual)
