"""What ``attach`` has found out about a run in which layers become pairs."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import nn
from torch.optim import Optimizer

from tersor.core.errors import ConfigError
from tersor.train.factorable import Layers
from tersor.train.probe import Probe
from tersor.train.rank_planning import RankPlanner
from tersor.train.schedule import Schedule


@dataclass(frozen=True, slots=True, kw_only=True)
class SpectralParts:
    """Of one run.

    Attributes:
        outer: The model as the caller has it, wrapped or not.
        model: The plain module inside.
        layers: That can be replaced.
        names: Of those that are looked at: all, or those of ``counts``.
        shapes: Layer -> outputs and inputs: what a checkpoint has to agree with.
        parameters: Elements of all parameters before.
        planner: Of the target; None where the ranks are given.
        counts: Layer -> rank, where they are given.
        rescue: Folder of the last sound state; None: none is written.
    """

    outer: nn.Module
    model: nn.Module
    optimizer: Optimizer
    layers: Layers
    names: tuple[str, ...]
    shapes: Mapping[str, str]
    parameters: int
    probe: Probe
    schedule: Schedule
    planner: RankPlanner | None
    counts: Mapping[str, int] | None
    rescue: Path | None = None


def shapes_of(layers: Layers) -> dict[str, str]:
    """Layer -> its sizes as text."""
    return {
        n: "x".join(map(str, (layer.sizes.outputs, layer.sizes.inputs, *layer.kernel)))
        for n, layer in layers.by_name.items()
    }


def check_ranks(counts: Mapping[str, int], layers: Layers) -> None:
    """Refuse ranks that no pair has.

    Raises:
        ConfigError: A layer that can't be replaced, or a rank out of its range.
    """
    if not counts:
        raise ConfigError(
            "counts: found none, wanted {layer: rank} for algorithm='spectral'; layers that can become pairs: "
            f"{', '.join(list(layers.by_name)[:8])}"
        )
    for name, rank in counts.items():
        why = layers.why_not(name)
        if why is not None:
            raise ConfigError(
                f"counts: {name!r} can't become a pair: {why}; there are "
                f"{', '.join(list(layers.by_name)[:8])}"
            )
        most = layers.by_name[name].most
        if type(rank) is not int or not 1 <= rank <= most:
            raise ConfigError(
                f"counts: {name}: found rank {rank!r}, wanted 1 to {most}: above that no pair is smaller than "
                "the layer"
            )
