"""Extra peak memory of one run, as the system accounts it."""

import gc
from collections.abc import Callable
from pathlib import Path

_STATUS = Path("/proc/self/status")
_RESET = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # proc(5): reset the high-water mark of the resident set


def peak_bytes(call: Callable[[], object]) -> int | None:
    """High-water mark of the resident set during a call, above what was resident before.

    Garbage is collected first: what was freed during the call would hide as much of what it touches.

    Returns:
        Bytes, or None where the system does not account for it (only Linux does).
    """
    gc.collect()
    try:
        _RESET.write_text(_RESET_PEAK)
        before = _field("VmRSS")
        call()
        return max(0, _field("VmHWM") - before)
    except (OSError, KeyError):
        return None


def _field(name: str) -> int:
    for line in _STATUS.read_text(encoding="ascii").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(name)
