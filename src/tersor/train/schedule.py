"""When units die: nothing at first, all that have to by a given share of the run, most of them early."""

import math
from dataclasses import dataclass
from numbers import Real

from tersor.core.errors import ConfigError

_BEGIN, _END = 0.05, 0.40  # of the window, where nothing else is said
FEWEST_LOOKS = 4  # between the begin and the end: fewer would be a one-shot cut


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """Of a run of ``total_steps`` steps of the optimizer.

    The count of dead units grows as 1 - (1 - tau)^3, tau from 0 to 1 between begin and end: most of them
    early, when there is time left to make up for them.

    Args:
        total_steps: Steps of the optimizer in the whole run.
        begin: Share of the run before any unit dies.
        end: Share of the run at which all have, and the model shrinks.
        every: Steps between two looks at the scores.
        hard: Share of the run at which weights of few bits (``attach(bits=...)``) lie on their grid.
        epoch: Steps in which stable ranks have to change by less than 2 % (``algorithm="spectral"``); None:
            a twentieth of the run.

    Raises:
        ConfigError: A value out of its range, or a run too short for four looks.

    Source: Zhu and Gupta 2017, arXiv:1710.01878, eq. 1 (the cube).
    """

    total_steps: int
    begin: float = _BEGIN
    end: float = _END
    every: int = 20
    hard: float = 0.90
    epoch: int | None = None

    def __post_init__(self) -> None:
        if type(self.total_steps) is not int or self.total_steps < 1:
            raise ConfigError(
                f"total_steps: found {self.total_steps!r}, wanted the number of the optimizer's steps, "
                "a whole number of at least 1: epochs * batches // accumulation"
            )
        self._check_shares()
        if self.epoch is not None and (type(self.epoch) is not int or self.epoch < 1):
            raise ConfigError(
                f"schedule: found epoch={self.epoch!r}, wanted at least 1 step, or None"
            )
        if type(self.every) is not int or self.every < 1:
            raise ConfigError(f"schedule: found every={self.every!r}, wanted at least 1 step")
        self._check_looks()

    def _check_shares(self) -> None:
        for name in ("begin", "end", "hard"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, Real):
                raise ConfigError(
                    f"schedule: found {name}={value!r}, wanted a share of the run, a number from 0 to 1"
                )
        if not (0 <= self.begin < self.end <= 1):
            raise ConfigError(
                f"schedule: found begin={self.begin}, end={self.end}; wanted 0 <= begin < end <= 1"
            )
        if not 0 < self.hard <= 1:
            raise ConfigError(f"schedule: found hard={self.hard}, wanted more than 0, at most 1")

    def _check_looks(self) -> None:
        looks = max(0, self.last - self.first) // self.every
        if looks < FEWEST_LOOKS:
            least = math.ceil((FEWEST_LOOKS + 1) * self.every / (self.end - self.begin))
            raise ConfigError(
                f"total_steps={self.total_steps} is too small: {looks} looks at the scores between "
                f"{self.begin:.0%} and {self.end:.0%} of the run, wanted {FEWEST_LOOKS}; train for "
                f"{least} steps{self._way_out()}"
            )

    def _way_out(self) -> str:
        """A schedule that fits the steps that there are: closer looks, else a wider window."""
        head = f"schedule=tersor.train.Schedule(total_steps={self.total_steps}"
        every = (self.last - self.first) // FEWEST_LOOKS
        if every >= 1:
            is_usual = (self.begin, self.end) == (_BEGIN, _END)
            shares = "" if is_usual else f", begin={self.begin}, end={self.end}"
            return f", or give {head}{shares}, every={every})"
        every = self.total_steps // FEWEST_LOOKS
        if every >= 1:
            return f", or give a wider window: {head}, begin=0.0, end=1.0, every={every})"
        return ""

    @property
    def first(self) -> int:
        """Steps that are done when the first units may die."""
        return math.ceil(self.begin * self.total_steps)

    @property
    def last(self) -> int:
        """Steps that are done when all have."""
        return math.floor(self.end * self.total_steps)

    @property
    def hard_step(self) -> int:
        """Steps that are done when weights of few bits lie on their grid."""
        return math.floor(self.hard * self.total_steps)

    @property
    def epoch_steps(self) -> int:
        """Steps in which stable ranks have to settle."""
        return max(1, self.total_steps // 20) if self.epoch is None else self.epoch

    def share(self, step: int) -> float:
        """Share of the units that have to go which are dead after so many steps."""
        tau = (step - self.first) / max(1, self.last - self.first)
        return float(1 - (1 - min(1.0, max(0.0, tau))) ** 3)

    def dead(self, step: int, units: int, keep: int) -> int:
        """How many of a group's units are dead after so many steps."""
        return round((units - keep) * self.share(step))

    def is_look(self, step: int) -> bool:
        """Whether scores are read at the step that ends as the ``step``-th."""
        return step % self.every == 0 or step == self.last
