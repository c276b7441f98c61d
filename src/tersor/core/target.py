"""What the caller wants: budgets on latency, size, memory and quality."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real

from tersor.core.errors import ConfigError, TargetError
from tersor.core.units import parse_quantity

_DIMENSIONS: dict[str, tuple[str, ...]] = {
    "speedup": ("ratio",),
    "latency_ms": ("ms",),
    "size_mb": ("mb",),
    "size_ratio": ("ratio", "size_ratio"),
    "peak_mb": ("mb",),
    "drop_points": ("points",),
    "min_agreement": (),
}
_TEXT_KEYS = {
    "ratio": "speedup",
    "size_ratio": "size_ratio",
    "ms": "latency_ms",
    "mb": "size_mb",
    "points": "drop_points",
}
_ONE_QUANTITY = (("speedup", "latency_ms"), ("size_mb", "size_ratio"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Budgets that a result must meet; ``parse`` and ``from_mapping`` read texts with units.

    Args:
        speedup: Times faster than the best uncompressed build on the device, at least 1.
        latency_ms: Milliseconds of one call at the batch that is asked for.
        size_mb: Size of the saved artifact, in 10^6 bytes.
        size_ratio: Times smaller than the model as given, at least 1.
        peak_mb: Extra peak memory of one run, in 10^6 bytes.
        drop_points: 100 x (metric of the original - metric of the result), at least 0.
        min_agreement: Agreement with the original, from 0 to 1.

    Raises:
        TargetError: No budget at all, a value out of its range, a text that can't be read, or
            two budgets on one quantity.
    """

    speedup: float | None = None
    latency_ms: float | None = None
    size_mb: float | None = None
    size_ratio: float | None = None
    peak_mb: float | None = None
    drop_points: float | None = None
    min_agreement: float | None = None

    def __post_init__(self) -> None:
        for name in _DIMENSIONS:
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, _checked(name, value))
        if all(getattr(self, name) is None for name in _DIMENSIONS):
            raise TargetError(f"the target is empty; give at least one of {', '.join(_DIMENSIONS)}")
        for pair in _ONE_QUANTITY:
            if all(getattr(self, name) is not None for name in pair):
                raise TargetError(
                    f"the target contradicts itself: {pair[0]}={getattr(self, pair[0]):g} and "
                    f"{pair[1]}={getattr(self, pair[1]):g} both bound one quantity; keep one"
                )

    @classmethod
    def parse(cls, text: str) -> "Target":
        """Read a target such as ``"2x, 0.5 pt"``, ``"5 ms, 10 MB"`` or ``"size_ratio=4"``.

        Raises:
            TargetError: An unknown key or unit, or one budget given twice.
        """
        values: dict[str, str] = {}
        for part in filter(None, (p.strip() for p in text.replace(";", ",").split(","))):
            name, _, amount = part.rpartition("=")
            key = name.strip() or _TEXT_KEYS.get(parse_quantity(part)[0], "")
            if not key:
                raise TargetError(
                    f"{part!r}: a bare number could be anything; write for example '2x' or "
                    f"'min_agreement=0.99'"
                )
            if key in values:
                raise TargetError(
                    f"the target contradicts itself: {key} is given as {values[key]!r} and as "
                    f"{amount.strip()!r}; keep one"
                )
            values[key] = amount.strip()
        return cls.from_mapping(values)

    @classmethod
    def from_mapping(cls, values: Mapping[str, object]) -> "Target":
        """Read a target from a mapping of numbers or texts with units; unknown keys are refused."""
        unknown = sorted(set(values) - set(_DIMENSIONS))
        if unknown:
            raise TargetError(f"target: unknown keys {unknown}; known are {list(_DIMENSIONS)}")
        return cls(**{name: _checked(name, value) for name, value in values.items()})

    def budgets(self) -> dict[str, float]:
        """The budgets that are set, by name."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    def describe(self) -> str:
        """The budgets in one line, in a form that ``parse`` reads."""
        return ", ".join(f"{name}={value:g}" for name, value in self.budgets().items())


def as_target(target: object) -> Target:
    """A target from a Target, a text or a mapping.

    Raises:
        ConfigError: Something else.
        TargetError: A text or a mapping that can't be read.
    """
    if isinstance(target, Target):
        return target
    if isinstance(target, str):
        return Target.parse(target)
    if isinstance(target, Mapping):
        return Target.from_mapping(target)
    raise ConfigError(
        f"target: found {type(target).__name__}, wanted tersor.Target(...) or a text such as '2x'"
    )


def _checked(name: str, value: object) -> float:
    if isinstance(value, str):
        dimension, number = parse_quantity(value)
        if dimension not in ("number", *_DIMENSIONS[name]):
            wanted = " or ".join(_DIMENSIONS[name]) or "a plain number"
            raise TargetError(f"{name}={value!r}: found a {dimension}, wanted {wanted}")
    elif isinstance(value, bool) or not isinstance(value, Real):  # NumPy's, too
        raise TargetError(f"{name}={value!r}: wanted a number or a text such as '2x'")
    else:
        try:
            number = float(value)
        except OverflowError:  # a whole number beyond what a float holds
            number = math.inf
    if not math.isfinite(number):
        raise TargetError(f"{name}={number}: wanted a finite number")
    _check_range(name, number)
    return number


def _check_range(name: str, number: float) -> None:
    if name in ("speedup", "size_ratio") and number < 1:
        raise TargetError(
            f"{name}={number:g} contradicts the promise that a result is never worse; "
            "wanted at least 1"
        )
    if name in ("latency_ms", "size_mb", "peak_mb") and number <= 0:
        raise TargetError(f"{name}={number:g}: wanted more than 0")
    if name == "drop_points" and not 0 <= number <= 100:
        raise TargetError(f"drop_points={number:g}: wanted 0 to 100 points")
    if name == "min_agreement" and not 0 <= number <= 1:
        raise TargetError(f"min_agreement={number:g}: wanted a fraction from 0 to 1")
