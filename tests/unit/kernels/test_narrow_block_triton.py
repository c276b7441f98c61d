"""The kernels of narrow blocks under Triton's interpreter, how a launch is chosen, and what the compiler
for a card makes of them; on a card see tests/gpu.
"""

import re
import subprocess
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.unit.kernels.interpreter import interpreted

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
HOPPER = ("cuda", 90, 32)  # its capability and the threads of a warp


@pytest.mark.timeout(300)
def test_interpreted_kernels_stay_within_the_bound_of_their_formats() -> None:
    found = interpreted("-m", "tests.unit.kernels.interpreted_narrow")
    assert found
    for name, share in found.items():
        assert share <= 1, name


def test_no_checker_of_types_wraps_a_kernel() -> None:
    from triton.runtime.jit import KernelInterface

    from tersor.kernels import narrow_block_kernels_triton as module

    kernels = [v for v in vars(module).values() if isinstance(v, KernelInterface)]
    assert len(kernels) >= 6
    for kernel in kernels:
        assert kernel.fn.__globals__ is vars(module), kernel.fn.__name__  # type: ignore[attr-defined]


def test_what_is_worth_measuring() -> None:
    from tersor.kernels import narrow_block_triton as module
    from tersor.kernels.narrow_block import CHANNELS

    for channels in CHANNELS:
        found = module.launches(channels)
        assert len(set(found)) == len(found)
        assert {t.form for t in found} == {"images", "tiles"}


def test_a_chosen_launch_is_that_of_its_shape_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from tersor.kernels import narrow_block_triton as module

    x = torch.empty(8, 16, 28, 28, device="meta", dtype=torch.float16)
    known = module.launches(16)
    monkeypatch.setattr(module, "_CHOSEN", {module._key(x, (16, 16), 1, is_plain=True): known[1]})
    assert module.launch_of(x, (16, 16), 1, is_plain=True) == known[1]
    assert module.launch_of(x.bfloat16(), (16, 16), 1, is_plain=True) == known[1]  # as fast
    assert module.launch_of(x[:4], (16, 16), 1, is_plain=True) == known[0]
    assert module.launch_of(x, (16, 16), 1, is_plain=False) == known[0]


def compiled(name: str, launch: Any, **settings: Any) -> str:
    """PTX of a kernel; machine code was made of it, too."""
    return str(made_of(name, launch, **settings)["ptx"])


def made_of(name: str, launch: Any, **settings: Any) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from tersor.kernels import narrow_block_kernels_triton as module

    kernel = getattr(module, name)
    names = kernel.arg_names
    fixed = {n: v for n, v in settings.items() if n in names}

    def kind(argument: str) -> str:
        if argument in fixed:
            return "constexpr"
        if not argument.endswith("_ptr"):
            return "i32"
        return "*fp32" if "bias" in argument else "*bf16"

    source = ASTSource(
        fn=kernel,
        signature={n: kind(n) for n in names},
        constexprs={(names.index(n),): v for n, v in fixed.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in names if n.endswith("_ptr")},
    )
    options = {"num_warps": launch.warps, "num_stages": 1, "enable_fp_fusion": True}
    made = triton.compile(source, target=GPUTarget(*HOPPER), options=options)
    assert made.asm["cubin"]
    return made.asm


SAME = {"H": 28, "W": 28, "OH": 28, "OW": 28, "S": 1, "SHORT": False}


def test_whole_images() -> None:
    from tersor.kernels import narrow_block_triton as module

    launch = module.launches(16)[1]
    assert launch.form == "images"
    assert launch.keeps
    ptx = compiled(
        "narrow_block_kernel",
        launch,
        **SAME,
        NI=16,
        NO=16,
        CI=16,
        CM=16,
        CO=16,
        BM=launch.pixels,
        G=1,
        KEEP=True,
    )
    assert re.search(r"ld\.global\.v4\.b32", ptx)  # 16 bytes a thread
    assert "cp.async" not in ptx  # which would go around the first-level cache
    assert "wgmma.mma_async" in ptx
    assert "st.local" not in ptx


def test_channels_that_are_filled_up_are_read_eight_at_once() -> None:
    from tersor.kernels import narrow_block_triton as module

    sizes = {**SAME, "NI": 24, "NO": 24, "CI": 32, "CM": 16, "CO": 32}
    ptx = compiled("narrow_second_kernel", module.launches(32)[0], **sizes, BM=128)
    assert re.search(r"ld\.global\.v4\.b32", ptx)
    assert re.search(r"st\.global\.v4", ptx)
    assert not re.search(r"ld\.global\.b16", ptx)
    assert "st.local" not in ptx


@pytest.mark.slow
def test_tiles() -> None:
    from tersor.kernels import narrow_block_triton as module

    launch = module.launches(16)[0]
    assert launch.form == "tiles"
    for name in ("narrow_first_kernel", "narrow_second_kernel"):
        ptx = compiled(name, launch, **SAME, NI=16, NO=16, CI=16, CM=16, CO=16, BM=launch.pixels)
        assert "wgmma.mma_async" in ptx
        assert "st.local" not in ptx


def test_the_assembler_reads_no_register_that_nothing_wrote(tmp_path: Path) -> None:
    """ptxas 12.8 does, of this kernel at these sizes: an operand's place in memory is luck then."""
    from triton import knobs

    from tersor.kernels import narrow_block_triton as module

    launch = module.Launch("images", 128, 2)
    assert launch in module.launches(64)
    sizes = {"H": 7, "W": 7, "OH": 7, "OW": 7, "NI": 64, "NO": 64, "CI": 64, "CM": 32, "CO": 64}
    made = made_of(
        "narrow_block_kernel", launch, **sizes, S=1, SHORT=False, BM=128, G=2, KEEP=False
    )
    file = tmp_path / "kernel.cubin"
    file.write_bytes(made["cubin"])
    command = [knobs.nvidia.nvdisasm.path, "-c", str(file)]
    code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    lines = re.findall(r"/\*[0-9a-f]+\*/\s+(.*?);", code)
    named = {r for line in lines for r in re.findall(r"\bUR\d+\b", line)}
    # What an instruction writes is its first operand, pairs and more by its first register.
    written = {
        f"UR{int(number) + i}"
        for line in lines
        if (found := re.match(r"(?:@!?U?P\d+\s+)?(?:U|R2UR|S2UR)\S*\s+UR(\d+)", line))
        for number in (found[1],)
        for i in range(4 if ".128" in line else 2 if ".64" in line or "WIDE" in line else 1)
    }
    assert len(named) > 40
    assert not {r for r in named if r not in written}
