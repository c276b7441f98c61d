"""How one call works together with the other processes of a ``torch.distributed`` job: plain values."""

import math
from dataclasses import dataclass

from tersor.core.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """What a call does where a ``torch.distributed`` process group is there; without one, nothing.

    Args:
        join: Share the work with all ranks of the default group, each of which makes the same call.
            False: this process works by itself, as for a call that other ranks don't make.
        timeout_s: Seconds without a word from another rank after which it is given up. A rank whose
            process ends is noticed at once. Longer than the longest step that one rank makes while
            the others wait: one part of a recovery, one search of a plan.

    Raises:
        ConfigError: A time that is not positive.
    """

    join: bool = True
    timeout_s: float = 1800.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.timeout_s) and self.timeout_s > 0):
            raise ConfigError(
                f"ranks: found timeout_s={self.timeout_s}, wanted a number of seconds above 0"
            )
