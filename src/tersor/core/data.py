"""What the caller gives beside the model: representative inputs, and a metric."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from tersor.core.errors import ConfigError, DataError
from tersor.core.records import OutputKind

Split = Literal["calibration", "search", "test"]
SPLITS: tuple[Split, ...] = ("calibration", "search", "test")
RESERVOIR = 4096  # samples kept of a longer stream
MOST_READ = 16 * RESERVOIR  # samples that are looked at: a stream may be endless, or take hours
FRACTIONS = (0.6, 0.2, 0.2)
ENOUGH_TEST_SAMPLES = 30  # below, a verdict on quality says "unknown"


@dataclass(frozen=True, slots=True)
class Data:
    """Representative inputs, whole or already split.

    Args:
        iterable: Inputs of the model, one batch an item: a tensor, a tuple of positional
            arguments or a dict of keyword arguments. Split 60/20/20 by sample and seed. Of a long
            stream, 4,096 of the first 65,536 samples are kept: shuffle what lies in some order.
        to_inputs: Turns an item into inputs, for example ``lambda batch: batch[0]`` for a loader
            that also yields labels.
        calibration: Inputs for the statistics; with ``search`` and ``test`` in place of
            ``iterable``.
        search: Inputs for errors and for choosing.
        test: Inputs for the verdict, used once.
        output: Geometry of the outputs: "logits" (equal top-1), "embedding" (mean cosine) or
            "values" (1 - normalised squared error). None: inferred, with a warning.

    Raises:
        ConfigError: Both or neither of ``iterable`` and the three parts.
    """

    iterable: Iterable[Any] | None = None
    to_inputs: Callable[[Any], Any] | None = None
    calibration: Iterable[Any] | None = None
    search: Iterable[Any] | None = None
    test: Iterable[Any] | None = None
    output: OutputKind | None = None

    def __post_init__(self) -> None:
        parts = [getattr(self, name) for name in SPLITS]
        if (self.iterable is None) == all(part is None for part in parts):
            raise ConfigError(
                "tersor.Data: give either one iterable or calibration=, search= and test="
            )
        if self.iterable is None and any(part is None for part in parts):
            missing = [n for n, part in zip(SPLITS, parts, strict=True) if part is None]
            raise ConfigError(
                f"tersor.Data: {', '.join(missing)} missing; give all of {', '.join(SPLITS)}"
            )
        if self.output not in (None, "logits", "embedding", "values"):
            raise ConfigError(
                f"tersor.Data: output={self.output!r}; wanted logits, embedding or values"
            )


@dataclass(frozen=True, slots=True)
class Metric:
    """A metric whose range is not [0, 1].

    Args:
        function: Takes ``predict``, a callable with the model's calling convention, and returns a
            number, higher is better.
        points: What one point of ``drop_points`` is worth in the metric's own unit; 0.01 for a
            fraction in [0, 1].
    """

    function: Callable[[Any], float]
    points: float = 0.01

    def __post_init__(self) -> None:
        if not self.points > 0:
            raise ConfigError(f"tersor.Metric: points={self.points}; wanted more than 0")


def as_data(data: object) -> Data:
    """Take what the caller gave as ``data``.

    Raises:
        DataError: It can't be iterated.
    """
    if isinstance(data, Data):
        return data
    if not isinstance(data, Iterable) or isinstance(data, str | bytes):
        raise DataError(
            f"data: found {type(data).__name__}, wanted an iterable of inputs (a DataLoader is "
            "one), or tersor.Data(...)"
        )
    return Data(data)
