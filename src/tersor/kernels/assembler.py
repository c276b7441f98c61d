"""Which of Triton's assemblers (ptxas) kernels for NVIDIA cards go through.

ptxas 12.8, which Triton 3.6 carries, miscompiles some products on cards of capability 9.0: it reads a uniform
register that nothing wrote, and with it the descriptor of an operand of a warp group's product in shared memory
(seen in ``narrow_block``: 12.8.93 leaves out the zero that 12.9.86 and 13.0.88 write, of the same PTX). What comes of
it depends on what ran before: the right result, a wrong one, an illegal memory access. torch's own compiler takes an
assembler that comes with torch where there is one (13.0 beside torch 2.11), but only in processes where it has
compiled; and Triton carries a newer one for newer cards, that knows the older ones as well.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

_SOUND = (12, 9)


def use_sound_assembler() -> None:
    """Point Triton to a newer assembler, torch's or else another of its own, where the usual one is older than 12.9.

    Processes that compile for torch inherit it, as Triton writes what is set here into the environment. What the user
    has set (``TRITON_PTXAS_PATH``) stays. Without Triton, or a newer assembler, nothing changes.
    """
    if find_spec("triton") is None:
        return
    from triton import knobs

    usual = _of(knobs.nvidia, "ptxas")
    if usual is None or _number(usual) >= _SOUND or not _is_triton_s_own(usual):
        return
    for newer in (_torch_s(usual), _of(knobs.nvidia, "ptxas_blackwell")):
        if newer is not None and _number(newer) >= _SOUND:
            knobs.nvidia.ptxas = newer.path
            return


def _of(offered: Any, name: str) -> Any:
    """Path and version; None where this Triton has none of the name, or its file is missing."""
    try:
        return getattr(offered, name, None)
    except RuntimeError:
        return None


def _is_triton_s_own(tool: Any) -> bool:
    import triton

    return Path(triton.__file__).parent in Path(tool.path).parents


def _torch_s(usual: Any) -> Any:
    import torch

    path = Path(torch.__file__).parent / "bin" / "ptxas"
    return type(usual).from_path(str(path)) if path.is_file() else None


def _number(tool: Any) -> tuple[int, ...]:
    return tuple(int(part) for part in tool.version.split("."))
