"""HiGHS through SciPy, kept from writing to the standard output."""

import ctypes
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from tersor.core.errors import NumericalError

Vector = np.ndarray[Any, np.dtype[np.float64]]
Row = tuple[Any, Any, Any]  # matrix, lower bounds, upper bounds


def run_milp(
    cost: Vector, rows: Sequence[Row], is_integer: Vector, options: Mapping[str, float]
) -> tuple[Vector | None, bool, float]:
    """Minimise ``cost`` over variables in [0, 1].

    Returns:
        The variables (None where there is no solution), whether they are proven optimal within
        the options' gap, and the relative gap that is left.

    Raises:
        NumericalError: HiGHS stopped before it found a solution or a proof that there is none.
    """
    with _standard_output_closed():
        result = milp(
            cost,
            constraints=[LinearConstraint(*row) for row in rows],
            integrality=is_integer,
            bounds=Bounds(0, 1),
            options=dict(options),
        )
    if result.status == 2:
        return None, True, 0.0
    if result.x is None:
        raise NumericalError(
            f"the solver stopped without a plan for {len(cost)} variables: {result.message}; "
            "loosen the target, or keep= fewer sites in play"
        )
    return np.asarray(result.x), result.status == 0, float(result.mip_gap or 0.0)


@contextmanager
def _standard_output_closed() -> Iterator[None]:
    """Send file descriptor 1 to the null device.

    HiGHS (in SciPy 1.17) prints a debugging line from C++ whatever its options say, which would break
    ``--json``. Its buffer is the C library's, so that is flushed before the descriptor is
    restored.
    """
    sys.stdout.flush()
    try:
        saved = os.dup(1)
    except OSError:  # no standard output at all: nothing to protect
        yield
        return
    null = os.open(os.devnull, os.O_WRONLY)
    try:
        _flush_c()
        os.dup2(null, 1)
        yield
    finally:
        _flush_c()
        os.dup2(saved, 1)
        os.close(saved)
        os.close(null)


def _flush_c() -> None:
    if os.name == "posix":
        ctypes.CDLL(None).fflush(None)
