"""The kernels of 8-bit convolutions as Triton compiles them for a card, without one.

What their speed rests on: tensor cores on codes, copies of 16 bytes in flight, nothing spilled.
"""

import re
from importlib.util import find_spec
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
HOPPER = ("cuda", 90, 32)  # its capability and the threads of a warp
TYPES = {
    "x_ptr": "*i8", "w_ptr": "*i8", "y_ptr": "*i8", "parts_ptr": "*i32", "scale_ptr": "*fp32",
    "offset_ptr": "*fp32", "residual_ptr": "*i8",
}  # fmt: skip
FLOATS = ("gain", "residual_gain", "shift", "low", "high", "inner_low", "inner_high")
DEFAULTS = {
    "UNIT": 16, "KH": 3, "KW": 3, "SH": 1, "SW": 1, "PH": 1, "PW": 1, "WALK": 1, "BLOCKS": 1,
    "EVEN": True, "IS_INT": True, "BORDER": False, "INNER": False, "RESIDUAL": False,
    "ROUND": True, "NATIVE": True, "IS_SHARE": False, "BM": 128, "BN": 128, "BK": 128, "GROUP": 8,
}  # fmt: skip
POINT = {"KH": 1, "KW": 1, "PH": 0, "PW": 0, "WALK": 0}
STEM = {
    "UNIT": 4, "KH": 7, "KW": 7, "SH": 2, "SW": 2, "PH": 3, "PW": 3, "WALK": 2, "EVEN": False,
    "BN": 64, "BK": 32,
}  # fmt: skip


def compiled(name: str, warps: int, stages: int, types: dict[str, str], **settings: Any) -> str:
    """PTX of a kernel; machine code was made of it, too."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from tersor.kernels import conv8_kernels_triton as module

    kernel = getattr(module, name)
    names = kernel.arg_names
    fixed = {n: v for n, v in {**DEFAULTS, **settings}.items() if n in names}
    known = {**TYPES, **types, **dict.fromkeys(FLOATS, "fp32")}
    whole = [n for n in names if n in ("M", "N") or n in TYPES]
    source = ASTSource(
        fn=kernel,
        signature={n: "constexpr" if n in fixed else known.get(n, "i32") for n in names},
        constexprs={(names.index(n),): v for n, v in fixed.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in whole},
    )
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    made = triton.compile(source, target=GPUTarget(*HOPPER), options=options)
    assert made.asm["cubin"]
    return str(made.asm["ptx"])


@pytest.mark.parametrize(
    ("warps", "stages", "settings"),
    [
        (4, 3, {**POINT, "RESIDUAL": True, "INNER": True}),
        pytest.param(4, 3, {}, marks=pytest.mark.slow),
        pytest.param(8, 3, {"BORDER": True}, marks=pytest.mark.slow),
        pytest.param(4, 5, {"BM": 64, "BN": 64, "IS_SHARE": True}, marks=pytest.mark.slow),
    ],
)
def test_products_of_codes(warps: int, stages: int, settings: dict[str, Any]) -> None:
    ptx = compiled("conv8_kernel", warps, stages, {}, **settings)
    assert re.search(r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k32\.s32\.s8\.s8", ptx)
    assert re.search(r"cp\.async\.cg\.shared\.global .*0x10", ptx)  # 16 bytes at once, in flight
    assert "st.global.v4" in ptx  # and 16 bytes of the result
    assert "st.local" not in ptx


def test_stem_reads_four_channels_at_once() -> None:
    ptx = compiled("conv8_kernel", 4, 4, {}, **STEM)
    assert re.search(r"cp\.async\.ca\.shared\.global .*0x4", ptx)
    assert "s32.s8.s8" in ptx


@pytest.mark.slow
def test_eight_bit_floats_and_sums() -> None:
    types = {"x_ptr": "*fp8e4nv", "w_ptr": "*fp8e4nv", "y_ptr": "*fp8e4nv", "parts_ptr": "*fp32"}
    ptx = compiled("conv8_kernel", 4, 3, types, IS_INT=False, ROUND=False)
    assert "e4m3.e4m3" in ptx
    ptx = compiled("conv8_finish_kernel", 4, 1, {}, BM=16, BN=64, BORDER=True, RESIDUAL=True)
    assert "ld.global.v4" in ptx
