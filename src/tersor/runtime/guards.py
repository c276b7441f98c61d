"""Filters of what goes into a model and comes out: finite, in range, counted.

A compressed model is exact only where it was calibrated: an int8 quantiser clips what it has
never seen, and does it silently. The guards say so instead, or clip and count. Pure functions
over arrays; the runner holds the counters.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tersor.artifact.manifest import Range
from tersor.core.errors import ConfigError, GuardError

Array = NDArray[Any]
_POLICIES = ("reject", "clamp")


@dataclass(frozen=True, slots=True, kw_only=True)
class Guards:
    """What a runner checks beyond shapes and types.

    Args:
        policy: ``reject`` raises ``GuardError``; ``clamp`` clips into the range, replaces what
            is not finite, and counts the values it changed.
        check_finite: Whether NaN and infinity are refused, in inputs and outputs.
        range_factor: How far beyond the calibrated range floats may lie, as a multiple of its
            half-width around its middle, at least 1; 2 doubles the range, because a few hundred
            samples do not show the extremes. The half-width of a range of one value v is |v|.
            Integers have a declared range, which is taken as it is. None: no ranges.
    """

    policy: str = "reject"
    check_finite: bool = True
    range_factor: float | None = 2.0

    def __post_init__(self) -> None:
        if self.policy == "fallback":
            raise ConfigError(
                "policy 'fallback' is not available in this version; use 'reject' or 'clamp'"
            )
        if self.policy not in _POLICIES:
            raise ConfigError(f"policy: found {self.policy!r}, wanted one of {list(_POLICIES)}")
        factor = self.range_factor
        if factor is not None and not (math.isfinite(factor) and factor >= 1):
            raise ConfigError(
                f"range_factor: found {factor}, wanted at least 1 (the calibrated range), or None"
            )


def guard_arrays(
    arrays: Mapping[str, Array], ranges: Mapping[str, Range], guards: Guards, where: str
) -> tuple[dict[str, Array], int]:
    """Check arrays by name; the input is never changed.

    Args:
        arrays: Arrays by tensor name.
        ranges: Ranges by tensor name; a name without one is checked for finiteness only.
        guards: What to do.
        where: "input" or "output", for the messages.

    Returns:
        The arrays (new ones where values were clamped), and how many values were changed.

    Raises:
        GuardError: Under ``reject``, the first array that fails; says which, how many values,
            the worst of them and what was wanted.
    """
    checked: dict[str, Array] = {}
    changed = 0
    for name, array in arrays.items():
        limits = _limits(ranges.get(name), array, guards)
        bad = _bad(array, limits, check_finite=guards.check_finite)
        checked[name] = array
        if bad is None or not bad.any():
            continue
        if guards.policy == "reject":
            raise GuardError(_message(f"{where} {name!r}", array, bad, limits))
        checked[name] = _clamped(array, bad, limits)
        changed += int(bad.sum())
    return checked, changed


def _limits(allowed: Range | None, array: Array, guards: Guards) -> tuple[float, float] | None:
    if allowed is None or guards.range_factor is None or array.dtype.kind == "b":
        return None
    if array.dtype.kind in "iu":
        return allowed.low, allowed.high
    half = (allowed.high - allowed.low) / 2 or abs(allowed.high)
    margin = half * (guards.range_factor - 1)
    return allowed.low - margin, allowed.high + margin


def _bad(array: Array, limits: tuple[float, float] | None, *, check_finite: bool) -> Array | None:
    """Which values fail; None where nothing can. NaN is judged by finiteness alone."""
    is_float = array.dtype.kind == "f"
    if array.size == 0 or (limits is None and not (is_float and check_finite)):
        return None
    bad: Array = np.zeros(array.shape, dtype=bool)
    if limits is not None:
        bad |= (array < limits[0]) | (array > limits[1])
    if is_float:
        finite = np.isfinite(array)
        bad = bad | ~finite if check_finite else bad & finite
    return bad


def _clamped(array: Array, bad: Array, limits: tuple[float, float] | None) -> Array:
    if limits is None:  # no range: NaN to 0, infinity to the largest finite value
        return np.asarray(np.where(bad, np.nan_to_num(array), array))
    low, high = limits
    if array.dtype.kind in "iu":
        low, high = math.ceil(low), math.floor(high)
        return np.asarray(np.where(bad, np.clip(array, low, high), array).astype(array.dtype))
    filled = np.where(np.isnan(array), (low + high) / 2, array)
    return np.asarray(np.where(bad, np.clip(filled, low, high), array).astype(array.dtype))


def _message(where: str, array: Array, bad: Array, limits: tuple[float, float] | None) -> str:
    values = array[bad]
    is_float = array.dtype.kind == "f"
    n_nan = int(np.isnan(values).sum()) if is_float else 0
    n_inf = int(np.isinf(values).sum()) if is_float else 0
    if n_nan or n_inf:
        return (
            f"{where}: found {n_nan} NaN and {n_inf} infinite of {array.size} values, wanted "
            "finite ones; look at what made it, or use Guards(policy='clamp')"
        )
    low, high = limits or (-math.inf, math.inf)
    beyond = np.maximum(low - values.astype(np.float64), values.astype(np.float64) - high)
    worst = values[int(np.argmax(beyond))]
    way_out = (
        "check the preprocessing, raise range_factor, or use Guards(policy='clamp')"
        if is_float
        else "check the preprocessing, or use Guards(policy='clamp')"
    )
    return (
        f"{where}: {values.size} of {array.size} values lie outside of what the model was "
        f"calibrated for: found {worst:g}, wanted {low:g} to {high:g}; {way_out}"
    )
