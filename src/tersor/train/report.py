"""What a run of compress-while-training did: plain values."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from tersor.train.factoring import Factored
from tersor.train.groups import Group, Held
from tersor.train.pricing import Measured
from tersor.train.rounding import Rounded


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """One group: how many units it had, and how many it has."""

    group: str
    units: int
    kept: int


def kept_of(groups: Mapping[str, Group], kept: Mapping[str, Tensor]) -> tuple[Kept, ...]:
    """Every group; one without indices of those that stay is whole."""
    return tuple(
        Kept(group=n, units=g.units, kept=len(kept[n]) if n in kept else g.units)
        for n, g in groups.items()
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Of a finished run.

    Attributes:
        algorithm: How the units were chosen.
        steps: Of the optimizer, skipped ones left out.
        shrunk_at: Step after which the model was cut; None: it lost nothing.
        groups: Every group that may shrink.
        held: Widths that stayed whole, and why.
        difference: Largest difference of the outputs between zeroed and cut, of their scale; of pairs root
            mean square before and after, of the outputs'.
        parameters_before, parameters_after: Elements of all parameters.
        predicted_ms: Of one call of the counts, by prices; None where the counts were given.
        measured: The small model beside the dense one on the device; None where counts were given.
        validated: What ``validate`` gave for the small model.
        hook_share: Share of the time between steps that was spent in hooks, looks included.
        rate_share: Learning rate at the cut, of its peak.
        notes: What a reader should know.
        rounded: Layers whose weights lie on a grid of few bits.
        factored: Layers that can be pairs: their ranks, or why they are whole.
    """

    algorithm: str
    steps: int
    shrunk_at: int | None
    groups: tuple[Kept, ...]
    held: tuple[Held, ...]
    difference: float
    parameters_before: int
    parameters_after: int
    predicted_ms: float | None
    measured: Measured | None
    validated: float | None
    hook_share: float
    rate_share: float
    notes: tuple[str, ...] = ()
    rounded: tuple[Rounded, ...] = ()
    factored: tuple[Factored, ...] = ()

    def counts(self) -> Mapping[str, int]:
        """Group -> units that it has now."""
        return {row.group: row.kept for row in self.groups}

    def ranks(self) -> Mapping[str, int]:
        """Layer that has become a pair -> its rank."""
        return {row.layer: row.rank for row in self.factored if row.rank}

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)

    def describe(self) -> str:
        """A few lines."""
        counted = f"{self.parameters_before} parameters to {self.parameters_after}"
        lines = [*self._structure(counted)]
        if self.measured is not None:
            m = self.measured
            lines.append(
                f"{m.build}: {m.dense.median_ms:.3f} ms to {m.small.median_ms:.3f} ms, "
                f"{m.speedup.value:.2f}x [{m.speedup.low:.2f}, {m.speedup.high:.2f}]"
            )
        if self.rounded:
            kinds = sorted({row.bits for row in self.rounded}, reverse=True)
            weights = sum(row.weights for row in self.rounded)
            lines.append(
                f"{weights} weights of {len(self.rounded)} layers on a grid of {', '.join(map(str, kinds))} bits"
            )
        return "\n".join((*lines, *self.notes))

    def _structure(self, counted: str) -> tuple[str, str]:
        if self.algorithm == "spectral":
            return (
                f"{len(self.ranks())} of {len(self.factored)} layers are pairs, {counted}",
                f"that changed the outputs by {self.difference:.1e} of their size",
            )
        cut = [row for row in self.groups if row.kept < row.units]
        return (
            f"{len(cut)} of {len(self.groups)} widths cut, {counted}",
            f"cutting changed the outputs by {self.difference:.1e} of their scale",
        )
