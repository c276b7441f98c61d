"""The machine's own speed, told by a fixed piece of work between timed calls.

Neighbours on a shared core and the clock frequency make a processor faster and slower by 10 % and
more within a second, which neither its CPU time nor its accounting of stolen time shows. A fixed
piece of work feels the same, so that it is a control variate: the part of a sample that follows it
is taken out. On a virtual machine with a busy neighbour this brought the medians of 27 calls of two
networks from 7.5 % of spread to 2.5 %.
"""

import time
from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

_SIZE = 48  # of the matrices: three of them stay in a first-level cache
_PRODUCTS = 60  # about 0.3 ms
_TRIM = 0.05  # samples beyond these quantiles are clipped before the slope is fitted
_FEWEST = 8  # samples that a slope needs

FloatArray = NDArray[np.float64]
Times = Sequence[float] | FloatArray


@lru_cache(maxsize=1)
def _operands() -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
    values = np.linspace(0.5, 1.5, _SIZE * _SIZE, dtype=np.float32).reshape(_SIZE, _SIZE)
    return values, values.T.copy(), np.empty_like(values)


def probe_ms() -> float:
    """Milliseconds of the fixed work: small products of matrices, on this thread."""
    left, right, out = _operands()
    start = time.perf_counter_ns()
    for _ in range(_PRODUCTS):
        np.matmul(left, right, out=out)
    return (time.perf_counter_ns() - start) / 1e6


def factors(walls: Mapping[str, Times], probes: Mapping[str, Times]) -> dict[str, FloatArray]:
    """What each sample is to be multiplied by, to be at the run's median speed.

    One slope for all callables, of log times on log probes, each callable around its own median;
    between 0 (the probe says nothing about them) and 1 (they follow it).

    Args:
        walls: Times of each callable.
        probes: The probe beside each of them.
    """
    logs = {name: np.log(np.asarray(p, dtype=np.float64)) for name, p in probes.items()}
    middle = float(np.median(np.concatenate(list(logs.values()))))
    x = {name: own - middle for name, own in logs.items()}
    xs, ys = [], []
    for name, own in walls.items():
        y = np.log(np.maximum(np.asarray(own, dtype=np.float64), 1e-9))
        xs.append(_clipped(x[name] - np.median(x[name])))
        ys.append(_clipped(y - np.median(y)))
    slope = _slope(np.concatenate(xs), np.concatenate(ys))
    return {name: np.exp(-slope * own) for name, own in x.items()}


def _slope(x: FloatArray, y: FloatArray) -> float:
    spread = float(x @ x)
    if len(x) < _FEWEST or spread <= 0:
        return 0.0
    return min(1.0, max(0.0, float(x @ y) / spread))


def _clipped(values: FloatArray) -> FloatArray:
    low, high = np.quantile(values, [_TRIM, 1 - _TRIM])
    clipped: FloatArray = np.clip(values, low, high)
    return clipped
