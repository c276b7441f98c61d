"""What tuning a step may spend, how it decides, and what it found: plain values."""

import math
from dataclasses import dataclass
from typing import Literal

from tersor.core.errors import ConfigError

MIN_BLOCK = 20  # steps: fewer show the clock's noise, not the step's time
MIN_ROUNDS = 3  # of the timing protocol
MIN_SEEDS = 3  # two show one difference, which may be small by chance
_END_PART = 5  # the last fifth of a run is its end


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeRule:
    """When a switch counts as faster.

    Args:
        gain: Least share by which steps have to become faster; 0.03 is 3 %.
        block: Steps of one side before the other has its turn; at least 20.
        rounds: Turns of each side; at least 3. Fewer are made where three tell enough.

    Raises:
        ConfigError: A value out of its range.
    """

    gain: float = 0.03
    block: int = MIN_BLOCK
    rounds: int = 5

    def __post_init__(self) -> None:
        if not 0 <= self.gain < 1:
            raise ConfigError(
                f"time_rule: found gain={self.gain}, wanted a share from 0 to below 1"
            )
        if self.block < MIN_BLOCK:
            raise ConfigError(f"time_rule: found block={self.block}, wanted at least {MIN_BLOCK}")
        if self.rounds < MIN_ROUNDS:
            raise ConfigError(
                f"time_rule: found rounds={self.rounds}, wanted at least {MIN_ROUNDS}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class LossRule:
    """When a switch counts as harmless to the loss.

    The plain step runs ``steps`` steps once for every seed, each with its own order of the batches
    and its own random numbers. A switch runs those of the first seed. Its mean loss, over the run and
    over the last fifth of it, may differ from that of the plain run of the same seed by no more
    than two seeds of the plain step differ among themselves.

    Args:
        steps: Of one run; at least 10.
        seeds: Runs of the plain step; at least 3.
        tolerance: Difference, as a share of the loss, that is always allowed: where all seeds see the
            same (one batch, no random numbers) they have no spread, and rounding has.

    Raises:
        ConfigError: A value out of its range.
    """

    steps: int = 50
    seeds: int = 5
    tolerance: float = 1e-4

    def __post_init__(self) -> None:
        if self.steps < 2 * _END_PART:
            raise ConfigError(
                f"loss_rule: found steps={self.steps}, wanted at least {2 * _END_PART}"
            )
        if self.seeds < MIN_SEEDS:
            raise ConfigError(f"loss_rule: found seeds={self.seeds}, wanted at least {MIN_SEEDS}")
        if not 0 <= self.tolerance < 1:
            raise ConfigError(
                f"loss_rule: found tolerance={self.tolerance}, wanted a share from 0 to below 1"
            )

    @property
    def end(self) -> int:
        """Steps of the run's last part."""
        return max(1, self.steps // _END_PART)


CheckKind = Literal["seed spread", "same batches", "by name"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LossCheck:
    """What a switch does to the loss.

    Attributes:
        kind: "seed spread": by runs, see ``LossRule``; "same batches": its batches were compared bit
            by bit, the rest of the step is the same; "by name": it changes convergence and the
            caller asked for it, so that its loss is shown and not judged.
        is_ok: Whether it may stay.
        mean, plain_mean: Mean loss of the run; NaN where none was made.
        end, plain_end: Mean loss of its last fifth.
        allowed_mean, allowed_end: Differences that are allowed.
    """

    kind: CheckKind
    is_ok: bool
    mean: float = float("nan")
    plain_mean: float = float("nan")
    end: float = float("nan")
    plain_end: float = float("nan")
    allowed_mean: float = float("nan")
    allowed_end: float = float("nan")

    def describe(self) -> str:
        """A few words for people."""
        if self.kind == "same batches":
            return "batches are equal bit for bit" if self.is_ok else "batches differ"
        text = f"loss {self.mean:.4g} beside {self.plain_mean:.4g}"
        if self.kind == "by name":
            return f"{text}, not judged: it changes convergence"
        text += f" (+- {self.allowed_mean:.2g} allowed), at the end {self.end:.4g} beside "
        return f"{text}{self.plain_end:.4g} (+- {self.allowed_end:.2g})"


@dataclass(frozen=True, slots=True, kw_only=True)
class SwitchReport:
    """One switch: what was tried, what was found and what was decided.

    Attributes:
        name: As in ``switches=[...]``.
        choice: Which of several, as "2 threads" or "foreach"; "" where there is one.
        is_tried: Whether steps were made with it.
        is_on: Whether the returned step has it.
        why: The reason, in words.
        speedup, low, high: Time of a step without it / with it, both sides interleaved, and the 95 %
            bounds; None where it was not timed. Bounds are None after a first look that was enough.
        noise: How much that ratio spreads from turn to turn, as a share of it.
        loss: What it does to the loss; None where that was not looked at.
        seconds: What it took to get ready (compiling, recording), beyond the steps themselves.
        break_even_steps: Steps until that time is saved; None where it does not save any.
    """

    name: str
    choice: str = ""
    is_tried: bool = False
    is_on: bool = False
    why: str
    speedup: float | None = None
    low: float | None = None
    high: float | None = None
    noise: float | None = None
    loss: LossCheck | None = None
    seconds: float = 0.0
    break_even_steps: int | None = None

    @property
    def label(self) -> str:
        """Name and choice."""
        return f"{self.name} ({self.choice})" if self.choice else self.name

    def describe(self) -> str:
        """One line for people."""
        state = "on " if self.is_on else "off"
        return f"{state} {self.label}: {self.why}"


@dataclass(frozen=True, slots=True, kw_only=True)
class TuneReport:
    """What ``tune`` measured and chose.

    Attributes:
        device: Where the step runs, as "cpu" or "cuda:0".
        device_name: The processor or the card.
        torch: Its version.
        threads: Of the plain step (on a CPU).
        batch: Shapes and types of a batch.
        steps: Length of the coming run, as the caller said; None: unknown.
        plain_ms, tuned_ms: Time of a step, its batch included, before and after; both from the last,
            interleaved measurement. They are equal where nothing is on.
        speedup, low, high: Their ratio and its 95 % bounds.
        switches: In the order in which they were decided.
        notes: What else a reader should know.
        seconds: All of the tuning.
        steps_made: Training steps that tuning made; all were undone.
        seed: Of orders and random numbers.
        time_rule, loss_rule: How it was decided.
    """

    device: str
    device_name: str
    torch: str
    threads: int
    batch: str
    steps: int | None
    plain_ms: float
    tuned_ms: float
    speedup: float = 1.0
    low: float = 1.0
    high: float = 1.0
    switches: tuple[SwitchReport, ...] = ()
    notes: tuple[str, ...] = ()
    seconds: float = 0.0
    steps_made: int = 0
    seed: int = 0
    time_rule: TimeRule = TimeRule()
    loss_rule: LossRule = LossRule()

    @property
    def on(self) -> tuple[SwitchReport, ...]:
        """The switches that are on."""
        return tuple(s for s in self.switches if s.is_on)

    @property
    def break_even_steps(self) -> int | None:
        """Steps until the whole tuning has saved its own time; None where it does not save any."""
        return steps_to_save(self.seconds, (self.plain_ms - self.tuned_ms) / 1e3)

    def lines(self) -> tuple[str, ...]:
        """For people: a line a switch, then the sum."""
        total = f"{self.plain_ms:.2f} -> {self.tuned_ms:.2f} ms a step on {self.device_name}"
        if self.on:
            total += f": {self.speedup:.2f}x ({self.low:.2f} to {self.high:.2f})"
        else:
            total += ": nothing is on, the step is as it was"
        total += f"; tuning took {self.seconds:.0f} s"
        if self.break_even_steps is not None:
            total += f", saved after {self.break_even_steps} steps"
        return (*(s.describe() for s in self.switches), *self.notes, total)


def steps_to_save(seconds: float, saved_seconds: float) -> int | None:
    """Steps after which a time is saved, at so much saved a step; None where nothing is."""
    if not saved_seconds > 0:
        return None
    return math.ceil(seconds / saved_seconds)
