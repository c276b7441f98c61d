"""What was measured of one whole build."""

from collections.abc import Mapping
from dataclasses import dataclass

from tersor.core.records import Level


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """One whole build as measured: node times by name, and the latency of a call."""

    assignment: Mapping[str, Level]
    node_ms: Mapping[str, float]
    measured_ms: float
    held_out: bool = False
