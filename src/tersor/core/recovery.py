"""What the caller allows for recovery, and what it did: plain values."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from tersor.core.data import Data
from tersor.core.errors import ConfigError

_MOST_SECONDS = 86400.0
_SECONDS = 60.0  # that recovery takes where nothing else is said
_HOTTEST = 20.0  # beyond, divergences are those of the logits' squared differences
_GOALS = ("outputs", "features")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recover:
    """Train what compression has left towards the original's own outputs; labels only if a loss is given.

    Args:
        seconds: Wall-clock time for all gradient steps of one result. How many steps fit in depends
            on the machine; the report says how many were made.
        steps: Steps of each part in place of a time: the same numbers on every run.
        rate: Size of a full step of a block, relative to the root mean square of the tensor that it
            changes; steps of all blocks together are a quarter as large, and steps that only hurt
            become smaller.
        batch: Samples of one step.
        whole: Share of the budget for training all blocks together after each by itself, 0 to 1.
        minutes: In place of seconds.
        data: More inputs for training all blocks together, as for ``tersor.compress``: an iterable, or
            ``tersor.Data(iterable, to_inputs=...)``. None: the calibration part.
        loss: Takes the model's outputs and an item of ``data``, and returns a scalar: labels have half of
            the say, the original's outputs the other half.
        towards: What all blocks together are trained towards: the original's "outputs", or its
            "features", the largest values behind the last layer but one, in front of any pooling.
            What is kept is decided by the outputs either way.
        temperature: Of outputs that are logits: T^2 times the divergence of the softmax of logits / T,
            1 to 20. 2 to 4 gives the classes that are not right more of a say.

    Raises:
        ConfigError: A value out of its range.
    """

    seconds: float = _SECONDS
    steps: int | None = None
    rate: float = 0.02
    batch: int = 64
    whole: float = 0.5
    minutes: float | None = None
    data: Any = None
    loss: Callable[[Any, Any], Any] | None = None
    towards: str = "outputs"
    temperature: float = 1.0

    def __post_init__(self) -> None:
        self._check_numbers()
        self._take_minutes()
        self._check_data()
        if not 0 < self.seconds <= _MOST_SECONDS:
            raise ConfigError(
                f"recover: found seconds={self.seconds}, wanted more than 0 and at most "
                f"{_MOST_SECONDS:.0f}; recover=None leaves it out"
            )
        if self.steps is not None and (type(self.steps) is not int or self.steps < 1):
            raise ConfigError(
                f"recover: found steps={self.steps!r}, wanted a whole number of at least 1, or None "
                "to go by seconds"
            )
        if not 0 < self.rate <= 1:
            raise ConfigError(f"recover: found rate={self.rate}, wanted more than 0 and at most 1")
        if type(self.batch) is not int or self.batch < 1:
            raise ConfigError(
                f"recover: found batch={self.batch!r}, wanted a whole number of at least 1"
            )
        if not 0 <= self.whole <= 1:
            raise ConfigError(f"recover: found whole={self.whole}, wanted a share from 0 to 1")
        self._check_goal()

    def _check_numbers(self) -> None:
        """Types, before anything is compared or multiplied."""
        for name in ("seconds", "minutes", "rate", "whole", "temperature"):
            value = getattr(self, name)
            if name == "minutes" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ConfigError(
                    f"recover: found {name}={value!r}, wanted a number; leave it out for the default"
                )

    def _check_data(self) -> None:
        if not (self.data is None or isinstance(self.data, Data) or _is_many(self.data)):
            raise ConfigError(
                f"recover: found data={self.data!r}, wanted an iterable of inputs (a DataLoader is one), "
                "tersor.Data(iterable, to_inputs=...), or None for the calibration part"
            )
        if not (self.loss is None or callable(self.loss)):
            raise ConfigError(
                f"recover: found loss={self.loss!r}, wanted a function loss(outputs, item) that returns a "
                "scalar tensor, or None"
            )
        if self.loss is not None and self.data is None:
            raise ConfigError(
                "recover: found a loss without data; give data=tersor.Data(loader, to_inputs=...) whose "
                "items hold what the loss needs"
            )

    def _check_goal(self) -> None:
        if self.towards not in _GOALS:
            raise ConfigError(
                f"recover: found towards={self.towards!r}, wanted one of {', '.join(_GOALS)}"
            )
        if not 1 <= self.temperature <= _HOTTEST:
            raise ConfigError(
                f"recover: found temperature={self.temperature}, wanted 1 to {_HOTTEST:.0f}"
            )

    def _take_minutes(self) -> None:
        if self.minutes is None:
            return
        if self.seconds != _SECONDS:
            raise ConfigError("recover: found seconds and minutes, wanted one of them")
        object.__setattr__(self, "seconds", 60.0 * self.minutes)
        object.__setattr__(self, "minutes", None)

    def budget(self) -> "Recover":
        """The same without data and loss: plain values, which keys and records are made of."""
        return replace(self, data=None, loss=None)


def _is_many(data: Any) -> bool:
    """Whether items can be had of it one by one; those of a text are none."""
    each = getattr(data, "__iter__", getattr(data, "__getitem__", None))
    return callable(each) and not isinstance(data, str | bytes)


Part = Literal["moments", "block", "whole"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PartRecovery:
    """One block, or all of them together.

    Attributes:
        part: "moments" for means and deviations of channels, which are set back without gradient
            steps; "block", or "whole" for all that can be trained.
        name: The node that the block ends with; several are joined by commas. Of moments what was
            kept: "means", "means and deviations", or nothing.
        ops: Its linear maps and convolutions, by node.
        steps: Gradient steps that were made.
        before, after: The loss on samples that no step read: of a block the squared difference of
            its outputs over their variance, of the whole and of moments the error of the model's
            outputs. ``after`` is never above ``before``: what did not help was undone.
        restarts: How often it went back to the best so far, with steps a quarter as large.
        is_mean: What stayed is the exponential mean of the tensors.
    """

    part: Part
    name: str
    ops: tuple[str, ...]
    steps: int
    before: float
    after: float
    restarts: int = 0
    is_mean: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovery:
    """What recovery did to one graph.

    Attributes:
        what: "weights" of a graph without rounded weights, or "rounded" ones, whose codes and bits
            stay: their scales, and biases.
        parts: Moments, blocks front to back, then the whole; empty where nothing could be trained.
        seconds: Wall-clock time that it took.
        samples, held_out: Calibration samples that steps were made on, and that they were checked on.
        before, after: Mean error of the outputs on the held-out samples, as errors of candidates are
            measured. ``after`` is never above ``before``.
        search_before, search_after: The loss on the search part; None where it was not measured.
        is_kept: Whether the result has the trained tensors; else it has those from before.
        reason: Why nothing was trained or kept; "" otherwise.
    """

    what: Literal["weights", "rounded"]
    parts: tuple[PartRecovery, ...] = ()
    seconds: float = 0.0
    samples: int = 0
    held_out: int = 0
    before: float = 0.0
    after: float = 0.0
    search_before: float | None = None
    search_after: float | None = None
    is_kept: bool = False
    reason: str = ""

    @property
    def steps(self) -> int:
        """Gradient steps of all parts."""
        return sum(part.steps for part in self.parts)

    def describe(self) -> str:
        """One line for people."""
        what = "weights" if self.what == "weights" else "scales and biases of rounded weights"
        if not self.parts:
            return f"recovery: {what}: nothing was trained: {self.reason}"
        text = (
            f"recovery: {what}: {self.steps} steps on {len(self.parts)} parts in "
            f"{self.seconds:.0f} s, error on {self.held_out} samples that no step read "
            f"{self.before:.4g} -> {self.after:.4g}"
        )
        if self.search_before is not None and self.search_after is not None:
            losses = f"{self.search_before:.4g} -> {self.search_after:.4g}"
            text += f", loss on the search part {losses}"
        return text if self.is_kept else f"{text}; not kept: {self.reason}"
