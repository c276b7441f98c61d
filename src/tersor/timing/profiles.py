"""How often a profile runs a build: warm-ups that do not count, then blocks that do."""

import math

BLOCKS = 3  # that count: their median tells where one of them was hit by another process
FEWEST_WARM = 2
_MOST_WARM, _WARM_MS = 9, 100.0  # settles caches and clock, where calls are long
_FEWEST_RUNS, _MOST_RUNS = 3, 100
_BLOCK_MS = 40.0  # of a block, where its runs are so many


def warm_runs(call_ms: float) -> int:
    """Runs that do not count, for a call of that long."""
    return min(_MOST_WARM, max(FEWEST_WARM, math.ceil(_WARM_MS / max(call_ms, 1e-3))))


def block_runs(call_ms: float) -> int:
    """Runs of a block: enough that a moment of another process is a small part."""
    return max(_FEWEST_RUNS, min(_MOST_RUNS, round(_BLOCK_MS / max(call_ms, 1e-3))))
