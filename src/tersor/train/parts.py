"""What ``attach`` has found out about a run, for those that carry it out."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn
from torch.optim import Optimizer

from tersor.train.planning import Planner
from tersor.train.probe import Probe
from tersor.train.rounding import Rounding
from tersor.train.schedule import Schedule
from tersor.train.sharding import Shard
from tersor.train.structure import Structure


@dataclass(frozen=True, slots=True)
class Parts:
    """Of one run.

    Attributes:
        outer: The model as the caller has it, wrapped or not.
        model: The plain module inside.
        planner: Of the target; None where the counts are given.
        counts: Group -> units to keep, where they are given.
        algorithm: How units die.
        rounding: Weights that are to have few bits, if any.
        rescue: Folder of the last sound state; None: none is written.
        shard: Shards a plain model as the caller's is; None where it is not sharded.
    """

    outer: nn.Module
    model: nn.Module
    optimizer: Optimizer
    structure: Structure
    probe: Probe
    schedule: Schedule
    planner: Planner | None
    counts: Mapping[str, int] | None
    algorithm: str = "regrow"
    rescue: Path | None = None
    rounding: Rounding = field(default_factory=Rounding)
    shard: Shard | None = None
