"""The kernels of narrow transformers as Triton compiles them for a card, without one: what only its compiler refuses,
and what their speed rests on: tensor cores, copies under way, nothing spilled.
"""

import re
import subprocess
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
HOPPER = ("cuda", 90, 32)  # its capability and the threads of a warp
# Of arguments that are no 16-bit tensors.
TYPES = {
    "bias_ptr": "*fp32",
    "sums_ptr": "*fp32",
    "scale_ptr": "*fp32",
    "shift_ptr": "*fp32",
    "eps": "fp32",
    "scale": "fp32",
    "first_eps": "fp32",
    "last_eps": "fp32",
    "factor_ptr": "*fp32",
    "inverse": "fp32",
    "zero": "fp32",
    "low": "fp32",
    "high": "fp32",
}
EIGHTS = {1: "*i8", 2: "*fp8e4nv"}
FLOATS = {"EIGHT": 0, "FLOATS": True, "CODES": 0}  # fmt: skip


def compiled(name: str, warps: int, half: str = "fp16", **settings: Any) -> Any:
    """What a kernel becomes: PTX, and machine code."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from tersor.kernels import narrow_encoder_kernels_triton as module

    kernel = getattr(module, name)
    names = kernel.arg_names

    def kind(argument: str) -> str:
        if argument in settings:
            return "constexpr"
        if argument == "mask_ptr" and settings["MASK"] == 2:
            return "*i1"
        eights = {"x_ptr": "EIGHT", "w_ptr": "EIGHT", "codes_ptr": "CODES"}
        if settings.get(eights.get(argument, "")):
            return EIGHTS[settings[eights[argument]]]
        return TYPES.get(argument, f"*{half}" if argument.endswith("_ptr") else "i32")

    assert set(settings) <= set(names)
    source = ASTSource(
        fn=kernel,
        signature={n: kind(n) for n in names},
        constexprs={(names.index(n),): v for n, v in settings.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in names if n.endswith("_ptr")},
    )
    stages = settings["STAGES"]
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    made = triton.compile(source, target=GPUTarget(*HOPPER), options=options)
    return made.asm


def check(made: Any, folder: Path) -> str:
    """What is PTX of it."""
    from triton import knobs

    ptx = str(made["ptx"])
    assert "wgmma.mma_async" in ptx
    assert "mma.sync" not in ptx
    assert "st.local" not in ptx
    assert re.search(r"cp\.async\.cg\.shared\.global .*0x10", ptx)  # 16 bytes at once, in flight
    file = folder / "kernel.cubin"
    file.write_bytes(made["cubin"])
    command = [knobs.nvidia.nvdisasm.path, "-c", str(file)]
    code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert re.search(r"\b[HIQ]GMMA\b", code)
    assert not re.search(r"\b(STL|LDL)\b", code)  # registers that there were too few of
    return ptx


@pytest.mark.parametrize(
    "around",
    [
        {"NORM_FIRST": True, "ACTIVATION": 2, "ADD": False},  # of a ViT: to its hidden units
        pytest.param({"NORM_FIRST": False, "ACTIVATION": 0, "ADD": True}, marks=pytest.mark.slow),
    ],
    ids=["up", "down"],
)
def test_linear(around: dict[str, Any], tmp_path: Path) -> None:
    from tersor.kernels.narrow_linear_triton import tiles

    tile = tiles(64 * 49, 768, is_normed=False)[0]
    made = compiled(
        "narrow_linear_kernel", tile.warps, K=192, KP=192, D=768, DP=768, **around, **FLOATS,
        SHORT=True, NORM_LAST=False, BM=tile.rows, BK=tile.step, C=tile.columns, N=tile.sums, STAGES=tile.stages,
    )  # fmt: skip
    ptx = check(made, tmp_path)
    assert re.search(r"st\.global\.v4", ptx)
    assert ("tanh.approx.f32" in ptx) == (around["ACTIVATION"] == 2)


def test_linear_with_a_norm_behind_it(tmp_path: Path) -> None:
    """Of MiniLM: from its hidden units, 384 channels in three sums."""
    from tersor.kernels.narrow_linear_triton import tiles

    tile = tiles(64 * 128, 384, is_normed=True)[0]
    assert (tile.columns, tile.sums) == (128, 3)
    made = compiled(
        "narrow_linear_kernel", tile.warps, "bf16", K=1536, KP=1536, D=384, DP=384, NORM_FIRST=False,
        ACTIVATION=0, **FLOATS, SHORT=True, ADD=True, NORM_LAST=True, BM=tile.rows, BK=tile.step,
        C=tile.columns, N=tile.sums, STAGES=tile.stages,
    )  # fmt: skip
    check(made, tmp_path)


@pytest.mark.parametrize(
    ("kind", "place"),
    [
        (1, 0),
        pytest.param(2, 0, marks=pytest.mark.slow),
        pytest.param(1, 1, marks=pytest.mark.slow),
    ],
)
def test_linear_of_codes_with_a_norm_behind_it(kind: int, place: int, tmp_path: Path) -> None:
    """Of MiniLM in 8 bits: from its hidden units, floats and codes of which are written."""
    import torch

    from tersor.kernels.narrow_linear8_triton import tiles

    x = torch.empty(64 * 128, 1536, dtype=torch.int8, device="meta")
    tile = tiles(x, 384, is_normed=True)[place]
    made = compiled(
        "narrow_linear_kernel", tile.warps, K=1536, KP=1536, D=384, DP=384, EIGHT=kind, NORM_FIRST=False,
        ACTIVATION=0, SHORT=True, ADD=True, NORM_LAST=True, FLOATS=True, CODES=kind, BM=tile.rows,
        BK=tile.step, C=tile.columns, N=tile.sums, STAGES=tile.stages,
    )  # fmt: skip
    check(made, tmp_path)


@pytest.mark.parametrize(
    ("sizes", "norm", "mask", "place"),
    [
        ((49, 192, 64), True, 0, 0),
        pytest.param((128, 384, 32), False, 1, 0, marks=pytest.mark.slow),
        ((128, 384, 32), False, 1, 3),
    ],
    ids=["vit", "minilm", "pairs"],
)
def test_attention(
    sizes: tuple[int, int, int], norm: bool, mask: int, place: int, tmp_path: Path
) -> None:
    import triton

    from tersor.kernels.narrow_attention_triton import launches

    tokens, width, size = sizes
    launch = launches(tokens, size, 2)[place]
    made = compiled(
        "narrow_attention_kernel", launch.warps, T=tokens, K=width, KP=width, S=size, SIZE=size,
        NORM=norm, MASK=mask, ALIKE=True, CAUSAL=False, BT=triton.next_power_of_2(tokens), G=launch.heads,
        BK=launch.step, STAGES=launch.stages,
    )  # fmt: skip
    check(made, tmp_path)
