"""The one timing protocol, over callables."""

from tersor.timing.protocol import (
    SYSTEM_CLOCK,
    Clock,
    Protocol,
    Ratio,
    measure,
    noise,
    ratio,
)

__all__ = ["SYSTEM_CLOCK", "Clock", "Protocol", "Ratio", "measure", "noise", "ratio"]
