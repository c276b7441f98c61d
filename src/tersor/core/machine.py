"""What the machine is: the key under which measured prices are kept."""

import os
import platform
from dataclasses import dataclass
from pathlib import Path

from tersor.core.jsonable import digest

_ISA = (
    "avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8",
    "asimd", "asimddp", "bf16", "i8mm",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Processor, instruction sets, cores and memory."""

    processor: str
    architecture: str
    features: tuple[str, ...]
    cores: int
    memory_bytes: int
    system: str
    python: str

    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits that change with the processor, its features or the cores."""
        return digest(self.processor, self.architecture, list(self.features), self.cores)[:16]


def usable_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def describe_machine() -> Machine:
    """Read the machine's description; unknown parts stay empty."""
    fields = _cpuinfo()
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    return Machine(
        processor=fields.get("model name") or platform.processor() or platform.machine(),
        architecture=platform.machine(),
        features=tuple(name for name in _ISA if name in flags),
        cores=usable_cores(),
        memory_bytes=_memory_bytes(),
        system=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
    )


def _cpuinfo() -> dict[str, str]:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def _memory_bytes() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return 0
