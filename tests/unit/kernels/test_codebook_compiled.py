"""The codebook kernels as Triton compiles them for a card, without one: what only its compiler refuses,
and what their speed rests on: wide loads, tensor cores, nothing spilled.
"""

import re
from importlib.util import find_spec
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
HOPPER = ("cuda", 90, 32)  # its capability and the threads of a warp
WHOLE = ("x_ptr", "words_ptr", "tables_ptr", "planes_ptr", "scales_ptr", "y_ptr", "N", "K", "WORDS")
TYPES = {
    "x_ptr": "*bf16", "words_ptr": "*i32", "tables_ptr": "*fp16", "planes_ptr": "*i32",
    "scales_ptr": "*fp32", "bias_ptr": "*bf16", "y_ptr": "*bf16", "parts_ptr": "*fp32",
    "weight_ptr": "*bf16",
}  # fmt: skip
DEFAULTS = {"GROUP": 128, "BITS": 4, "SCALE": 0, "GROUPED": False, "RUN": 8, "BIAS": True}


def compiled(name: str, warps: int, stages: int, **settings: Any) -> str:
    """PTX of a kernel; machine code was made of it, too."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from tersor.kernels import codebook_kernels_triton, codebook_mma_triton

    module = codebook_mma_triton if name == "codebook_mma_kernel" else codebook_kernels_triton
    kernel = getattr(module, name)
    names = kernel.arg_names
    fixed = {**DEFAULTS, "NATIVE": True, **settings}
    fixed = {n: v for n, v in fixed.items() if n in names}
    types = {n: "constexpr" if n in fixed else TYPES.get(n, "i32") for n in names}
    source = ASTSource(
        fn=kernel,
        signature=types,
        constexprs={(names.index(n),): v for n, v in fixed.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in WHOLE if n in names},
    )
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    made = triton.compile(source, target=GPUTarget(*HOPPER), options=options)
    assert made.asm["cubin"]
    return str(made.asm["ptx"])


@pytest.mark.parametrize("index", [0, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("lookup", ["PERMUTE", pytest.param("ARITHMETIC", marks=pytest.mark.slow)])
def test_vector_kernel(lookup: str, index: int) -> None:
    from tersor.kernels import codebook_kernels_triton as kernels
    from tersor.kernels import codebook_launches as module

    outputs, words, _, warps = module._VECTORS[index]
    number = getattr(kernels, lookup)
    ptx = compiled("codebook_vector_kernel", warps, 1, LOOKUP=number, BN=outputs, BW=words)
    assert re.search(r"ld\.global\.v4\.b32", ptx)  # of codes: 16 bytes a thread
    loop = ptx[ptx.index("$L__BB0_") :]
    assert "st.local" not in ptx
    assert loop.count("bar.sync") <= 4  # those of the sums at the end: none for each of 8 places
    assert ("lop3.b32" if lookup == "ARITHMETIC" else "prmt.b32") in ptx


@pytest.mark.parametrize(
    ("lookup", "bits", "scale", "joined"),
    [
        ("PERMUTE", 4, 0, 1),
        ("ARITHMETIC", 8, 1, 4),
        pytest.param("ARITHMETIC", 4, 2, 4, marks=pytest.mark.slow),
        pytest.param("ARITHMETIC", 4, 2, 1, marks=pytest.mark.slow),
        pytest.param("LOAD", 8, 0, 4, marks=pytest.mark.slow),
    ],
)
def test_dot_kernel(lookup: str, bits: int, scale: int, joined: int) -> None:
    from tersor.kernels import codebook_kernels_triton as kernels

    run = 4 if scale == 2 else 32 // bits
    ptx = compiled(
        "codebook_dot_kernel", 4, 3, LOOKUP=getattr(kernels, lookup), BITS=bits, SCALE=scale,
        RUN=run, BN=64, BM=16, JOINED=joined,
    )  # fmt: skip
    assert re.search(r"cp\.async\.cg\.shared\.global .*0x10", ptx)  # 16 bytes at once, in flight
    assert "st.local" not in ptx
    # What is joined stays where it is: no values through shared memory, but for those of loads.
    loop = ptx[ptx.rindex("$L__BB0_", 0, ptx.index("wgmma.mma_async")) : ptx.rindex("bra")]
    assert lookup == "LOAD" or "st.shared" not in loop
    # Registers that a product reads may be written once it was waited for, and the next step writes them:
    # each is waited for in its own step.
    waits = re.findall(r"wgmma\.wait_group\.sync\.aligned (\d+)", loop)
    assert waits == ["0"] * (32 // bits // joined)
    assert loop.rindex("wgmma.wait_group") > loop.rindex("wgmma.mma_async")


@pytest.mark.parametrize(
    ("lookup", "scale", "index"),
    [("ARITHMETIC", 2, 1), pytest.param("PERMUTE", 0, 0, marks=pytest.mark.slow)],
)
def test_mma_kernel(lookup: str, scale: int, index: int) -> None:
    from tersor.kernels import codebook_kernels_triton as kernels
    from tersor.kernels import codebook_launches as module

    outputs, _, warps, ahead, tall = module._MMAS[index]
    ptx = compiled(
        "codebook_mma_kernel", warps, 1, LOOKUP=getattr(kernels, lookup), SCALE=scale,
        RUN=4 if scale else 8, BN=outputs, BM=8, TALL=tall, WARPS=warps, AHEAD=ahead, WHOLE=True,
    )  # fmt: skip
    # Of each chunk and tile: 8 places of 32 inputs. No value goes through another thread or shared memory
    # but for the sums at the end.
    assert ptx.count("mma.sync.aligned.m16n8k16") == 16 * tall
    words = "ld.global.L1::no_allocate.L2::128B.v2.b64"
    assert ptx.count(words) == 4 * tall * (1 + ahead)  # of the first step, before the loop, too
    loop = ptx[ptx.rindex("$L__BB0_", 0, ptx.index("mma.sync")) : ptx.rindex("mma.sync")]
    assert loop.count(words) == 4 * tall
    assert not ahead or loop.rindex(words) < loop.index("mma.sync")  # under way in every product
    for word in ("bar.sync", "shfl", "ld.shared", "st.shared", "st.local"):
        assert word not in loop


def test_sum_and_expansion() -> None:
    from tersor.kernels import codebook_kernels_triton as kernels

    assert "ld.global" in compiled("codebook_sum_kernel", 4, 1, SPLITS=3, BN=256)
    ptx = compiled("codebook_expand_kernel", 4, 1, LOOKUP=kernels.LOAD, SCALE=2, BN=16)
    assert "st.global" in ptx
