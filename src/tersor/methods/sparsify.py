"""Weights of which a share is zero, for storage: one bit says which, the others take 8 bits each.

Which weights go is chosen for the layer as a whole by ADMM on its own statistics (``ops.admm``), the
others are refitted on what stays, and rounded with error feedback that leaves zeros alone; the bias
takes up the mean of what is left. Given statistics of a compressed prefix, the weight is first
refitted to the original layer's outputs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from tersor.core.errors import ConfigError
from tersor.core.packing import FLOAT_BITS, Packing
from tersor.core.records import Candidate, Level, Site
from tersor.graph.contracts import MethodKind, SiteChange, SiteStatistics
from tersor.graph.storing import Aim, aim_of, stored_bytes, stored_change, worth_packing
from tersor.ops.admm import choose_support
from tersor.ops.group_rounding import RoundingConfig
from tersor.ops.low_bits import DRAFT, rounded_low
from tersor.ops.packed import Packed
from tersor.ops.sparsity import Unstructured, best_mask, eliminate, magnitude_scores
from tersor.ops.storing import grid_of, kept_of, pack_nearest, pack_sparse
from tersor.ops.support import refit_support

ZEROS: Mapping[Level, float] = {
    "sparse50_weight": 0.5,
    "sparse70_weight": 0.7,
    "sparse90_weight": 0.9,
}
# Of the refit's gradient; the loss is then within 1e-3 of its least one, and rounding follows.
REFIT_TOLERANCE = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class Sparsify:
    """Shares of zeros of one weight, as a ``Method``.

    Args:
        bits: Of a kept weight: 2..8 on a grid with a step an output, 32 for float32.
        damping: Of the choice and of error feedback, relative to the mean diagonal of H.
        steps: Of ADMM at most.
    """

    kinds: ClassVar[tuple[MethodKind, ...]] = ("format",)
    for_size: ClassVar[bool] = True  # a plan without packed levels does not need it
    by_name: ClassVar[bool] = True  # not part of "all": a first look at a layer takes seconds
    bits: int = 8
    damping: float = 1e-2
    steps: int = 100

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8 and self.bits != FLOAT_BITS:
            raise ConfigError(f"bits: found {self.bits}, wanted 2..8 or {FLOAT_BITS}")

    def propose(self, site: Site, statistics: SiteStatistics) -> Sequence[Candidate]:
        """One candidate a share of zeros."""
        if not worth_packing(statistics):
            return []
        return [
            Candidate(
                site=site.name,
                level=level,
                method="sparsify",
                size_bytes=stored_bytes(site, self._packing(site, level, self.bits).size_bytes()),
                detail={"bits": self.bits},
            )
            for level in ZEROS
        ]

    def apply(self, site: Site, candidate: Candidate, statistics: SiteStatistics) -> SiteChange:
        """The change for the current weight and statistics.

        Raises:
            ConfigError: A level that this method does not have.
        """
        if candidate.level not in ZEROS:
            raise ConfigError(f"{site.name}: sparsify has no level {candidate.level!r}")
        bits = int(candidate.detail.get("bits", self.bits))
        packing = self._packing(site, candidate.level, bits)
        aim = aim_of(site, statistics)
        packed = self._packed(packing, aim)
        return stored_change(site, candidate.level, packed, (aim, statistics))

    def _packing(self, site: Site, level: Level, bits: int) -> Packing:
        kept = kept_of(site.shape, ZEROS[level])
        return Packing(kind="sparse", shape=site.shape, bits=bits, kept=kept)

    def _packed(self, packing: Packing, aim: Aim) -> Packed:
        if aim.metric is None:
            return pack_nearest(aim.target, packing)
        keep, weight = self._kept(packing, aim, aim.metric)
        if packing.bits == FLOAT_BITS:
            return pack_sparse(packing, keep, weight, None)
        config = DRAFT if aim.is_draft else RoundingConfig.for_layer(*weight.shape[1:])
        config = replace(config, damping=self.damping)
        codes, steps = rounded_low(weight, aim.metric, grid_of(packing), config, keep)
        return pack_sparse(packing, keep, codes, steps)

    def _kept(self, packing: Packing, aim: Aim, metric: Tensor) -> tuple[Tensor, Tensor]:
        """Which weights stay, and what they are: in one pass over the columns, or at leisure."""
        pattern = Unstructured(kept=packing.kept / aim.target.numel())
        if aim.is_draft:
            done = eliminate(aim.target, metric, pattern, damping=self.damping)
            # It keeps a share of every block of columns, whose sum may be a few weights off.
            keep = best_mask(magnitude_scores(done.weight), pattern)
            return keep, done.weight * keep
        found = choose_support(aim.target, metric, pattern, damping=self.damping, steps=self.steps)
        fitted = refit_support(
            aim.target,
            metric,
            found.keep,
            damping=self.damping,
            direct=False,  # one factorisation an output takes ten times as long
            tolerance=REFIT_TOLERANCE,
        )
        return found.keep, fitted.weight


__all__ = ["Sparsify"]
